"""Reference scores for a run whose loss subtracts them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrank.data.cache import default_cache_dir
from fastrank.data.packing import Group
from fastrank.errors import InputError
from fastrank.modeling.pretrained import check_model_path, load_tokenizer
from fastrank.modeling.reference_scores import ReferenceGroups, with_reference_scores
from fastrank.training.config import RankConfig
from fastrank.training.run_options import TrainOptions


def check_reference(options: TrainOptions, config: RankConfig) -> None:
    """Raise `InputError` for a reference model that is not there or that no loss asks for."""
    if options.reference_model is None:
        return
    if not config.ranking_loss.uses_reference:
        raise InputError(
            f"--reference_model is for losses that use a reference, such as dpo, got {config.loss}"
        )
    check_model_path(options.reference_model)


def attach_references(
    splits: Sequence[Sequence[Group]],
    options: TrainOptions,
    config: RankConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sequence[Group]]:
    """The splits as they are, or with reference scores if the loss uses them.

    The reference is ``--reference_model``, or the model that training starts from. Scores of a
    model that has a path are kept in the cache folder.

    Raises:
        InputError: the reference model cannot be loaded, or reads texts by other tokens.
    """
    loss = config.ranking_loss
    if not loss.uses_reference:
        return list(splits)
    # A quantised model's reference is what it computes itself, not the weights it was made of.
    path = options.reference_model or (None if options.quantized else options.model)
    trust = options.trust_remote_code
    if options.reference_model is not None:
        _check_tokens("--reference_model", options.reference_model, tokenizer, trust)
    attach = partial(
        _attach,
        model=model if path is None else path,
        config=config,
        cache_dir=None if options.no_cache else options.cache_dir or default_cache_dir(),
        trust_remote_code=trust,
    )
    return [attach(groups) if len(groups) else groups for groups in splits]


def reference_of(
    ref_model: str | Path | nn.Module | None,
    model: nn.Module,
    config: RankConfig,
    *,
    tokenizer: Any,
) -> str | nn.Module | None:
    """The reference of `RankTrainer`: ``ref_model``, or the model as it is before training, without
    its adapter; None for a loss that uses none.

    Args:
        ref_model: a model, or the name or folder of one.
        model: the model to train.
        config: of the run.
        tokenizer: of the run; None is not checked.

    Raises:
        InputError: the loss uses no reference, or the model is not there or has other tokens.
    """
    if ref_model is None:
        return model if config.ranking_loss.uses_reference else None
    if not config.ranking_loss.uses_reference:
        raise InputError(
            f"ref_model is for losses that use a reference, such as dpo, got {config.loss}"
        )
    if isinstance(ref_model, nn.Module):
        return ref_model
    check_model_path(str(ref_model))
    if tokenizer is not None:
        _check_tokens("ref_model", str(ref_model), tokenizer, False)
    return str(ref_model)


def attach_reference(
    name: str, groups: Sequence[Group], reference: str | nn.Module, config: RankConfig
) -> Sequence[Group]:
    """The groups of ``name`` with the scores of a `reference_of`, an adapter of it switched off;
    groups that have scores as they are. Scores of a model by name are kept in the cache folder.

    Raises:
        InputError: some groups have scores and some have none, or the model cannot score them.
    """
    have = [isinstance(groups, ReferenceGroups)]
    if not have[0]:
        some = groups if isinstance(groups, (list, tuple)) else [groups[0]]
        have = [group.reference_scores is not None for group in some]
    if any(have):
        if not all(have):
            raise InputError(
                f"{name}: all groups or none must have reference_scores, got "
                f"{sum(have)} of {len(have)}"
            )
        return groups
    off = getattr(reference, "disable_adapter", nullcontext)
    with off():
        return _attach(groups, reference, config=config, cache_dir=default_cache_dir())


def _attach(
    groups: Sequence[Group],
    model: str | nn.Module,
    *,
    config: RankConfig,
    cache_dir: str | Path | None,
    trust_remote_code: bool = False,
) -> ReferenceGroups:
    return with_reference_scores(
        groups,
        model,
        normalize=config.ranking_loss.normalize,
        cache_dir=cache_dir,
        max_tokens=config.max_tokens,
        dtype=config.weights_dtype,
        device=config.device,
        trust_remote_code=trust_remote_code,
    )


def _check_tokens(
    name: str, path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> None:
    other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{name} {path}: its tokens are not those of the model to train")
