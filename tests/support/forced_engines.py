"""accelerate's own FSDP2 and DeepSpeed code on CPU processes: ``forced_engines.py OUT CASE ...``.

On a CPU accelerate turns FSDP2 into DDP without a word. Told that it runs on one GPU per process
over gloo, it takes the code that users run. Each case trains for a few AdamW steps and leaves, for
each process, the whole weights, the log, an evaluation, and how every pack was computed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pack_cases import tied_groups
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.modeling import prepare
from fastrank.tasks.menu import tiny_llama
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer

STEPS = 4
GLOBAL_BATCH = 12

# Functions of torch.distributed that move weights and gradients, some by their new and old name.
_GATHERS = ("all_gather_single", "all_gather_into_tensor")
_REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce", "reduce")

# What `accelerate launch` sets from a configuration file.
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
_ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ENGINES = {
    "fsdp2": _FSDP2,
    "zero2": {**_ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**_ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "tensor parallel": {},  # transformers shards the model when it is loaded
}


@dataclass(frozen=True)
class Case:
    engine: str
    tied: bool = False
    two_phase: bool = False
    bf16: bool = False

    @property
    def name(self) -> str:
        words = [self.engine, "bf16" if self.bf16 else "float32", "tied" if self.tied else "untied"]
        return "-".join([*words, "two_phase" if self.two_phase else "joint"])


def cases(*engines: str, pairs: bool = False) -> dict[str, Case]:
    """All combinations, or as many as bring together every two choices."""
    made = [
        Case(engine, tied, two_phase, narrow)
        for engine in engines
        for narrow in (False, True)
        for tied in (False, True)
        for two_phase in (False, True)
        if not pairs or narrow == (tied != two_phase)
    ]
    return {case.name: case for case in made}


CASES = cases("fsdp2") | cases("zero2", "zero3", pairs=True)


def close_groups() -> list[Group]:
    """Rewards from 300.00 in steps of 0.01, with ties: in bfloat16 all of them are equal."""
    return [
        Group(g.prompt_ids, g.response_ids, 300 + 0.01 * g.rewards, name=g.name)
        for g in tied_groups(11, 6)
    ]


#: Comparable steps: a constant rate, no clipping, nothing saved.
STEADY: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1000.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_model(tied: bool) -> PreTrainedModel:
    model = tiny_llama(0)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    return model


def make_trainer(folder: Path, case: Case, world_size: int, **more: Any) -> RankTrainer:
    config = RankConfig(
        output_dir=str(folder / f"run-{case.name}"),
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        max_steps=STEPS,
        **STEADY,
        max_tokens=24 if case.two_phase else 60,
        backprop="two_phase" if case.two_phase else "joint",
        head_path="fused",
        bf16=case.bf16,
        **more,
    )
    groups = close_groups()
    return RankTrainer(make_model(case.tied), config, groups, groups[:7])


class Watch:
    """Counts how packs are computed, what is sent in each step, the dtypes of results and of
    gradients on their way, and the bytes of gradients that are held after every pass."""

    def __init__(self) -> None:
        self.paths: Counter[str] = Counter()
        self.dtypes: Counter[str] = Counter()
        self.reduced: Counter[str] = Counter()
        self.gathers: Counter[int] = Counter()
        self.scatters: Counter[int] = Counter()
        self.steps: list[dict[str, Any]] = []

    @contextmanager
    def watching(self, trainer: RankTrainer) -> Iterator[None]:
        def count(name: str, function: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.paths[name] += 1
                return function(*args, **kwargs)

            return counted

        fused, logits = prepare.call_head, prepare.logits_fallback
        step, evaluate = trainer.backprop.step, trainer.backprop.evaluate
        synchronising = trainer.engine.synchronising

        def stepped(*args: Any) -> Any:
            self.gathers, self.scatters = Counter(), Counter()
            self.steps.append({"held": []})
            result = step(*args)
            self.steps[-1] |= {"gathers": dict(self.gathers), "scatters": dict(self.scatters)}
            for part in result.computed:
                self._note(part.output, part.candidates.rewards)
            return result

        def evaluated(*args: Any) -> Any:
            result = evaluate(*args)
            if result is not None:
                self._note(result.output, result.candidates.rewards)
            return result

        @contextmanager
        def synchronised(*args: Any) -> Iterator[None]:
            with synchronising(*args):
                yield
            self.steps[-1]["held"].append(gradient_bytes(trainer))

        with ExitStack() as stack:
            stack.enter_context(_listening(self))
            for place, name, function in (
                (prepare, "call_head", count("fused", fused)),
                (prepare, "logits_fallback", count("logits", logits)),
                (trainer.backprop, "step", stepped),
                (trainer.backprop, "evaluate", evaluated),
                (trainer.engine, "synchronising", synchronised),
            ):
                stack.enter_context(mock.patch.object(place, name, function))
            yield

    def _note(self, output: Any, rewards: Tensor) -> None:
        for tensor in (*output, rewards):
            self.dtypes[str(tensor.dtype)] += 1


@contextmanager
def _listening(watch: Watch) -> Iterator[None]:
    """Tell a watch what is sent meanwhile."""
    if not _listeners:  # DeepSpeed keeps the functions that it finds first: replace them once
        for name in (*_GATHERS, *_REDUCTIONS):
            if hasattr(dist, name):
                setattr(dist, name, _heard(getattr(dist, name), name in _GATHERS))
    _listeners.append(watch)
    yield
    _listeners.append(None)


_listeners: list[Watch | None] = []


def _heard(function: Any, gathers: bool) -> Any:
    def heard(*args: Any, **kwargs: Any) -> Any:
        tensor = _largest(*args, *kwargs.values())
        watch = _listeners[-1]
        # Not a norm, nor a flag.
        if watch is not None and tensor.is_floating_point() and tensor.numel() > 1:
            (watch.gathers if gathers else watch.scatters)[tensor.numel()] += 1
            if not gathers:
                watch.reduced[str(tensor.dtype)] += 1
        return function(*args, **kwargs)

    return heard


def _largest(*arguments: Any) -> Tensor:
    """What is whole on every process, be it sent or received."""
    return max((a for a in arguments if isinstance(a, Tensor)), key=Tensor.numel)


def gradient_bytes(trainer: RankTrainer) -> int:
    """Bytes of gradients that this process holds, wherever the engine keeps them."""
    held = [p.grad for p in trainer.model.parameters()]
    for group in fsdp_groups(trainer.model):
        for own in group.fsdp_params:
            held += [own.unsharded_accumulated_grad, own.unsharded_param.grad]
    zero = getattr(trainer.optimizer, "optimizer", None)
    for name in ("averaged_gradients", "all_grad_tensors"):
        held += [t for part in getattr(zero, name, {}).values() for t in part or []]
    partitions = getattr(zero, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    held += partitions.values()
    local = [t.to_local() if isinstance(t, DTensor) else t for t in held if t is not None]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in local}.values())


def fsdp_groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    return list({id(group): group for group in groups}.values())


def run_case(folder: Path, case: Case, world_size: int) -> dict[str, Any]:
    trainer = make_trainer(folder, case, world_size)
    watch = Watch()
    with watch.watching(trainer):
        trainer.train()
        evaluation = trainer.evaluate()
    saved = folder / f"saved-{case.name}"
    trainer.save_model(str(saved))
    weights = whole_weights(trainer)
    return {
        "engine": _engine(trainer),
        "looks_first": trainer._guard.looks_first,
        "weights": weights,
        "bad": bad_weights(trainer),
        "refusal": skip_refusal(folder, case, world_size),
        "log": [row for row in trainer.state.log_history if "grad_norm" in row],
        "evaluation": evaluation,
        "paths": dict(watch.paths),
        "dtypes": dict(watch.dtypes),
        "reduced": dict(watch.reduced),
        "steps": watch.steps,
        "head_unit": head_unit_numel(trainer),
    }


def head_unit_numel(trainer: RankTrainer) -> int:
    """Numbers that are sent when FSDP2 gathers the head's unit: rows padded for every process."""
    head = trainer.lm.lm_head.weight
    world_size = trainer.engine.world_size
    for group in fsdp_groups(trainer.model):
        if any(own.sharded_param is head for own in group.fsdp_params):
            shapes = [own._orig_size for own in group.fsdp_params]
            return sum(-(-s[0] // world_size) * world_size * s[1:].numel() for s in shapes)
    return 0


def _engine(trainer: RankTrainer) -> str:
    accelerator = trainer.accelerator
    if accelerator.is_fsdp2:
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        return "fsdp2"
    if accelerator.deepspeed_plugin is not None:
        return f"zero{accelerator.deepspeed_plugin.zero_stage}"
    return str(accelerator.distributed_type)


def whole_weights(trainer: RankTrainer) -> dict[str, Tensor]:
    return {
        name: _whole(parameter).detach().clone() for name, parameter in _named(trainer.lm).items()
    }


def skip_refusal(folder: Path, case: Case, world_size: int) -> str | None:
    """Why DeepSpeed cannot skip bad records."""
    if not case.engine.startswith("zero"):
        return None
    try:
        make_trainer(folder, case, world_size, nonfinite="skip")
    except InputError as error:
        return str(error)
    return None


def bad_weights(trainer: RankTrainer) -> list[str]:
    """What is found when the first process's part of the head holds a NaN."""
    head = trainer.lm.lm_head.weight
    if trainer.engine.rank == 0:
        local = head.to_local() if isinstance(head, DTensor) else getattr(head, "ds_tensor", head)
        with torch.no_grad():
            local.view(-1)[0] = torch.nan
    return trainer._guard.bad_weights(trainer.lm)


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _whole(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def force_engine(name: str) -> None:
    """Let accelerate take the next trainer's model to an engine, whatever the device."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    def on_gloo(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    for known in {key for environment in ENGINES.values() for key in environment}:
        os.environ.pop(known, None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", **ENGINES[name]}
    PartialState._prepare_backend = on_gloo
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if name.startswith("zero"):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # needs a compiler


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        force_engine(CASES[name].engine)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        result = run_case(folder, CASES[name], world_size)
        torch.save(result, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
