"""The step suite: a model, one prompt with n responses, loss and every parameter's gradient.

Responses are equally long, so that padding costs the peers nothing beyond what their layout does.
They repeat their own last token more or less often, which spreads the scores of a model with random
weights; candidates whose scores a dtype cannot tell apart get the same reward, so that no rounding
decides a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastrank

from . import plain, published
from .models import SHAPES, build_model
from .problem import Outputs, Problem, Variant
from .workloads import Workload

# Scores closer than this are one reward: float32 needs next to nothing, narrow dtypes some.
_TIE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class StepProblem(Problem):
    """``model`` with its parameters requiring gradients, ``prompts`` [G, P], ``responses``
    [G, n, R], ``rewards`` [G, n]."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        w = workload
        self.model = build_model(w.model, self.dtype, device, w.seed)
        vocab = SHAPES[w.model].vocab
        host = torch.Generator().manual_seed(w.seed)
        self.prompts = torch.randint(vocab, (w.groups, w.prompt), generator=host).to(device)
        self.responses = _responses(w, vocab, host).to(device)
        self.loss = fastrank.loss_from_name(w.loss)
        # Rounding in a deep model is more than in one product.
        self.limit *= 3.0
        self.rewards = self._rewards()

    def variants(self) -> list[Variant]:
        from .step_peers import VARIANTS

        return [v for v in VARIANTS if v.target in ("loss", f"published {self.workload.loss}")]

    @property
    def rows(self) -> Tensor:
        """[G, n, P + R] token ids of every [prompt; response]."""
        n = self.workload.candidates
        prompts = self.prompts[:, None].expand(-1, n, -1)
        return torch.cat([prompts, self.responses], dim=-1)

    def padded_labels(self) -> Tensor:
        """[G, n, P + R] as the published scripts have them: shifted, -100 where nothing counts."""
        labels = torch.full_like(self.rows, published.IGNORED)
        first = self.workload.prompt - 1
        labels[:, :, first : first + self.workload.response] = self.responses
        return labels

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
        """The results of a run whose backward is done."""
        outputs = {"loss": loss.detach()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                outputs[name] = parameter.grad
            parameter.grad = None
        return outputs

    def parameters(self) -> list[Tensor] | None:
        return list(self.model.parameters()) if self.device.type == "cpu" else None

    def response_logprobs(self, model: torch.nn.Module, group: int, index: int) -> Tensor:
        """[R] log-probabilities of one response, in a forward pass of its own."""
        row = self.rows[group, index : index + 1]
        logits = model(input_ids=row, use_cache=False).logits[0, self.workload.prompt - 1 : -1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs = torch.log_softmax(logits, dim=-1, dtype=wide)
        return logprobs.gather(1, self.responses[group, index, :, None]).squeeze(1)

    def _rewards(self) -> Tensor:
        """[G, n] in the opposite order of the scores (no candidate is without a gradient)."""
        w = self.workload
        with torch.no_grad():
            scores = [
                torch.stack(
                    [self.response_logprobs(self.model, g, i).mean() for i in range(w.candidates)]
                )
                for g in range(w.groups)
            ]
        return torch.stack([_reversed_levels(s, _TIE[w.dtype]) for s in scores])

    def compute_reference(self, target: str) -> Outputs:
        """Every response in a float64 forward pass of its own, twice: the loss decides how much
        each token counts, then each response is back-propagated alone."""
        w = self.workload
        model = build_model(w.model, self.dtype, self.device, w.seed).double()
        with torch.no_grad():
            leaves = torch.stack(
                [
                    torch.stack([self.response_logprobs(model, g, i) for i in range(w.candidates)])
                    for g in range(w.groups)
                ]
            ).requires_grad_()
        loss = self._loss(target, leaves)
        loss.backward()
        assert leaves.grad is not None
        for g in range(w.groups):
            for i in range(w.candidates):
                logprobs = self.response_logprobs(model, g, i)
                (logprobs * leaves.grad[g, i]).sum().backward()
        grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
        return {"loss": loss.detach(), "gradient": torch.cat(grads)}

    def _loss(self, target: str, logprobs: Tensor) -> Tensor:
        """The loss from ``logprobs`` [G, n, R]; the published RRHF divides by the padded length,
        the published PRO differs by its 1e-10 alone."""
        rewards = self.rewards.double()
        if target == "loss":
            return plain.loss_from_logprobs(logprobs, rewards, self.workload.loss)
        length = self.workload.prompt + self.workload.response
        losses = []
        for tokens, reward in zip(logprobs, rewards, strict=True):
            if target == "published rrhf":
                best = tokens[reward.argmax()].sum() / length
                losses.append(published.rrhf_from_scores(tokens.sum(-1) / length, reward) - best)
            else:
                order = reward.argsort(descending=True, stable=True)
                tokens, reward = tokens[order], reward[order]
                weight = 0.05 * (len(reward) - 1) ** 2
                losses.append(
                    published.pro_from_scores(tokens.mean(-1), reward) - weight * tokens[0].sum()
                )
        return torch.stack(losses).mean()


def present(problem: StepProblem, outputs: Outputs) -> Outputs:
    """All parameters' gradients as one vector: what is small is judged beside what is not."""
    grads = [
        outputs.get(name, torch.zeros_like(p)).reshape(-1)
        for name, p in problem.model.named_parameters()
    ]
    return {"loss": outputs["loss"], "gradient": torch.cat(grads)}


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
