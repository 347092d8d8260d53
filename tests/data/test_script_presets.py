"""The presets of the papers' scripts against float64 evaluations of what those scripts do with the
same texts: their collators' padded rows, one by one through a plain model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from char_tokenizer import make_tokenizer
from pack_cases import assert_same_gradients, take_gradients
from transformers import GPT2Config, GPT2LMHeadModel

import fastrank
from fastrank.data.published import pro_script, rrhf_script
from fastrank.errors import InputError

RESPONSES = ["a short one", "b", "the longest of all the answers", "a short two"]
REWARDS = [0.5, -1.0, 2.0, 0.5]
QUERY = "Human: what is it? "


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = GPT2Config(
        vocab_size=len(tokenizer), initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **sizes,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().train()


def through_fastrank(model, prompt):
    fastrank.prepare_model(model)
    (pack,) = fastrank.pack([prompt.group], max_tokens=1024)
    loss = model(pack=pack, loss=prompt.loss).loss
    loss.backward()
    return loss.detach()


def padded_logprobs(model, rows, labels, width):
    """[width - 1 or width] log-probabilities of each row's labels at every padded position."""
    for row, own in zip(rows, labels, strict=True):
        ids = torch.tensor([row + [0] * (width - len(row))])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row))])
        logp = model(input_ids=ids, attention_mask=mask).logits[0].log_softmax(-1)
        yield {at: logp[at, label] for at, label in own.items()}


@pytest.mark.parametrize(
    ("limit", "weight", "penalty"), [(512, 100.0, 1.0), (40, 1.0, 0.7), (25, 3.0, 0.0)]
)
def test_rrhf_counts_the_padding_and_the_beginning(tokenizer, model, limit, weight, penalty):
    """Also with responses that are cut, and their ends with them."""
    ids = tokenizer(QUERY)["input_ids"]
    rows, labels = [], []
    for text in RESPONSES:
        own = tokenizer(f"{text}</s>")["input_ids"][: limit - len(ids)]
        assert own[0] == tokenizer.bos_token_id
        rows.append(ids + own)
        labels.append({len(ids) - 1 + i: token for i, token in enumerate(own)})
    width = max(map(len, rows))
    plain = copy.deepcopy(model)
    sums = [sum(found.values()) for found in padded_logprobs(plain, rows, labels, width)]
    scores = [total / width**penalty for total in sums]
    expected = -sums[2] / width
    for i, j in ((i, j) for i in range(4) for j in range(4) if REWARDS[i] < REWARDS[j]):
        if scores[i] > scores[j]:
            expected = expected + weight * (scores[i] - scores[j])
    expected.backward()
    shared = copy.deepcopy(model)
    prompt = rrhf_script(
        QUERY, RESPONSES, REWARDS, tokenizer,
        max_length=limit, rrhf_weight=weight, length_penalty=penalty,
    )  # fmt: skip
    got = through_fastrank(shared, prompt)
    assert math.isclose(got.item(), expected.item(), rel_tol=1e-12)
    assert expected.item() > -sums[2].item() / width  # some pair is the wrong way round
    assert_same_gradients(take_gradients(shared), take_gradients(plain), 1e-12)


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [2, 1, 3, 0]], ids=["falling", "as it comes"])
@pytest.mark.parametrize("limit", [512, 140])
def test_pro_keeps_the_order_and_ends_all_but_the_longest(tokenizer, model, order, limit):
    prefix = "<|prompter|>what is it?<|assistant|>"
    text = "\n\nHuman: what is it?\n\nAssistant:"
    kept = tokenizer(text)["input_ids"]
    if len(kept) > limit - 128:  # truncation on the left keeps the BOS and the end
        kept = [kept[0], *kept[-(limit - 129) :]]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    start = len(tokenizer(text)["input_ids"])
    rewards = [REWARDS[i] for i in order]
    rows = [tokenizer(f"{text} {RESPONSES[i]}")["input_ids"][:limit] for i in order]
    width = max(map(len, rows))
    labels = []
    for row in rows:
        after = [*row, tokenizer.eos_token_id]
        labels.append({at: after[at + 1] for at in range(start - 1, min(len(row), width - 1))})
    plain = copy.deepcopy(model)
    found = list(padded_logprobs(plain, rows, labels, width))
    scores = [sum(own.values()) / len(own) for own in found]
    expected = -0.05 * 3**2 * sum(found[0].values())
    for k in range(3):
        gaps = [rewards[k] - rewards[i] for i in range(k + 1, 4)]
        others = sum((scores[k + 1 + i] * gap).exp() for i, gap in enumerate(gaps))
        own = scores[k] * max(gaps)
        expected = expected + (1e-10 + own.exp() + others).log() - own
    expected.backward()
    shared = copy.deepcopy(model)
    suffixes = [RESPONSES[i] for i in order]
    got = through_fastrank(
        shared, pro_script(prefix, suffixes, rewards, tokenizer, max_length=limit)
    )
    assert math.isclose(got.item(), expected.item(), rel_tol=1e-12)
    assert_same_gradients(take_gradients(shared), take_gradients(plain), 1e-12)


def test_what_a_preset_cannot_be(tokenizer):
    with pytest.raises(InputError, match="query must be shorter than max_length=5, got no room"):
        rrhf_script(QUERY, RESPONSES, REWARDS, tokenizer, max_length=5)
    with pytest.raises(InputError, match="sft_index must be that of the first of the best, got 0"):
        pro_script(QUERY, RESPONSES, REWARDS, tokenizer)
    merged = make_tokenizer([("?", "Ġ"), ("?Ġ", "b")])
    with pytest.raises(InputError, match="depend on what follows"):
        pro_script("is it?", ["bc", "d"], [1.0, 0.0], merged)
    assert tokenizer.truncation_side == "right"
