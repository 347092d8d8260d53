"""The output head: the weight, bias, scale and softcap that turn hidden states into logits.

The fused loss multiplies by the head itself, so it must know exactly what the model does after its
last hidden state. Configuration names do not tell: Granite divides by ``logits_scaling``,
HyperCLOVAX multiplies by an attribute of the same name. So the head is *measured*: the model's own
logits on a few rows are compared with those computed from the head, and a scale is accepted only if
it reproduces them. What cannot be reproduced, and a head that is not a plain linear layer (with an
adapter, quantised, partitioned by ZeRO-3), takes the logits fallback: the model computes its own
logits, at the cost of memory for all response rows' logits, with the same values and gradients.
Multiplying by an adapter's factors here would save memory for one kind of adapter; the fallback is
right for every kind.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from fastrank.data.packing import Pack


class HeadWeights(NamedTuple):
    """Logits are ``softcap * tanh(logit_scale * (weight @ h + bias) / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class Head:
    """How logits are computed: by the loss from the head's weights (``fused``), or by the model."""

    fused: bool
    reason: str
    softcap: float | None = None
    logit_scale: float = 1.0

    def weights(self, model: PreTrainedModel) -> HeadWeights | None:
        """The head's current tensors; None for the logits fallback."""
        if not self.fused or not_plain(model) is not None:
            return None
        linear: Any = _linear(model)
        return HeadWeights(linear.weight, linear.bias, self.softcap, self.logit_scale)


def not_plain(model: PreTrainedModel) -> str | None:
    """Reason why the head is not a plain weight matrix; None if it is one.

    Checked before every pack, because adapters come and go.
    """
    module = _linear(model)
    if not isinstance(module, nn.Linear):
        return f"the head is a {type(module).__name__}"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"the head is a {type(module).__name__} with a forward of its own"
    weight = module.weight
    if hasattr(weight, "ds_id"):
        return "the head is partitioned by ZeRO-3, which gathers it for its own forward only"
    if isinstance(weight, DTensor):
        return "the head is sharded by itself"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the head's weight is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"the head is quantised ({weight.dtype})"
    return None


def logits_fallback(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], pack: Pack
) -> Tensor:
    """Log-probability of every label by the model's own forward: [T], in at least float32."""
    num_columns = pack.input_ids.shape[1]
    rows, index = torch.unique(pack.rows, return_inverse=True)
    keeps_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if pack.shared_prompts and keeps_rows:
        logits = forward(**inputs, logits_to_keep=rows).logits[0]
    else:
        logits = forward(**inputs).logits
        logits = logits[rows // num_columns, rows % num_columns]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[index, pack.labels] - torch.logsumexp(logits, dim=-1)[index]


@contextmanager
def head_in_own_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Let the head take inputs of any dtype.

    The fused loss multiplies by a float32 head over a bfloat16 trunk in float32; the model itself
    need not be able to call such a head.
    """
    module = _linear(model)
    weight: Any = module.weight
    handle = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(weight.dtype),))
    try:
        yield
    finally:
        handle.remove()


def _linear(model: PreTrainedModel) -> nn.Module:
    module: nn.Module = model.get_output_embeddings()
    copies = getattr(module, "modules_to_save", None)  # PEFT's trained copy of a whole module
    if copies is not None and not getattr(module, "disable_adapters", False):
        return copies[module.active_adapter]
    return module


def measure_head(model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> Head:
    """Find the scale and softcap with which the head maps ``hidden`` to ``logits``.

    Args:
        model: a causal language model with a plain head (`not_plain`).
        hidden: [S, D], last hidden states of some tokens.
        logits: [S, V], the model's own logits of these tokens.
    """
    module: Any = _linear(model)
    if module.weight.shape[1] != hidden.shape[1]:
        return Head(False, "the model transforms its last hidden state before the head")
    # Not by calling the module: its hooks belong to what is measured.
    plain = nn.functional.linear(hidden.to(module.weight.dtype), module.weight, module.bias)
    plain = plain.double()
    logits = logits.double()
    if plain.shape != logits.shape:
        return Head(False, "the model's logits are not the size of its head")
    config = model.config.get_text_config()
    error = 1e-4 if module.weight.dtype in (torch.float32, torch.float64) else 3e-2
    for softcap in _softcaps(config):
        for scale in _scales(config):
            made = scale * plain
            if softcap is not None:
                made = softcap * torch.tanh(made / softcap)
            if (made - logits).norm() <= error * logits.norm():
                return Head(True, "the head reproduces the model's logits", softcap, scale)
    return Head(False, "the head alone does not reproduce the model's logits")


def _softcaps(config: PretrainedConfig) -> list[float | None]:
    cap = getattr(config, "final_logit_softcapping", None)
    return [float(cap), None] if cap else [None]


def _scales(config: PretrainedConfig) -> list[float]:
    """1, and every number of the configuration that may be a factor or divisor of logits."""
    scales = [1.0]
    base = getattr(config, "dim_model_base", None)
    if base:  # MiniCPM divides its last hidden states by hidden_size / dim_model_base
        scales.append(base / config.hidden_size)
    for name, value in config.to_dict().items():
        if "logit" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value) and value not in (0, 1):
                scales += [float(value), 1.0 / float(value)]
    return scales
