"""Copies of a prepared model are prepared models of their own; one model serves one thread."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack_cases import tied_groups
from torch import nn

from fastrank import RRHF, pack, prepare_model
from fastrank.modeling.prepare import prepared_state, release_model
from fastrank.tasks.menu import tiny_llama


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def seen(module: nn.Module, args: Any) -> None:
    """A hook of somebody else, which copies keep."""
    module.calls = getattr(module, "calls", 0) + 1


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["plain", "adapter", "padded", "within"])
def test_a_copy_is_a_prepared_model_of_its_own(how: str, kind: str) -> None:
    model: Any = tiny_llama(0)
    model.lm_head.register_forward_pre_hook(seen)
    if kind == "adapter":
        model = _adapted(model)
    shared = kind != "padded"
    prepare_model(model, shared_prompts=shared)
    (chosen,) = pack(tied_groups(3, 5), max_tokens=4096, shared_prompts=shared)
    given = nn.ModuleDict({"policy": model}) if kind == "within" else model
    copied = COPIES[how](given)
    other = copied["policy"] if kind == "within" else copied
    assert type(other) is type(model) and prepared_state(other) is not None
    own, theirs = (m.state_dict() for m in (model, other))
    assert own.keys() == theirs.keys() and not any(
        own[name].data_ptr() == theirs[name].data_ptr() for name in own
    )
    expected = model(pack=chosen, loss=RRHF())
    found = other(pack=chosen, loss=RRHF())
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    found.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    heads = [
        next(head for head in each.modules() if hasattr(head, "calls")) for each in (model, other)
    ]
    assert heads[0] is not heads[1]
    release_model(other)
    assert prepared_state(other) is None and prepared_state(model) is not None
    assert not other(input_ids=ids).logits.any()
    with pytest.raises((TypeError, ValueError)):
        other(pack=chosen)
    torch.testing.assert_close(model(pack=chosen).scores, expected.scores, rtol=0, atol=0)


def test_another_thread_is_told_that_the_model_is_in_use() -> None:
    model = prepare_model(tiny_llama(0))
    (chosen,) = pack(tied_groups(3, 5), max_tokens=4096)
    expected = model(pack=chosen).scores
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)

    layer = model.model.layers[0]
    handle = layer.register_forward_hook(wait)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model(pack=chosen).scores))
    thread.start()
    assert inside.wait(60)
    for call in (
        lambda: model(pack=chosen),
        lambda: model(pack=chosen, loss=RRHF()),
        lambda: model(input_ids=torch.tensor([[1, 2, 3]])),
    ):
        with pytest.raises(RuntimeError, match="computing a pack in another thread: call it from"):
            call()
    go_on.set()
    thread.join()
    handle.remove()
    for scores in (found[0], model(pack=chosen).scores):
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)
