"""The two parts of shared-prompt attention by PyTorch's flash kernels, on a CPU and on CUDA.

Every segment attends to itself causally, and the responses of a group attend to all of its prompt.
Both are calls of one flash kernel on views of the pack; `merge_into` makes one softmax of them, and
their gradients are those of the whole once the backward kernels are given the merged output and
log-sum-exp (`fastrank.attention.merged` has the argument). The calls differ by device:

- the CPU kernel takes equally long segments as a batch, [B, H, S, D], and is called in a loop;
- the CUDA kernel takes ragged segments side by side, [N, H, D], and is called once per part,
  whatever the number of groups and candidates.

    H, H_kv: heads of queries and of keys; N: tokens of the pack; D: head size
    query [1, H, N, D]; key, value [1, H_kv, N, D]; out [1, N, H, D]
    lse [1, H, N], float32 or wider
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank.attention.segments import GroupSpan, SegmentTable, Span

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # grad_out, q, k, v, out, lse


def merge_into(out: Tensor, lse: Tensor, shared: Tensor, shared_lse: Tensor) -> None:
    """Make ``out`` [..., D] and ``lse`` [...] those of the softmax over both parts' keys."""
    merged = torch.logaddexp(lse, shared_lse)
    weight = torch.exp(lse - merged).unsqueeze(-1)
    shared_weight = torch.exp(shared_lse - merged).unsqueeze(-1)
    # In low precision both parts are weighted in float32 and rounded once.
    own = out.mul_(weight) if out.dtype == merged.dtype else out * weight
    torch.addcmul(own, shared, shared_weight, out=out)
    lse.copy_(merged)


# ---- CPU -----------------------------------------------------------------------------------

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Merged output and log-sum-exp; shapes as in the module's legend."""
    _, num_heads, num_tokens, head_size = query.shape
    out = query.new_empty(1, num_tokens, num_heads, head_size)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(1, num_tokens, num_heads, dtype=wide).transpose(1, 2)
    rows, ratio = out.transpose(1, 2), _ratio(query, key)
    for group in segments.groups:
        for span, count in _causal_parts(group, ratio):
            part, part_lse = _attend(query, key, value, span, span, count, True, scale)
            _split(rows, span, ratio, count).copy_(part)
            _split(lse, span, ratio, count).copy_(part_lse)
        if group.responses:
            responses = group.all_responses
            shared = _attend(query, key, value, responses, group.prompt, 1, False, scale)
            own, own_lse = (_split(tensor, responses, ratio) for tensor in (rows, lse))
            merge_into(own, own_lse, *shared)
    return out, lse


def cpu_backward(
    saved: Saved, segments: SegmentTable, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``saved`` holds the merged output and log-sum-exp."""
    grad, query, key, value, out, lse = saved
    saved = (grad.transpose(1, 2), query, key, value, out.transpose(1, 2), lse)
    ratio = _ratio(query, key)
    # Memory order [N, H, D], as the projections left it.
    grads = tuple(
        tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)
        for tensor in (query, key, value)
    )
    ratios = (ratio, 1, 1)
    for group in segments.groups:
        for span, count in _causal_parts(group, ratio):
            own = _attend_backward(saved, span, span, count, True, scale)
            for total, part, by in zip(grads, own, ratios, strict=True):
                _split(total, span, by, count).copy_(part)
        if group.responses:
            responses, prompt = group.all_responses, group.prompt
            shared = _attend_backward(saved, responses, prompt, 1, False, scale)
            spans = (responses, prompt, prompt)
            for total, part, span, by in zip(grads, shared, spans, ratios, strict=True):
                _split(total, span, by).add_(part)
    return grads[0], grads[1], grads[2]


def _ratio(query: Tensor, key: Tensor) -> int:
    """Query heads per key head."""
    return query.shape[1] // key.shape[1]


def _causal_parts(group: GroupSpan, ratio: int) -> list[tuple[Span, int]]:
    """Prompt and responses, which attend to themselves. Responses of one length are one batch, if
    every head has keys of its own: a batch within a batch would have to be copied."""
    own = group.runs if ratio == 1 else [(response, 1) for response in group.responses]
    return [(group.prompt, 1), *own]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Span,
    columns: Span,
    count: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Flash attention of the tokens ``rows`` over the tokens ``columns``, both ``count`` segments,
    without copies; shapes as `_split` gives them."""
    ratio = _ratio(query, key)
    out, lse = _cpu_flash(
        _split(query, rows, ratio, count).flatten(0, 1),
        _split_keys(key, columns, ratio, count),
        _split_keys(value, columns, ratio, count),
        0.0,
        causal,
        scale=scale,
    )
    return out.unflatten(0, (count, ratio)), lse.unflatten(0, (count, ratio))


def _attend_backward(
    saved: Saved, rows: Span, columns: Span, count: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value, out, lse = saved
    ratio = _ratio(query, key)
    grads = _cpu_flash_backward(
        _split(grad, rows, ratio, count).flatten(0, 1),
        _split(query, rows, ratio, count).flatten(0, 1),
        _split_keys(key, columns, ratio, count),
        _split_keys(value, columns, ratio, count),
        _split(out, rows, ratio, count).flatten(0, 1),
        _split(lse, rows, ratio, count).flatten(0, 1),
        0.0,
        causal,
        scale=scale,
    )
    of_query, of_key, of_value = (part.unflatten(0, (count, ratio)) for part in grads)
    if ratio > 1:
        of_key, of_value = of_key.sum(1, keepdim=True), of_value.sum(1, keepdim=True)
    return of_query, of_key, of_value


def _split(tensor: Tensor, span: Span, ratio: int, count: int = 1) -> Tensor:
    """The tokens of ``span`` of a [1, H, N, ...] tensor as a view [count, ratio, H / ratio,
    S / count, ...]: segments, and query heads that share keys, become batches."""
    tokens = tensor[0].narrow(1, span.start, span.length)
    heads = tokens.unflatten(0, (-1, ratio)).unflatten(2, (count, -1))
    return heads.movedim((2, 1), (0, 1))


def _split_keys(tensor: Tensor, span: Span, ratio: int, count: int) -> Tensor:
    """Keys or values for queries that `_split` gave, [count * ratio, H_kv, S / count, D]: views
    with a batch stride of zero, whatever the kernel does about grouped queries."""
    return _split(tensor, span, 1, count).expand(-1, ratio, -1, -1, -1).flatten(0, 1)


# ---- CUDA ----------------------------------------------------------------------------------


class PartIndex(NamedTuple):
    """One segment table for the CUDA kernel, on its device.

    The second part has two entries per group: the prompt's queries, which see no key there, and the
    responses', which see the prompt's. So the queries need no gathering: they lie side by side as
    they are. The kernel gives a query without keys zeros and an infinite log-sum-exp.

    Attributes:
        segments: int32 [S + 1], offsets of all segments.
        longest: tokens of the longest segment.
        queries, keys: int32, offsets of the second part's entries.
        longest_queries, longest_keys: their longest entries; 0 if there are no responses.
        prompts: the prompts' tokens, a view of one prompt or gathered, each once.
        keyless: bool [N], the queries without keys in the second part.
    """

    segments: Tensor
    longest: int
    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    prompts: slice | Tensor
    keyless: Tensor


def cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float
) -> tuple[Tensor, Tensor]:
    """As `cpu_forward`."""
    index = segments.on_device("parts", query.device, _part_index)
    q, k, v = (_rows(tensor) for tensor in (query, key, value))
    out, lse = _cuda_flash(q, k, v, _causal(index), True, scale)
    if index.longest_keys:
        k, v = k[index.prompts], v[index.prompts]
        shared, shared_lse = _cuda_flash(q, k, v, _to_prompts(index), False, scale)
        shared_lse.masked_fill_(index.keyless, -torch.inf)
        merge_into(out, lse.t(), shared, shared_lse.t())
    return out[None], lse[None]


def cuda_backward(
    saved: Saved, segments: SegmentTable, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu_backward`."""
    grad, query, key, value, out, lse = saved
    index = segments.on_device("parts", query.device, _part_index)
    q, k, v = (_rows(tensor) for tensor in (query, key, value))
    made = (grad[0].contiguous(), out[0], lse[0])
    of_q, of_k, of_v = _cuda_flash_backward(made, q, k, v, _causal(index), True, scale)
    if index.longest_keys:
        k, v = k[index.prompts], v[index.prompts]
        shared = _cuda_flash_backward(made, q, k, v, _to_prompts(index), False, scale)
        of_q.add_(shared[0])
        _add_rows(of_k, index.prompts, shared[1])
        _add_rows(of_v, index.prompts, shared[2])
    of_q, of_k, of_v = (grad.transpose(0, 1)[None] for grad in (of_q, of_k, of_v))
    return of_q, of_k, of_v


def _rows(tensor: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D], a view wherever the kernel can read it."""
    rows = tensor[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _add_rows(total: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    if isinstance(rows, slice):
        total[rows].add_(part)
    else:
        total.index_add_(0, rows, part)  # no index repeats: the threads' order does not matter


Ragged = tuple[Tensor, Tensor, int, int]  # offsets of queries and keys, their longest entries


def _causal(index: PartIndex) -> Ragged:
    return index.segments, index.segments, index.longest, index.longest


def _to_prompts(index: PartIndex) -> Ragged:
    return index.queries, index.keys, index.longest_queries, index.longest_keys


def _cuda_flash(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """[N, H, D] and its log-sum-exp, float32 [H, N]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *ragged, 0.0, causal, False, scale=scale
    )
    return out, lse


def _cuda_flash_backward(
    made: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Ragged,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, out, lse = made
    # Read for dropout only.
    random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    grads: Any = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *ragged, 0.0, causal, random_state, unused, scale=scale
    )
    return grads[0], grads[1], grads[2]


def _part_index(segments: SegmentTable) -> PartIndex:
    queries: list[int] = []  # tokens of each entry
    keys: list[int] = []
    for group in segments.groups:
        queries.append(group.prompt.length)
        keys.append(0)
        if group.responses:
            queries.append(group.all_responses.length)
            keys.append(group.prompt.length)
    with_responses = [group.prompt for group in segments.groups if group.responses]
    prompts: slice | Tensor
    if len(with_responses) == 1:
        prompts = slice(with_responses[0].start, with_responses[0].stop)
    else:
        tokens = [torch.arange(prompt.start, prompt.stop) for prompt in with_responses]
        prompts = torch.cat(tokens) if tokens else slice(0)
    return PartIndex(
        segments=segments.offsets,
        longest=segments.longest_segment,
        queries=_offsets(queries),
        keys=_offsets(keys),
        longest_queries=max(queries),
        longest_keys=max(keys),
        prompts=prompts,
        keyless=segments.parents.long()[segments.segment_ids] == segments.segment_ids,
    )


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
