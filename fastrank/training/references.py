"""Reference scores for a run whose loss subtracts them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrank.data.cache import default_cache_dir
from fastrank.data.packing import Group
from fastrank.errors import InputError
from fastrank.modeling.pretrained import check_model_path, load_tokenizer
from fastrank.modeling.reference_scores import with_reference_scores
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
    path = options.reference_model or options.model
    if options.reference_model is not None:
        other = load_tokenizer(options.reference_model, trust_remote_code=options.trust_remote_code)
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--reference_model {path}: its tokens are not those of --model")
    cache_dir = None if options.no_cache else options.cache_dir or default_cache_dir()
    return [
        with_reference_scores(
            groups,
            model if path is None else path,
            normalize=loss.normalize,
            cache_dir=cache_dir,
            max_tokens=config.max_tokens,
            dtype=config.weights_dtype,
            device=config.device,
            trust_remote_code=options.trust_remote_code,
        )
        if len(groups)
        else groups
        for groups in splits
    ]
