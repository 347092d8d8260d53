"""Everyone who can do the step suite: layouts of the same work, on the same model.

What differs is where prompts are encoded and which rows meet the head. All peers but the published
loop project response rows only, and go on in plain PyTorch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrank

from . import plain, published
from .problem import Outputs, Step, Variant
from .step_suite import StepProblem, present


def _one_pack(
    problem: StepProblem,
    *,
    repeat_prompts: bool = False,
    shared_prompts: bool | Literal["auto"] = True,
) -> fastrank.Pack:
    groups = problem.groups(repeat_prompts=repeat_prompts)
    everything = sum(g.num_candidates * g.longest_sequence for g in groups)
    (pack,) = fastrank.pack(groups, max_tokens=everything, shared_prompts=shared_prompts)
    assert pack.group_index == tuple(range(len(groups))), "equal groups keep their order"
    return pack.to(problem.device)


def _make_fastrank(problem: StepProblem, shared_prompts: bool | Literal["auto"] = True) -> Step:
    """``shared_prompts`` as `fastrank.pack` takes it: the layout is what is compared."""
    model = fastrank.prepare_model(problem.model)
    pack = _one_pack(problem, shared_prompts=shared_prompts)

    def step() -> Outputs:
        return problem.gradients(model(pack=pack, loss=problem.loss).loss)

    return step


def _make_repeated(problem: StepProblem) -> Step:
    """Padding-free, every response with a prompt of its own, on fastrank's attention and head."""
    model = fastrank.prepare_model(problem.model)
    pack = _one_pack(problem, repeat_prompts=True)
    shape = problem.responses.shape

    def step() -> Outputs:
        logprobs = model(pack=pack).token_logprobs.view(shape)
        loss = plain.loss_from_logprobs(logprobs, problem.rewards, problem.workload.loss)
        return problem.gradients(loss)

    return step


def _head(problem: StepProblem, hidden: Tensor, shape: torch.Size) -> Tensor:
    """Loss of response rows ``hidden`` [T, D] by plain operations."""
    weight: Any = problem.model.get_output_embeddings().weight
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs = F.log_softmax(logits, dim=-1, dtype=wide)
    logprobs = logprobs.gather(1, problem.responses.reshape(-1, 1)).view(shape)
    return plain.loss_from_logprobs(logprobs, problem.rewards, problem.workload.loss)


def _make_padded(problem: StepProblem) -> Step:
    """All rows [prompt; response] as one batch, response rows projected."""
    rows = problem.rows.flatten(0, 1)
    trunk: Any = problem.model.model
    first = problem.workload.prompt - 1

    def step() -> Outputs:
        hidden = trunk(input_ids=rows, use_cache=False).last_hidden_state[:, first:-1]
        shape = problem.responses.shape
        return problem.gradients(_head(problem, hidden.flatten(0, 1), shape))

    return step


def _make_dense(problem: StepProblem) -> Step:
    """Prompts shared through a dense mask [N, N], made once outside."""
    pack = _one_pack(problem)
    assert pack.segments is not None
    trunk: Any = problem.model.model
    mask = dense_mask(pack.segments, problem.dtype).to(problem.device)

    def step() -> Outputs:
        hidden = trunk(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[0]
        shape = problem.responses.shape
        return problem.gradients(_head(problem, hidden[pack.rows], shape))

    return step


def dense_mask(segments: Any, dtype: torch.dtype) -> Tensor:
    """[1, 1, N, N] of 0 and the dtype's lowest value, as transformers' models take it."""
    ids, positions = segments.segment_ids, segments.position_ids
    parents = segments.parents.long()
    related = (ids[:, None] == ids[None, :]) | (parents[ids][:, None] == ids[None, :])
    seen = related & (positions[:, None] >= positions[None, :])
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None]


def _make_published_rrhf(problem: StepProblem) -> Step:
    """One prompt a batch, every position projected, one backward a prompt."""
    rows, labels = problem.rows, problem.padded_labels()
    mask = torch.ones_like(rows)

    def step() -> Outputs:
        losses = []
        for group in range(len(rows)):
            logits = problem.model(
                input_ids=rows[group], attention_mask=mask[group], use_cache=False
            ).logits
            loss = published.rrhf_from_logits(logits, labels[group], problem.rewards[group])
            (loss / len(rows)).backward()
            losses.append(loss.detach())
        return problem.take_gradients(torch.stack(losses).mean())

    return step


def _make_published_pro(problem: StepProblem) -> Step:
    """One forward a candidate, all logits kept for one backward a prompt."""
    order = problem.rewards.argsort(dim=1, descending=True, stable=True)
    rows = [problem.rows[g, order[g]] for g in range(len(order))]
    labels = [problem.padded_labels()[g, order[g]] for g in range(len(order))]
    rewards = problem.rewards.gather(1, order)

    def logits(row: Tensor) -> Tensor:
        row = row[None]
        made: Tensor = problem.model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
        ).logits
        return made

    def step() -> Outputs:
        losses = []
        for group, candidates in enumerate(rows):
            forwards = [partial(logits, row) for row in candidates]
            loss = published.pro_from_forwards(forwards, labels[group], rewards[group])
            (loss / len(rows)).backward()
            losses.append(loss.detach())
        return problem.take_gradients(torch.stack(losses).mean())

    return step


VARIANTS = [
    Variant("fastrank", _make_fastrank, present=present, ours=True),
    Variant(
        "fastrank, padded rows",
        partial(_make_fastrank, shared_prompts=False),
        present=present,
        ours=True,
    ),
    Variant(
        "fastrank, layout by auto",
        partial(_make_fastrank, shared_prompts="auto"),
        present=present,
        ours=True,
    ),
    Variant("no sharing, padding-free", _make_repeated, present=present, ours=True),
    Variant("dense mask", _make_dense, present=present),
    Variant("padded, responses projected", _make_padded, present=present),
    Variant("published loop", _make_published_rrhf, target="published rrhf", present=present),
    Variant("published loop", _make_published_pro, target="published pro", present=present),
]
