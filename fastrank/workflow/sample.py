"""Candidates for ranking: responses of one or several policies to every prompt of a file.

Prompts are sampled in batches of like length. A finished batch goes into a journal
(`fastrank.workflow.journal`), and a batch's seed depends on the run's seed, the policy and the
batch's number alone: a run that was killed goes on where it was, and ends with the same file as one
that was not.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, Literal

from fastrank import options as shared
from fastrank.console import Bar
from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError
from fastrank.options.declare import change, options, values_of
from fastrank.workflow.candidates import MixtureCounts, add_responses
from fastrank.workflow.items import (
    PromptItem,
    as_line,
    check_distinct,
    file_identity,
    read_items,
    template_identity,
)
from fastrank.workflow.journal import Journal, journal_path


@options
class SampleOptions(
    shared.ModelOptions, shared.PromptOptions, shared.DecodingOptions, shared.ResumableOptions
):
    """Draw responses to every prompt of a file. A run that was stopped goes on where it was when
    the same command is given again."""

    model: list[str] = change(  # type: ignore[assignment]  # one or several
        "Model folder or Hub name to sample from; may be repeated.", required=True
    )
    prompts: str = change(required=True)
    partial: Literal["resume", "discard"] = change(
        "What to do with the unfinished work of a run that was stopped."
    )


def sample_file(options: SampleOptions) -> dict[str, Any]:
    """Sample, write the output, and return what was done as JSON types.

    Raises:
        InputError: something the user gave cannot be used; the output has not been written.
    """
    from fastrank.modeling.pretrained import check_model_path, choose_device, model_identity

    if not options.model:
        raise InputError("--model must name at least one model, got none")
    target = check_output(options.output, "--output")
    check_distinct(options.prompts, "--prompts", options.output)
    if not journal_path(target).exists():  # of this output's own run
        check_output(target, "--output", replace=options.overwrite)
    choose_device(options.device)
    for model in options.model:
        check_model_path(model)
        check_model_path(model, needed="tokenizer_config.json")
    items = list(read_items(options.prompts, format=options.format, columns=options.columns))
    plan = {
        "prompts file": [file_identity(options.prompts), options.format, options.columns],
        "set of models": [model_identity(model) for model in options.model],
        "way of decoding": [values_of(options, shared.Decoding), template_identity(options)],
        "seed": options.seed,
        "batch size": options.batch_size,
        "dtype": options.dtype,
    }
    began = time.perf_counter()
    with ExitStack() as stack:
        discard = options.partial == "discard"
        journal = stack.enter_context(Journal(target, plan, discard=discard))
        runs = [_PolicyRun(k, model, journal) for k, model in enumerate(options.model)]
        resumed = sum(run.num_finished for run in runs)
        total = len(items) * len(runs)
        bar = Bar(desc="sampling", unit="prompts", total=total, initial=resumed)
        with bar:
            for run in runs:
                run.sample(items, options, bar)
        result = _result(items, options, runs)
        lines = result.pop("lines")
        path = stack.enter_context(atomic_path(target))
        path.write_text("".join(lines), encoding="utf-8")
    return result | {"prompts_resumed": resumed, "seconds": time.perf_counter() - began}


class _PolicyRun:
    """One policy's part of a run, read from and written to the journal.

    Journal keys: ``policy K`` is its list of batches, ``K/B`` a batch's responses.
    """

    def __init__(self, number: int, path: str, journal: Journal) -> None:
        self.number = number
        self.path = path
        self.journal = journal

    @property
    def _plan(self) -> dict[str, Any] | None:
        return self.journal.finished.get(f"policy {self.number}")

    def _is_done(self, batch: int) -> bool:
        return f"{self.number}/{batch}" in self.journal.finished

    @property
    def num_finished(self) -> int:
        """Prompts that need no more sampling."""
        batches = [] if self._plan is None else self._plan["batches"]
        return sum(len(members) for b, members in enumerate(batches) if self._is_done(b))

    def sample(self, items: list[PromptItem], options: SampleOptions, bar: Bar) -> None:
        """Draw what is missing; a model is loaded only if something is."""
        from fastrank.modeling.context import context_length
        from fastrank.modeling.pretrained import load_tokenizer, template_values
        from fastrank.workflow.policy import draw, encode_prompts, load_policy, read_config

        if self._plan is not None and all(map(self._is_done, range(len(self._plan["batches"])))):
            return
        tokenizer = load_tokenizer(
            self.path,
            trust_remote_code=options.trust_remote_code,
            **template_values(options),
        )
        encoded = encode_prompts(
            [item.prompt for item in items],
            tokenizer,
            options,
            context_length(read_config(self.path, options)),
            as_chat=options.as_chat,
            tools=[item.tools for item in items],
        )
        if self._plan is None:
            plan = {
                "batches": encoded.batches(options.batch_size),
                "truncated": len(encoded.truncated),
                "unusable": len(encoded.unusable),
            }
            self.journal.append(f"policy {self.number}", plan)
        bar.update(len(encoded.unusable))
        model, tokenizer = load_policy(self.path, options, options)
        for batch, members, found in draw(
            model,
            tokenizer,
            encoded,
            options,
            batch_size=options.batch_size,
            seed=f"{options.seed}/{self.number}",
            skip=self._is_done,
        ):
            unit = {
                "responses": [[(r.text, r.ended) for r in row] for row in found],
                "tokens": sum(r.num_tokens for row in found for r in row),
                "cut": sum(not r.ended for row in found for r in row),
            }
            self.journal.append(f"{self.number}/{batch}", unit)
            bar.update(len(members))

    def responses(self, num_items: int) -> list[list[tuple[str, bool]]]:
        """Responses drawn for each prompt, in the order of the prompts, and whether they ended."""
        drawn: list[list[tuple[str, bool]]] = [[] for _ in range(num_items)]
        assert self._plan is not None
        for batch, members in enumerate(self._plan["batches"]):
            unit = self.journal.finished[f"{self.number}/{batch}"]
            for i, texts in zip(members, unit["responses"], strict=True):
                drawn[i] = texts
        return drawn

    def counted(self, name: str) -> int:
        """A count over this policy: of its plan, or summed over its batches."""
        assert self._plan is not None
        if name in self._plan:
            return int(self._plan[name])
        batches = range(len(self._plan["batches"]))
        return sum(int(self.journal.finished[f"{self.number}/{b}"][name]) for b in batches)


def _result(
    items: list[PromptItem], options: SampleOptions, runs: list[_PolicyRun]
) -> dict[str, Any]:
    """The output's lines, and everything counted."""
    drawn = [run.responses(len(items)) for run in runs]
    counts = MixtureCounts()
    lines = []
    for i, item in enumerate(items):
        new = [(run.path, found[i]) for run, found in zip(runs, drawn, strict=True)]
        mixed = add_responses(item, new, counts, as_chat=options.as_chat)
        lines.append(as_line(mixed.as_row()))
    return {
        "lines": lines,
        "output": options.output,
        "models": list(options.model),
        "prompts": len(items),
        "responses": counts.kept,
        "responses_from_file": counts.kept - counts.new,
        "responses_new": counts.new,
        "duplicates": counts.duplicates,
        "empty": counts.empty,
        "prompts_with_fewer_than_2": sum(n for size, n in counts.sizes.items() if size < 2),
        "prompts_truncated": sum(run.counted("truncated") for run in runs),
        "prompts_unusable": sum(run.counted("unusable") for run in runs),
        "tokens": sum(run.counted("tokens") for run in runs),
        "cut_at_max_new_tokens": sum(run.counted("cut") for run in runs),
    }


def sample_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    rate = result["tokens"] / max(result["seconds"], 1e-9)
    lines = [
        f"{result['output']}: {result['responses']} responses to {result['prompts']} prompts, "
        f"{result['responses_new']} of them new, {result['responses_from_file']} from the file"
    ]
    if result["prompts_resumed"]:
        lines.append(f"  resumed     {result['prompts_resumed']} prompts were done before")
    lines += [
        f"  left out    {result['duplicates']} duplicates, {result['empty']} empty responses",
        f"  tokens      {result['tokens']:,} in {result['seconds']:.1f} s "
        f"({rate:,.0f} per second), {result['cut_at_max_new_tokens']} responses cut at "
        "max_new_tokens",
    ]
    for name, what in (
        ("prompts_truncated", "lost their beginning to fit the context"),
        ("prompts_unusable", "could not be sampled for: no token, or refused by the chat template"),
        ("prompts_with_fewer_than_2", "have fewer than 2 responses and say nothing about ranking"),
    ):
        if result[name]:
            lines.append(f"  prompts     {result[name]} {what}")
    return "\n".join(lines)
