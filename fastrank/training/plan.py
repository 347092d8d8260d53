"""What determines a run: the plan that its checkpoints keep and that a resumed run must share.

Every option counts, those of later versions of transformers included, unless it is listed here as
one that cannot change the numbers: an option that is forgotten is then refused, not ignored. Data,
tokenizer, model and reference count by their content, not by their path. How the work is spread
over processes and devices does not count: the same run may go on with another engine.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from fastrank.data.cache import tokenizer_identity
from fastrank.data.columns import groups_digest
from fastrank.data.manifest import content_hash, value_checksum
from fastrank.data.packing import Group
from fastrank.data.streamed_groups import StreamedGroups
from fastrank.data.user_functions import is_function
from fastrank.errors import InputError
from fastrank.hf_private import portable_settings
from fastrank.modeling.reference_scores import ReferenceGroups
from fastrank.options.paths import local_path
from fastrank.training.checkpoint import read_manifest
from fastrank.training.config import RankConfig

#: What cannot be changed at all: a checkpoint's weights fit nothing else.
FIXED = ("model", "adapter")

STREAM_DIGEST = 64  # groups of a stream by which it is recognised
_DIGITS = 12  # of a digest that a message shows

#: Options that leave the numbers of a run as they are.
_WITHOUT_EFFECT = frozenset(
    [
        # places, logs, trackers
        *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "report_to", "disable_tqdm", "log_level", "log_level_replica"),
        *("logging_dir", "logging_strategy", "logging_steps", "logging_first_step"),
        *("log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen"),
        *("skip_memory_metrics", "debug", "push_to_hub", "hub_token", "hub_private_repo"),
        *("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        # checkpoints and evaluations; what chooses the best model is in `evaluation`
        *("save_strategy", "save_steps", "save_only_model", "save_on_each_node"),
        *("save_total_limit", "enable_jit_checkpoint", "load_best_model_at_end"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
        "eval_token_statistics",
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches"),
        *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "label_names"),
        *("bf16_full_eval", "fp16_full_eval", "resume_from_checkpoint", "resume_changed"),
        *("restore_callback_states_from_checkpoint", "do_train", "do_eval", "do_predict"),
        # engines, and what saves memory without another result
        *("use_cpu", "local_rank", "accelerator_config", "parallelism_config", "deepspeed"),
        *("fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
        *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("dataloader_in_order", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("use_cache", "remove_unused_columns", "length_column_name", "split_groups"),
        # part of other entries: groups_per_step, mixed_precision, weights_dtype
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
        *("average_tokens_across_devices", "bf16", "fp16", "dtype"),
    ]
)

#: Of a model's configuration, what its forward pass does not depend on, or training itself sets.
_MODEL_WITHOUT_EFFECT = (
    *("dtype", "torch_dtype", "architectures", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_ADAPTER_WITHOUT_EFFECT = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping")

_CONSTANT = ("constant", "constant_with_warmup")

Plan = Mapping[str, Any]


def option_plan(config: RankConfig) -> dict[str, Any]:
    """The options of a run that determine it, as JSON types."""
    left_out = _WITHOUT_EFFECT
    if config.lr_scheduler_type in _CONSTANT and not 0 < config.warmup_steps < 1:
        left_out |= {"max_steps", "num_train_epochs"}  # only its end depends on a run's length
    names = [field.name for field in dataclasses.fields(config)]
    if config.groups_per_step is None and config.world_size > 1:
        left_out |= {"groups_per_step"}  # the model tells which processes take different data
    values = vars(config) | {"groups_per_step": config.groups_over(config.world_size)}
    return {
        **{name: _plain(values[name]) for name in names if name not in left_out},
        **_loss_plan(config.loss),
        "data_seed": config.seed if config.data_seed is None else config.data_seed,
    }


def _loss_plan(loss: Any) -> dict[str, Any]:
    """A loss by its name, or by what it prints; a function's file by its content."""
    if not isinstance(loss, str):
        return {"loss": re.sub(r" at 0x[0-9a-f]+", "", repr(loss)), "loss_file": None}
    file = loss.rpartition(":")[0] if is_function(loss) else None
    return {"loss": loss, "loss_file": file and content_hash(local_path(file))[:_DIGITS]}


def groups_plan(groups: Sequence[Group]) -> str:
    """A set of groups by its content, as text; a stream by its first groups."""
    if isinstance(groups, StreamedGroups):
        return f"stream {groups_digest(groups.beginning(STREAM_DIGEST))[:_DIGITS]}"
    return f"{len(groups)} groups {groups_digest(groups)[:_DIGITS]}"


def tokenizer_plan(tokenizer: PreTrainedTokenizerBase | Any | None) -> dict[str, Any]:
    """A run's tokenizer and chat template, by their content."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return {"tokenizer": None, "chat_template": None}
    template = tokenizer.chat_template
    return {
        "tokenizer": tokenizer_identity(tokenizer, with_template=False)[:_DIGITS],
        "chat_template": None if template is None else value_checksum(template)[:_DIGITS],
    }


def reference_plan(groups: Sequence[Group]) -> str:
    """The reference scores of groups that have them, by their content."""
    if isinstance(groups, ReferenceGroups):
        scores = groups.reference_scores.tolist()
    else:
        scores = [
            None if g.reference_scores is None else g.reference_scores.tolist() for g in groups
        ]
    return value_checksum(scores)[:_DIGITS]


def model_plan(model: nn.Module) -> dict[str, Any]:
    """Architecture, trainable parameters and adapter of a model, as it is before training."""
    parameters = list(model.named_parameters())
    settings = portable_settings(getattr(model, "config", None))
    shapes = [[name, list(p.shape), p.requires_grad] for name, p in parameters]
    about = [_plain(_without(settings, _MODEL_WITHOUT_EFFECT)), shapes]
    adapters = getattr(model, "peft_config", None) or {}
    # ``fully_shard`` gives a model a class of its own, derived from the model's.
    name = next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    return {
        "adapter": {
            name: _plain(_without(adapter.to_dict(), _ADAPTER_WITHOUT_EFFECT))
            for name, adapter in adapters.items()
        },
        "model": f"{name} {value_checksum(about)[:_DIGITS]}",
        "weights_dtype": ", ".join(
            sorted({str(p.dtype).removeprefix("torch.") for _, p in parameters})
        ),
    }


def _without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _plain(value: Any) -> Any:
    """The value in JSON types, the same in every process that has the same."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def changed_names(resume_changed: Sequence[str] | None) -> frozenset[str]:
    """The names of ``--resume_changed``, which may be given one by one or with commas."""
    texts = resume_changed or ()
    return frozenset(name.strip() for text in texts for name in text.split(",") if name.strip())


def check_resumed(
    checkpoint: Path, plan: Plan, allowed: frozenset[str], *, known: Plan | None = None
) -> frozenset[str]:
    """What differs from the run that wrote the checkpoint, all of it allowed to.

    Args:
        plan: of the run that is to go on, or a part of it.
        allowed: names of the plan that may differ.
        known: the whole plan, for names that are misspelled; None to leave them.

    Raises:
        InputError: something else differs, or something that never may; a name is not known.
    """
    before = (read_manifest(checkpoint) or {}).get("plan") or {}
    names = {*before, *(known or ())}
    for name in sorted(allowed - names) if known is not None else ():
        near = difflib.get_close_matches(name, [*names, *_HINTS], 1)
        hint = _HINTS.get(name) or (f"did you mean {near[0]}?" if near else "see its help")
        raise InputError(f"--resume_changed: a run has no {name[:60]}; {hint}")
    plan = json.loads(json.dumps(plan))
    differing = {
        name: list(_differences(name, before[name], value))
        for name, value in plan.items()
        if name in before and not _same(before[name], value)
    }
    fixed = [name for name in FIXED if name in differing]
    refused = fixed or [name for name in differing if name not in allowed]
    if refused:
        texts = [text for name in refused for text in differing[name]]
        way = (
            f"these weights go with no other {' and '.join(fixed)}; begin a new run"
            if fixed
            else f"to go on all the same, pass --resume_changed {','.join(differing)}"
        )
        raise InputError(f"{checkpoint} was written with {'; '.join(texts)}: {way}")
    return frozenset(differing)


#: Options that are no names of a plan themselves, and what they are part of.
_HINTS = {
    "per_device_train_batch_size": "its name there is groups_per_step",
    "gradient_accumulation_steps": "its name there is groups_per_step",
    "bf16": "its name there is mixed_precision",
    "dtype": "its names there are weights_dtype and mixed_precision",
}


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """``name=old, got new``, for a dictionary of each of its entries."""
    if isinstance(before, dict) and isinstance(now, dict) and before and now:
        for key in [*before, *(key for key in now if key not in before)]:
            if not _same(before.get(key), now.get(key)):
                yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    else:
        yield f"{name}={_shown(before)}, got {_shown(now)}"


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
