"""The way into transformers' attention layers: the mask channel.

transformers asks `AttentionMaskInterface` for one mask per forward and kind of layer, and passes
whatever comes back to every layer's attention function as ``attention_mask``. Keyword arguments do
not reach the attention of every architecture; the mask does. So the "mask" of the implementation
registered here is an `AttentionLayout`: the pack's segments and the layer's visibility.

The implementation is switched on for one forward only (`shared_prompt_attention`), and, by hooks on
the attention modules, for the recomputation under gradient checkpointing, which runs later, in the
backward. Every other call of the model, generation included, uses the implementation it had.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from fastrank.attention.backends import AttentionName, attend
from fastrank.attention.operator import opaque_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import Visibility, ask, recognise
from fastrank.hf_private import attention_implementation, set_attention_implementation
from fastrank.outputs import Opaque

IMPLEMENTATION = "fastrank"

# Arguments of attention functions that change the result and have no counterpart here.
_REFUSED_ARGUMENTS = ("position_bias", "head_mask", "cache")


class PackContext:
    """One forward over one pack, as the mask function hands it to the layers; of the thread that
    makes it."""

    def __init__(self, segments: SegmentTable, backend: AttentionName) -> None:
        self.segments = segments
        self.backend = backend
        self.calls = 0
        self._thread = None if torch.compiler.is_compiling() else threading.get_ident()

    def check_thread(self) -> None:
        """Raise RuntimeError in another thread, whose call of the model would take this pack for
        its own."""
        if not torch.compiler.is_compiling() and self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "the model is computing a pack in another thread: call it from one thread at a "
                "time, or let every thread have a copy"
            )


class AttentionLayout(Opaque):
    """Takes the place of ``attention_mask`` on its way through the model.

    Attributes:
        mask_answers, local_size: of `fastrank.attention.visibility.ask`.
        visibility: recognised in the answers; None while a compiler traces the model, which cannot
            branch on them.
    """

    context: PackContext
    mask_answers: Tensor
    local_size: int | None
    visibility: Visibility | None


# Where a model's configs hold the pack during a forward. A context variable would be the usual
# place; a compiler cannot read one.
_PACK = "_fastrank_pack"


@contextmanager
def shared_prompt_attention(
    configs: list[PretrainedConfig], segments: SegmentTable, backend: AttentionName
) -> Iterator[PackContext]:
    """Let the models with these configs attend along the sequences of ``segments``."""
    context = PackContext(segments, backend)
    if not torch.compiler.is_compiling():
        # In one move, so that of two threads that come together one is told.
        configs[0].__dict__.setdefault(_PACK, context).check_thread()
    held = [c.__dict__.get(_PACK) for c in configs]
    packs = [None if pack is context else pack for pack in held]
    previous = [(attention_implementation(c), pack) for c, pack in zip(configs, packs, strict=True)]
    try:
        for config in configs:
            set_attention_implementation(config, IMPLEMENTATION)
            config.__dict__[_PACK] = context
        yield context
    finally:
        for config, (name, pack) in zip(configs, previous, strict=True):
            set_attention_implementation(config, name)
            config.__dict__[_PACK] = pack
            if pack is None:
                del config.__dict__[_PACK]


def layout_mask(
    *args: Any,
    mask_function: Any = None,
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> AttentionLayout:
    """transformers' mask function of this implementation; see `AttentionLayout`."""
    context = getattr(config, _PACK, None)
    if context is None:
        raise RuntimeError(
            f"attention implementation {IMPLEMENTATION!r} serves packs only: call the model that "
            "prepare_model returned with pack=..."
        )
    context.check_thread()
    device = torch.device("cpu")
    if attention_mask is not None and getattr(config, "attention_chunk_size", None) is not None:
        device = attention_mask.device  # such masks hold tensors
    answers = ask(mask_function, local_size, device)
    visibility = None if torch.compiler.is_compiling() else recognise(answers, local_size)
    return AttentionLayout(context, answers, local_size, visibility)


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
    if attention_mask.visibility is not None:
        context.calls += 1  # a traced value may not change; start-up checks have counted before
    query = correct_temperature(module, query, context.segments)
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "backend": context.backend,
    }
    if attention_mask.visibility is None:
        options |= {
            "mask_answers": attention_mask.mask_answers,
            "local_size": attention_mask.local_size,
        }
        return opaque_attention(query, key, value, context.segments, **options), None
    options["visibility"] = attention_mask.visibility
    return attend(query, key, value, context.segments, **options), None


def correct_temperature(module: nn.Module, query: Tensor, segments: SegmentTable) -> Tensor:
    """The query [1, H, N, D] as the module would have made it on a row of its own.

    Llama 4's layers without RoPE scale queries by the index of the token in the row, beyond
    ``floor_scale`` tokens. In a pack that is not the token's position, so the factor is exchanged.
    """
    layer: Any = module
    if not getattr(layer, "attn_temperature_tuning", False) or getattr(layer, "use_rope", True):
        return query
    if segments.num_tokens < layer.floor_scale:
        return query  # every factor is 1

    def factor(position: Tensor) -> Tensor:
        steps = torch.floor((position.float() + 1.0) / layer.floor_scale)
        return torch.log1p(steps) * layer.attn_scale + 1.0

    index = torch.arange(segments.num_tokens, device=query.device)
    positions = segments.on_device("positions", query.device, lambda table: table.position_ids)
    exchange = factor(positions).double() / factor(index).double()
    return query * exchange.to(query.dtype)[:, None]


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
        if attention_implementation(config) != IMPLEMENTATION:
            module.__dict__["_fastrank_implementation"] = attention_implementation(config)
            set_attention_implementation(config, IMPLEMENTATION)


def _after_attention(module: nn.Module, args: Any, output: Any) -> None:
    name = module.__dict__.pop("_fastrank_implementation", None)
    if name is not None:
        config: Any = module.config
        set_attention_implementation(config, name)


def hook_attention(modules: list[nn.Module]) -> list[Any]:
    """Install the switch on attention modules; returns the handles that remove it."""
    handles: list[Any] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        handles.append(module.register_forward_hook(_after_attention, always_call=True))
    return handles


AttentionInterface.register(IMPLEMENTATION, layout_attention)
AttentionMaskInterface.register(IMPLEMENTATION, layout_mask)
