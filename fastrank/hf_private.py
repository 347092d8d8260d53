"""Every private name of transformers and accelerate that fastrank uses or overrides, and why; and
of FSDP2, which does not tell its mesh.

Private names may change in any minor release, which is why ``pyproject.toml`` bounds both packages
from above. The rest of fastrank uses the public names given here, and a test holds it to that, so
that a new release is a matter of reading this file beside its changes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import Trainer as _Trainer
else:
    # A mixin at run time: importing this file must not import the trainer and accelerate.
    _Trainer = object


# ---- models ------------------------------------------------------------------------------


def attention_implementation(config: PretrainedConfig) -> str | None:
    """Name of the attention function that the modules of this configuration call."""
    name: str | None = config._attn_implementation
    return name


def set_attention_implementation(config: PretrainedConfig, name: str | None) -> None:
    """Switch it for one forward pass. The public setters reload kernels and check the name against
    what the architecture supports, and they reach every sub-configuration."""
    config._attn_implementation_internal = name


def portable_settings(config: Any) -> dict[str, Any]:
    """A model's configuration, without where it came from and which version wrote it; empty for
    what is no configuration."""
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return dict(settings)


def has_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be exchanged; only ``set_attn_implementation`` itself
    tells, by a warning."""
    return bool(model._can_set_attn_implementation())


# ---- accelerate --------------------------------------------------------------------------


def set_sync_gradients(accelerator: Accelerator, value: bool) -> None:
    """Tell accelerate whether the next backward pass ends the step. Its public way
    (``accelerator.accumulate``) counts batches, not the packs of one batch."""
    accelerator.gradient_state._set_sync_gradients(value)


# ---- torch -------------------------------------------------------------------------------


def fsdp_mesh(module: Any) -> DeviceMesh | None:
    """The mesh over which ``fully_shard`` shards and replicates a module's own parameters; None if
    it has none of its own."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return None if groups[0] is None else groups[0].mesh_info.mesh


# ---- Trainer -----------------------------------------------------------------------------

OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"  # in its checkpoints


#: Methods of ``Trainer`` that RankTrainer never calls, and what to do in place of overriding them.
NOT_CALLED = {
    "compute_loss": "give a loss of your own to RankConfig(loss=...)",
    "prediction_step": "override evaluation_loop",
    "_prepare_inputs": "override training_step",
    "_get_train_sampler": "override get_train_dataloader",
    "_get_eval_sampler": "override get_eval_dataloader",
}


class _Unloaded:
    """Stands in for what is to keep its own state."""

    def load_state_dict(self, state: Any) -> None:
        del state


class TrainerHooks(abc.ABC, _Trainer):
    """``Trainer`` with public names for the private methods that fastrank overrides or calls."""

    engine: Any
    """As `fastrank.training.engine.Engine`."""

    staging: Path | None = None
    """Where a checkpoint is written meanwhile, in place of the run's own folder."""

    # -- a step

    @abc.abstractmethod
    def before_optimizer_step(self, model: nn.Module, norm: Any) -> Any:
        """The gradients are complete and clipped; returns the gradient norm to log."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last call before the optimiser's step. The callback event that follows it can change
        # neither the norm nor the loss that are logged.
        return self.before_optimizer_step(model, super()._get_grad_norm(model, grad_norm))

    def clip_gradients(self, model: nn.Module) -> Any:
        """Clip as the options say; returns the norm before. ``Trainer`` does it between its calls
        of `training_step` and `before_optimizer_step`; a repeated step needs it again."""
        clipped = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        return super()._get_grad_norm(model, clipped)

    @property
    def running_loss(self) -> Tensor:
        """Sum of the losses since the last log entry, for a repeated step to correct."""
        return self._tr_loss

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Trainer counts the input_ids of a dictionary; a step is not one.
        if self.args.include_num_input_tokens_seen != "no":
            # Tensor-parallel processes compute the same tokens.
            counts = self.engine.gather_count(inputs.num_tokens, self.args.device)
            self.state.num_input_tokens_seen += sum(counts)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from a checkpoint of the last step, Trainer would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        self.after_epoch(lambda: self._save_checkpoint(kwargs["model"], kwargs["trial"]))

    @property
    @abc.abstractmethod
    def interrupted(self) -> bool:
        """Whether the run is to end although it has steps to go."""

    @abc.abstractmethod
    def after_epoch(self, save: Callable[[], None]) -> None:
        """Called when the loop over an epoch has ended, on every process; ``save`` writes a
        checkpoint."""

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer loads the best model, and may remove the checkpoint that the run is to go on from.
        options = ("load_best_model_at_end", "save_total_limit") if self.interrupted else ()
        kept = {name: getattr(self.args, name) for name in options}
        try:
            for name in kept:
                setattr(self.args, name, None)
            return super()._finalize_training(*args, **kwargs)
        finally:
            for name, value in kept.items():
                setattr(self.args, name, value)

    def loads(self, what: str) -> bool:
        """Whether a resumed run takes the state of its "optimizer" or "lr_scheduler" from the
        checkpoint; otherwise both begin anew."""
        return True

    @property
    @abc.abstractmethod
    def writes_whole_state(self) -> bool:
        """Whether the model is sharded, and `write_optimizer`, `read_optimizer` and `read_weights`
        take the place of what ``Trainer`` does then."""

    @abc.abstractmethod
    def write_optimizer(self, file: Path) -> None: ...

    @abc.abstractmethod
    def read_optimizer(self, file: Path) -> None: ...

    @abc.abstractmethod
    def read_weights(self, folder: Path) -> None: ...

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.writes_whole_state:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        self.write_optimizer(folder / OPTIMIZER_NAME)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.writes_whole_state:
            self.read_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is saved once; under its other name it is not missing.
        model: Any = self.model
        named = dict(model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
        lost = [key for key in load_result.missing_keys if id(named.get(key)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.writes_whole_state and best is not None:
            self.read_weights(Path(best))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.writes_whole_state:
            folder = Path(checkpoint)
            if self.loads("optimizer"):
                self.read_optimizer(folder / OPTIMIZER_NAME)
            if self.loads("lr_scheduler"):
                scheduler: Any = self.lr_scheduler
                scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            return
        # Trainer loads both or none.
        anew = {name: getattr(self, name) for name in ("optimizer", "lr_scheduler")}
        for name in anew:
            if not self.loads(name):
                setattr(self, name, _Unloaded())
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            for name, kept in anew.items():
                setattr(self, name, kept)

    def is_prepared(self) -> bool:
        """Whether accelerate has the model already; preparing it twice would wrap it twice."""
        return self.model_wrapped is not self.model or bool(self.accelerator._models)

    # -- checkpoints

    @abc.abstractmethod
    def stage_checkpoint(self, run_dir: Path, write: Callable[[], None]) -> Path:
        """Have ``write`` fill the folder `staging`, publish it in ``run_dir``; returns its path."""

    @abc.abstractmethod
    def after_write(self, folder: Path) -> None:
        """Called when model and tokenizer have been written to ``folder``."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Trainer writes into the folder that has the checkpoint's name.
        write = super()._save_checkpoint
        published = self.stage_checkpoint(
            Path(self._get_output_dir(trial)), lambda: write(model, trial)
        )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(published))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.staging is None else str(self.staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.staging is None:  # otherwise the folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        self.after_write(Path(output_dir or self.args.output_dir or "."))

    @abc.abstractmethod
    def publish_model(self, folder: Path) -> None:
        """Save model and tokenizer for ``from_pretrained``; every file is replaced at once."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer for ``from_pretrained``; every file is replaced at once."""
        if _internal_call:  # into a checkpoint, which is staged as a whole
            super().save_model(output_dir, _internal_call=True)
            return
        self.publish_model(Path(output_dir or self.args.output_dir or "."))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, folder: Path) -> None:
        """Write model and tokenizer to a folder, as `save_model` of ``Trainer`` does."""
        super().save_model(str(folder), _internal_call=True)
