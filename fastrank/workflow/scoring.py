"""``fastrank score``: a causal language model as reranker or reward model over a record file.

A response's score is the model's own log-probability of it, by default the mean over its tokens.
The file is scored in portions, so that neither it nor the scores' records are ever held whole, and
the output appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any, TextIO, cast

from fastrank import options as shared
from fastrank.console import Bar
from fastrank.data.fields import end_names
from fastrank.errors import InputError
from fastrank.options.declare import change, check_least, options, values_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastrank.data.packing import Group
    from fastrank.data.records import Record

#: About how many packs a portion fills: enough to fill them well, few enough to hold.
_PACKS_PER_PORTION = 16


@options
class ScoreOptions(
    shared.ModelOptions,
    shared.DataOptions,
    shared.ReadOptions,
    shared.TextOptions,
    shared.SharingOptions,
    shared.NormalizeOptions,
    shared.OverwriteOptions,
    shared.LoadOptions,
    shared.JsonOptions,
):
    """Score every response of a record file with a causal language model, and compare its order
    with that of the file's rewards."""

    model: str = change("Model folder or Hub name of a causal language model.", required=True)
    data: str = change(
        "Records: JSONL, JSON or Parquet file, folder, or Hub data set.", required=True
    )
    output: str | None = change("JSONL file to write: every scored record with its model_scores.")
    normalize: float | str = change(
        "A score is the mean or the sum of a response's token log-probabilities, or for a number "
        "their sum over the length to that power.",
        default="mean",
    )


def score_file(options: ScoreOptions) -> dict[str, Any]:
    """Score the file, write the output if asked to, and return the result as JSON types; prints it
    as text unless ``options.json``."""
    from fastrank.data.load import fit_context
    from fastrank.data.records import read_records, require_records
    from fastrank.data.report import Report, strict_pairs
    from fastrank.data.tokenize import TokenizeOptions, tokenize_record
    from fastrank.data.write import atomic_path, check_output
    from fastrank.metrics import ranking_metrics
    from fastrank.modeling.context import context_length
    from fastrank.modeling.pretrained import check_model_path, load_tokenizer, template_values
    from fastrank.workflow.items import check_distinct

    check_least(options, "--", max_tokens=2)
    if options.output is not None:
        check_distinct(options.data, "--data", options.output)
        check_output(options.output, "--output", replace=options.overwrite)
    cut = TokenizeOptions(**values_of(options, shared.LengthOptions), as_chat=options.as_chat)
    check_model_path(options.model)
    report = Report(name=options.data)
    reading = values_of(options, shared.ReadOptions)
    records = read_records(options.data, min_candidates=1, report=report, **reading)
    first = next(records)  # a file of no use is found before a model is loaded
    tokenizer = load_tokenizer(
        options.model,
        trust_remote_code=options.trust_remote_code,
        **template_values(options),
    )
    model, sharing, chosen = _load(options)
    cut = fit_context(cut, context_length(model.config))

    scores: list[Tensor] = []
    rewards: list[Sequence[float]] = []
    tokens = num_scored = 0
    began = time.perf_counter()
    with ExitStack() as stack:
        file = None
        if options.output is not None:
            path = stack.enter_context(atomic_path(options.output))
            file = stack.enter_context(path.open("w", encoding="utf-8"))
        bar = stack.enter_context(Bar(desc="scoring", unit="records"))
        groups = (
            (record, tokenize_record(record, tokenizer, cut, report))
            for record in chain([first], records)
        )
        for portion in _portions(groups, options.max_tokens, sharing):
            found = _score(model, [group for _, group in portion], options)
            for (record, group), values in zip(portion, found, strict=True):
                tokens += _size(group, sharing)
                num_scored += len(values)
                if not bool(values.isfinite().all()):
                    raise InputError(f"{group.name}: the model's scores are not finite")
                if strict_pairs(record.scores)[0]:
                    scores.append(values)
                    rewards.append(record.scores)
                if file is not None:
                    _write(file, record, values)
            bar.update(len(portion))
        require_records(report)
    seconds = time.perf_counter() - began

    result: dict[str, Any] = {
        "model": options.model,
        "normalize": options.normalize,
        "metrics": ranking_metrics(scores, rewards) if scores else None,
        "records_with_an_order": len(scores),
        "responses_scored": num_scored,
        "tokens": tokens,
        "seconds": seconds,
        "output": options.output,
        "chosen": chosen,
        "report": report.as_dict(),
    }
    if not options.json:
        print(report.as_text())
        print(_as_text(result))
    return result


def _load(options: ScoreOptions) -> tuple[PreTrainedModel, bool, str]:
    """The prepared model, whether it shares prompts, and in words what was chosen and why."""
    import torch

    from fastrank.attention.gate import refusal
    from fastrank.modeling.prepare import prepare_model
    from fastrank.modeling.pretrained import choose_device, choose_dtype, load_model
    from fastrank.workflow.policy import refusals_of

    device = choose_device(options.device)
    dtype, why = choose_dtype(options.dtype, device)
    model = load_model(options.model, dtype, trust_remote_code=options.trust_remote_code)
    reason = refusal(model)
    sharing = reason is None if options.shared_prompts is None else options.shared_prompts
    with refusals_of(options.model):
        torch.nn.Module.to(model, device)
        prepare_model(model, attention=options.attention, shared_prompts=sharing)  # type: ignore[arg-type]
    prompts = "shared" if sharing else f"once per response ({reason or 'asked for'})"
    return model, sharing, f"{device}, {str(model.dtype)[6:]} ({why}), prompts {prompts}"


def _size(group: Group, sharing: bool) -> int:
    """Tokens that the model computes for a group."""
    return group.num_tokens_shared if sharing else group.num_candidates * group.longest_sequence


def _portions(
    groups: Iterable[tuple[Record, Group | None]], max_tokens: int, sharing: bool
) -> Iterator[list[tuple[Record, Group]]]:
    """The records that have a group, as many at a time as fill some packs."""
    portion, size = [], 0
    for record, group in groups:
        if group is None:
            continue
        portion.append((record, group))
        size += _size(group, sharing)
        if size >= _PACKS_PER_PORTION * max_tokens:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _score(model: PreTrainedModel, groups: list[Group], options: ScoreOptions) -> list[Tensor]:
    from fastrank.arguments import Normalize
    from fastrank.modeling.score import score

    normalize = cast(Normalize, options.normalize)
    try:
        return score(model, groups, max_tokens=options.max_tokens, normalize=normalize)
    except ValueError as error:  # a tokenizer that does not go with the model, longrope, ...
        raise InputError(str(error)) from error


def _write(file: TextIO, record: Record, values: Tensor) -> None:
    """The record as it was read, with ``model_scores`` beside its candidates (null: dropped)."""
    row = record.source
    if row is None:
        said = list(record.turns or record.responses)
        row = {"prompt": record.prompt, "responses": said, "scores": record.scores}
        if record.ended:
            row["ended"] = end_names(record.ended)
        aligned: list[float | None] = values.tolist()
    else:
        aligned = [None] * record.num_source
        for position, value in zip(record.positions, values.tolist(), strict=True):
            aligned[position] = value
    line = json.dumps({**row, "model_scores": aligned}, ensure_ascii=False, default=str)
    file.write(line + "\n")


def _as_text(result: dict[str, Any]) -> str:
    rate = result["tokens"] / max(result["seconds"], 1e-9)
    lines = [
        f"{result['model']}: {result['chosen']}",
        f"  scored      {result['responses_scored']} responses, {result['tokens']:,} tokens in "
        f"{result['seconds']:.1f} s ({rate:,.0f} per second)",
    ]
    if result["metrics"] is None:
        lines.append("  metrics     none: the file's rewards order no pair")
    else:
        lines.append(f"  against the rewards of {result['records_with_an_order']} prompts")
        lines += [f"    {name:<18} {value:.4f}" for name, value in result["metrics"].items()]
    if result["output"] is not None:
        lines.append(f"  output      {result['output']}")
    return "\n".join(lines)
