"""What `RankTrainer` may be given: a model or its name, groups or records of any known format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrank.data.columns import GroupSizes, group_sizes, largest_ids
from fastrank.data.group import Group
from fastrank.data.load import fit_context, load_groups
from fastrank.data.report import Report
from fastrank.data.streamed_groups import StreamedGroups
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError
from fastrank.loss import Loss
from fastrank.modeling.context import context_length
from fastrank.modeling.mesh import is_sharded
from fastrank.modeling.pretrained import load_model, load_tokenizer
from fastrank.modeling.reference_scores import ReferenceGroups
from fastrank.options import LengthOptions
from fastrank.options.declare import values_of
from fastrank.training.batching import too_large
from fastrank.training.config import RankConfig


def length_limits(config: RankConfig, model: Any) -> TokenizeOptions:
    """The limits that a run asks for, within the model's context."""
    asked = TokenizeOptions(**values_of(config, LengthOptions))
    return fit_context(asked, context_length(model.config))


def as_model(
    model: str | Path | nn.Module,
    tokenizer: Any,
    config: RankConfig,
    quantization_config: Any = None,
) -> tuple[nn.Module, Any]:
    """A model, loaded if it is a name or a folder, and its tokenizer unless one is given.

    Raises:
        InputError: it cannot be loaded, or is to be quantised although it is loaded already.
    """
    if isinstance(model, nn.Module):
        if quantization_config is not None:
            raise InputError(
                "quantization_config needs the name or folder of a model, got a loaded one: give "
                "it to from_pretrained"
            )
        return model, tokenizer
    tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
    options = {} if quantization_config is None else quantized_loading(quantization_config, config)
    return load_model(model, config.weights_dtype, **options), tokenizer


def quantized_loading(quantization_config: Any, config: RankConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a quantised model, which is loaded where it is used."""
    device = config.device
    place = str(device) if device.index is None else device.index
    return {"quantization_config": quantization_config, "device_map": {"": place}}


def check_trainable(model: nn.Module, *, adapted: bool) -> None:
    """Refuse what cannot be trained: an adapter on a model that is sharded when it is loaded, and
    quantised weights without an adapter.

    Args:
        model: as it was loaded.
        adapted: whether it is about to be wrapped with an adapter.
    """
    has_adapter = adapted or hasattr(model, "get_base_model")
    if is_sharded(model) and has_adapter:
        raise InputError("a model that is sharded when it is loaded takes no adapter, got one")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not has_adapter and not quantizer.is_qat_trainable:
        raise InputError(
            "a quantised model needs a peft_config, because its weights cannot be trained; got none"
        )


def as_groups(
    name: str,
    data: Any,
    tokenizer: Any,
    limits: Callable[[], TokenizeOptions],
    check: Callable[[Group], None],
    *,
    reports: list[Report],
    quiet: bool = False,
) -> Sequence[Group]:
    """Groups as they are; records, a data set or a path of them as the command line reads them.

    A `datasets.IterableDataset` becomes `StreamedGroups`; every other iterable is read to its end.

    Args:
        name: of the argument, for messages.
        data: what was given.
        tokenizer: makes tokens of records.
        limits: their limits in tokens.
        check: of every group of a stream.
        reports: takes the report of what is read here.
        quiet: do not print the report of the records.

    Raises:
        InputError: the records cannot be used, or there is no tokenizer for them.
    """
    if _are_groups(data):
        groups: Sequence[Group] = data
        return groups
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"processing_class must be a tokenizer, which {name} needs, got "
            f"{type(tokenizer).__name__}"
        )
    datasets = sys.modules.get("datasets")  # whoever has a data set has imported it
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return StreamedGroups(data, tokenizer, limits(), check=check)
    groups, report = load_groups(data, tokenizer, options=limits())
    reports.append(report)
    if not quiet:
        print(report.as_text(), flush=True)
    return groups


def each_set(made: Callable[[str, Any], Any], train: Any, evaluation: Any) -> tuple[Any, Any]:
    """What ``made`` makes of each set of groups, given its name for messages."""
    if train is not None:
        train = made("train_dataset", train)
    if isinstance(evaluation, dict):
        evaluation = {name: made(f"eval_dataset {name!r}", x) for name, x in evaluation.items()}
    elif evaluation is not None:
        evaluation = made("eval_dataset", evaluation)
    return train, evaluation


def check_stream(name: str, config: RankConfig, loss: Loss) -> None:
    """Refuse a stream where it cannot be used."""
    for wrong, what in (
        (name != "train_dataset", "is read whole; expected a data set, got a stream"),
        (config.max_steps < 1, "is a stream, which needs max_steps"),
        (config.dataloader_num_workers > 0, "is a stream, which takes no loader's workers"),
        (config.auto_find_pack_size, "is a stream; auto_find_pack_size reads all"),
        (loss.uses_reference, f"is a stream, without the scores {config.loss} needs"),
    ):
        if wrong:
            raise InputError(f"{name} {what}")


def check_groups(
    name: str, groups: Sequence[Group], model: Any, config: RankConfig, loss: Loss
) -> None:
    """Refuse groups that cannot be trained on: none, one that fits no pack or holds tokens that the
    model does not have, or lacks the reference scores that the loss uses."""
    if not len(groups):
        raise InputError(f"{name} must hold at least one group, got none")
    vocab_size = model.get_input_embeddings().num_embeddings
    lengths = group_sizes(groups)
    _check_lengths(groups, lengths, config)
    sizes = config.tokens_at_once(lengths)
    for i in np.flatnonzero(sizes > config.max_tokens)[:1]:
        raise InputError(too_large(groups[i], int(sizes[i]), config.max_tokens))
    largest = largest_ids(groups)
    for i in np.flatnonzero(largest >= vocab_size)[:1]:
        raise InputError(
            f"{groups[i].name or name}: token ids must be below the model's {vocab_size}, "
            f"got {largest[i]}; is this the model's own tokenizer?"
        )
    if loss.uses_reference and not isinstance(groups, ReferenceGroups):
        for group in groups:
            if group.reference_scores is None:
                raise InputError(
                    f"{group.name or name}: the loss {config.loss} needs reference_scores or "
                    "a ref_model, got none"
                )


def _check_lengths(groups: Sequence[Group], sizes: GroupSizes, config: RankConfig) -> None:
    """Refuse groups beyond the limits that a run asks for: only what is made of records here is cut
    to them."""
    for name, lengths in (
        ("max_prompt_length", sizes.num_prompt_tokens),
        ("max_length", sizes.longest_sequence),
        ("max_response_length", sizes.longest_sequence - sizes.num_prompt_tokens),
    ):
        limit = getattr(config, name)
        for i in () if limit is None else np.flatnonzero(lengths > limit)[:1]:
            raise InputError(
                f"{groups[i].name or f'group {i}'}: {name}={limit} is for records, ready groups "
                f"are not cut to it, got {lengths[i]} tokens"
            )


def _are_groups(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return not data or isinstance(data[0], Group)
    return isinstance(data, Sequence) and not isinstance(data, (str, bytes))
