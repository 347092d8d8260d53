"""Reference scores for DPO-like losses: computed once, kept in a file, attached to the groups.

The reference model is only needed for the scores of candidates that never change, so it is loaded,
asked once, and gone before training begins. The alternative, a second model beside the one that is
trained, costs its memory and a forward pass a step.

In a distributed run every process scores its share of the groups.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrank.attention.gate import refusal
from fastrank.data.packing import Group
from fastrank.data.write import atomic_path
from fastrank.errors import InputError
from fastrank.modeling.identity import model_identity
from fastrank.modeling.load import load_model
from fastrank.modeling.prepare import prepare_model
from fastrank.modeling.score import score

#: Groups that are scored before the bar moves: enough to fill packs well.
_PORTION = 256


class ReferenceGroups(Sequence[Group]):
    """Groups with their reference scores, put together when they are asked for.

    Args:
        groups: without reference scores; any sequence.
        scores: float32 [C] of all candidates, group after group.
        sizes: candidates of each group.
    """

    def __init__(self, groups: Sequence[Group], scores: Tensor, sizes: Sequence[int]) -> None:
        self._groups = groups
        self._scores = scores.split(list(sizes))

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...

    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...

    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dataclasses.replace(self._groups[index], reference_scores=self._scores[index])


def with_reference_scores(
    groups: Sequence[Group],
    path: str | Path,
    *,
    normalize: str,
    cache_dir: str | Path | None = None,
    max_tokens: int = 16384,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> ReferenceGroups:
    """The groups with the scores that a reference model gives their candidates.

    Args:
        groups: tokenised candidates, by the reference model's tokenizer.
        path: the reference model, a folder or a Hub name.
        normalize: "sum" or "mean" of a response's token log-probabilities; the loss's own.
        cache_dir: where scores are kept, in a file named after the groups' tokens and the model's
            content; None keeps none.
        max_tokens: of a pack; a larger group gets a pack of its own size.
        dtype: of the reference model's weights.
        device: where it runs.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the model cannot be loaded, or does not go with the groups' tokens.
    """
    sizes = []
    about = f"{model_identity(path)} {normalize} {dtype}"
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for group in groups:
        sizes.append(group.num_candidates)
        for ids in (group.prompt_ids, *group.response_ids):
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    cache = None
    if cache_dir is not None:
        cache = Path(cache_dir) / f"reference-{digest.hexdigest()}.safetensors"
    scores = _read(cache, sum(sizes))
    if not _on_every_process(scores is not None):
        model = load_model(path, dtype, trust_remote_code=trust_remote_code)
        torch.nn.Module.to(model, device)
        prepare_model(model, shared_prompts=refusal(model) is None)
        try:
            scores = _score(model, groups, sizes, normalize, max_tokens)
        except ValueError as error:  # another tokenizer's ids, a group beyond the context, ...
            raise InputError(f"{path}: as reference model: {error}") from error
        del model
        gc.collect()
        if cache is not None and _rank() == 0:
            os.makedirs(cache.parent, exist_ok=True)
            with atomic_path(cache) as file:
                save_file({"scores": scores}, file)
    assert scores is not None
    return ReferenceGroups(groups, scores, sizes)


def _read(cache: Path | None, num_candidates: int) -> Tensor | None:
    """Scores kept earlier; None if there are none, or the file is not what it should be."""
    if cache is None or not cache.is_file():
        return None
    try:
        scores = load_file(cache).get("scores")
    except (SafetensorError, OSError):
        return None
    return scores if scores is not None and scores.shape == (num_candidates,) else None


def _score(
    model: nn.Module,
    groups: Sequence[Group],
    sizes: Sequence[int],
    normalize: str,
    max_tokens: int,
) -> Tensor:
    """float32 [C], every process its share of the groups."""
    from tqdm import tqdm

    rank, world = _rank(), _world()
    mine = range(rank, len(groups), world)
    parts: list[Tensor] = []
    with tqdm(desc="reference scores", unit=" groups", total=len(mine), disable=_bar(rank)) as bar:
        for portion in _portions(mine):
            chosen = [groups[i] for i in portion]
            largest = max(group.num_candidates * group.longest_path for group in chosen)
            parts += score(model, chosen, max_tokens=max(max_tokens, largest), normalize=normalize)
            bar.update(len(portion))
    shares: list[list[Tensor]] = [parts]
    if world > 1:
        shares = [[] for _ in range(world)]
        dist.all_gather_object(shares, parts)
    found = [shares[i % world][i // world] for i in range(len(groups))]
    assert [len(values) for values in found] == list(sizes)
    return torch.cat(found)


def _portions(numbers: range) -> Iterator[range]:
    for start in range(0, len(numbers), _PORTION):
        yield numbers[start : start + _PORTION]


def _bar(rank: int) -> bool | None:
    """tqdm's ``disable``: only on a terminal, and of the first process."""
    return None if rank == 0 else True


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
