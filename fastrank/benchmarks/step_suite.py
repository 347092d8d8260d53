"""The step suite: a model, prompts with n responses each, loss and every parameter's gradient.

The variants are layouts of the same work on the same model: where prompts are encoded, and which
rows meet the head. All peers but the published loop project response rows only, and go on in plain
PyTorch. Responses are equally long, so that padding costs the peers nothing beyond their layout.
They repeat their own last token more or less often, which spreads the scores of a model with random
weights; candidates whose scores a dtype cannot tell apart get the same reward, so that no rounding
decides a pair.

Shapes: G groups, n candidates, prompts of P and responses of R tokens, N tokens of a pack.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import fastrank

from .attention_suite import dense_mask
from .loss_formulas import (
    IGNORED,
    label_logprobs,
    loss_from_logprobs,
    published_loss,
    published_pro_from_sums,
    published_rrhf_from_logprobs,
)
from .problem import Outputs, Problem, Step, Target, Variant
from .workloads import MODEL_SHAPES, Workload

# Scores closer than this are one reward: float32 needs next to nothing, narrow dtypes some.
_TIE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def random_model(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of `MODEL_SHAPES` with random weights, in training mode (it has no dropout); the same
    seed gives the same weights in every dtype."""
    shape = MODEL_SHAPES[name]
    make_config, make_model = _FAMILIES[shape.family]
    config = make_config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model: PreTrainedModel = make_model(config)
    nn.Module.to(model, dtype)
    return model.train()


class StepProblem(Problem):
    """``model`` with its parameters requiring gradients, ``prompts`` [G, P], ``responses``
    [G, n, R], ``rewards`` [G, n], and ``rows`` [G, n, P + R], every [prompt; response]."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        self.model = random_model(w.model, self.dtype, device, w.seed)
        vocab = MODEL_SHAPES[w.model].vocab
        host = torch.Generator().manual_seed(w.seed)
        self.prompts = torch.randint(vocab, (w.groups, w.prompt), generator=host).to(device)
        self.responses = _responses(w, vocab, host).to(device)
        repeated = self.prompts[:, None].expand(-1, w.candidates, -1)
        self.rows = torch.cat([repeated, self.responses], dim=-1)
        self.loss = fastrank.loss_from_name(w.loss)
        # Rounding in a deep model is more than in one product.
        self.limit *= 3.0
        # The opposite order of the scores: no candidate is without a gradient.
        scores = self._logprobs(self.model).mean(dim=-1)
        self.rewards = torch.stack([_reversed_levels(s, _TIE[w.dtype]) for s in scores])

    def groups(self, *, repeat_prompts: bool = False) -> list[fastrank.Group]:
        """The prompts with their candidates; or every candidate with a prompt of its own."""
        made = []
        for prompt, responses, rewards in zip(
            self.prompts.cpu(), self.responses.cpu(), self.rewards.cpu(), strict=True
        ):
            if repeat_prompts:
                made += [fastrank.Group(prompt, (r,), torch.zeros(1)) for r in responses]
            else:
                made.append(fastrank.Group(prompt, tuple(responses), rewards))
        return made

    def gradients(self, loss: Tensor) -> Outputs:
        """Back-propagate; the results of a run, the parameters' ``.grad`` left empty."""
        loss.backward()
        return self.take_gradients(loss)

    def take_gradients(self, loss: Tensor) -> Outputs:
        """The results of a run after its backward pass."""
        outputs = {"loss": loss.detach()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                outputs[name] = parameter.grad
            parameter.grad = None
        return outputs

    def parameters(self) -> list[Tensor] | None:
        return list(self.model.parameters()) if self.device.type == "cpu" else None

    def compute_reference(self, target: Target) -> Outputs:
        """Every response in a float64 forward pass of its own, twice: the loss decides how much
        each token counts, then each response is back-propagated alone."""
        w = self.workload
        model = random_model(w.model, self.dtype, self.device, w.seed).double()
        logprobs = self._logprobs(model).requires_grad_()
        loss = self._loss(target, logprobs)
        loss.backward()
        assert logprobs.grad is not None
        for g in range(w.groups):
            for i in range(w.candidates):
                (self._response_logprobs(model, g, i) * logprobs.grad[g, i]).sum().backward()
        grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
        return {"loss": loss.detach(), "gradient": torch.cat(grads)}

    @torch.no_grad()
    def _logprobs(self, model: nn.Module) -> Tensor:
        """[G, n, R] log-probabilities of all responses."""
        groups, n, _ = self.responses.shape
        return torch.stack(
            [
                torch.stack([self._response_logprobs(model, g, i) for i in range(n)])
                for g in range(groups)
            ]
        )

    def _response_logprobs(self, model: nn.Module, group: int, index: int) -> Tensor:
        """[R] log-probabilities of one response, in a forward pass of its own."""
        row = self.rows[group, index : index + 1]
        logits = model(input_ids=row, use_cache=False).logits[0, self.workload.prompt - 1 : -1]
        return label_logprobs(logits, self.responses[group, index])

    def _loss(self, target: Target, logprobs: Tensor) -> Tensor:
        """The loss from ``logprobs`` [G, n, R]."""
        rewards = self.rewards.double()
        if target == "loss":
            return loss_from_logprobs(logprobs, rewards, self.workload.loss)
        length = self.rows.shape[-1]
        losses = []
        for tokens, reward in zip(logprobs, rewards, strict=True):
            if self.workload.loss == "rrhf":
                losses.append(published_rrhf_from_logprobs(tokens, reward, length))
            else:
                order = reward.argsort(descending=True, stable=True)
                counts = torch.full_like(reward, self.workload.response)
                losses.append(published_pro_from_sums(tokens[order].sum(-1), counts, reward[order]))
        return torch.stack(losses).mean()


def _responses(workload: Workload, vocab: int, generator: torch.Generator) -> Tensor:
    """[G, n, R]: candidate i repeats its last token with probability i / n."""
    w = workload
    shape = (w.groups, w.candidates, w.response)
    tokens = torch.randint(vocab, shape, generator=generator)
    share = (torch.arange(w.candidates) / w.candidates)[None, :, None]
    repeats = torch.rand(shape, generator=generator) < share
    for position in range(1, w.response):
        before = tokens[..., position - 1]
        tokens[..., position] = torch.where(repeats[..., position], before, tokens[..., position])
    return tokens


def _reversed_levels(scores: Tensor, tie: float) -> Tensor:
    """Rewards [n] that fall as ``scores`` rise, one level for scores closer than ``tie``; the
    widest gap always divides."""
    ordered, order = scores.float().sort(descending=True)
    gaps = ordered[:-1] - ordered[1:]
    if not len(gaps):
        return torch.zeros_like(ordered)
    steps = (gaps >= min(tie, gaps.max().item())).float()
    rewards = torch.empty_like(ordered)
    rewards[order] = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    return rewards


# ---- variants ------------------------------------------------------------------------------------


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
    """``shared_prompts`` as `fastrank.pack` takes it chooses the layout."""
    model = fastrank.prepare_model(problem.model)
    pack = _one_pack(problem, shared_prompts=shared_prompts)
    return lambda: problem.gradients(model(pack=pack, loss=problem.loss).loss)


def _make_two_phase(problem: StepProblem) -> Step:
    """Exact gradients in the memory of half of a group's candidates."""
    model = fastrank.prepare_model(problem.model)
    groups = problem.groups()
    w = problem.workload
    half = w.prompt + -(-w.candidates // 2) * w.response

    def step() -> Outputs:
        out = fastrank.two_phase_backward(model, groups, loss=problem.loss, max_tokens=half)
        return problem.take_gradients(out.loss)

    return step


def _gradients_from_logprobs(problem: StepProblem, logprobs: Tensor) -> Outputs:
    """Results by plain operations, from token log-probabilities [G * n * R]."""
    shaped = logprobs.view(problem.responses.shape)
    loss = loss_from_logprobs(shaped, problem.rewards, problem.workload.loss)
    return problem.gradients(loss)


def _gradients_from_hidden(problem: StepProblem, hidden: Tensor) -> Outputs:
    """Results by plain operations, from the hidden rows [G * n * R, D] that meet the head."""
    weight: Any = problem.model.get_output_embeddings().weight
    logits = nn.functional.linear(hidden, weight)
    return _gradients_from_logprobs(problem, label_logprobs(logits, problem.responses.reshape(-1)))


def _make_repeated(problem: StepProblem) -> Step:
    """Padding-free, every response with a prompt of its own, on fastrank's attention and head."""
    model = fastrank.prepare_model(problem.model)
    pack = _one_pack(problem, repeat_prompts=True)
    return lambda: _gradients_from_logprobs(problem, model(pack=pack).token_logprobs)


def _make_padded(problem: StepProblem) -> Step:
    """All rows [prompt; response] as one batch, response rows projected."""
    rows = problem.rows.flatten(0, 1)
    trunk: Any = problem.model.model
    first = problem.workload.prompt - 1

    def step() -> Outputs:
        hidden = trunk(input_ids=rows, use_cache=False).last_hidden_state[:, first:-1]
        return _gradients_from_hidden(problem, hidden.flatten(0, 1))

    return step


def _make_dense(problem: StepProblem) -> Step:
    """Prompts shared through a dense mask, made once outside, as transformers' models take it:
    [1, 1, N, N] of 0 and the dtype's lowest value."""
    pack = _one_pack(problem)
    assert pack.segments is not None
    trunk: Any = problem.model.model
    seen = dense_mask(pack.segments)
    mask = torch.zeros(seen.shape, dtype=problem.dtype)
    mask.masked_fill_(~seen, torch.finfo(problem.dtype).min)
    mask = mask[None, None].to(problem.device)

    def step() -> Outputs:
        hidden = trunk(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[0]
        return _gradients_from_hidden(problem, hidden[pack.rows])

    return step


def _make_published(problem: StepProblem) -> Step:
    """One prompt per batch, every position projected, one backward pass per prompt."""
    rows = problem.rows
    labels = torch.full_like(rows, IGNORED)
    first = problem.workload.prompt - 1
    labels[:, :, first : first + problem.workload.response] = problem.responses

    def forward(inputs: Tensor) -> Tensor:
        mask = torch.ones_like(inputs)
        out = problem.model(input_ids=inputs, attention_mask=mask, use_cache=False)
        logits: Tensor = out.logits
        return logits

    def step() -> Outputs:
        losses = []
        for row, label, rewards in zip(rows, labels, problem.rewards, strict=True):
            loss = published_loss(forward, row, label, rewards, problem.workload.loss)
            (loss / len(rows)).backward()
            losses.append(loss.detach())
        return problem.take_gradients(torch.stack(losses).mean())

    return step


def _present(problem: StepProblem, outputs: Outputs) -> Outputs:
    """All parameters' gradients as one vector: small ones are judged beside large ones."""
    grads = [
        outputs.get(name, torch.zeros_like(p)).reshape(-1)
        for name, p in problem.model.named_parameters()
    ]
    return {"loss": outputs["loss"], "gradient": torch.cat(grads)}


PROBLEM = StepProblem

_variant = partial(Variant, present=_present)
_ours = partial(_variant, ours=True)
VARIANTS = [
    _ours("fastrank", _make_fastrank),
    _ours("fastrank, padded rows", partial(_make_fastrank, shared_prompts=False)),
    _ours("fastrank, layout by auto", partial(_make_fastrank, shared_prompts="auto")),
    _ours("fastrank, two phases", _make_two_phase),
    _ours("no sharing, padding-free", _make_repeated),
    _variant("dense mask", _make_dense),
    _variant("padded, responses projected", _make_padded),
    _variant("published loop", _make_published, target="published"),
]
