"""What travels through engines as it is: FSDP2's own walk over arguments changes nothing of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from architectures import build
from pack_cases import one_pack, random_groups
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors

import fastrank
from fastrank.data.packing import Pack
from fastrank.outputs import Opaque


class Point(Opaque):
    x: Tensor
    name: str = "origin"


def narrowed(value):
    """As FSDP2 with ``param_dtype=torch.bfloat16`` hands on the arguments of a wrapped forward."""
    return _apply_to_tensors(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, value)


def test_a_dataclass_would_be_rebuilt_and_cast():
    """The negative control."""
    plain = dataclasses.make_dataclass("Plain", ["x"])(torch.tensor([300.01]))
    assert narrowed({"it": [plain]})["it"][0].x.dtype == torch.bfloat16


def test_an_opaque_value_is_handed_on():
    point = Point(torch.tensor([300.01]))
    found = narrowed({"it": [(point,)]})["it"][0][0]
    assert found is point and found.x.dtype == torch.float32
    assert not dataclasses.is_dataclass(point)


def test_it_is_frozen_and_can_be_copied_with_changes():
    point = Point(torch.zeros(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.name = "elsewhere"
    moved = point.replace(name="elsewhere")
    assert (moved.name, point.name) == ("elsewhere", "origin") and moved.x is point.x
    assert Point.field_names == ("x", "name") and point != Point(point.x)
    with pytest.raises(TypeError, match="nowhere"):
        point.replace(nowhere=1)
    if hasattr(copy, "replace"):
        assert copy.replace(point, name="n").name == "n"


def test_packs_survive_the_way_from_a_loader_s_process():
    pack = one_pack(random_groups(references=True))
    other = pickle.loads(pickle.dumps(pack))
    assert isinstance(other, Pack) and other.group_index == pack.group_index
    assert torch.equal(other.rewards, pack.rewards) and other.rewards.dtype == pack.rewards.dtype
    assert torch.equal(other.segments.offsets, pack.segments.offsets)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_nothing_of_ours_that_modules_take_or_return_is_rebuilt(model_type):
    """Every argument of every module while a pack is computed: values of the package's own types
    come out of the engines' walk as the same objects, tensors in them untouched."""
    model = fastrank.prepare_model(build(model_type))
    seen = set()

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            if type(value).__module__.startswith("fastrank") and not isinstance(
                value, fastrank.Loss
            ):
                seen.add(type(value).__name__)
                assert narrowed(value) is value, type(value).__name__

    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules()]
    model(pack=one_pack(), loss=fastrank.RRHF()).loss.backward()
    for handle in handles:
        handle.remove()
    assert {"Pack", "AttentionLayout"} <= seen
