"""`OnlineTrainer`: a `RankTrainer` whose candidates come from the model that it trains.

Training runs in rounds of ``online_every`` steps. A round's prompts are those of its steps, in the
order that the seeded permutation gives; before its first step the present model draws candidates
for all of them, and the round's steps train on these. Nothing else changes: batches, packs, losses,
checkpoints and logs are the trainer's own. A callback could not do it: a round must exist before
its first step is cut into packs, and the last event before that, the end of the step before, comes
ahead of that step's log, evaluation and checkpoint.

Every round is also a file, ``<output_dir>/online/round-00012.jsonl``. A run that is resumed in the
middle of a round trains on the file's candidates; one that is resumed between rounds draws them
again, which gives the same, because the checkpoint has the same weights and the seeds do not
depend on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from fastrank.data.columns import GroupSizes, GroupView, prompt_key
from fastrank.data.manifest import value_checksum
from fastrank.data.packing import Group
from fastrank.data.user_functions import is_function
from fastrank.errors import InputError, TrainingStopped
from fastrank.modeling.pretrained import model_identity
from fastrank.modeling.score import score
from fastrank.modeling.unwrap import causal_lm, evaluation_mode
from fastrank.training.batching import StepBatch, StepCutter
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer
from fastrank.workflow.items import file_identity
from fastrank.workflow.online_data import Round, round_line, round_metrics
from fastrank.workflow.online_round import RoundMaker

ROUNDS_FOLDER = "online"

#: The options of online training that determine a run, and those among them that do not.
_OPTIONS = ("online_", "kl_", "reward_kind")
_WITHOUT_EFFECT = ("online_prompts", "online_perplexity")  # the prompts count by their content


class OnlineGroups(GroupView):
    """One entry per prompt; it is a group while the prompt's round lasts, None if it gave nothing.

    Only bounds are known beforehand: ``sizes`` are those of the largest group that can come.
    """

    def __init__(self, maker: RoundMaker) -> None:
        self._maker = maker
        self._groups: dict[int, Group | None] = {}

    def set_round(self, groups: dict[int, Group | None]) -> None:
        """Replace the groups of the round before."""
        self._groups = groups

    def __len__(self) -> int:
        return len(self._maker.encoded.ids)

    def group_at(self, position: int) -> Any:
        return self._groups[position]

    def __iter__(self) -> Iterator[Group]:
        raise TypeError("the candidates of an online run exist for one round at a time")

    @cached_property
    def sizes(self) -> GroupSizes:
        """Upper bounds; see `fastrank.data.columns.group_sizes`."""
        options = self._maker.options
        prompts = np.array([len(ids) for ids in self._maker.encoded.ids], dtype=np.int64)
        own = [item.responses for item in self._maker.items]
        stored = np.array([min(options.online_stored, len(r)) for r in own], dtype=np.int64)
        longest = np.full_like(prompts, options.online_max_new_tokens + 1)
        for i in np.flatnonzero(stored):
            texts = self._maker.tokenizer(own[i], add_special_tokens=False)["input_ids"]
            longest[i] = max(longest[i], *(len(ids) + 1 for ids in texts))
        candidates = options.online_responses + stored
        return GroupSizes.of_lengths(prompts, np.repeat(longest, candidates), candidates)

    @cached_property
    def largest_ids(self) -> NDArray[np.int64]:
        """Of the prompts; see `fastrank.data.columns.largest_ids`."""
        return np.array([max(ids, default=0) for ids in self._maker.encoded.ids], dtype=np.int64)

    @cached_property
    def prompt_keys(self) -> NDArray[np.uint64]:
        """See `fastrank.data.columns.prompt_keys`."""
        ids = [np.array(ids, dtype=np.int64) for ids in self._maker.encoded.ids]
        return np.array([prompt_key(row) for row in ids], dtype=np.uint64)


class OnlineTrainer(RankTrainer):
    """Trains on candidates that its model draws every ``online_every`` steps.

    Args:
        model, args, eval_dataset, processing_class, callbacks, optimizers: as for `RankTrainer`.
        maker: makes the rounds; its prompts are what an epoch passes over.

    Raises:
        InputError: options that online training does not go with.
    """

    def __init__(
        self, model: nn.Module, args: RankConfig, maker: RoundMaker, **options: Any
    ) -> None:
        if args.dataloader_num_workers:
            raise InputError(
                "dataloader_num_workers must be 0 for online training, got "
                f"{args.dataloader_num_workers}: candidates are drawn between steps"
            )
        if args.auto_find_pack_size:
            raise InputError("auto_find_pack_size cannot try packs that are not drawn yet")
        self.maker = maker
        self.online = maker.options
        self._round: int | None = None
        self._candidates = OnlineGroups(maker)
        super().__init__(model, args, train_dataset=self._candidates, **options)
        if self.is_sharded:
            raise InputError(
                "online training generates with the whole model on every process: use DDP, not "
                "FSDP, DeepSpeed or tensor parallelism"
            )
        maker.rank, maker.world_size = self.engine.rank, self.engine.world_size
        maker.gather, maker.max_tokens = self.engine.gather, self.max_tokens

    def _referenced(self, name: str, groups: Sequence[Group], *rest: Any) -> Sequence[Group]:
        # A round brings its own.
        return groups if groups is self._candidates else super()._referenced(name, groups, *rest)

    def _check_groups(
        self, name: str, groups: Sequence[Group], model: nn.Module, args: RankConfig
    ) -> None:
        if groups is not self._candidates:
            super()._check_groups(name, groups, model, args)
            return
        sizes = args.tokens_at_once(self._candidates.sizes)
        largest = int(sizes.argmax())
        if sizes[largest] > args.max_tokens:
            raise InputError(
                f"{self.maker.items[largest].place}: {self.online.online_responses} responses of "
                f"{self.online.online_max_new_tokens} tokens may take {sizes[largest]}, max_tokens "
                f"is {args.max_tokens}"
            )

    def run_plan(self) -> dict[str, Any]:
        reward = str(self.online.reward)
        found = file_identity(reward.rpartition(":")[0]) if is_function(reward) else None
        own = {
            name: value for name, value in vars(self.online).items() if name.startswith(_OPTIONS)
        }
        return (
            super().run_plan()
            | {name: value for name, value in own.items() if name not in _WITHOUT_EFFECT}
            | {"reward": model_identity(reward) if found is None else found}
        )

    def data_plan(self) -> str | None:
        rows = [[item.prompt, item.responses, item.scores] for item in self.maker.items]
        return f"{len(rows)} prompts {value_checksum([rows, self.maker.encoded.ids])[:12]}"

    def reference_plan(self) -> str | None:
        if not (self.online.kl_weight or self.loss.uses_reference):
            return None
        return model_identity(self.online.reference_model or str(self.online.model))[:12]

    def _cutter(self) -> StepCutter:
        # Prompts that gave nothing are left out of their step.
        return PresentGroups(**vars(super()._cutter()))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        self._begin_round()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # ---- rounds --------------------------------------------------------------------------

    def round_path(self, number: int) -> Path:
        """The file of a round's candidates."""
        return Path(self.args.output_dir or ".") / ROUNDS_FOLDER / f"round-{number:05d}.jsonl"

    def _begin_round(self) -> None:
        """Provide the coming step's candidates: drawn, or of the round that was interrupted."""
        every = self.online.online_every
        assert every is not None
        number, within = divmod(self.state.global_step, every)
        if self._round == number:
            return
        first = number * every
        steps = self._steps(first, min(first + every, self.state.max_steps))
        wanted = sorted({index for step in steps for index in step})
        if within:
            found = Round.read(self.round_path(number))
            if found.step != first or not {own.index for own in found.candidates} <= set(wanted):
                raise InputError(f"{self.round_path(number)}: not the round that is to be resumed")
        else:
            found = self._draw(number, first, wanted)
        groups: dict[int, Group | None] = dict.fromkeys(wanted)
        groups |= {own.index: self.maker.group(own) for own in found.candidates}
        self._candidates.set_round(self._with_references(groups))
        self._round = number

    def _draw(self, number: int, first: int, wanted: Sequence[int]) -> Round:
        usable = [i for i in wanted if self.maker.encoded.ids[i]]
        policy = causal_lm(self.lm)
        with evaluation_mode(self.lm), self.accelerator.autocast():
            found = self.maker.make(self.lm, policy, number, first, usable)
        if self.args.should_save:
            found.write(self.round_path(number), self.maker.items)
        values = round_metrics(found, with_reference=self.maker.reference is not None)
        if self.is_world_process_zero():
            print(round_line(values, first), flush=True)
        self.log(values)
        return found

    def _with_references(self, groups: dict[int, Group | None]) -> dict[int, Group | None]:
        """With reference scores, where the loss subtracts them."""
        if not self.loss.uses_reference:
            return groups
        assert self.maker.reference is not None
        present = {i: group for i, group in groups.items() if group is not None}
        scores = score(
            self.maker.reference,
            list(present.values()),
            max_tokens=self.max_tokens,
            normalize=self.loss.normalize,
        )
        pairs = zip(present.items(), scores, strict=True)
        return groups | {i: replace(group, reference_scores=own) for (i, group), own in pairs}

    def _steps(self, start: int, stop: int) -> list[list[int]]:
        """The prompts of each of the steps from ``start`` to ``stop``."""
        sampler = self._sampler()
        steps: list[list[int]] = []
        while start < stop:
            epoch, offset = divmod(start, len(sampler))
            sampler.set_epoch(epoch)
            taken = list(sampler)[offset : offset + stop - start]
            steps += taken
            start += len(taken)
        return steps

    def get_train_dataloader(self) -> DataLoader:
        if not any(self.maker.encoded.ids):
            raise InputError("no prompt can be sampled for")
        return super().get_train_dataloader()


class PresentGroups(StepCutter):
    """A cutter that leaves out the prompts of a step that have no group."""

    def __call__(
        self, groups: Sequence[Group], index: Sequence[int], sizes: GroupSizes | None = None
    ) -> StepBatch:
        del sizes  # upper bounds
        present = [position for position in index if groups[position] is not None]
        if not present:
            raise TrainingStopped(
                f"none of the {len(index)} prompts of a step has a response that is not empty: "
                "there is nothing to train on"
            )
        return super().__call__(groups, present)
