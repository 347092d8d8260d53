"""What prepare_model and prepared models refuse, each in one line that says what to do."""

from __future__ import annotations

import pytest
import torch
from architectures import COMMON, build
from pack_cases import one_pack, random_groups, separate_scores
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fastrank
from fastrank.attention.adapter import shared_prompt_attention
from fastrank.errors import InputError
from fastrank.modeling.dropout import disable_dropout
from fastrank.modeling.prepare import prepared_state


@pytest.mark.parametrize(
    ("model_type", "fields", "name"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "GPT2Attention.attn_dropout = 0.1"),
        ("llama", {"attention_dropout": 0.2}, "LlamaAttention.attention_dropout = 0.2"),
    ],
)
def test_attention_dropout_is_refused_until_it_is_off(model_type, fields, name):
    model = build(model_type, **fields)
    with pytest.raises(InputError, match=f"attention dropout must be 0, got {name}"):
        fastrank.prepare_model(model)
    assert prepared_state(model) is None
    assert disable_dropout(model)
    groups = random_groups()
    expected = separate_scores(model.train(), groups).detach()
    fastrank.prepare_model(model)
    torch.testing.assert_close(model(pack=one_pack()).scores, expected, atol=1e-5, rtol=0)


def test_dropout_switched_on_later_is_refused_in_the_forward():
    model = fastrank.prepare_model(build("llama")).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(
        ValueError, match="attention dropout must be 0 with shared prompts, got 0.1"
    ):
        model(pack=one_pack())
    assert model.config._attn_implementation == "sdpa"


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(TypeError, match="must be a transformers causal language model.*Linear"):
        fastrank.prepare_model(torch.nn.Linear(2, 2))
    llama = build("llama")
    with pytest.raises(InputError, match="LlamaModel has no language-model head"):
        fastrank.prepare_model(LlamaModel(llama.config))
    small = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 61,
    }
    with pytest.raises(InputError, match="encoder-decoder"):
        fastrank.prepare_model(T5ForConditionalGeneration(T5Config(**small)))


def test_bidirectional_attention_is_refused():
    config = BertConfig(
        **{k: COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        num_attention_heads=4, intermediate_size=32, attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0, max_position_embeddings=64, is_decoder=False,
        initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(InputError, match="BertLMHeadModel cannot share prompts"):
        fastrank.prepare_model(BertLMHeadModel(config).eval())
    with pytest.raises(InputError, match="BertLMHeadModel is not causal: a token's hidden state"):
        fastrank.prepare_model(BertLMHeadModel(config).eval(), shared_prompts=False)


def test_alibi_is_refused():
    pytest.importorskip("transformers.models.falcon")
    model = build("falcon", alibi=True, num_kv_heads=4, head_dim=..., hidden_dropout=0.0)
    with pytest.raises(InputError, match="ALiBi biases count packed indices"):
        fastrank.prepare_model(model)


def test_a_model_that_mixes_tokens_unseen_is_caught_at_the_start():
    """No configuration tells that this layer reads its neighbour; the start-up check does."""
    model = build("llama")

    def mix(module, args, output):
        return output + torch.nn.functional.pad(output, (0, 0, 1, -1))

    model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(InputError, match="differ from those in a row of its own"):
        fastrank.prepare_model(model)
    assert prepared_state(model) is None and "forward" not in vars(model)


def test_packs_are_not_what_restarted_positions_alone_give():
    """The control of the matrix: without the layout only the first response is right."""
    model = build("llama")
    groups = random_groups([(7, [5, 5, 5])])
    expected = separate_scores(model, groups).detach()
    pack = one_pack(groups)
    with torch.no_grad():
        logits = model(input_ids=pack.input_ids, position_ids=pack.position_ids).logits[0]
    logp = logits.log_softmax(-1)[pack.rows].gather(1, pack.labels[:, None])[:, 0]
    naive = fastrank.sequence_scores(logp, pack.cu_responses)
    error = (naive - expected).abs()
    assert error[0] < 1e-5 and (error[1:] > 1e-2).all()
    prepared = fastrank.prepare_model(model)(pack=pack).scores
    assert ((prepared - expected).abs() < 1e-5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": fastrank.RRHF()}, "loss needs pack="),
        ({"pack": ..., "input_ids": torch.ones(1, 2).long()}, "takes no other model inputs.*input"),
    ],
)
def test_forward_arguments_that_contradict_each_other(arguments, message):
    model = fastrank.prepare_model(build("llama"))
    given = {k: one_pack() if v is ... else v for k, v in arguments.items()}
    with pytest.raises(TypeError, match=message):
        model(**given)


def test_unknown_backends_and_backends_that_do_not_serve():
    model = build("llama")
    expected = "attention must be one of auto, cpu, merge, varlen, flex, segmentwise"
    with pytest.raises(ValueError, match=expected):
        fastrank.prepare_model(model, attention="magic")
    fastrank.prepare_model(model, attention="flex")
    with pytest.raises(ValueError, match="attention='flex' cannot serve a full layer .* on cpu"):
        model(pack=one_pack())


@pytest.mark.parametrize("attention", ["cpu", "segmentwise"])
def test_backends_by_name_agree(attention):
    model = fastrank.prepare_model(build("llama"), attention=attention)
    expected = fastrank.prepare_model(build("llama"))
    got, reference = model(pack=one_pack()).scores, expected(pack=one_pack()).scores
    torch.testing.assert_close(got, reference, atol=1e-5, rtol=0)


def test_the_attention_implementation_is_restored_after_an_error():
    model = fastrank.prepare_model(build("llama"))
    segments = one_pack().segments
    with pytest.raises(RuntimeError, match="inside"):
        with shared_prompt_attention([model.config], segments, "auto"):
            assert model.config._attn_implementation == "fastrank"
            raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation_internal = "fastrank"
    with pytest.raises(RuntimeError, match="serves packs only"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_disable_dropout_says_what_it_changed():
    model = build("gpt2", attn_pdrop=0.1, embd_pdrop=0.2)
    changed = disable_dropout(model)
    assert "transformer.drop: 0.2" in changed
    assert any("attn_dropout: 0.1" in line for line in changed)
    assert disable_dropout(model) == []


def test_the_auxiliary_loss_of_experts_is_said_to_be_left_out(caplog):
    model = build("qwen3_moe", output_router_logits=True)
    fastrank.prepare_model(model)
    assert "auxiliary load-balancing loss" in caplog.text
    groups = random_groups()
    expected = separate_scores(model, groups).detach()
    torch.testing.assert_close(model(pack=one_pack()).scores, expected, atol=1e-5, rtol=0)
    caplog.clear()
    fastrank.prepare_model(build("qwen3_moe"))
    assert "auxiliary" not in caplog.text
