"""A pack through a prepared model equals a separate forward pass for every response."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from architectures import build
from pack_cases import (
    assert_same_gradients,
    gradients,
    one_pack,
    random_groups,
    separate_loss,
    separate_scores,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastrank
from fastrank.modeling.prepare import release_model


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gpt2"])
def model(request) -> PreTrainedModel:
    return build(request.param)


@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.DPO()], ids=repr)
def test_the_loss_equals_the_loss_on_separate_scores(model, loss):
    groups = random_groups(references=loss.uses_reference)
    pack = one_pack(groups)
    scores = separate_scores(model, groups)
    if loss.normalize == "sum":
        scores = scores * (pack.cu_responses[1:] - pack.cu_responses[:-1])
    expected = separate_loss(model, groups, loss)
    reference = gradients(model, expected, torch.tensor(1.0))

    fastrank.prepare_model(model)
    output = model(pack=pack, loss=loss)
    assert isinstance(output, fastrank.RankingOutput)
    torch.testing.assert_close(output.loss, expected.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.scores, scores.detach(), atol=1e-4, rtol=0)
    got = gradients(model, output.loss, torch.tensor(1.0))
    assert_same_gradients(got, reference, 1e-5)


def test_calls_without_a_pack_are_what_they_were(model):
    untouched = copy.deepcopy(model)
    fastrank.prepare_model(model)
    rows = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    assert torch.equal(
        model(input_ids=rows, attention_mask=mask).logits,
        untouched(input_ids=rows, attention_mask=mask).logits,
    )
    labelled = model(rows, labels=rows)
    assert torch.equal(labelled.loss, untouched(rows, labels=rows).loss)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(rows, **options), untouched.generate(rows, **options))


def test_the_signature_and_the_checkpoint_are_unchanged(model, tmp_path):
    signature = inspect.signature(model.forward)
    names = sorted(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    fastrank.prepare_model(model)
    assert inspect.signature(model.forward) == signature
    assert sorted(model.state_dict()) == names
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        before, after = ((tmp_path / side / file).read_bytes() for side in ("before", "after"))
        assert before == after
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(loaded) is type(model)


def test_a_copy_of_a_prepared_model_is_one_of_its_own(model):
    pack = one_pack()
    fastrank.prepare_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(pack=pack).scores
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(pack=pack).scores, before)
        assert not torch.allclose(other(pack=pack).scores, before)


def test_release_gives_the_model_back(model):
    before = dict(model.__dict__)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    fastrank.prepare_model(model)
    release_model(model)
    assert model.__dict__.keys() == before.keys()
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
