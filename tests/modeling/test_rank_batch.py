"""`fastrank.rank` on padded batches equals the plain loop over a model's own logits, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import adapt, build
from pack_cases import assert_same_gradients, random_groups, take_gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrank
from fastrank.modeling.prepare import head_path_of, prepared_state, release_model
from fastrank.modeling.unwrap import causal_lm

SHAPES = [(9, [3, 1, 7]), (1, [4, 2]), (6, [5]), (4, [6, 6, 2, 5])]
SIZES = [len(responses) for _, responses in SHAPES]
REWARDS = [[0.5, 2.0, 0.5], [1.0, 0.0], [3.0], [0.0, 1.0, 1.0, -2.0]]
REFERENCE = [-30.0, -9.0, -71.0, -33.0, -21.0, -50.0, -60.0, -55.0, -25.0, -44.0]
PAD = 3

MODELS = {
    "llama, untied": lambda: build("llama", dtype=torch.float64, tie_word_embeddings=False),
    "gpt2, tied": lambda: build("gpt2", dtype=torch.float64),
    "gpt2, attention dropout": lambda: build("gpt2", dtype=torch.float64, attn_pdrop=0.1),
    "gemma2, softcap": lambda: build("gemma2", dtype=torch.float64),
    "cohere, scale": lambda: build("cohere", dtype=torch.float64, logit_scale=0.3),
    "phi, bias": lambda: build("phi", dtype=torch.float64),
    "mamba": lambda: build("mamba", dtype=torch.float64),
    "lora": lambda: adapt(
        build("llama", dtype=torch.float64), target_modules=["q_proj", "v_proj"]
    ).double(),
    "lora on head": lambda: adapt(
        build("qwen3", dtype=torch.float64, tie_word_embeddings=False), target_modules=["lm_head"]
    ).double(),
}


def padded(side: str = "right", *, gap: bool = False, differ_at: int | None = None) -> dict:
    """A batch of `SHAPES`; with a gap in a row's labels, or one prompt that differs there."""
    ids, labels = [], []
    for number, group in enumerate(random_groups(SHAPES)):
        for i, response in enumerate(group.response_ids):
            prompt = group.prompt_ids.clone()
            if differ_at is not None and number == 3 and i == 2:
                prompt[differ_at] = (prompt[differ_at] + 1) % 60
            ids.append(torch.cat((prompt, response)))
            labels.append(torch.cat((torch.full_like(prompt, -100), response)))
            if gap and number == 3 and i == 1:
                labels[-1][-3] = -100
    make = {"batch_first": True, "padding_side": side}
    return {
        "input_ids": pad_sequence(ids, padding_value=PAD, **make),
        "labels": pad_sequence(labels, padding_value=-100, **make),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], **make),
    }


def plain_scores(model: nn.Module, batch: dict, normalize: str = "mean") -> Tensor:
    """[C]: the padded loop over all logits; what a training script has."""
    mask, labels = batch["attention_mask"], batch["labels"]
    kind = causal_lm(model).config.model_type
    named = {} if kind == "gemma2" else {"attention_mask": mask}
    if kind == "gpt2":  # positions count from the first real token
        named["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch["input_ids"], **named, use_cache=False).logits[:, :-1]
    keep = labels[:, 1:] != -100
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    sums = torch.where(keep, logps, 0.0).sum(1)
    return sums if normalize == "sum" else sums / keep.sum(1)


def plain_loss(loss: fastrank.Loss, scores: Tensor, reference: Tensor | None = None) -> Tensor:
    """Loops over prompts and pairs: RRHF with its supervised term, or DPO."""
    total = scores.new_zeros(())
    reference = scores.new_zeros(len(scores)) if reference is None else reference.double()
    pairs = zip(REWARDS, scores.split(SIZES), reference.split(SIZES), strict=True)
    for rewards, s, below in pairs:
        if isinstance(loss, fastrank.RRHF):
            total = total - s[rewards.index(max(rewards))]
        for i, high in enumerate(rewards):
            for j, low in enumerate(rewards):
                if high > low and isinstance(loss, fastrank.RRHF):
                    total = total + (s[j] - s[i]).clamp(min=0)
                elif high > low:
                    margin = (s - below)[i] - (s - below)[j]
                    total = total - nn.functional.logsigmoid(loss.beta * margin)
    return total / len(SIZES)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_scores_and_every_gradient_equal_the_plain_loop(kind) -> None:
    model = MODELS[kind]()
    # Most norms and all rotations are computed in float32, whatever the model's dtype.
    close = {"rtol": 1e-9, "atol": 1e-9} if "gpt2" in kind else {"rtol": 1e-6, "atol": 1e-6}
    right = padded()
    # transformers' own Mamba reads padding, and its Gemma 2 makes NaN of a row that is all masked.
    left = right if kind.startswith(("mamba", "gemma2")) else padded("left")
    for batch, extra in ((right, {}), (left, {"attention_mask": left["attention_mask"]})):
        want_scores = plain_scores(model, batch)
        want = plain_loss(fastrank.RRHF(), want_scores)
        want.backward()
        expected = take_gradients(model)
        assert all(bool(g.any()) for g in expected.values())
        out = fastrank.rank(
            model, batch["input_ids"], batch["labels"], REWARDS, loss=fastrank.RRHF(), **extra
        )
        out.loss.backward()
        torch.testing.assert_close(out.scores, want_scores.detach(), **close, check_dtype=False)
        torch.testing.assert_close(out.loss, want, **close, check_dtype=False)
        assert_same_gradients(take_gradients(model), expected, close["atol"])
    state = prepared_state(model)
    assert state.shared_prompts == (kind not in ("mamba", "gpt2, attention dropout"))


@pytest.mark.parametrize("rows", [{"gap": True}, {"differ_at": 0}, {"differ_at": 2}], ids=str)
def test_rows_that_share_no_whole_prompt_or_have_gaps(rows) -> None:
    model, batch = MODELS["gpt2, tied"](), padded("left", **rows)
    want_scores = plain_scores(model, batch, "sum")
    want = plain_loss(fastrank.RRHF(), want_scores)
    want.backward()
    expected = take_gradients(model)
    loss = fastrank.RRHF(normalize="sum", sft_reduction="sum")
    out = fastrank.rank(model, **batch, rewards=REWARDS, loss=loss)
    (3 * out.loss).backward()
    torch.testing.assert_close(out.scores, want_scores.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=1e-9)
    got = {name: gradient / 3 for name, gradient in take_gradients(model).items()}
    assert_same_gradients(got, expected, 1e-9)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_the_first_call_may_be_under_autocast(kind) -> None:
    """Gemma 2 in bfloat16 rounds so much that the check of sharing, made there, refused it."""
    model, batch = build(kind), padded()
    call = {"rewards": REWARDS, "loss": fastrank.RRHF()}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fastrank.rank(model, **batch, **call)
    assert prepared_state(model).shared_prompts and head_path_of(model).fused
    exact = fastrank.rank(model, **batch, **call)
    error = (rounded.scores - exact.scores).abs().max() / exact.scores.abs().max()
    assert 1e-5 < float(error) < 3e-2


def test_prompts_are_shared_where_it_pays() -> None:
    model, batch, lengths = MODELS["llama, untied"](), padded(), []
    handle = model.model.register_forward_hook(lambda *call: lengths.append(call[2][0].shape[:2]))
    call = {"rewards": REWARDS, "loss": fastrank.RRHF()}
    fastrank.rank(model, **batch, **call)
    assert lengths[-1] == (1, sum(prompt + sum(own) for prompt, own in SHAPES))
    fastrank.rank(model, **padded(gap=True), **call)
    assert lengths[-1] == lengths[-2]
    fastrank.rank(model, **padded(differ_at=1), **call)  # three of four tokens are no longer shared
    assert lengths[-1] == (1, lengths[-2][1] + 3 * 3)
    fastrank.rank(model, **padded(differ_at=0), **call)
    assert lengths[-1] == (sum(SIZES), 16)
    handle.remove()


def test_every_form_of_rewards_is_the_same_and_a_function_is_a_loss() -> None:
    model, batch = MODELS["llama, untied"](), padded()
    cu_groups = torch.tensor([0, 3, 5, 6, 10], dtype=torch.int32)
    flat = [reward for own in REWARDS for reward in own]
    want = fastrank.rank(model, **batch, rewards=REWARDS, loss=fastrank.PRO(), reduction="none")
    assert want.loss.shape == (4,) and bool(want.loss.any())
    for rewards, offsets in (
        (flat, cu_groups),
        (torch.tensor(flat), cu_groups.long()),
        ([torch.tensor(own) for own in REWARDS], None),
    ):
        got = fastrank.rank(
            model, **batch, rewards=rewards, cu_groups=offsets, loss=fastrank.PRO(),
            reduction="none",
        )  # fmt: skip
        torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
    # [G, n]: the same four candidates twice
    twice = {name: value[6:].repeat(2, 1) for name, value in batch.items()}
    square = torch.tensor([REWARDS[3]] * 2)
    got = fastrank.rank(model, **twice, rewards=square, loss=fastrank.PRO(), reduction="none")
    torch.testing.assert_close(got.loss, want.loss[3:].expand(2), rtol=1e-9, atol=1e-9)
    # flat without offsets: one prompt; and a loss of one's own
    one = {name: value[6:] for name, value in batch.items()}
    got = fastrank.rank(model, **one, rewards=REWARDS[3], loss=fastrank.PRO())
    torch.testing.assert_close(got.loss, want.loss[3], rtol=1e-9, atol=1e-9)
    got = fastrank.rank(model, **one, rewards=REWARDS[3], loss=lambda s, r: (s * r).sum())
    expected = (got.scores * torch.tensor(REWARDS[3])).sum()
    torch.testing.assert_close(got.loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["scores", "list per prompt", "model", "below the adapter"])
def test_the_reference_of_dpo(way) -> None:
    model, batch = MODELS["lora"](), padded("left")
    reference: dict = {}
    below = torch.tensor(REFERENCE)
    if way == "scores":
        reference = {"reference_scores": REFERENCE}
    elif way == "list per prompt":
        reference = {"reference_scores": [own.tolist() for own in below.split(SIZES)]}
    elif way == "model":
        other = MODELS["gpt2, attention dropout"]().train()
        reference = {"ref_model": other}
        with torch.no_grad():
            below = plain_scores(copy.deepcopy(other).eval(), batch, "sum")
    else:
        with torch.no_grad(), model.disable_adapter():
            below = plain_scores(model, batch, "sum")
    want = plain_loss(fastrank.DPO(), plain_scores(model, batch, "sum"), below)
    want.backward()
    expected = take_gradients(model)
    assert all("lora_" in name for name in expected)
    out = fastrank.rank(model, **batch, rewards=REWARDS, loss=fastrank.DPO(), **reference)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6)
    assert_same_gradients(take_gradients(model), expected, 1e-6)
    if way == "model":
        assert other.training and all(p.grad is None for p in other.parameters())


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model, batch = MODELS["gpt2, tied"]().train(), padded()
    names = list(model.state_dict())
    before = model(batch["input_ids"]).logits
    for _ in range(2):
        fastrank.rank(model, **batch, rewards=REWARDS, loss=fastrank.RRHF())
    state = prepared_state(model)
    assert model.training and list(model.state_dict()) == names
    assert torch.equal(model(batch["input_ids"]).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).train()
    assert torch.equal(again(batch["input_ids"]).logits, before)
    assert prepared_state(model) is state  # prepared once
    release_model(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "shifted"}, "labels must be input_ids .*not shifted.* got another token"),
        ({"labels": "none in row 2"}, "labels must have a token in every row, got none in row 2"),
        ({"labels": "all"}, "labels must leave out the first token, which none predicts in"),
        ({"attention_mask": "gap"}, "attention_mask must be one run of ones .* gap in row 1, pos"),
        ({"attention_mask": "short"}, "labels must be -100 where attention_mask is 0, got a label"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask must have the shape \[10, 16\]"),
        ({"input_ids": "large"}, "input_ids must be below the model's 61 tokens, got more in"),
        ({"rewards": [1.0, 2.0]}, "rewards must have one value for each of the 10 rows"),
        ({"rewards": [[1.0], [2.0]]}, r"rewards must have one value .* got \[1, 1\] for 2 prompts"),
        ({"rewards": [0.5] * 10}, "rewards without cu_groups .* another prompt in row 3: give a"),
        ({"rewards": [*REWARDS[:3], [0.0, float("nan"), 1.0, 2.0]]}, "rewards of prompt 3 must be"),
        ({"rewards": [*REWARDS[:3], ["a", 1, 2, 3]]}, "rewards of prompt 3 must be numbers, got"),
        ({"cu_groups": torch.tensor([0, 10])}, "cu_groups goes with flat rewards"),
        (
            {"rewards": [0.5] * 10, "cu_groups": torch.tensor([0, 4])},
            r"cu_groups must rise from 0 to 10 \(rows of input_ids\), got \[0, 4\]",
        ),
        ({"loss": fastrank.DPO()}, r"DPO\(\) needs reference_scores or ref_model, got neither"),
        ({"reference_scores": REFERENCE}, "reference_scores needs a loss with uses_reference=True"),
        (
            {"loss": fastrank.DPO(), "reference_scores": [0.0]},
            "reference_scores must have one value for each of 10 candidates",
        ),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_bad_input_is_one_line(change, message) -> None:
    batch = {**padded(), "rewards": REWARDS, "loss": fastrank.RRHF()}
    labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
    match change.get("labels", change.get("attention_mask", change.get("input_ids"))):
        case "shifted":
            change = {"labels": labels.roll(-1, 1)}
        case "none in row 2":
            labels[2] = -100
            change = {"labels": labels}
        case "all":
            labels[0, :9] = batch["input_ids"][0, :9]
            change = {"labels": labels}
        case "gap":
            mask[1, 2] = 0
            change = {"attention_mask": mask}
        case "short":
            mask[0, 11] = 0
            change = {"attention_mask": mask}
        case "large":
            ids = batch["input_ids"].clone()
            ids[4, 0] = 61
            change = {"input_ids": ids}
    model = MODELS["llama, untied"]()
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        fastrank.rank(model, **(batch | change))
    assert "\n" not in str(raised.value)
