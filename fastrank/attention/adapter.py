"""The way into transformers' attention layers: the mask channel.

transformers asks `AttentionMaskInterface` for a mask once a forward and kind of layer, and passes
whatever comes back to every layer's attention function as ``attention_mask``. Keyword arguments do
not reach the attention of every architecture; the mask does. So the "mask" of the implementation
registered here is an `AttentionLayout`: the pack's segments and what the layer may see.

The implementation is switched on for one forward only (`shared_prompt_attention`), and, by hooks on
the attention modules, for the recomputation under gradient checkpointing, which runs later, in the
backward. Every other call of the model, generation included, uses the implementation it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from fastrank.attention.backends import LayerProperties, check_backend, choose_backend
from fastrank.attention.cpu import merged_attention
from fastrank.attention.paths import path_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.temperature import correct_temperature
from fastrank.attention.varlen import varlen_attention
from fastrank.attention.visibility import Visibility, classify

IMPLEMENTATION = "fastrank"

# Arguments of attention functions that change the result and have no counterpart here.
_REFUSED_ARGUMENTS = ("position_bias", "head_mask", "cache")


@dataclass(eq=False)
class PackContext:
    """One forward over one pack: what the mask function hands to the layers."""

    segments: SegmentTable
    backend: str
    calls: int = field(default=0)


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Stands in the place of ``attention_mask`` on its way through the model."""

    context: PackContext
    visibility: Visibility


_active: ContextVar[PackContext | None] = ContextVar("fastrank_pack", default=None)


@contextmanager
def shared_prompt_attention(
    configs: list[PretrainedConfig], segments: SegmentTable, backend: str
) -> Iterator[PackContext]:
    """Let the models with these configs attend along the paths of ``segments``."""
    context = PackContext(segments, backend)
    token = _active.set(context)
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = IMPLEMENTATION
        yield context
    finally:
        for config, name in zip(configs, previous, strict=True):
            config._attn_implementation_internal = name
        _active.reset(token)


def layout_mask(
    *args: Any,
    mask_function: Any = None,
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> AttentionLayout:
    """transformers' mask function of this implementation; see `AttentionLayout`."""
    context = _active.get()
    if context is None:
        raise RuntimeError(
            f"attention implementation {IMPLEMENTATION!r} serves packs only: call the model that "
            "prepare_model returned with pack=..."
        )
    where = torch.device("cpu") if attention_mask is None else attention_mask.device
    return AttentionLayout(context, classify(mask_function, local_size, where))


def layout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionLayout | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of this implementation.

    query is [1, H, N, D], key and value [1, H_kv, N, D]; returns [1, N, H, D_v] and no weights.
    """
    name = type(module).__name__
    if not isinstance(attention_mask, AttentionLayout):
        raise ValueError(
            f"{name} got {type(attention_mask).__name__} for attention_mask, expected the pack's "
            "layout: shared prompts do not work here, use shared_prompts=False"
        )
    if dropout:
        raise ValueError(f"{name}: attention dropout must be 0 with shared prompts, got {dropout}")
    for argument in _REFUSED_ARGUMENTS:
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"{name} passes {argument} to its attention, which shared prompts do not support: "
                "use shared_prompts=False"
            )
    context = attention_mask.context
    context.calls += 1
    out = attend(
        correct_temperature(module, query, context.segments),
        key,
        value,
        context.segments,
        visibility=attention_mask.visibility,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        backend=context.backend,
    )
    return out, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Shared-prompt attention by the backend named, or by the one that fits (``"auto"``).

    query [1, H, N, D], key [1, H_kv, N, D], value [1, H_kv, N, D_v] -> [1, N, H, D_v]. Under
    autocast all three are cast to its type, as for PyTorch's own attention: rotary embeddings leave
    queries and keys wider than values.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layer = LayerProperties.of(
        visibility,
        segments.longest_path,
        softcap=softcap is not None,
        sinks=sinks is not None,
        head_size=query.shape[-1],
        value_size=value.shape[-1],
    )
    if backend == "auto":
        backend = choose_backend(query.device, query.dtype, layer).name
    else:
        check_backend(backend, query.device, query.dtype, layer)
    if backend == "cpu":
        return merged_attention(query, key, value, segments, scale=scale, sinks=sinks)
    options: dict[str, Any] = {"visibility": visibility, "scale": scale, "softcap": softcap}
    if backend == "varlen":
        return varlen_attention(query, key, value, segments, **options)
    if backend == "flex":
        from fastrank.attention.flex import flex_attention_on_pack

        return flex_attention_on_pack(query, key, value, segments, sinks=sinks, **options)
    return path_attention(query, key, value, segments, sinks=sinks, **options)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose forward asks transformers for its attention function."""
    return [m for m in model.modules() if "ALL_ATTENTION_FUNCTIONS" in global_names(type(m))]


def global_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The global and attribute names that a class's forward mentions."""
    function = inspect.unwrap(cls.forward)
    code = getattr(function, "__code__", None)
    return code.co_names if code is not None else ()


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In a recomputation the model's own implementation is set again: switch for this call."""
    if any(isinstance(value, AttentionLayout) for value in (*args, *kwargs.values())):
        config: Any = module.config
        module.__dict__["_fastrank_implementation"] = config._attn_implementation
        config._attn_implementation_internal = IMPLEMENTATION


def _after_attention(module: nn.Module, args: Any, output: Any) -> None:
    name = module.__dict__.pop("_fastrank_implementation", None)
    if name is not None:
        config: Any = module.config
        config._attn_implementation_internal = name


def hook_attention(modules: list[nn.Module]) -> list[Any]:
    """Install the switch on attention modules; returns the handles that remove it."""
    handles: list[Any] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        handles.append(module.register_forward_hook(_after_attention, always_call=True))
    return handles


AttentionInterface.register(IMPLEMENTATION, layout_attention)
AttentionMaskInterface.register(IMPLEMENTATION, layout_mask)
