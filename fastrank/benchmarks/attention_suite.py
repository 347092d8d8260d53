"""The attention suite: queries, keys and values of one pack in, outputs and their gradients out.

One prompt with n responses. Without sharing the prompt stands before every response; there each
copy of the prompt carries an n-th of the upstream gradient, which makes the summed gradients those
of the shared layout.

Shapes: N packed tokens, H heads (H_kv of keys and values) of size D; P and R tokens of the prompt
and of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.attention.backends import (
    BACKENDS,
    AttentionName,
    BackendName,
    LayerProperties,
    attend,
)
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import FULL

from .problem import Outputs, Problem, Step, Target, Variant
from .workloads import Workload


class AttentionProblem(Problem):
    """``query`` [1, H, N, D], ``key`` and ``value`` [1, H_kv, N, D] of the packed row
    ``[prompt | a1 | ... | an]``, and the upstream gradient ``upstream`` [1, N, H, D]."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        self.segments = SegmentTable.from_lengths([(w.prompt, [w.response] * w.candidates)])
        generator = torch.Generator(device).manual_seed(w.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        tokens = self.segments.num_tokens
        self.query = random(1, w.heads, tokens, w.head_size).requires_grad_()
        self.key = random(1, w.kv_heads, tokens, w.head_size).requires_grad_()
        self.value = random(1, w.kv_heads, tokens, w.head_size).requires_grad_()
        self.upstream = random(1, tokens, w.heads, w.head_size)
        # Row n of `sequences` holds the packed indices of [prompt; response n].
        responses = torch.arange(w.prompt, tokens).view(w.candidates, w.response)
        prompts = torch.arange(w.prompt).expand(w.candidates, w.prompt)
        self.sequences = torch.cat([prompts, responses], dim=1).to(device)
        self.layer = LayerProperties.of(
            FULL, self.segments.longest_sequence, head_size=w.head_size, value_size=w.head_size
        )

    def compute_reference(self, target: Target) -> Outputs:
        """Sequence by sequence and head by head in float64."""
        w = self.workload
        inputs = [x.detach().double() for x in (self.query, self.key, self.value)]
        grads = [torch.zeros_like(x) for x in inputs]
        out = torch.zeros(self.upstream.shape, dtype=torch.float64, device=self.device)
        for head in range(w.heads):
            shared = head * w.kv_heads // w.heads
            heads = (head, shared, shared)
            q, k, v = (x[0, h].requires_grad_() for x, h in zip(inputs, heads, strict=True))
            rows = [self._sequence(q, k, v, i) for i in range(w.candidates)]
            head_out = torch.cat([rows[0][: w.prompt], *(row[w.prompt :] for row in rows)])
            made = torch.autograd.grad(head_out, (q, k, v), self.upstream[0, :, head].double())
            out[0, :, head] = head_out.detach()
            for grad, part, h in zip(grads, made, heads, strict=True):
                grad[0, h] += part
        return _named(out, grads)

    def _sequence(self, q: Tensor, k: Tensor, v: Tensor, index: int) -> Tensor:
        """One head of plain causal attention over one [prompt; response]: [P + R, D]."""
        rows = self.sequences[index]
        logits = q[rows] @ k[rows].t() / self.workload.head_size**0.5
        hidden = torch.ones(logits.shape, dtype=torch.bool, device=logits.device).triu(1)
        return torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1) @ v[rows]

    def gradients(self, out: Tensor) -> Outputs:
        """The results of a run from its output [1, N, H, D]."""
        inputs = (self.query, self.key, self.value)
        return _named(out.detach(), torch.autograd.grad(out, inputs, self.upstream))


def _named(out: Tensor, grads: Sequence[Tensor]) -> Outputs:
    return dict(zip(("out", "dquery", "dkey", "dvalue"), (out, *grads), strict=True))


def dense_mask(segments: SegmentTable) -> Tensor:
    """bool [N, N], True where a token of the pack sees another."""
    ids, positions = segments.segment_ids, segments.position_ids
    parents = segments.parents.long()
    related = (ids[:, None] == ids[None, :]) | (parents[ids][:, None] == ids[None, :])
    return related & (positions[:, None] >= positions[None, :])


def _make_fastrank(problem: AttentionProblem, backend: AttentionName) -> Step:
    inputs = (problem.query, problem.key, problem.value)
    options: dict[str, Any] = {"visibility": FULL, "backend": backend}
    return lambda: problem.gradients(attend(*inputs, problem.segments, **options))


def _make_dense(problem: AttentionProblem) -> Step:
    """Sharing by a dense mask, made once outside."""
    inputs = (problem.query, problem.key, problem.value)
    options: dict[str, Any] = {
        "attn_mask": dense_mask(problem.segments).to(problem.device),
        "enable_gqa": _grouped(problem),
    }

    def step() -> Outputs:
        out = F.scaled_dot_product_attention(*inputs, **options)
        return problem.gradients(out.transpose(1, 2))

    return step


def _make_flex(problem: AttentionProblem) -> Step:
    """Sharing by FlexAttention as its documentation shows it: the mask as a function, its blocks
    found once outside."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segments, device = problem.segments, problem.device
    ids, positions = segments.segment_ids.to(device), segments.position_ids.to(device)
    parents = segments.parents.long().to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (ids[query] == ids[key]) | (parents[ids[query]] == ids[key])
        return related & (positions[query] >= positions[key])

    tokens = segments.num_tokens
    mask = create_block_mask(seen, None, None, tokens, tokens, device=str(device))
    attention: Any = torch.compile(flex_attention, dynamic=False)
    inputs = (problem.query, problem.key, problem.value)
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": _grouped(problem)}
    return lambda: problem.gradients(attention(*inputs, **options).transpose(1, 2))


def _make_rows(problem: AttentionProblem) -> Step:
    """No sharing: n rows of [prompt; response], causal. They are equally long, so that padding-free
    packing would compute the same."""
    sequences = problem.sequences
    query, key, value = inputs = [
        x.detach()[0][:, sequences].transpose(0, 1).contiguous().requires_grad_()
        for x in (problem.query, problem.key, problem.value)
    ]
    upstream = problem.upstream[0][sequences].clone()
    upstream[:, : problem.workload.prompt] /= problem.workload.candidates
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": _grouped(problem)}

    def step() -> Outputs:
        out = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
        return _named(out.detach(), torch.autograd.grad(out, inputs, upstream))

    return step


def _present_rows(problem: AttentionProblem, outputs: Outputs) -> Outputs:
    """Rows [n, ., P + R, .] back in the packed layout; the copies' gradients summed."""
    out = torch.empty_like(problem.upstream)
    out[0, problem.sequences] = outputs["out"]
    packed = {"out": out}
    for name, like in (("dquery", problem.query), ("dkey", problem.key), ("dvalue", problem.value)):
        grad = outputs[name].double().transpose(0, 1).flatten(1, 2)
        total = torch.zeros(like.shape[1:], dtype=torch.float64, device=problem.device)
        packed[name] = total.index_add_(1, problem.sequences.reshape(-1), grad)[None]
    return packed


def _grouped(problem: AttentionProblem) -> bool:
    return problem.workload.heads != problem.workload.kv_heads


def _serves(backend: BackendName) -> Callable[[AttentionProblem], str | None]:
    return lambda problem: BACKENDS[backend].refusal(problem.device, problem.dtype, problem.layer)


PROBLEM = AttentionProblem

VARIANTS = [
    Variant("fastrank", partial(_make_fastrank, backend="auto"), ours=True),
    *(
        Variant(f"fastrank, {n}", partial(_make_fastrank, backend=n), ours=True, missing=_serves(n))
        for n in BACKENDS
    ),
    Variant("dense mask", _make_dense),
    Variant(
        "FlexAttention",
        _make_flex,
        missing=lambda problem: None if problem.device.type == "cuda" else "needs CUDA",
    ),
    Variant("no sharing", _make_rows, present=_present_rows),
]
