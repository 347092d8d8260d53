"""`RankTrainer`: transformers' ``Trainer`` for groups of ranked candidates.

What it inherits: optimisers, schedules, DDP, FSDP2, DeepSpeed, trackers, callbacks, resuming. What
it does by itself: cutting a step into packs (`fastrank.training.batching`), the loss over them,
evaluation on packs, log values, checkpoints that are whole or not there, and stopping before
bad numbers spread.

The loss is computed inside the wrapped module's forward, ``model(pack=…, loss=…)``: on the bare
model DDP and FSDP would silently synchronise nothing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from fastrank.data.columns import group_sizes, largest_ids
from fastrank.data.packing import Group
from fastrank.errors import InputError
from fastrank.modeling.dropout import disable_dropout
from fastrank.modeling.prepare import prepare_model
from fastrank.modeling.reference_scores import ReferenceGroups
from fastrank.training.adapters import adapt
from fastrank.training.batching import (
    NumberedGroups,
    PackDataset,
    StepBatch,
    StepCutter,
    StepLoader,
    StepSampler,
    too_large,
)
from fastrank.training.config import RankConfig
from fastrank.training.determinism import check_deterministic
from fastrank.training.evaluation import evaluate_packs, summarize
from fastrank.training.failures import TrainingStopped
from fastrank.training.guards import Computed, GuardedTrainer
from fastrank.training.memory import explained_out_of_memory, largest_fitting
from fastrank.training.progress import RankProgress
from fastrank.training.step_metrics import StepWindow
from fastrank.training.two_phase import Phases
from fastrank.training.two_phase_step import evaluate_groups, trainer_phases, two_phase_step

logger = logging.getLogger(__name__)


class RankTrainer(GuardedTrainer):
    """Trains a causal language model to rank the candidates of each prompt.

    Args:
        model: a transformers causal language model, PEFT-wrapped or not; it is prepared in place.
        args: a `RankConfig`.
        train_dataset: the groups to train on.
        eval_dataset: groups held out, or a dictionary of such lists by name.
        processing_class: the tokenizer, saved beside the model.
        peft_config: a PEFT configuration to wrap the model with.
        callbacks, optimizers: as for ``Trainer``.

    Raises:
        InputError: no group, a group that fits no pack or holds tokens the model does not have, a
            loss that needs reference scores which the groups do not have.
    """

    args: RankConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: RankConfig | None = None,
        train_dataset: Sequence[Group] | None = None,
        eval_dataset: Sequence[Group] | dict[str, Sequence[Group]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        # The loop must see one batch a step; how many groups that is stays in groups_per_step.
        args = copy.copy(args if args is not None else RankConfig())
        self.groups_per_step = args.groups_per_step
        args.gradient_accumulation_steps = 1
        if eval_dataset is None:
            args.eval_strategy = "no"
        self.loss = args.ranking_loss
        self.max_tokens = args.max_tokens
        for name, groups in _named_sets(train_dataset, eval_dataset):
            self._check_groups(name, groups, model, args)
        if peft_config is not None:
            model = adapt(model, peft_config, args.seed)
        self.disabled_dropout = disable_dropout(model) if args.disable_dropout else []
        prepare_model(model, attention=args.attention, shared_prompts=args.shared_prompts)
        if args.two_phase:
            check_deterministic(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=_unused_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(RankProgress(self.args.disable_tqdm))

    def _check_groups(
        self, name: str, groups: Sequence[Group], model: nn.Module, args: RankConfig
    ) -> None:
        if not len(groups):
            raise InputError(f"{name} must hold at least one group, got none")
        vocab_size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        sizes = args.tokens_at_once(group_sizes(groups))
        for i in np.flatnonzero(sizes > args.max_tokens)[:1]:
            raise InputError(too_large(groups[i], int(sizes[i]), args.max_tokens))
        largest = largest_ids(groups)
        for i in np.flatnonzero(largest >= vocab_size)[:1]:
            raise InputError(
                f"{groups[i].name or name}: token ids must be below the model's {vocab_size}, "
                f"got {largest[i]}; is this the model's own tokenizer?"
            )
        if self.loss.uses_reference and not isinstance(groups, ReferenceGroups):
            for group in groups:
                if group.reference_scores is None:
                    raise InputError(
                        f"{group.name or name}: the loss {args.loss} needs reference_scores, "
                        "got none"
                    )

    def run_plan(self) -> dict[str, Any]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return {
            "groups_per_step": self.groups_per_step,
            "num_groups": 0 if self.train_dataset is None else len(self.train_dataset),  # type: ignore[arg-type]
            "data_seed": seed,
        }

    def run_notes(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def before_training(self, notes: dict[str, Any] | None) -> None:
        if not self.args.auto_find_pack_size:
            return
        if notes is not None and "max_tokens" in notes:
            self.max_tokens = notes["max_tokens"]  # the same packs give the same bits
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "auto_find_pack_size cannot try packs under FSDP or DeepSpeed; set max_tokens"
            )
        groups: Any = self.train_dataset
        mine = largest_fitting(self.lm, groups, self.loss, self.args, self.accelerator.autocast)
        self.max_tokens = min(self._gather([mine]))
        if self.max_tokens < self.args.max_tokens:
            logger.warning("auto_find_pack_size: packs of at most %d tokens", self.max_tokens)

    # ---- data ----------------------------------------------------------------------------

    def _cutter(self) -> StepCutter:
        return StepCutter(
            max_tokens=self.max_tokens,
            shared_prompts=self.args.shared_prompts,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            whole_groups=self.args.two_phase,
        )

    def _phases(self, model: nn.Module) -> Phases:
        return trainer_phases(
            model,
            self.loss,
            max_tokens=self.max_tokens,
            world_size=self.args.world_size,
            synchronising=lambda last: self._synchronising(model, last),
            backward=self._backward,
        )

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None")
        groups: Any = self.train_dataset
        sampler = StepSampler(
            len(groups),
            self.groups_per_step,
            seed=self.run_plan()["data_seed"],
            drop_last=self.args.dataloader_drop_last,
        )
        if not len(sampler):
            raise InputError(
                f"a step needs {self.groups_per_step} groups and dataloader_drop_last leaves out "
                f"the rest, got {len(groups)} groups"
            )
        return StepLoader(
            NumberedGroups(groups),
            batch_sampler=sampler,
            collate_fn=self._cutter(),
            **self._loader_options(),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        groups: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(groups, str):
            groups = self.eval_dataset[groups]  # type: ignore[index]
        if groups is None:
            raise ValueError("eval_dataset must be given to evaluate, got None")
        if groups is not self.eval_dataset:
            self._check_groups("eval_dataset", groups, self.lm, self.args)
        return DataLoader(
            PackDataset(groups, self._cutter()), batch_size=None, **self._loader_options()
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _loader_options(self) -> dict[str, Any]:
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        }
        if workers:
            options["persistent_workers"] = self.args.dataloader_persistent_workers
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        return options

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        del num_batches, device  # one batch is one step; the loss is normalised here by groups
        batch = next(epoch_iterator, None)
        return ([] if batch is None else [batch]), None

    def get_total_train_batch_size(self, args: Any) -> int:
        return self.groups_per_step

    def num_examples(self, dataloader: DataLoader) -> int:
        dataset: Any = dataloader.dataset
        return len(dataset.groups)

    # ---- a step --------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: StepBatch,  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward over this process's packs of one step.

        Returns:
            The loss, times the number of processes, of this process's groups over those of the
            whole
            step: its mean over the processes is the step's loss, as for gradients.
        """
        started = time.perf_counter()
        self._begin_step(inputs)
        self._step_loss, self._computed = self._accumulate(model, inputs)
        self._window.add_step(time.perf_counter() - started)
        return self._step_loss

    def _accumulate(self, model: nn.Module, batch: StepBatch) -> tuple[Tensor, Computed]:
        model.train()
        _switch(self.optimizer, "train")
        if self.args.two_phase:
            with self.compute_loss_context_manager():
                return two_phase_step(self._phases(model), batch, self._window)
        total = torch.zeros((), device=self.args.device)
        computed: Computed = []
        last = len(batch.packs) - 1
        for number, (pack, weight) in enumerate(zip(batch.packs, batch.weights, strict=True)):
            with (
                explained_out_of_memory(pack, self.max_tokens),
                self._synchronising(model, number == last),
                self.compute_loss_context_manager(),
            ):
                pack = pack.to(self.args.device, non_blocking=True)
                output = model(pack=pack, loss=self.loss, reduction="sum")
                # DDP and FSDP take the mean over processes, so the sum needs their number.
                scale = weight * self.args.world_size / batch.num_groups
                self._backward(output.loss * scale)
            if weight:
                total += output.loss.detach() * scale
                computed.append((pack, output._replace(loss=output.loss.detach())))
        return total, computed

    def _synchronising(
        self, model: nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between processes with the last pack only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def _backward(self, loss: Tensor) -> None:
        options = {}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            options["scale_wrt_gas"] = False  # the loss is normalised already
        self.accelerator.backward(loss, **options)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 operations a weight and token (forward and backward), embeddings included."""
        parameters = sum(p.numel() for p in self.lm.parameters())
        return 6 * parameters * inputs.num_tokens

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs.num_tokens, device=self.args.device)
            total = self.accelerator.gather(tokens).sum().item()
            self.state.num_input_tokens_seen += total

    # ---- what is reported -----------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.steps:
            extra = self._window.summary(self.loss, self._gather)
            loss = logs.pop("loss")
            rest = dict(logs)
            logs.clear()
            logs.update({"loss": loss, **extra, **rest})
            self._window = StepWindow()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores every group of the loader; the result is the same on every process.

        ``predictions`` is one float32 array of scores a group, in the order of the data set.
        """
        model = self._evaluation_model()
        self.callback_handler.eval_dataloader = dataloader
        was_training = model.training
        model.eval()
        _switch(self.optimizer, "eval")
        on_step: Callable[[], None] = self._on_prediction_step
        if self.args.two_phase:
            evaluated = evaluate_groups(self._phases(model), dataloader, on_step)
        else:
            evaluated = evaluate_packs(
                model, dataloader, self.loss, self.args.device, self.max_tokens, on_step
            )
        found = summarize(evaluated, self._gather)
        model.train(was_training)
        if found.bad and self.args.nonfinite == "stop":
            dataset: Any = dataloader.dataset
            raise TrainingStopped(self._bad_evaluation(dataset.groups, found.bad))
        return EvalLoopOutput(
            predictions=found.scores,  # type: ignore[arg-type]
            label_ids=found.rewards,  # type: ignore[arg-type]
            metrics={f"{metric_key_prefix}_{name}": value for name, value in found.values.items()},
            num_samples=len(found.scores),
        )

    def _on_prediction_step(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _evaluation_model(self) -> nn.Module:
        """The model to call: wrapped already while training, otherwise prepared once here."""
        if self.model_wrapped is not self.model or len(self.accelerator._models):
            return self.model_wrapped
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("with FSDP or DeepSpeed, evaluate during or after train(), not before")
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)


def _switch(optimizer: Any, mode: str) -> None:
    """Schedule-free optimisers have a training and an evaluation mode."""
    if callable(getattr(optimizer, mode, None)):
        getattr(optimizer, mode)()


def _unused_collator(items: list[Any]) -> dict[str, Any]:
    """Keeps ``Trainer`` from making one that pads; the loaders made here cut packs instead."""
    raise TypeError("RankTrainer's loaders cut packs; a data collator is never called")


def _named_sets(train: Any, evaluation: Any) -> list[tuple[str, Sequence[Group]]]:
    sets = [] if train is None else [("train_dataset", train)]
    if isinstance(evaluation, dict):
        sets += [(f"eval_dataset {name!r}", groups) for name, groups in evaluation.items()]
    elif evaluation is not None:
        sets.append(("eval_dataset", evaluation))
    return sets
