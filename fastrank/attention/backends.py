"""The attention backends: the choice for a layer with its reason, and the call.

``auto`` takes the first of `BACKENDS` that can: the log-sum-exp merge, which copies no prompt per
response, for full layers (``cpu`` and ``merge`` are its two devices); then one variable-length
kernel on gathered keys (``varlen``: sliding windows, soft caps where flash-attn is installed); then
FlexAttention (``flex``: chunks, sinks, float32 on a GPU); ``segmentwise`` serves every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrank.attention.merged import merged_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.varlen import MAX_HEAD_SIZE, flash_attn, torch_varlen, varlen_attention
from fastrank.attention.visibility import FULL, Visibility

BackendName = Literal["cpu", "merge", "varlen", "flex", "segmentwise"]
AttentionName = Literal["auto"] | BackendName


@dataclass(frozen=True)
class LayerProperties:
    """Requirements of a layer on its attention, beyond queries, keys and values.

    ``covered``: no sequence of the pack is longer than the layer's window or chunk, which makes the
    layer an ordinary full one for this pack.
    """

    visibility: Visibility = FULL
    covered: bool = True
    softcap: bool = False
    sinks: bool = False
    head_size: int = 64
    value_size: int = 64

    @classmethod
    def of(
        cls, visibility: Visibility, longest_sequence: int, **properties: Any
    ) -> LayerProperties:
        """The properties of a layer for a pack whose longest sequence has this many tokens."""
        return cls(visibility, visibility.covers(longest_sequence), **properties)


class Choice(NamedTuple):
    name: BackendName
    reason: str


class Backend(NamedTuple):
    """An attention backend.

    Attributes:
        about: one line on it.
        device: the only type of device that it runs on; None: any.
        limits: the reason why it cannot serve a layer there; None if it can.
        tried: the function to try on a device before it is used; None: no need.
    """

    about: str
    device: Literal["cpu", "cuda"] | None
    limits: Callable[[torch.dtype, LayerProperties], str | None]
    tried: Callable[..., Tensor] | None = None

    def runs_on(self, device: torch.device) -> bool:
        return self.device in (None, device.type)

    def refusal(
        self, device: torch.device, dtype: torch.dtype, layer: LayerProperties
    ) -> str | None:
        """Why it cannot serve the layer; None if it can."""
        if not self.runs_on(device):
            return f"needs {'CPU tensors' if self.device == 'cpu' else 'a CUDA device'}"
        reason = self.limits(dtype, layer)
        if reason is None and self.tried is not None:
            reason = device_fault(self.tried, device)
        return reason


def choose_attention(
    device: torch.device, dtype: torch.dtype, layer: LayerProperties = LayerProperties()
) -> Choice:
    """The backend that ``attention="auto"`` takes for a layer, and the reason in words."""
    skipped: list[str] = []
    for name, backend in BACKENDS.items():
        reason = backend.refusal(device, dtype, layer)
        if reason is None:
            return Choice(name, backend.about + (f"; not {', '.join(skipped)}" if skipped else ""))
        if backend.runs_on(device):
            skipped.append(f"{name} ({reason})")
    raise AssertionError("the segmentwise backend serves every layer")


def check_backend(
    name: BackendName, device: torch.device, dtype: torch.dtype, layer: LayerProperties
) -> None:
    """Raise ValueError if the backend asked for by name cannot serve the layer."""
    reason = BACKENDS[name].refusal(device, dtype, layer)
    if reason is not None:
        raise ValueError(
            f"attention={name!r} cannot serve a {layer.visibility} layer in {dtype} on "
            f"{device.type}: {reason}; use attention='auto'"
        )


@contextmanager
def recording() -> Iterator[None]:
    """Autograd, also inside an operator: the dispatcher has switched it off there, beyond what
    ``torch.enable_grad`` switches on."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


@functools.cache
def device_fault(attention: Callable[..., Tensor], device: torch.device) -> str | None:
    """Why a backend's function gives no right results on a device; None if it does.

    Its kernels differ between versions of PyTorch and kinds of GPU, so it is tried once per process
    and device: forward and backward on a few tokens with grouped heads, against
    `segmentwise_attention` in float64 on the host.
    """
    with torch.inference_mode(False), recording(), torch.autocast(device.type, enabled=False):
        segments = SegmentTable.from_lengths([(5, [3, 1]), (2, []), (3, [4])])
        generator = torch.Generator().manual_seed(0)
        heads = (4, 2, 2, 4)  # of query, key, value and the upstream gradient
        made = [
            torch.randn(1, h, segments.num_tokens, 16, generator=generator).half() for h in heads
        ]

        def run(function: Callable[..., Tensor], place: torch.device, dtype: torch.dtype) -> Tensor:
            *inputs, upstream = (tensor.to(place, dtype).requires_grad_() for tensor in made)
            out = function(*inputs, segments)
            grads = torch.autograd.grad(out, inputs, upstream.detach().transpose(1, 2))
            return torch.cat([t.detach().flatten().cpu().double() for t in (out, *grads)])

        expected = run(segmentwise_attention, torch.device("cpu"), torch.float64)
        try:
            found = run(attention, device, torch.float16)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            return f"it fails here: {(str(error) or repr(error)).splitlines()[0]}"
    worst = float((found - expected).abs().max())
    return None if worst < 0.05 else f"its results are wrong here, by up to {worst:.1e}"


def _uncovered(layer: LayerProperties) -> str | None:
    return None if layer.covered else f"{layer.visibility} is shorter than a sequence"


def _flash_limits(dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is neither float16 nor bfloat16"
    if max(layer.head_size, layer.value_size) > MAX_HEAD_SIZE:
        return f"heads larger than {MAX_HEAD_SIZE}"
    return "attention sinks" if layer.sinks else None


def _cpu_limits(dtype: torch.dtype, layer: LayerProperties) -> str | None:
    return _uncovered(layer) or ("soft-capped logits" if layer.softcap else None)


def _merge_limits(dtype: torch.dtype, layer: LayerProperties) -> str | None:
    if torch.version.hip is not None:
        return "ROCm's kernel gives its log-sum-exp in another layout"
    return _cpu_limits(dtype, layer) or _flash_limits(dtype, layer)


def _varlen_limits(dtype: torch.dtype, layer: LayerProperties) -> str | None:
    reason = _flash_limits(dtype, layer)
    if reason is None and layer.visibility.kind == "chunked":
        reason = _uncovered(layer)
    if reason is None and flash_attn().function is None:
        if layer.softcap:
            return f"soft-capped logits need flash-attn: {flash_attn().reason}"
        if torch_varlen() is None:
            return f"this PyTorch has no varlen_attn, and {flash_attn().reason}"
    return reason


# In the order in which "auto" tries them.
BACKENDS: dict[BackendName, Backend] = {
    "cpu": Backend(
        "parts of one softmax merged by log-sum-exp, no keys copied", "cpu", _cpu_limits
    ),
    "merge": Backend(
        "two flash kernels merged by log-sum-exp, no prompt copied per response",
        "cuda",
        _merge_limits,
        merged_attention,
    ),
    "varlen": Backend(
        "one variable-length flash kernel on gathered keys",
        "cuda",
        _varlen_limits,
        varlen_attention,
    ),
    "flex": Backend(
        "FlexAttention with blocks built from the segments",
        "cuda",
        lambda dtype, layer: "float64" if dtype == torch.float64 else None,
    ),
    "segmentwise": Backend("every sequence by itself", None, lambda dtype, layer: None),
}


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
    backend: AttentionName = "auto",
) -> Tensor:
    """Shared-prompt attention of one layer by the backend named, or by the one that fits.

    Arguments and result are those of `segmentwise_attention`. Under autocast queries, keys and
    values are cast to its dtype, as for PyTorch's own attention: rotary embeddings leave queries
    and keys wider than values.

    Raises:
        ValueError: the backend named cannot serve the layer.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layer = LayerProperties.of(
        visibility,
        segments.longest_sequence,
        softcap=softcap is not None,
        sinks=sinks is not None,
        head_size=query.shape[-1],
        value_size=value.shape[-1],
    )
    if backend == "auto":
        name = choose_attention(query.device, query.dtype, layer).name
    else:
        name = backend
        check_backend(name, query.device, query.dtype, layer)
    if name in ("cpu", "merge"):
        return merged_attention(query, key, value, segments, scale=scale, sinks=sinks)
    options: dict[str, Any] = {"visibility": visibility, "scale": scale, "softcap": softcap}
    if name == "varlen":
        return varlen_attention(query, key, value, segments, **options)
    if name == "flex":
        from fastrank.attention.flex import flex_attention_on_pack

        return flex_attention_on_pack(query, key, value, segments, sinks=sinks, **options)
    return segmentwise_attention(query, key, value, segments, sinks=sinks, **options)
