"""Every kind of output head that people have: value and gradients equal the plain computation.

The plain computation is a forward pass of the model itself for every response, head and adapters
included, with log-softmax and the loss on top.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import adapt, build
from pack_cases import (
    assert_same_gradients,
    one_pack,
    random_groups,
    separate_loss,
    separate_scores,
    take_gradients,
)
from torch import Tensor, nn

import fastrank
from fastrank.errors import InputError
from fastrank.modeling.prepare import head_path_of, prepared_state, release_model


def llama(*, tied: bool = False, **changed) -> nn.Module:
    return build("llama", tie_word_embeddings=tied, **changed)


def with_bias() -> nn.Module:
    model = build("phi")
    nn.init.normal_(model.lm_head.bias)
    return model


def with_forbidden_token() -> nn.Module:
    """A bias of -inf on a token that no response has."""
    model = with_bias()
    used = {int(x) for group in random_groups() for ids in group.response_ids for x in ids}
    unused = next(i for i in range(model.config.vocab_size) if i not in used)
    with torch.no_grad():
        model.lm_head.bias[unused] = float("-inf")
    return model


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(names))
        return model

    return make


def adapted(*, tied: bool = False, **options) -> Callable[[], nn.Module]:
    return lambda: adapt(llama(tied=tied), **options)


class Int8Linear(nn.Linear):
    """Quantised as a subclass with integer weights, as bitsandbytes does it."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        scale = source.weight.detach().abs().amax() / 127
        codes = (source.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class DequantizingHead(nn.Module):
    """Quantised as a module of its own."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.inner = Int8Linear(source)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class QuantizedTensor(Tensor):
    """Quantised as a tensor subclass inside a plain ``nn.Linear``, as torchao does it: its dtype
    claims to be float, and its memory holds something else."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def whole(x):
            return x.codes.to(x.scale.dtype) * x.scale if isinstance(x, cls) else x

        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return func(*(whole(x) for x in args), **(kwargs or {}))


def with_head(change: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = llama()
        model.lm_head = change(model.lm_head)
        return model

    return make


def quantized_weight(head: nn.Linear) -> nn.Linear:
    source = Int8Linear(head)
    head.weight = nn.Parameter(QuantizedTensor(source.weight.data, source.scale), False)
    return head


def parametrized(head: nn.Linear) -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(head)


def hooked(head: nn.Linear) -> nn.Linear:
    head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return head


def forward_replaced(head: nn.Linear) -> nn.Linear:
    """As accelerate attaches its hooks, and some patches theirs."""
    original = head.forward
    head.forward = lambda x: original(x) + 0.3 * x.sum(-1, keepdim=True).cos()
    return head


def temperature(head: nn.Linear) -> nn.Module:
    return nn.Sequential(head, nn.Tanh())


# kind: (builder, whether the fused loss multiplies the head)
KINDS = {
    "untied": (llama, True),
    "tied": (lambda: llama(tied=True), True),
    "frozen head": (frozen("lm_head"), True),
    "frozen trunk": (frozen("model"), True),
    "bias": (with_bias, True),
    "forbidden token": (with_forbidden_token, True),
    "softcap": (lambda: build("gemma2"), True),
    "scale": (lambda: build("cohere", logit_scale=0.3), True),
    "parametrized": (with_head(parametrized), True),
    "lora on head": (adapted(target_modules=["q_proj", "lm_head"]), False),
    "lora on head alone": (adapted(target_modules=["lm_head"]), False),
    "lora on trunk": (adapted(target_modules=["q_proj", "v_proj"]), True),
    "dora on head": (adapted(target_modules=["lm_head"], use_dora=True), False),
    "saved head": (adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), True),
    "saved tied head": (
        adapted(tied=True, target_modules=["q_proj"], modules_to_save=["lm_head"]), True,
    ),
    "lora on tied embedding": (adapted(tied=True, target_modules=["embed_tokens"]), True),
    "trainable tokens": (
        adapted(tied=True, target_modules=["q_proj"], trainable_token_indices=[3, 7]), False,
    ),
    "int8 subclass": (with_head(Int8Linear), False),
    "int8 module": (with_head(DequantizingHead), False),
    "int8 tensor": (with_head(quantized_weight), False),
    "hook": (with_head(hooked), False),
    "forward replaced": (with_head(forward_replaced), False),
    "two modules": (with_head(temperature), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:Model has `tie_word_emb")
def test_value_and_every_gradient_equal_the_plain_computation(kind):
    make, fused = KINDS[kind]
    model = make()
    groups = random_groups()
    expected = separate_loss(model, groups, fastrank.RRHF())
    expected.backward()
    reference = take_gradients(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert reference.keys() == trainable and all(g.any() for g in reference.values())

    fastrank.prepare_model(model)
    pack = one_pack(groups)
    output = model(pack=pack, loss=fastrank.RRHF())
    path = head_path_of(model)
    assert path.fused == fused, path
    torch.testing.assert_close(output.loss, expected.detach(), atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert_same_gradients(take_gradients(model), reference, 1e-5)

    output = fastrank.two_phase_backward(model, groups, loss=fastrank.RRHF(), max_tokens=40)
    torch.testing.assert_close(output.loss, expected.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(take_gradients(model), reference, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantized_head():
    """torch's own int8 head has no gradient by its inputs: it can be scored with. Its activations
    are rounded on a scale of all rows of a call, so a pack rounds a little differently."""
    model = llama()
    groups = random_groups()
    with torch.no_grad():
        exact = separate_scores(model, groups)
        torch.ao.quantization.quantize_dynamic(model, {"lm_head"}, inplace=True)
        expected = separate_scores(model, groups)
    fastrank.prepare_model(model)
    scores = torch.cat(fastrank.score(model, groups, max_tokens=4096))
    rounding = float((expected - exact).abs().max())
    assert 1e-4 < rounding < 0.1
    assert 0 < float((scores - exact).abs().max()) <= 2 * rounding


@pytest.mark.parametrize("casts", [True, False], ids=["casting hook", "no hook"])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_float32_head_over_a_bfloat16_trunk(casts, frozen_head):
    """Without the hook the model could not even make its own logits."""
    model = llama(dtype=torch.bfloat16)
    model.lm_head.float().requires_grad_(not frozen_head)
    if casts:
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    fastrank.prepare_model(model)
    pack = one_pack()

    # The plain head on the trunk's own hidden rows of the same pack: everything after the trunk.
    rows = []
    handle = model.model.register_forward_hook(lambda *call: rows.append(call[2][0]))
    output = model(pack=pack, loss=fastrank.RRHF())
    output.loss.backward()
    got = take_gradients(model)
    model(pack=pack)
    handle.remove()
    logits = model.lm_head(rows[1][0][pack.rows].float())
    assert output.token_logprobs.dtype == logits.dtype == torch.float32
    logp = logits.log_softmax(-1).gather(1, pack.labels[:, None]).squeeze(1)
    torch.testing.assert_close(output.token_logprobs, logp.detach(), atol=1e-5, rtol=1e-5)
    scores = fastrank.sequence_scores(logp, pack.cu_responses)
    expected = fastrank.ranking_loss(
        scores, pack.rewards, loss=fastrank.RRHF(), cu_groups=pack.cu_groups
    )
    for first, stop in zip(pack.cu_groups[:-1], pack.cu_groups[1:], strict=True):
        expected = expected - scores[first + pack.rewards[first:stop].argmax()] / pack.num_groups
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    reference = take_gradients(model)
    assert got.keys() == reference.keys() and ("lm_head.weight" in got) != frozen_head
    for name, gradient in reference.items():
        assert got[name].dtype == gradient.dtype
        # The trunk's gradients start from rows rounded to bfloat16 in either way.
        tolerance = 1e-5 if name.startswith("lm_head") else 2e-2
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


def test_the_head_follows_adapters_that_come_and_go():
    peft = pytest.importorskip("peft")
    groups = random_groups()
    model = fastrank.prepare_model(llama())

    def check() -> Tensor:
        with torch.no_grad():
            expected = separate_scores(model, groups)
        scores = torch.cat(fastrank.score(model, groups, max_tokens=4096))
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        return scores

    bare = check()
    saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(model, saved)
    wrapped.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    )
    model = fastrank.prepare_model(wrapped)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = [bare, check()]
    wrapped.set_adapter("other")
    found.append(check())
    with wrapped.disable_adapter():
        torch.testing.assert_close(check(), bare)
    wrapped.delete_adapter("other")
    wrapped.set_adapter("default")
    torch.testing.assert_close(check(), found[1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[a], found[b], atol=1e-3)
    model = fastrank.prepare_model(wrapped.merge_and_unload())
    torch.testing.assert_close(check(), found[1], atol=1e-5, rtol=0)


class Partitioned:
    """What ZeRO-3 does to a parameter, as far as a forward pass sees it: outside of its own
    module's forward the data is gone, and it carries DeepSpeed's attributes."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.whole = module, module.weight.data
        module.weight.ds_id, module.weight.ds_shape = 0, module.weight.shape
        module.register_forward_pre_hook(lambda *_: self.gather())
        self.release()

    def gather(self) -> None:
        self.module.weight.data = self.whole

    def release(self) -> None:
        self.module.weight.data = self.whole.new_empty(0)


def test_a_zero3_partitioned_head_is_gathered_by_its_own_forward():
    model = llama()
    groups = random_groups()
    expected = separate_loss(model, groups, fastrank.RRHF())
    expected.backward()
    reference = take_gradients(model)
    head = Partitioned(model.lm_head)
    fastrank.prepare_model(model)
    pack = one_pack(groups)
    for _ in range(2):
        head.release()
        output = model(pack=pack, loss=fastrank.RRHF())
        assert head_path_of(model).fused
        torch.testing.assert_close(output.loss, expected.detach(), atol=1e-5, rtol=1e-5)
        output.loss.backward()
        assert_same_gradients(take_gradients(model), reference, 1e-5)


# ---- the head's own forward ------------------------------------------------------------------


def halved(module, inputs, output):
    return output * 0.5


def doubled_input(module, inputs):
    return (inputs[0] * 2,)


@pytest.mark.parametrize("change", ["forward hook", "global hook", "backward hook", "input hook"])
def test_a_hook_on_the_head_takes_effect_whenever_it_comes(change, caplog):
    model = fastrank.prepare_model(llama())
    groups = random_groups()
    assert head_path_of(model).fused
    seen = []
    if change == "forward hook":
        handle = model.lm_head.register_forward_hook(halved)
    elif change == "global hook":

        def halved_head(module, inputs, output):
            return output * 0.5 if module is model.lm_head else None

        handle = nn.modules.module.register_module_forward_hook(halved_head)
    elif change == "backward hook":
        handle = model.lm_head.register_full_backward_hook(
            lambda module, before, after: seen.append(after[0].shape[-1])
        )
    else:
        handle = model.lm_head.register_forward_pre_hook(doubled_input)
    try:
        expected = separate_loss(model, groups, fastrank.RRHF())
        expected.backward()
        reference = take_gradients(model)
        seen.clear()
        path = head_path_of(model)
        assert path.fused == (change == "input hook")
        if not path.fused:
            assert "hook on the head" in path.reason
        output = model(pack=one_pack(groups), loss=fastrank.RRHF())
        assert ("the head path changes" in caplog.text) != path.fused
        torch.testing.assert_close(output.loss, expected.detach(), atol=1e-5, rtol=1e-5)
        output.loss.backward()
        assert_same_gradients(take_gradients(model), reference, 1e-5)
        assert set(seen) == ({model.config.vocab_size} if change == "backward hook" else set())
    finally:
        handle.remove()
    assert head_path_of(model).fused


def test_an_input_hook_from_the_start_is_measured_with_the_head():
    """Not taken for a scale of the logits and then applied a second time."""
    model = build("cohere", logit_scale=0.5)
    groups = random_groups()
    model.lm_head.register_forward_pre_hook(doubled_input)
    expected = separate_loss(model, groups, fastrank.RRHF())
    fastrank.prepare_model(model)
    assert head_path_of(model).fused
    output = model(pack=one_pack(groups), loss=fastrank.RRHF())
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


def test_a_path_that_was_asked_for_is_taken_or_refused_by_name():
    model = llama()
    expected = separate_loss(model, random_groups(), fastrank.RRHF())
    fastrank.prepare_model(model, head_path="logits")
    assert head_path_of(model) == (False, "asked for")
    output = model(pack=one_pack(), loss=fastrank.RRHF())
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)

    fastrank.prepare_model(model, head_path="fused")
    model(pack=one_pack(), loss=fastrank.RRHF())
    handle = model.lm_head.register_forward_hook(halved)
    with pytest.raises(InputError, match=r"head_path=fused .* forward hook on the head .*halved"):
        model(pack=one_pack(), loss=fastrank.RRHF())
    handle.remove()
    model(pack=one_pack(), loss=fastrank.RRHF())

    refused = KINDS["dora on head"][0]()
    with pytest.raises(InputError, match="head_path=fused is not possible: the head is a"):
        fastrank.prepare_model(refused, head_path="fused")
    assert prepared_state(refused) is None
    with pytest.raises(ValueError, match="head_path must be one of 'auto', 'fused', 'logits'"):
        fastrank.prepare_model(llama(), head_path="fast")


def test_the_head_is_left_as_it_was():
    model = llama()
    before = model.lm_head(torch.ones(2, 3, model.config.hidden_size))
    fastrank.prepare_model(model)
    assert torch.equal(model.lm_head(torch.ones(2, 3, model.config.hidden_size)), before)
    twin = copy.deepcopy(model)
    assert twin.lm_head.forward.__self__ is twin.lm_head
    release_model(model)
    assert "forward" not in vars(model.lm_head)
