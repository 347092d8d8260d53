"""Training in two phases gives the gradients of joint training, a pack at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from architectures import build
from pack_cases import LARGE, one_pack, random_groups, take_gradients
from pack_cases import assert_same_gradients as assert_gradients
from torch import nn
from transformers import PreTrainedModel

import fastrank
from fastrank import Group
from fastrank.data.candidate_packs import Candidates, candidate_packs
from fastrank.modeling.cost import PackCost
from fastrank.modeling.dropout import disable_dropout
from fastrank.training.backprop import JointBackprop, TwoPhaseBackprop
from fastrank.training.engine import Engine
from fastrank.training.step_metrics import StepWindow
from fastrank.training.two_phase import two_phase_backward
from fastrank_kernels import head_cast, projection

PACK = 24
COPY = head_cast._Copy


def large_groups(seed: int = 0, *, references: bool = False) -> list[Group]:
    """One-token prompts and responses, a single candidate, and groups larger than a pack."""
    return random_groups(LARGE, seed=seed, references=references, name="data")


def llama(seed: int = 0) -> PreTrainedModel:
    return build("llama", seed=seed).train()


def joint_backward(model: nn.Module, groups: list[Group], loss, **layout):
    output = model(pack=one_pack(groups, **layout), loss=loss)
    output.loss.backward()
    return output


LOSSES = [
    fastrank.RRHF(),
    fastrank.RRHF(margin=0.3, sft_reduction="sum"),
    fastrank.PRO(),
    fastrank.ListMLE(),
    fastrank.ListNet(),
    fastrank.DPO(pairs="best_worst"),
    fastrank.LambdaRank(sft_weight=0.5),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_equal_those_of_joint_training(loss):
    model = fastrank.prepare_model(llama())
    groups = large_groups(references=loss.uses_reference)
    joint = joint_backward(model, groups, loss)
    expected = take_gradients(model)
    output = two_phase_backward(model, groups, loss=loss, max_tokens=PACK)
    assert_gradients(take_gradients(model), expected, 1e-6)
    for name in ("loss", "rank_loss", "sft_loss", "scores", "token_logprobs"):
        torch.testing.assert_close(
            getattr(output, name), getattr(joint, name).detach(), atol=2e-5, rtol=1e-5
        )
    assert output.drift < 1e-4


@pytest.mark.parametrize("shared_prompts", [True, False])
@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.ListMLE()], ids=repr)
def test_gradients_are_exact_in_float64(loss, shared_prompts):
    # Llama's norm computes in float32 whatever its input is; GPT-2 stays in float64.
    model = build("gpt2", dtype=torch.float64).train()
    fastrank.prepare_model(model, shared_prompts=shared_prompts)
    groups = [replace(group, rewards=group.rewards.double()) for group in large_groups()]
    joint_backward(model, groups, loss, shared_prompts=shared_prompts)
    expected = take_gradients(model)
    two_phase_backward(model, groups, loss=loss, max_tokens=PACK)
    assert_gradients(take_gradients(model), expected, 1e-12)


@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.ListMLE()], ids=repr)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_give_the_same_parameters(loss, optimizer):
    """SGD takes the gradients as they are; AdamW divides small ones by their own size, so that
    it starts from the same rounding only with an epsilon that is not far below them."""
    models = [fastrank.prepare_model(llama()) for _ in range(2)]
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4),
    }[optimizer]
    optimizers = [make(model.parameters()) for model in models]
    start = copy.deepcopy(models[0].state_dict())
    for step in range(20):
        groups = large_groups(seed=step % 3)
        joint_backward(models[0], groups, loss)
        two_phase_backward(models[1], groups, loss=loss, max_tokens=40)
        for stepper in optimizers:
            stepper.step()
            stepper.zero_grad()
    moved = 0.0
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        moved = max(moved, float((a - start[name]).detach().abs().max()))
        assert float((a - b).detach().abs().max()) <= 1e-5, name
    assert moved > 1e-2


def test_gradients_add_up_over_calls():
    model = fastrank.prepare_model(llama())
    groups = large_groups()
    loss = fastrank.RRHF()
    two_phase_backward(model, groups, loss=loss, max_tokens=PACK)
    expected = take_gradients(model)
    parts = groups[:2], groups[2:]
    outputs = [
        two_phase_backward(model, part, loss=loss, max_tokens=PACK, num_groups=len(groups))
        for part in parts
    ]
    assert_gradients(take_gradients(model), expected, 1e-6)
    whole = two_phase_backward(model, groups, loss=loss, max_tokens=PACK)
    torch.testing.assert_close(sum(o.loss for o in outputs), whole.loss)


def test_the_size_of_packs_does_not_matter():
    model = fastrank.prepare_model(llama())
    groups = large_groups()
    found = []
    for sizes in ({"max_tokens": 4096}, {"max_tokens": 24}, {"max_tokens": 25, "score_tokens": 40}):
        output = two_phase_backward(model, groups, loss=fastrank.PRO(), **sizes)
        found.append((take_gradients(model), output))
    for gradients, output in found[1:]:
        assert_gradients(gradients, found[0][0], 1e-6)
        torch.testing.assert_close(output.scores, found[0][1].scores, atol=1e-5, rtol=0)
    one, small, mixed = (output for _, output in found)
    assert one.tokens_scored == one.tokens_joint == sum(g.num_tokens_shared for g in groups)
    assert small.tokens_scored > mixed.tokens_scored > one.tokens_scored


def test_candidates_in_their_place_are_not_run_again():
    """RRHF without its supervised term on groups that the model ranks rightly but for one pair."""
    model = fastrank.prepare_model(llama())
    shapes = [(5, [4, 3, 6, 2])] * 3
    scores = fastrank.score(model, random_groups(shapes))
    groups = []
    for number, (group, found) in enumerate(zip(random_groups(shapes), scores, strict=True)):
        rewards = found.clone()
        if number == 1:
            order = found.argsort()
            rewards[order[0]], rewards[order[1]] = found[order[1]], found[order[0]]
        groups.append(Group(group.prompt_ids, group.response_ids, rewards))
    loss = fastrank.RRHF(sft_weight=0.0)
    joint_backward(model, groups, loss)
    expected = take_gradients(model)
    output = two_phase_backward(model, groups, loss=loss, max_tokens=PACK)
    assert_gradients(take_gradients(model), expected, 1e-6)
    order = scores[1].argsort()[:2]
    live = sum(len(groups[1].response_ids[i]) for i in order)
    assert output.tokens_backpropagated == len(groups[1].prompt_ids) + live
    assert output.live_fraction == live / 45
    joint = sum(g.num_tokens_shared for g in groups)
    assert output.work_saved == 1 - (joint + 3 * output.tokens_backpropagated) / (4 * joint)


def test_nothing_to_learn_gives_gradients_of_zero():
    """As in joint training: an optimiser's momentum must go on, which None would stop."""
    model = fastrank.prepare_model(llama())
    group = random_groups([(5, [4, 3])])[0]
    tied = Group(group.prompt_ids, group.response_ids, [1.0, 1.0])
    output = two_phase_backward(model, [tied], loss=fastrank.ListMLE(), max_tokens=PACK)
    assert (output.loss, output.live_fraction, output.tokens_backpropagated) == (0, 0, 0)
    gradients = take_gradients(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_no_group_at_all_is_a_step_of_zero():
    model = fastrank.prepare_model(llama())
    output = two_phase_backward(model, [], loss=fastrank.RRHF(), max_tokens=PACK)
    assert output.loss == 0 and len(output.scores) == 0 and output.work_saved == 0
    assert all(not gradient.any() for gradient in take_gradients(model).values())


def test_a_score_that_is_nan_reaches_the_gradients():
    model = fastrank.prepare_model(llama())
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    output = two_phase_backward(model, large_groups(), loss=fastrank.RRHF(), max_tokens=PACK)
    assert output.loss.isnan() and model.lm_head.weight.grad.isnan().any()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_with_gradient_checkpointing(use_reentrant):
    model = fastrank.prepare_model(llama())
    groups = large_groups()
    two_phase_backward(model, groups, loss=fastrank.PRO(), max_tokens=PACK)
    expected = take_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    two_phase_backward(model, groups, loss=fastrank.PRO(), max_tokens=PACK)
    assert_gradients(take_gradients(model), expected, 1e-6)


def test_under_autocast_both_phases_compute_in_bfloat16():
    model = fastrank.prepare_model(llama())
    groups = large_groups()
    with torch.autocast("cpu", torch.bfloat16):
        joint_backward(model, groups, fastrank.RRHF())
        expected = take_gradients(model)
        output = two_phase_backward(model, groups, loss=fastrank.RRHF(), max_tokens=PACK)
    got = take_gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    exact = two_phase_backward(model, groups, loss=fastrank.RRHF(), max_tokens=PACK)
    reference = take_gradients(model)
    assert 1e-4 < float((output.scores - exact.scores).abs().max()) < 0.3
    for name, gradient in reference.items():
        rounding = float((expected[name] - gradient).norm())
        assert float((got[name] - gradient).norm()) <= 2 * rounding + 1e-3, name


@pytest.mark.parametrize("way", ["two phases", "joint"])
def test_the_packs_of_a_step_share_one_narrow_head(way, monkeypatch):
    """Bit for bit what a cast per pack gives, and no copy from one step in the next."""
    found = {}
    small = [group for group in large_groups() if group.num_tokens_shared <= 64]
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(head_cast, "cast_head", lambda weight, dtype: weight.to(dtype))
            monkeypatch.setattr(projection, "cast_head", head_cast.cast_head)
        model = fastrank.prepare_model(llama())
        head = model.get_output_embeddings().weight
        kept = []
        monkeypatch.setattr(
            head_cast, "_Copy", lambda *made, kept=kept: kept.append(made) or COPY(*made)
        )
        backprop = (TwoPhaseBackprop if way == "two phases" else JointBackprop)(
            fastrank.PRO(), Engine(), torch.device("cpu"), 64, True,
            lambda: torch.autocast("cpu", torch.bfloat16), PackCost(),
        )  # fmt: skip
        batch = backprop.cutter()(small, range(len(small)))
        assert way == "two phases" or len(batch.packs) > 1
        steps = []
        for _ in range(2):
            backprop.step(model, batch, StepWindow())
            steps.append(take_gradients(model))
            head.data.mul_(0.5)  # beside the version counter, as some optimisers write
        assert len(kept) == (2 if shared else 0)
        found[shared] = steps
    for ours, plain in zip(found[True], found[False], strict=True):
        assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert not torch.equal(*(step[next(iter(step))] for step in found[True]))


def test_packs_hold_every_live_candidate_once_with_its_prompt():
    groups = large_groups()
    candidates = Candidates.of(groups)
    live = [i % 3 != 1 for i in range(len(candidates.rewards))]
    packs = candidate_packs(groups, max_tokens=PACK, live=live)
    paths = []
    for chosen in packs:
        assert chosen.pack.num_tokens <= PACK
        for span in chosen.pack.segments.groups:
            row = chosen.pack.input_ids[0]
            prompt = row[span.prompt.start : span.prompt.stop].tolist()
            paths += [(prompt, row[r.start : r.stop].tolist()) for r in span.responses]
        assert len(chosen.tokens) == len(chosen.pack.labels)
    responses = [ids for group in groups for ids in group.response_ids]
    prompts = [g.prompt_ids for g in groups for _ in g.response_ids]
    everything = torch.cat(responses)
    for chosen in packs:
        assert torch.equal(everything[chosen.tokens], chosen.pack.labels)
    expected = [
        (prompt.tolist(), ids.tolist())
        for prompt, ids, keep in zip(prompts, responses, live, strict=True)
        if keep
    ]
    assert sorted(paths) == sorted(expected)
    covered = torch.cat([chosen.tokens for chosen in packs])
    assert len(covered.unique()) == len(covered)


def test_a_candidate_larger_than_a_pack_is_named():
    model = fastrank.prepare_model(llama())
    with pytest.raises(
        ValueError, match=r"data:4: prompt and response 0 .*max_tokens=20.* 9 \+ 15"
    ):
        two_phase_backward(model, large_groups(), loss=fastrank.RRHF(), max_tokens=20)


def test_reference_scores_for_some_groups_only_are_refused():
    model = fastrank.prepare_model(llama())
    groups = large_groups(references=True)[:2] + large_groups()[2:]
    with pytest.raises(ValueError, match="for every group or for none, got 2 of 5"):
        two_phase_backward(model, groups, loss=fastrank.DPO(), max_tokens=PACK)


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(ValueError, match="prepare_model, got LlamaForCausalLM"):
        two_phase_backward(llama(), large_groups(), loss=fastrank.RRHF(), max_tokens=PACK)


@pytest.mark.parametrize(
    ("model_type", "options", "named"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, r"attn\.attn_dropout: 0.1"),
        ("gpt2", {"resid_pdrop": 0.1}, r"attn\.resid_dropout: 0.1"),
        ("gpt2", {"embd_pdrop": 0.1}, r"transformer\.drop: 0.1"),
        ("mixtral", {"router_jitter_noise": 0.02}, r"jitter_noise: 0.02"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}, r"layerdrop: 0.5"),
    ],
)
def test_every_kind_of_randomness_is_refused_by_name(model_type, options, named):
    model = fastrank.prepare_model(build(model_type, **options), shared_prompts=False)
    with pytest.raises(fastrank.InputError, match=named):
        two_phase_backward(model, large_groups(), loss=fastrank.RRHF(), max_tokens=PACK)


def test_lora_dropout_is_refused_by_name():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"])
    model = fastrank.prepare_model(peft.get_peft_model(llama(), config))
    with pytest.raises(fastrank.InputError, match=r"q_proj\.lora_dropout\.default: 0.05"):
        two_phase_backward(model, large_groups(), loss=fastrank.RRHF(), max_tokens=PACK)


def test_dropout_that_no_module_states_is_found_by_the_numbers_it_draws():
    """Falcon's residual dropout reads its rate from the configuration in every forward pass."""
    options = {"alibi": False, "parallel_attn": False, "hidden_dropout": 0.0}
    model = build("falcon", attention_dropout=0.1, head_dim=..., **options)
    disable_dropout(model)
    fastrank.prepare_model(model, shared_prompts=False)
    model.train()
    with pytest.raises(fastrank.InputError, match=r"draws random numbers.*attention_dropout=0.1"):
        two_phase_backward(model, large_groups(), loss=fastrank.RRHF(), max_tokens=PACK)


def test_a_live_token_of_probability_zero_is_no_drift():
    """Both phases find -inf for it, which is no difference."""
    model = fastrank.prepare_model(llama())
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.out_features))
    group = Group([1, 2], [[3, 4], [5, 6], [7]], [0.0, 2.0, 1.0])
    with torch.no_grad():
        head.bias[6] = -torch.inf
    output = two_phase_backward(model, [group], loss=fastrank.RRHF(), max_tokens=PACK)
    assert output.token_logprobs[3] == -torch.inf and output.live_fraction == 1.0
    assert 0 <= output.drift < 1e-4
