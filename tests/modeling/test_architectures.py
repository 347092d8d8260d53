"""The matrix: every supported architecture in packs, every refused one in padded rows."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    FLOAT32_INSIDE,
    REFUSED,
    SHAREABLE,
    WITH_IMAGES,
    build,
    build_with_images,
)
from pack_cases import (
    RAGGED,
    assert_same_gradients,
    gradients,
    one_pack,
    random_groups,
    separate_scores,
)
from transformers import PreTrainedModel

import fastrank
from fastrank.attention.gate import refusal
from fastrank.errors import InputError
from fastrank.modeling.pretrained import load_model


def assert_exact(
    model: PreTrainedModel,
    score_tolerance: float,
    gradient_tolerance: float,
    shapes=RAGGED,
    shared_prompts: bool = True,
) -> None:
    """Scores and gradients of every response in a pack are those of separate forward passes."""
    groups = random_groups(shapes)
    expected = separate_scores(model, groups)
    weights = torch.linspace(-1.5, 2.0, len(expected), dtype=expected.dtype)
    reference = gradients(model, expected, weights)
    fastrank.prepare_model(model, shared_prompts=shared_prompts)
    pack = one_pack(groups, shared_prompts=shared_prompts)
    assert pack.group_index == tuple(range(len(groups)))
    scores = model(pack=pack).scores
    assert scores.dtype == expected.dtype
    torch.testing.assert_close(scores, expected.detach(), atol=score_tolerance, rtol=0)
    assert_same_gradients(gradients(model, scores, weights), reference, gradient_tolerance)


@pytest.mark.parametrize("model_type", SHAREABLE)
def test_packs_are_exact_in_float32(model_type):
    assert_exact(build(model_type), 1e-5, 1e-5)


@pytest.mark.parametrize("shared_prompts", [True, False])
@pytest.mark.parametrize("model_type", WITH_IMAGES)
def test_models_of_images_and_text_are_exact_on_text(model_type, shared_prompts):
    model = build_with_images(model_type).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name and "vision" not in name)
    assert_exact(model, 1e-6, 1e-6, shared_prompts=shared_prompts)


@pytest.mark.parametrize("model_type", WITH_IMAGES)
def test_models_of_images_and_text_are_loaded_from_a_folder(model_type, tmp_path):
    model = build_with_images(model_type)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


@pytest.mark.parametrize("model_type", SHAREABLE)
def test_packs_are_exact_in_float64(model_type):
    scores = 1e-6 if model_type in FLOAT32_INSIDE else 1e-7
    assert_exact(build(model_type).double(), scores, 1e-6)


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("shared_prompts", [True, False])
def test_padded_rows_are_as_exact_as_packs(model_type, changed, shared_prompts):
    assert_exact(build(model_type, **changed), 1e-5, 1e-5, shared_prompts=shared_prompts)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_share_is_refused_and_exact_without(model_type):
    reason, _ = REFUSED[model_type]
    model = build(model_type)
    with pytest.raises(InputError, match=rf"cannot share prompts: .*{reason}.*shared_prompts=Fal"):
        fastrank.prepare_model(model)
    assert "\n" not in refusal(model)
    assert_exact(model, 1e-5, 1e-5, shared_prompts=False)


def test_a_shared_pack_for_a_model_without_sharing_is_an_error():
    model = fastrank.prepare_model(build("mamba"), shared_prompts=False)
    with pytest.raises(ValueError, match="was prepared with shared_prompts=False"):
        model(pack=one_pack())


CHECKPOINTED = (
    *("llama", "gpt2", "qwen2", "qwen3"),
    *("gemma2", "gpt_oss", "llama4_text", "mistral", "nemotron", "stablelm", "qwen3_moe"),
)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", CHECKPOINTED)
def test_gradient_checkpointing_is_exact(model_type, use_reentrant):
    model, pack = build(model_type), one_pack()
    implementation = model.config._attn_implementation
    weights = torch.linspace(-1.5, 2.0, pack.num_candidates)
    fastrank.prepare_model(model)
    model.train()
    expected = gradients(model, model(pack=pack).scores, weights)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = []
    layers = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    scores = model(pack=pack).scores
    forward = len(calls)
    assert model.config._attn_implementation == implementation
    assert_same_gradients(gradients(model, scores, weights), expected, 1e-6)
    assert len(calls) > forward  # layers did run again
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("model_type", ["mistral", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("size", [1, 2, 8, 16, 40])
def test_windows_and_chunks_count_positions(model_type, size):
    model = build(model_type, sliding_window=size, attention_chunk_size=size)
    assert_exact(model, 1e-5, 1e-5, [(7, [3, 12]), (1, [2, 9, 1]), (13, [6])])


def longrope(boundary: int) -> dict[str, object]:
    return {
        "original_max_position_embeddings": boundary,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings":
            boundary, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    }  # fmt: skip


@pytest.mark.parametrize("boundary", [40, 5])
@pytest.mark.parametrize("shared_prompts", [True, False])
def test_longrope_is_exact_on_either_side_of_its_boundary(boundary, shared_prompts):
    model = build("phi3", **longrope(boundary))
    shapes = [(7, [3, 1, 9]), (5, [4, 2]), (12, [5])]
    assert_exact(model, 1e-5, 1e-5, shapes, shared_prompts)


@pytest.mark.parametrize("shared_prompts", [True, False])
def test_longrope_refuses_a_pack_on_both_sides(shared_prompts):
    model = fastrank.prepare_model(build("phi3", **longrope(9)), shared_prompts=shared_prompts)
    groups = random_groups([(7, [3, 1, 9]), (5, [4, 2])])
    pack = one_pack(groups, shared_prompts=shared_prompts)
    message = "up to 9 tokens differently .* group 1 with 7 and group 0 with 16; pack them apart"
    with pytest.raises(ValueError, match=message):
        model(pack=pack)


def dynamic(limit: int) -> dict[str, object]:
    return {
        "max_position_embeddings": limit,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    }


def test_dynamic_rope_is_exact_within_its_length_and_refused_beyond():
    assert_exact(build("llama", **dynamic(17)), 1e-5, 1e-5)
    model = fastrank.prepare_model(build("llama", **dynamic(17)))
    pack = one_pack(random_groups([(7, [3, 11])]))
    with pytest.raises(ValueError, match="model's context of 17 tokens, got 18"):
        model(pack=pack)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_fixed_rope_scalings_are_exact(kind):
    parameters = {
        "rope_type": kind, "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    if kind != "llama3":
        parameters = {k: v for k, v in parameters.items() if not k.endswith("freq_factor")}
    assert_exact(build("llama", rope_parameters=parameters), 1e-5, 1e-5)


def test_the_context_limits_sequences_and_not_packs():
    model = fastrank.prepare_model(build("gpt2", n_positions=16, max_position_embeddings=...))
    pack = one_pack(random_groups([(7, [9, 9, 9]), (3, [4, 5])]))
    assert pack.num_tokens > 16
    assert bool(torch.isfinite(model(pack=pack).scores).all())
    pack = one_pack(random_groups([(1, [2]), (7, [9, 10])]))
    with pytest.raises(ValueError, match="group 1: prompt and response must fit .* 16 .* got 17"):
        model(pack=pack)
