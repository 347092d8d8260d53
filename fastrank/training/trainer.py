"""`RankTrainer`: transformers' ``Trainer`` for groups of ranked candidates.

It inherits optimisers, schedules, DDP, FSDP2, DeepSpeed, trackers, callbacks and resuming. It
replaces the data (a step is cut into packs, `fastrank.training.batching`), the computation over
them (`fastrank.training.backprop`) and the log values. Checkpoints are whole or not there
(`fastrank.training.checkpoint`); a run stops before bad numbers spread
(`fastrank.training.guards`).

The loss is computed inside the wrapped module's forward, ``model(pack=…, loss=…)``: on the bare
model DDP and FSDP would silently synchronise nothing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from fastrank.data.locks import locked_folder
from fastrank.data.packing import Group
from fastrank.data.report import Report
from fastrank.data.streamed_groups import StreamedGroups
from fastrank.errors import InputError, TrainingInterrupted, TrainingStopped
from fastrank.hf_private import NOT_CALLED, TrainerHooks
from fastrank.modeling.cost import PackCost
from fastrank.modeling.dropout import disable_dropout
from fastrank.modeling.mesh import is_sharded
from fastrank.modeling.prepare import prepare_model, token_statistics
from fastrank.training import checkpoint, plan
from fastrank.training.adapters import adapt
from fastrank.training.backprop import JointBackprop, StepResult, TwoPhaseBackprop
from fastrank.training.batching import (
    PackDataset,
    StepBatch,
    StepCutter,
    StepDataset,
    StepLoader,
    StepSampler,
    loader_options,
)
from fastrank.training.callbacks import RankProgress, Renewal
from fastrank.training.checkpoint import Saver, explained_loading
from fastrank.training.config import RankConfig
from fastrank.training.early_checks import check_best_metric, uses_evaluation
from fastrank.training.engine import AccelerateEngine
from fastrank.training.guards import FiniteGuard, name_groups
from fastrank.training.inputs import (
    as_groups,
    as_model,
    check_groups,
    check_stream,
    check_trainable,
    each_set,
    length_limits,
)
from fastrank.training.interrupts import Interruption
from fastrank.training.memory import largest_fitting
from fastrank.training.model_card import (
    card_text,
    keep_foreign_card,
    renew_card,
    write_card,
)
from fastrank.training.references import attach_reference, reference_of
from fastrank.training.step_metrics import (
    Evaluated,
    StepWindow,
    summarize,
    warn_of_supervision,
)
from fastrank.training.two_phase import check_deterministic
from fastrank.training.whole_state import (
    load_optimizer_state,
    load_weights,
    whole_optimizer_state,
)

logger = logging.getLogger(__name__)


class RankTrainer(TrainerHooks, Trainer):
    """Trains a causal language model to rank the candidates of each prompt.

    Args:
        model: a transformers causal language model, PEFT-wrapped or not, which is prepared in
            place; or the folder or Hub name of one.
        args: a `RankConfig`.
        train_dataset: the groups to train on, or records of any known format, which
            ``processing_class`` makes tokens of as ``fastrank train`` does: a path, a
            `datasets.Dataset`, an iterable of dictionaries. A `datasets.IterableDataset` is read as
            training goes on, in its own order; it needs ``max_steps``, and a resumed run reads it
            up to where it was. Every process reads all of it and takes its part of each step. A
            dictionary of sets is refused. See `fastrank.load_groups` for other ways of reading.
        eval_dataset: groups or records held out, or a dictionary of such by name, whose metrics
            are ``eval_NAME_…``.
        processing_class: the tokenizer, saved beside the model; by default that of a model given by
            its name.
        peft_config: a PEFT configuration to wrap the model with.
        quantization_config: how the weights of a model by name are quantised when it is loaded,
            e.g. transformers' ``BitsAndBytesConfig``; it needs ``peft_config``.
        ref_model: the reference of a loss that uses one, a model or the name or folder of one; by
            default ``model`` as it is before training, without its adapter. It scores groups that
            have no ``reference_scores`` once, here; scores of a model by name are kept in the cache
            folder.
        compute_metrics: called after an evaluation with an ``EvalPrediction`` whose ``predictions``
            and ``label_ids`` are lists of one float32 array [n] per group, scores and rewards in
            the order of the data set. The dictionary that it returns is logged beside fastrank's
            own values, with their prefix (``eval_``).
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.

    Raises:
        InputError: no group, a group that fits no pack or holds tokens the model does not have;
            records that cannot be used, or that come without a tokenizer; a stream without
            ``max_steps``.

    Example::

        trainer = RankTrainer(
            "Qwen/Qwen3-0.6B",
            RankConfig(output_dir="run", loss="rrhf"),
            train_dataset=[
                {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1.0, 0.0]},
            ],
        )
        trainer.train()
    """

    args: RankConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module,
        args: RankConfig | None = None,
        train_dataset: Sequence[Group] | Any | None = None,
        eval_dataset: Sequence[Group] | dict[str, Any] | Any | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        quantization_config: Any | None = None,
        ref_model: str | Path | nn.Module | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        _refuse_overridden(type(self))
        # Trainer's loop must see one batch per step; groups_per_step keeps how many groups that is.
        given = args if args is not None else RankConfig()
        if not isinstance(given, RankConfig):
            raise InputError(
                f"args must be a fastrank.RankConfig, got {type(given).__name__}: RankConfig takes "
                "the same options, and those of ranking"
            )
        args = copy.copy(given)
        self.groups_per_step = given.groups_over(given.world_size)
        args.gradient_accumulation_steps = 1
        if compute_metrics is None:
            check_best_metric(given)
        if eval_dataset is None:
            option = uses_evaluation(args)
            if option is not None:
                raise InputError(f"{option} needs evaluations, got no eval_dataset")
            args.eval_strategy = "no"
        self.loss = args.ranking_loss
        self.reports: list[Report] = []
        model, processing_class = as_model(model, processing_class, given, quantization_config)
        check_trainable(model, adapted=peft_config is not None)
        reference = reference_of(ref_model, model, args, tokenizer=processing_class)
        train_dataset, eval_dataset = self._groups(
            train_dataset, eval_dataset, processing_class, model, reference, args
        )
        if peft_config is not None:
            model = adapt(model, peft_config, args.seed)
        self.disabled_dropout = disable_dropout(model) if args.disable_dropout else []
        prepare_model(
            model,
            attention=args.attention,  # type: ignore[arg-type]
            shared_prompts=args.shared_prompts,
            head_path=args.head_path,
        )
        if args.two_phase:
            check_deterministic(model)
        # Trainer refuses to checkpoint a model that was sharded when it was loaded: it cannot write
        # the optimiser's state, `fastrank.training.whole_state` can.
        args.save_only_model = given.save_only_model or is_sharded(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=_unused_collator,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args.save_only_model = given.save_only_model
        if self.is_deepspeed_enabled and args.nonfinite == "skip":
            raise InputError(
                "nonfinite=skip is not possible under DeepSpeed, whose backward pass takes the "
                "optimiser's step before the numbers can be looked at; expected stop"
            )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(RankProgress(self.args.disable_tqdm))
        self._renewal = Renewal()
        self.add_callback(self._renewal)
        self.engine = AccelerateEngine(self.accelerator, self.lm)
        self._interruption = Interruption(alone=self.engine.num_processes == 1)
        self.add_callback(self._interruption)
        self.groups_per_step = given.groups_over(self.engine.world_size)
        if isinstance(train_dataset, StreamedGroups):
            train_dataset.length = args.max_steps * self.groups_per_step
            train_dataset.num_held = max(train_dataset.num_held, 2 * self.groups_per_step)
        self.backprop = (TwoPhaseBackprop if args.two_phase else JointBackprop)(
            loss=self.loss,
            engine=self.engine,
            device=args.device,
            max_tokens=args.max_tokens,
            shared_prompts=args.shared_prompts,
            computing=self.compute_loss_context_manager,
            cost=PackCost.of_model(self.lm),
            split_groups=args.split_groups,
        )
        run_dir = Path(args.output_dir or ".")
        self._guard = FiniteGuard(self.engine, run_dir, not self.is_deepspeed_enabled)
        staging_name = self.engine.gather_all([checkpoint.new_staging_name()])[0]
        self._saver = Saver(args.should_save, self.accelerator.wait_for_everyone, staging_name)
        self._window = StepWindow()
        self.model_card()  # a template that cannot be used is known before anything is trained
        self._first_log = True
        self.scores_at: dict[str, dict[int, list[np.ndarray]]] = {}
        """By prefix and step, of the latest evaluation and the best: a float32 array per group."""
        self._uncounted = 0  # tokens of this process that the state does not know
        self._plan: dict[str, Any] = {}
        self._saved: tuple[int, int] | None = None

    @property
    def max_tokens(self) -> int:
        """Of a pack; ``auto_find_pack_size`` may lower it."""
        return self.backprop.max_tokens

    @property
    def lm(self) -> nn.Module:
        """The model that is trained, without the wrapper of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def model_step(self) -> int:
        """The step after which the weights were as they are now: the last, or the best one's."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if best and not self.is_in_train:
            return self.state.best_global_step or 0
        return self.state.global_step

    @property
    def is_sharded(self) -> bool:
        """Whether no process can run the model alone."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.lm)

    def _groups(
        self,
        train: Any,
        evaluation: Any,
        tokenizer: Any,
        model: nn.Module,
        reference: str | nn.Module | None,
        args: RankConfig,
    ) -> tuple[Any, Any]:
        """Groups of what was given to train on and to evaluate on, checked, and with the scores of
        a reference where there is one."""

        def made(name: str, data: Any) -> Sequence[Group]:
            groups = as_groups(
                name,
                data,
                tokenizer,
                lambda: length_limits(args, model),
                lambda group: self._check_groups(name, [group], model, args),
                reports=self.reports,
                quiet=args.process_index > 0,
            )
            if not isinstance(groups, StreamedGroups):
                groups = self._referenced(name, groups, reference, args)
                self._check_groups(name, groups, model, args)
                return groups
            check_stream(name, args, self.loss)
            return groups

        return each_set(made, train, evaluation)

    def _referenced(
        self,
        name: str,
        groups: Sequence[Group],
        reference: str | nn.Module | None,
        args: RankConfig,
    ) -> Sequence[Group]:
        """The groups with reference scores, where there is a reference to give them."""
        if reference is None or not len(groups):
            return groups
        return attach_reference(name, groups, reference, args)

    def _check_groups(
        self, name: str, groups: Sequence[Group], model: nn.Module, args: RankConfig
    ) -> None:
        check_groups(name, groups, model, args, self.loss)

    # ---- a run ---------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer.train``; ``True`` or ``"true"`` resumes from the latest undamaged
        checkpoint, ``"auto"`` too, or starts anew if there is none yet.

        Raises:
            InputError: there is no checkpoint, it is damaged, or of a run that differs in more
                than ``resume_changed`` allows; another run is writing ``output_dir``.
            TrainingInterrupted: Ctrl-C or SIGTERM came, in the main thread: after a whole step,
                with a checkpoint of it; another Ctrl-C, a second later, raises
                ``KeyboardInterrupt`` at once.
        """
        run_dir = Path(self.args.output_dir or ".")
        with self._writing_alone(run_dir) as alone:
            return self._train(run_dir, alone, resume_from_checkpoint, *args, **kwargs)

    @contextlib.contextmanager
    def _writing_alone(self, run_dir: Path) -> Iterator[bool]:
        """Context of a run; all processes fail together if another run has the folder."""
        with contextlib.ExitStack() as stack:
            alone, problem = False, None
            try:
                if self.args.should_save:
                    alone = stack.enter_context(locked_folder(run_dir, "output_dir"))
            except InputError as error:
                problem = str(error)
            for found in self.engine.gather_all([problem]):
                if found is not None:
                    raise InputError(found)
            yield alone

    def _train(
        self,
        run_dir: Path,
        alone: bool,
        resume_from_checkpoint: str | bool | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`train`, in a folder that no other run writes (if ``alone``)."""
        found = checkpoint.resolve_resume(
            resume_from_checkpoint,
            run_dir,
            checksums=self.args.should_save,  # one process reads all bytes, for all of them
            gather=self.engine.gather_all,
        )
        self._plan = self.run_plan()
        self._uncounted = 0
        self._check_same_data()
        self._renewal.changed = frozenset()
        if found is not None:
            self._renewal.changed = self._check_resumed(found)
        self._saver.clean(run_dir, alone=alone)
        self._saved = None
        if self.args.auto_find_pack_size:
            notes = {} if found is None else checkpoint.read_notes(found)
            if "max_tokens" in self._renewal.changed:
                notes = {}
            # A resumed run takes the size it had: the same packs give the same bits.
            self.backprop.max_tokens = notes.get("max_tokens") or self._fitting_pack_size()
        with (
            explained_loading(found),
            self._interruption.watching(says=self.is_world_process_zero()),
        ):
            result = super().train(None if found is None else str(found), *args, **kwargs)
        if self.interrupted:
            raise self._interrupted_error(run_dir)
        return result

    @property
    def interrupted(self) -> bool:
        return bool(self._interruption.agreed)

    def after_epoch(self, save: Callable[[], None]) -> None:
        request = torch.tensor([-self._interruption.requested], device=self.args.device)
        (least,) = self.engine.least(request)
        self._interruption.agreed = -least
        if not self.interrupted:
            return
        if self._saved != self._progress():
            only_model, self.args.save_only_model = self.args.save_only_model, False
            self.control.should_training_stop = False  # as it would be without the signal
            save()
            self.args.save_only_model = only_model
        self.control.should_training_stop = True

    def _progress(self) -> tuple[int, int]:
        """Steps done, and rows logged: what a checkpoint of the same state shares."""
        return self.state.global_step, len(self.state.log_history)

    def _interrupted_error(self, run_dir: Path) -> TrainingInterrupted:
        step, signum = self.state.global_step, self._interruption.agreed
        saved = run_dir / checkpoint.checkpoint_name(step)
        return TrainingInterrupted(
            f"interrupted ({signal.Signals(signum).name}) after step {step} of "
            f"{self.state.max_steps}, which {saved} holds",
            signum=signum,
            checkpoint=saved,
            is_first=self.is_world_process_zero(),
        )

    def _check_same_data(self) -> None:
        """Every process plans the whole step and takes its part: of the same groups."""
        everyone = self.engine.gather_all([self._plan["data"]])
        for rank, data in enumerate(everyone):
            if data != everyone[0]:
                raise InputError(
                    "train_dataset must be the same on every process, each of which takes its part "
                    f"of a step, got {everyone[0]} on process 0 and {data} on process {rank}; do "
                    "not divide it (split_dataset_by_node, shard)"
                )

    def _check_resumed(self, found: Path) -> frozenset[str]:
        """What differs from the run that wrote the checkpoint; says where this one goes on."""
        written = checkpoint.read_notes(found).get("state", self._state_kind)
        if written is None:
            raise InputError(
                f"resume_from_checkpoint: {found} holds the model alone (save_only_model), without "
                f"the optimizer's state; begin a new run with --model {found}"
            )
        if written != self._state_kind:
            raise InputError(
                f"resume_from_checkpoint: {found} holds its state as {written}, which this run "
                f"({self._state_kind}) cannot read: go on with the same engine, or begin a new run "
                f"with --model {found}"
            )
        allowed = plan.changed_names(self.args.resume_changed)
        changed = plan.check_resumed(found, self._plan, allowed, known=self._plan)
        sharded = self.is_fsdp_enabled and not self.writes_whole_state
        if changed and (self.is_deepspeed_enabled or sharded):
            engine = "FSDP with a sharded state" if sharded else "DeepSpeed"
            raise InputError(
                f"--resume_changed {','.join(sorted(changed))}: not possible under {engine}, which "
                f"loads the optimizer's state itself; begin a new run with --model {found}"
            )
        if self.is_world_process_zero():
            rest = f", with another {', '.join(sorted(changed))}" if changed else ""
            print(f"resuming from {found}{rest}", flush=True)
        return changed

    def run_plan(self) -> dict[str, Any]:
        """What determines the run; a resumed one must share it."""
        return {
            "data": self.data_plan(),
            **plan.option_plan(self.args),
            "groups_per_step": self.groups_per_step,
            "mixed_precision": self.accelerator.mixed_precision,
            "reference": self.reference_plan(),
            "evaluation": self._evaluation_plan(),
            **plan.tokenizer_plan(self.processing_class),
            **plan.model_plan(self.lm),
        }

    def data_plan(self) -> str | None:
        """The training data, by its content."""
        groups: Any = self.train_dataset
        return None if groups is None else plan.groups_plan(groups)

    def reference_plan(self) -> str | None:
        """The reference scores, by their content; None for a loss that uses none."""
        groups: Any = self.train_dataset
        return plan.reference_plan(groups) if self.loss.uses_reference and groups else None

    def _evaluation_plan(self) -> dict[str, str] | None:
        """The held-out data, where it decides about the best model or the learning rate."""
        plateau = self.args.lr_scheduler_type == "reduce_lr_on_plateau"
        if self.args.metric_for_best_model is None and not plateau:
            return None
        plans: dict[str, str] = {}
        each_set(
            lambda name, groups: plans.setdefault(name, plan.groups_plan(groups)),
            None,
            self.eval_dataset,
        )
        return plans

    def loads(self, what: str) -> bool:
        renewed = {
            "optimizer": self._renewal.new_optimizer,
            "lr_scheduler": self._renewal.new_schedule,
        }
        return not renewed[what]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._renewal.remember_optimizer(self.optimizer)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)
        self._renewal.remember_schedule(self.lr_scheduler)
        return scheduler

    def _fitting_pack_size(self) -> int:
        if self.is_sharded:
            raise InputError(
                "auto_find_pack_size cannot try packs of a model that several processes share "
                "(FSDP, DeepSpeed, tensor parallelism); set max_tokens"
            )
        groups: Any = self.train_dataset
        mine = largest_fitting(self.lm, groups, self.loss, self.args, self.accelerator.autocast)
        found = min(self.engine.gather([mine]))
        if found < self.args.max_tokens:
            logger.warning("auto_find_pack_size: packs of at most %d tokens", found)
        return found

    # ---- data ----------------------------------------------------------------------------

    def _cutter(self) -> StepCutter:
        return self.backprop.cutter()

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None")
        groups: Any = self.train_dataset
        sampler = self._sampler()
        if not len(sampler):
            raise InputError(
                f"a step needs {self.groups_per_step} groups and dataloader_drop_last leaves out "
                f"the rest, got {len(groups)} groups"
            )
        return StepLoader(
            StepDataset(groups, self._cutter()),
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            **loader_options(self.args),
        )

    def _sampler(self) -> StepSampler:
        groups: Any = self.train_dataset
        return StepSampler(
            len(groups),
            self.groups_per_step,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            in_order=isinstance(groups, StreamedGroups),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        groups: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(groups, str):
            groups = self.eval_dataset[groups]  # type: ignore[index]
        if groups is None:
            raise ValueError("eval_dataset must be given to evaluate, got None")
        if groups is not self.eval_dataset:
            self._check_groups("eval_dataset", groups, self.lm, self.args)
        packs = PackDataset(groups, self._cutter())
        return DataLoader(packs, batch_size=None, **loader_options(self.args))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

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
        """Forward and backward over this process's part of a step; the loss as in `StepResult`."""
        started = time.perf_counter()
        self._batch = inputs
        self._loss_before = self.running_loss.clone()
        self._result = self._step(model, inputs)
        self._window.add_step(time.perf_counter() - started)
        self._uncounted += inputs.num_tokens
        return self._result.loss

    def _step(self, model: nn.Module, batch: StepBatch) -> StepResult:
        model.train()
        _switch(self.optimizer, "train")
        return self.backprop.step(model, batch, self._window)

    def before_optimizer_step(self, model: nn.Module, norm: Any) -> Any:
        finite, self._interruption.agreed = self._guard.is_finite(
            self._result.loss, norm, self._interruption.requested
        )
        if not finite:
            norm = self._stop_or_skip(model)
        for part in self._result.computed:
            self._window.add(part, self._batch.num_groups)
        self._result = self._result._replace(computed=[])
        return norm

    def _stop_or_skip(self, model: nn.Module) -> Any:
        """Stop, or repeat the step without the records at fault; returns the gradient norm."""
        batch = self._batch
        groups: Any = self.train_dataset
        self._refuse_bad_weights()

        def is_sound(position: int) -> bool:
            return self.backprop.is_sound(self.lm, groups[position])

        trial = None if self.is_sharded else is_sound
        bad = self._guard.culprits(batch, self._result.computed, trial)
        if self.args.nonfinite == "stop":
            names = name_groups(groups, [batch.index[i] for i in bad], "training")
            step = self.state.global_step + 1
            raise TrainingStopped(self._guard.step_message(step, names, batch.num_groups))
        self._window.skipped += len(bad)
        model.zero_grad()
        kept = [batch.index[i] for i in range(batch.num_groups) if i not in bad]
        norm: Any = 0.0
        finite = False
        if kept:
            self._batch = self._cutter()(groups, kept)
            self._result = self._step(model, self._batch)
            norm = self.clip_gradients(model)
            finite, _ = self._guard.is_finite(self._result.loss, norm)
        if not finite:
            self._window.skipped += len(kept)
            model.zero_grad()  # an optimiser leaves weights without a gradient as they are
            self._result, norm = StepResult(torch.zeros_like(self._result.loss), []), 0.0
        self.running_loss.copy_(self._loss_before + self._result.loss)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """6 operations per weight and token (forward and backward), embeddings included, of which
        tensor-parallel processes have equal parts."""
        parameters = sum(p.numel() for p in self.lm.parameters())
        parts = self.engine.num_processes // self.engine.world_size
        return 6 * parameters * inputs.num_tokens // parts

    # ---- logs and evaluation -------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.steps:
            extra = self._window.summary(self.loss, self.engine.gather)
            self._count_tokens()
            extra["num_tokens"] = self.state.num_input_tokens_seen
            rest = dict(logs)
            logs.clear()
            logs.update({"loss": rest.pop("loss"), **extra, **rest})
            self._window = StepWindow()
            if self._first_log and self.is_world_process_zero():
                for line in warn_of_supervision(self.loss, logs):
                    logger.warning(line)
            self._first_log = False
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Bring the tokens of all processes up to date in the state, which checkpoints keep. Every
        process must call it."""
        if self.args.include_num_input_tokens_seen == "no":  # otherwise counted at every step
            self.state.num_input_tokens_seen += sum(self.engine.gather([self._uncounted]))
        self._uncounted = 0

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score every group of the loader; the result is the same on every process.

        ``predictions`` is one float32 array of scores per group, in the order of the data set.
        """
        model = self._evaluation_model()
        self.callback_handler.eval_dataloader = dataloader
        was_training = model.training
        model.eval()
        _switch(self.optimizer, "eval")
        found = summarize(self._evaluated(model, dataloader), self.loss, self.engine.gather)
        model.train(was_training)
        known = self.scores_at.get(metric_key_prefix, {})
        best = {s: scores for s, scores in known.items() if s == self.state.best_global_step}
        self.scores_at[metric_key_prefix] = best | {self.state.global_step: found.scores}
        if found.bad and self.args.nonfinite == "stop":
            groups = dataloader.dataset.groups  # type: ignore[attr-defined]
            names = name_groups(groups, found.bad, "evaluation")
            step = self.state.global_step
            raise TrainingStopped(self._guard.evaluation_message(step, names, len(groups)))
        scores: Any = found.scores
        rewards: Any = found.rewards
        values = dict(found.values)
        if self.compute_metrics is not None:
            values |= self.compute_metrics(EvalPrediction(predictions=scores, label_ids=rewards))
        return EvalLoopOutput(
            predictions=scores,
            label_ids=rewards,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in values.items()},
            num_samples=len(found.scores),
        )

    def _evaluated(self, model: nn.Module, batches: DataLoader) -> Iterator[Evaluated]:
        for batch in batches:
            if self.args.eval_token_statistics:
                with token_statistics(model) as statistics:
                    found = self.backprop.evaluate(model, batch)
                if found is not None:
                    sums = statistics.sums(found.output.token_logprobs.numel())
                    found = found._replace(statistics=sums)
            else:
                found = self.backprop.evaluate(model, batch)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
            if found is not None:
                yield found

    def _evaluation_model(self) -> nn.Module:
        """The model to call: wrapped already while training, otherwise prepared once here."""
        if self.is_prepared():
            return self.model_wrapped
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("with FSDP or DeepSpeed, evaluate during or after train(), not before")
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    # ---- checkpoints and the final model -------------------------------------------------

    @property
    def writes_whole_state(self) -> bool:
        if hasattr(self.lm, "peft_config"):  # its files hold the adapter alone, by other names
            return False
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return is_sharded(self.lm)
        return plugin.fsdp_version == 2 and "FULL" in str(plugin.state_dict_type)

    def write_optimizer(self, file: Path) -> None:
        state = whole_optimizer_state(self._bare_optimizer)
        if self.args.should_save:
            torch.save(state, file)

    def read_optimizer(self, file: Path) -> None:
        load_optimizer_state(self._bare_optimizer, file)

    def read_weights(self, folder: Path) -> None:
        load_weights(self.lm, folder)

    @property
    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _state_kind(self) -> str:
        """What can read the state of the run's checkpoints."""
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return f"DeepSpeed ZeRO-{stage} on {self.engine.num_processes} process(es)"
        if self.is_sharded and not self.writes_whole_state:
            return "shards of FSDP or tensor parallelism"
        return "whole tensors"

    def stage_checkpoint(self, run_dir: Path, write: Callable[[], None]) -> Path:
        self._refuse_bad_weights()
        self._count_tokens()
        name = checkpoint.checkpoint_name(self.state.global_step)

        def write_staged(staging: Path) -> None:
            self.staging = staging
            try:
                write()
            finally:
                self.staging = None

        def publish(staging: Path) -> None:
            staged = staging / name
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run_dir / name)
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            kind = None if self.args.save_only_model else self._state_kind
            notes = {"max_tokens": self.max_tokens, "state": kind}
            checkpoint.publish(staged, run_dir, self._plan, notes)

        self._saver.save(name, run_dir, write_staged, publish)
        self._saved = None if self.args.save_only_model else self._progress()
        if self.args.should_save:
            checkpoint.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        return run_dir / name

    def publish_model(self, folder: Path) -> None:
        self._refuse_bad_weights()
        if self.is_fsdp_enabled:  # shards alone would leave no model for from_pretrained
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

        def write(staging: Path) -> None:
            self.write_model(staging / "model")

        def publish(staging: Path) -> None:
            keep_foreign_card(staging / "model", folder)
            checkpoint.publish_files(staging / "model", folder)

        self._saver.save("the model", folder, write, publish)

    def after_write(self, folder: Path) -> None:
        """Replace ``training_args.bin``, a pickle that nothing reads, by JSON; write the card."""
        if self.args.should_save:
            file = folder / TRAINING_ARGS_NAME
            file.unlink(missing_ok=True)
            file.with_suffix(".json").write_text(self.args.to_json_string(), encoding="utf-8")
            write_card(folder, self.model_card())

    def model_card(self, metrics: str | None = None) -> str:
        """The text of the card that is written beside a saved model, as of now.

        Args:
            metrics: a table of them; by default of the evaluations that were logged.
        """
        lm: Any = self.lm
        shown = ("learning_rate", "lr_scheduler_type", "backprop", "seed")
        options = {name: getattr(self.args, name) for name in shown}
        names = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        counts = [f"{n}: {len(x)} groups" for n, x in names.items() if isinstance(x, Sequence)]
        return card_text(
            base=getattr(lm, "name_or_path", "") or "",
            adapter=hasattr(lm, "peft_config"),
            loss=repr(self.loss),
            steps=self.model_step,
            groups_per_step=self.groups_per_step,
            options={k: str(getattr(v, "value", v)) for k, v in options.items()}
            | {"precision": self.args.dtype_reason},
            data=[report.as_text() for report in self.reports] or counts,
            logs=self.state.log_history,
            metrics=metrics,
            template=self.args.model_card_template,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to the output folder as of now, unless it has one by somebody else."""
        if self.is_world_process_zero():
            renew_card(Path(self.args.output_dir or "."), self.model_card())

    def _refuse_bad_weights(self) -> None:
        bad = self._guard.bad_weights(self.lm)
        if bad:
            raise TrainingStopped(self._guard.weights_message(bad, self.state.global_step))


def _refuse_overridden(kind: type) -> None:
    """Refuse a subclass with a method that would never be called."""
    for name, way in NOT_CALLED.items():
        if getattr(kind, name) is not getattr(Trainer, name):
            raise InputError(f"{kind.__name__}.{name} would never be called by RankTrainer: {way}")


def _switch(optimizer: Any, mode: str) -> None:
    """Schedule-free optimisers have a training and an evaluation mode."""
    if callable(getattr(optimizer, mode, None)):
        getattr(optimizer, mode)()


def _as_it_is(batch: Any) -> Any:
    return batch


def _unused_collator(items: list[Any]) -> dict[str, Any]:
    """Keep ``Trainer`` from making one that pads; the loaders made here cut packs instead."""
    raise TypeError("RankTrainer's loaders cut packs; a data collator is never called")
