"""Reference scores for DPO-like losses: computed once, kept in a file, attached to the groups.

The reference model is only needed for the scores of candidates that never change, so it is loaded,
asked once, and gone before training begins. The alternative, a second model beside the one that is
trained, costs its memory and a forward pass per step.

In a distributed run every process scores its share of the groups; those that hold parts of one
reference model score the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastrank.arguments import Normalize
from fastrank.attention.gate import refusal
from fastrank.console import Bar
from fastrank.data.columns import (
    FlatGroups,
    GroupSizes,
    GroupView,
    flat_parts,
    group_sizes,
    largest_ids,
    prompt_keys,
    response_lengths,
    select,
    tokens_digest,
)
from fastrank.data.packing import Group
from fastrank.data.write import atomic_path
from fastrank.errors import InputError
from fastrank.modeling.mesh import data_share
from fastrank.modeling.prepare import prepare_model, prepared_state, release_model
from fastrank.modeling.pretrained import load_model, model_identity
from fastrank.modeling.score import enough_tokens, score
from fastrank.modeling.unwrap import causal_lm, evaluation_mode

logger = logging.getLogger(__name__)

#: Groups that are scored before the bar moves: enough to fill packs well.
_PORTION = 256


class ReferenceGroups(GroupView):
    """Groups with their reference scores, put together when they are asked for.

    Args:
        groups: without reference scores; any sequence.
        scores: float32 [C] of all candidates, group after group.
        cu_groups: int64 [G+1], offsets of the groups into ``scores``.
        index: int64, the scores' group for each of ``groups``; None: the same.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Tensor,
        cu_groups: NDArray[np.int64],
        index: NDArray[np.int64] | None = None,
    ) -> None:
        self._groups = groups
        self._scores = scores
        self._cu_groups = cu_groups
        self._index = np.arange(len(groups)) if index is None else index

    def __len__(self) -> int:
        return len(self._groups)

    def group_at(self, position: int) -> Group:
        row = int(self._index[position])
        scores = self._scores[self._cu_groups[row] : self._cu_groups[row + 1]]
        return dataclasses.replace(self._groups[position], reference_scores=scores)

    def select(self, index: Iterable[int]) -> ReferenceGroups:
        """The groups at these positions, in this order."""
        chosen = np.fromiter(index, dtype=np.int64)
        groups = select(self._groups, chosen)
        return ReferenceGroups(groups, self._scores, self._cu_groups, self._index[chosen])

    @cached_property
    def sizes(self) -> GroupSizes:
        """See `fastrank.data.columns.group_sizes`."""
        return group_sizes(self._groups)

    def response_lengths(self, position: int) -> NDArray[np.int64]:
        """See `fastrank.data.columns.response_lengths`."""
        return response_lengths(self._groups, position)

    @cached_property
    def largest_ids(self) -> NDArray[np.int64]:
        """See `fastrank.data.columns.largest_ids`."""
        return largest_ids(self._groups)

    @cached_property
    def reference_scores(self) -> Tensor:
        """float32 [C], group after group."""
        bounds = [self._cu_groups[self._index + end].tolist() for end in (0, 1)]
        parts = [self._scores[begin:end] for begin, end in zip(*bounds, strict=True)]
        return torch.cat([self._scores[:0], *parts])

    def flat_parts(self) -> Iterator[FlatGroups]:
        """See `fastrank.data.columns.flat_parts`; reference scores are no part of them."""
        return flat_parts(self._groups)

    @cached_property
    def prompt_keys(self) -> NDArray[np.uint64]:
        """See `fastrank.data.columns.prompt_keys`."""
        return prompt_keys(self._groups)


def with_reference_scores(
    groups: Sequence[Group],
    model: str | Path | nn.Module,
    *,
    normalize: Normalize,
    cache_dir: str | Path | None = None,
    max_tokens: int = 16384,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> ReferenceGroups:
    """The groups with the scores that a reference model gives their candidates.

    Args:
        groups: tokenised candidates, by the reference model's tokenizer.
        model: the reference model, a folder or a Hub name; or a loaded one, whose scores are not
            kept, and which is left on ``device``.
        normalize: how a response's token log-probabilities become a score, as the loss has it.
        cache_dir: where scores are kept, in a file named after the groups' tokens and the model's
            content; None keeps none.
        max_tokens: of a pack; larger groups are scored in parts; a longer prompt
            with its response makes packs that large.
        dtype: of the weights of a model that is loaded here.
        device: where it runs.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the model cannot be loaded, or does not go with the groups' tokens.
    """
    if isinstance(model, nn.Module):
        cache, path = None, "the model"
    else:
        path = str(model)
        about = f"{model_identity(path)} {normalize} {dtype}"
        cache = None if cache_dir is None else Path(cache_dir) / _cache_name(groups, about)
    sizes = group_sizes(groups).num_candidates
    cu_groups = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    scores = _read(cache, int(cu_groups[-1]))
    if not _on_every_process(scores is not None):
        if not isinstance(model, nn.Module):
            model = load_model(path, dtype, trust_remote_code=trust_remote_code)
        if getattr(model, "hf_quantizer", None) is None:  # a quantised one was loaded in its place
            model.to(device)
        try:
            scores = _score(model, groups, normalize, max_tokens)
        except ValueError as error:  # another tokenizer's ids, a group beyond the context, ...
            raise InputError(f"{path}: as reference model: {error}") from error
        if cache is not None and _rank() == 0:
            os.makedirs(cache.parent, exist_ok=True)
            _write(cache, scores)
    assert scores is not None
    return ReferenceGroups(groups, scores, cu_groups)


def _cache_name(groups: Sequence[Group], about: str) -> str:
    digest = hashlib.blake2b(f"{about} {tokens_digest(groups)}".encode(), digest_size=16)
    return f"reference-{digest.hexdigest()}.safetensors"


def _write(cache: Path, scores: Tensor) -> None:
    with atomic_path(cache) as file:
        file.write_bytes(save({"scores": scores, "xxh3": _checksum(scores)}))


def _read(cache: Path | None, num_candidates: int) -> Tensor | None:
    """Scores kept earlier; None if there are none, or the file, which is then said to be damaged,
    is not what was written."""
    if cache is None or not cache.is_file():
        return None
    try:
        kept = load(cache.read_bytes())
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        kept = {}
    scores, checksum = (kept.get(name, torch.empty(0)) for name in ("scores", "xxh3"))
    whole = scores.dtype == torch.float32 and scores.shape == (num_candidates,)
    if whole and _checksum(scores).equal(checksum):
        return scores
    logger.warning("%s is damaged: the reference model is asked again", cache)
    return None


def _checksum(scores: Tensor) -> Tensor:
    """uint8 [16]"""
    from xxhash import xxh3_128

    return torch.tensor(list(xxh3_128(scores.numpy().tobytes()).digest()), dtype=torch.uint8)


def _score(
    model: nn.Module, groups: Sequence[Group], normalize: Normalize, max_tokens: int
) -> Tensor:
    """float32 [C], every process its share of the groups."""
    prepared = prepared_state(model) is not None
    if not prepared:
        with evaluation_mode(model):
            prepare_model(model, shared_prompts=refusal(causal_lm(model)) is None)
    rank, world, together = data_share(model)
    mine = range(rank, len(groups), world)
    parts: list[Tensor] = []
    with Bar(desc="reference scores", unit="groups", total=len(mine), disable=rank > 0) as bar:
        for portion in _portions(mine):
            chosen = [groups[i] for i in portion]
            tokens = enough_tokens(chosen, max_tokens)
            parts += score(model, chosen, max_tokens=tokens, normalize=normalize)
            bar.update(len(portion))
    if not prepared:
        release_model(model)
    shares: list[list[Tensor]] = [parts]
    if world > 1:
        shares = [[] for _ in range(world)]
        dist.all_gather_object(shares, parts, group=together)
    return torch.cat([shares[i % world][i // world] for i in range(len(groups))])


def _portions(numbers: range) -> Iterator[range]:
    for start in range(0, len(numbers), _PORTION):
        yield numbers[start : start + _PORTION]


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _on_every_process(here: bool) -> bool:
    """Whether something holds on every process: they must all score, or none."""
    if _world() == 1:
        return here
    found: list[bool] = [False] * _world()
    dist.all_gather_object(found, here)
    return all(found)
