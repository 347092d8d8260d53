"""PEFT-wrapped models: prepared after or before wrapping, saved as ever, odd methods refused."""

from __future__ import annotations

import pytest
import torch
from architectures import adapt, build
from pack_cases import assert_same_gradients, gradients, one_pack, random_groups, separate_scores
from peft import PromptTuningConfig, get_peft_model

import fastrank
from fastrank.errors import InputError


def adapted():
    targets = ["q_proj", "v_proj", "down_proj"]
    return adapt(build("llama"), target_modules=targets, task_type="CAUSAL_LM").eval()


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_adapters_take_part_and_get_the_gradients(use_reentrant):
    model = adapted()
    groups = random_groups()
    expected = separate_scores(model, groups)
    weights = torch.linspace(-1.5, 2.0, len(expected))
    reference = gradients(model, expected, weights)
    assert reference and all("lora" in name for name in reference)
    assert fastrank.prepare_model(model) is model
    if use_reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    pack = one_pack(groups)
    scores = model(pack=pack).scores
    torch.testing.assert_close(scores, expected.detach(), atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, scores, weights), reference, 1e-5)
    with model.disable_adapter(), torch.no_grad():
        plain = model(pack=pack).scores
    assert not torch.allclose(plain, scores, atol=1e-3)


def test_wrapping_a_prepared_model_works_as_well():
    base = fastrank.prepare_model(build("llama"))
    model = adapt(base, target_modules="all-linear", task_type="CAUSAL_LM")
    groups = random_groups()
    expected = separate_scores(model.eval(), groups).detach()
    pack = one_pack(groups)
    torch.testing.assert_close(model(pack=pack).scores, expected, atol=1e-5, rtol=0)
    assert model(pack=pack, loss=fastrank.PRO()).loss.requires_grad


def test_the_adapter_checkpoint_is_unchanged(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "before")
    fastrank.prepare_model(model).save_pretrained(tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        before, after = ((tmp_path / side / file).read_bytes() for side in ("before", "after"))
        assert before == after


def test_virtual_tokens_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build("llama"), config)
    with pytest.raises(InputError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        fastrank.prepare_model(model)
