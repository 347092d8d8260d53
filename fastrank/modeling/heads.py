"""The output head: the weight, bias, scale and softcap that turn hidden states into logits.

The fused loss multiplies by the head itself, so it must know exactly what the model does after its
last hidden state. Configuration names do not tell: Granite divides by ``logits_scaling``,
HyperCLOVAX multiplies by an attribute of the same name. So the head is *measured*: the model's own
logits on a few rows are compared with those computed from the head, and a scale is accepted only if
it reproduces them.

The loss is computed inside the head module's own forward (`call_head`): there, and only there,
every engine has made the weight whole (FSDP2 gathers the unit that the head belongs to, ZeRO-3 the
module), and a hook that casts or moves the head's input takes effect. A head that tensor
parallelism divides over the vocabulary stays divided (``vocab_group`` of
`fastrank.linear_ranking_loss`). What cannot be reproduced, and a head that is not a plain linear
layer (with an adapter, quantised, divided in another way, with a hook on its logits), takes the
logits path: the model computes its own logits, at the cost of memory for all response rows' logits,
with the same values and gradients. Multiplying by an adapter's factors here would save memory for
one kind of adapter; the logits path is right for every kind.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig, PreTrainedModel

from fastrank.arguments import HeadPathName
from fastrank.data.packing import Pack
from fastrank.errors import InputError
from fastrank_kernels import agree_on_shard

ResultT = TypeVar("ResultT", bound="Tensor | tuple[Tensor, ...]")
Compute = Callable[[Tensor, Tensor, "Tensor | None", "ProcessGroup | None"], ResultT]
"""From the head's input, weight and bias to a result; and the processes among which the vocabulary
is divided, if it is: weight and bias are this one's rows then."""

# Hooks of these packages gather weights and leave values alone.
_GATHERING = ("torch.distributed.fsdp", "torch.distributed._composable", "deepspeed")

# Where transformers' forwards of tensor parallelism come from, and where a head keeps its own.
_TENSOR_PARALLEL = ("transformers.distributed.", "transformers.integrations.tensor_parallel")
_OWN_FORWARD = "_fastrank_own_forward"


@dataclass(frozen=True)
class Head:
    """What was measured: whether the loss can be computed from the head's weights, and how."""

    reproduced: bool
    reason: str
    softcap: float | None = None
    logit_scale: float = 1.0


class HeadPath(NamedTuple):
    """How a pack's log-probabilities are made: ``fused`` in the head's own forward, or by the
    model's logits."""

    fused: bool
    reason: str

    def __str__(self) -> str:
        """E.g. ``"fused: the head reproduces the model's logits"``."""
        return f"{'fused' if self.fused else 'logits'}: {self.reason}"


def choose_path(model: nn.Module, lm: PreTrainedModel, head: Head, asked: HeadPathName) -> HeadPath:
    """Choose the path for the next pack; adapters and hooks come and go.

    Args:
        model: the prepared model, PEFT-wrapped or not.
        lm: the transformers model in it.
        head: as measured.
        asked: ``"auto"`` for the fused path where it is possible.

    Raises:
        InputError: the fused path was asked for and is not possible; the message says why.
    """
    if asked == "logits":
        return HeadPath(False, "asked for")
    obstacle = (None if head.reproduced else head.reason) or not_plain(model, lm)
    if obstacle is None:
        return HeadPath(True, head.reason)
    if asked == "fused":
        raise InputError(
            f"head_path=fused is not possible: {obstacle}; head_path=auto takes the model's logits "
            "instead, with more memory"
        )
    return HeadPath(False, obstacle)


def not_plain(model: nn.Module, lm: PreTrainedModel) -> str | None:
    """Reason why the head's own forward is not a product with a weight matrix, whole there or
    divided over the vocabulary; None if it is."""
    module = head_module(lm)
    if not isinstance(module, nn.Linear):
        return f"the head is a {type(module).__name__}"
    own = vars(module).get(_OWN_FORWARD if _is_installed(module) else "forward")
    divided = isinstance(module.weight, DTensor) and own is not None
    replaced = own is not None and not (divided and _origin(own).startswith(_TENSOR_PARALLEL))
    if replaced or type(module).forward is not nn.Linear.forward:
        return f"the head is a {type(module).__name__} with a forward of its own"
    hook = _hook_on_result(module)
    if hook is not None:
        return hook
    weight = module.weight
    if isinstance(weight, DTensor):
        if any(isinstance(part, FSDPModule) for part in model.modules()):
            return None  # what its forward gathers shows there
        if not _is_vocab_shard(weight):
            return "the head is sharded over a mesh that no forward gathers"
        processes = weight.device_mesh.size()
        if -(-weight.shape[0] // processes) * (processes - 1) >= weight.shape[0]:
            return "the head's vocabulary is too small to be divided among all processes"
        return None
    if type(weight) not in (Tensor, nn.Parameter) and not hasattr(weight, "ds_id"):
        return f"the head's weight is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"the head is quantised ({weight.dtype})"
    return None


def _hook_on_result(module: nn.Module) -> str | None:
    """A hook that expects the head's logits, or their gradient, in words. Hooks on the input take
    effect in both paths."""
    kinds: dict[str, tuple[Mapping[int, Any], ...]] = {
        "forward": (module._forward_hooks, torch_module._global_forward_hooks),
        "backward": (
            *(module._backward_hooks, torch_module._global_backward_hooks),
            *(module._backward_pre_hooks, torch_module._global_backward_pre_hooks),
        ),
    }
    for kind, places in kinds.items():
        for place in places:
            for hook in place.values():
                if not _origin(hook).startswith(_GATHERING):
                    return f"a {kind} hook on the head reads logits ({_name(hook)})"
    return None


def _origin(hook: Any) -> str:
    if isinstance(hook, functools.partial):
        return _origin(hook.func)
    return getattr(hook, "__module__", None) or type(hook).__module__


def _name(hook: Any) -> str:
    if isinstance(hook, functools.partial):
        return _name(hook.func)
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def head_module(lm: PreTrainedModel) -> nn.Module:
    """The module that makes logits: the output embedding, or PEFT's trained copy of it."""
    module: nn.Module = lm.get_output_embeddings()
    copies = getattr(module, "modules_to_save", None)
    if copies is not None and not getattr(module, "disable_adapters", False):
        return copies[module.active_adapter]
    return module


# ---- the head's own forward ------------------------------------------------------------------


def call_head(lm: PreTrainedModel, hidden: Tensor, compute: Compute[ResultT]) -> ResultT:
    """Call ``compute(hidden, weight, bias, vocab_group)`` inside the head module's forward, where
    the weight is whole, or divided over the vocabulary; a plain head (`not_plain`) is required.

    Raises:
        InputError: the weight is neither even there.
    """
    module = head_module(lm)
    install_forward(module)
    made: list[ResultT] = []

    def keep(*there: Any) -> ResultT:
        made.append(compute(*there))
        return made[0]

    return uncast(made, module(hidden, compute=keep))


def uncast(made: list[ResultT], returned: ResultT) -> ResultT:
    """What a module's forward ``made``, as its hooks ``returned`` it but for a change of dtype.

    FSDP2 casts the outputs of its units to ``output_dtype``. The hooks that its backward needs are
    on the tensors that it cast.
    """
    (exact,) = made
    if isinstance(exact, Tensor):
        assert isinstance(returned, Tensor)
        return exact if returned.dtype != exact.dtype else returned
    pairs = zip(exact, returned, strict=True)
    kept = (own if got.dtype != own.dtype else got for own, got in pairs)
    return type(exact)(*kept)


def install_forward(module: nn.Module) -> None:
    """Let a linear layer's forward take ``compute``; every other call behaves as before."""
    if not _is_installed(module):
        if "forward" in vars(module):
            vars(module)[_OWN_FORWARD] = vars(module)["forward"]
        module.forward = MethodType(_head_forward, module)


def remove_forwards(model: nn.Module) -> None:
    """Undo `install_forward` for every module of a model."""
    for module in model.modules():
        without_forward(vars(module))


def without_forward(attributes: dict[str, Any]) -> None:
    """Undo `install_forward` in a copy of a module's attributes."""
    if _has_forward(attributes):
        del attributes["forward"]
        own = attributes.pop(_OWN_FORWARD, None)
        if own is not None:
            attributes["forward"] = own


def _is_installed(module: nn.Module) -> bool:
    return _has_forward(vars(module))


def _has_forward(attributes: dict[str, Any]) -> bool:
    return getattr(attributes.get("forward"), "__func__", None) is _head_forward


def _head_forward(self: nn.Linear, input: Tensor, compute: Compute[Any] | None = None) -> Any:
    if compute is None:
        own = vars(self).get(_OWN_FORWARD)
        return nn.Linear.forward(self, input) if own is None else own(input)
    weight: Any = self.weight
    bias: Any = self.bias
    parts = [part for part in (weight, bias) if part is not None]
    if all(isinstance(part, DTensor) and _is_vocab_shard(part) for part in parts):
        group = weight.device_mesh.get_group()
        return compute(input, weight.to_local(), None if bias is None else bias.to_local(), group)
    if any(isinstance(part, DTensor) for part in parts) or weight.numel() == 0:
        raise InputError(
            "the head's weight is neither whole nor divided over the vocabulary in the head's own "
            f"forward ({type(weight).__name__} {list(weight.shape)}): use head_path=logits"
        )
    return compute(input, weight, bias, None)


def _is_vocab_shard(parameter: DTensor) -> bool:
    """Whether the processes of one group have a part of the rows each."""
    return parameter.device_mesh.ndim == 1 and parameter.placements == (Shard(0),)


# ---- the model's own logits ------------------------------------------------------------------


def logits_fallback(
    model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any], pack: Pack
) -> Tensor:
    """Log-probability of every label by the model's own forward: [T], in at least float32."""
    num_columns = pack.input_ids.shape[1]
    # A prompt's last row stands once for each response: finding the repetitions would wait for the
    # device, to save one row per response.
    rows = pack.rows
    keeps_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if pack.shared_prompts and keeps_rows:
        logits = forward(**inputs, logits_to_keep=rows).logits[0]
    else:
        logits = forward(**inputs).logits
        logits = logits[rows // num_columns, rows % num_columns]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, pack.labels[:, None]).squeeze(1)
    return chosen - torch.logsumexp(logits, dim=-1)


@contextmanager
def head_in_own_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Let the head take inputs of any dtype.

    The fused loss multiplies by a float32 head over a bfloat16 trunk in float32; the model itself
    need not be able to call such a head.
    """
    module = head_module(model)
    weight: Any = module.weight
    handle = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(weight.dtype),))
    try:
        yield
    finally:
        handle.remove()


# ---- measuring -------------------------------------------------------------------------------


def measure_head(lm: PreTrainedModel, hidden: Tensor, logits: Tensor) -> Head:
    """Find the scale and softcap with which the head maps ``hidden`` to ``logits``.

    Args:
        lm: a causal language model with a plain head (`not_plain`).
        hidden: [B, L, D], last hidden states of some tokens.
        logits: [B, L, V], the model's own logits of these tokens.
    """
    module: Any = head_module(lm)
    if module.in_features != hidden.shape[-1]:
        return Head(False, "the model transforms its last hidden state before the head")

    whole = logits.shape[-1] == module.out_features
    group: ProcessGroup | None = None

    def multiply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_group: ProcessGroup | None
    ) -> Tensor:
        nonlocal logits, group
        if vocab_group is not None:
            group = vocab_group
            shard, _ = agree_on_shard(group, weight.shape[0], None, weight.device)
            logits = logits[..., shard.first : shard.first + weight.shape[0]]
        return nn.functional.linear(hidden.to(weight.dtype), weight, bias)

    def norm(values: Tensor) -> float:
        """Over all processes that have a part of the vocabulary: they decide alike."""
        square = values.square().sum()
        if group is not None:
            dist.all_reduce(square, group=group)
        return math.sqrt(float(square))

    # The same way as the loss takes, hooks on the head's input included.
    plain = call_head(lm, hidden, multiply).double()
    logits = logits.double()
    if not whole or plain.shape != logits.shape:
        return Head(False, "the model's logits are not the size of its head")
    config = lm.config.get_text_config()
    error = 1e-4 if module.weight.dtype in (torch.float32, torch.float64) else 3e-2
    for softcap in _softcaps(config):
        for scale in _scales(config):
            made = scale * plain
            if softcap is not None:
                made = softcap * torch.tanh(made / softcap)
            # A token that a bias of -inf forbids has no difference, and no size.
            difference = torch.where(made == logits, 0.0, made - logits)
            if norm(difference) <= error * norm(logits[logits.isfinite()]):
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
