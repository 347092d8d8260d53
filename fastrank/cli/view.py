"""``fastrank view``: a run or a data file as one page, without a network."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from fastrank import options as shared
from fastrank.errors import InputError, one_line
from fastrank.options.declare import change, option, options
from fastrank.options.paths import local_path

_STATE = "trainer_state.json"


@options
class ViewOptions(shared.ReadOptions, shared.OutputOptions, shared.JsonOptions):
    """Write one page of a run (curves, before and after, held-out prompts with their candidates) or
    of a data file (its prompts with their candidates)."""

    source: str = option("Folder of a run, or a data file as `inspect` reads it.")
    output: str | None = change(
        "Page to write (default: report.html in the run's folder, or the file's name here)."
    )
    open: bool = option("Open the page in the browser.", default=False)


def view(options: ViewOptions) -> dict[str, Any]:
    """Write the page; returns its path and what it shows."""
    folder = local_path(options.source)
    result = _view_run(options, folder) if is_run(folder) else _view_data(options)
    if options.open:
        import webbrowser

        webbrowser.open(Path(result["page"]).absolute().as_uri())
    return result


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, which has logged something."""
    logs = ("metrics.jsonl", _STATE, f"checkpoint-*/{_STATE}")
    return any(file.is_file() for log in logs for file in folder.glob(log))


def _log_rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged. A `RankTrainer` of a program of one's own keeps its log in its
    checkpoints alone; a checkpoint's own folder will do."""
    from fastrank.training.callbacks import METRICS_FILE, read_metrics
    from fastrank.training.checkpoint import find_checkpoints

    if (folder / METRICS_FILE).is_file():
        return read_metrics(folder / METRICS_FILE)
    states = [path / _STATE for path in (folder, *reversed(find_checkpoints(folder)))]
    state = next((file for file in states if file.is_file()), None)
    if state is None:
        raise InputError(f"{folder}: no checkpoint with a {_STATE}")
    try:
        rows = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        if not all(isinstance(row["step"], int) for row in rows):
            raise ValueError("a row has no step")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{state}: no state of a run: {one_line(error)}") from error
    return list(rows)


def _view_run(options: ViewOptions, folder: Path) -> dict[str, Any]:
    from fastrank.visual.pages import write_run_report

    for name in ("format", "columns", "score_key", "max_candidates"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is of data files, got the run {folder}")
    rows = _log_rows(folder)
    target = None if options.output is None else _page(options.output)
    return {"page": str(write_run_report(folder, rows, target)), "log_rows": len(rows)}


def _view_data(options: ViewOptions) -> dict[str, Any]:
    from fastrank.data.records import read_records, require_records
    from fastrank.data.report import Report
    from fastrank.options.declare import values_of
    from fastrank.visual.pages import write_data_page
    from fastrank.visual.shown_groups import SpreadSample, of_record

    name = Path(options.source).name or "data"
    target = _page(options.output or f"{Path(name).stem}.html")
    report, sample = Report(name=options.source), SpreadSample()
    reading = values_of(options, shared.ReadOptions)
    for record in read_records(options.source, report=report, min_candidates=1, **reading):
        sample.add(partial(of_record, record, options.source))
    require_records(report)
    write_data_page(target, name, sample.groups, sample.total, report.as_text())
    return {"page": str(target), "prompts": sample.total, "shown": len(sample.groups)}


def _page(path: str) -> Path:
    from fastrank.data.write import check_output
    from fastrank.visual.html import is_page

    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output must end in .html, got {path}")
    target = check_output(path, "--output")
    if target.is_file() and not is_page(target):
        raise InputError(f"{path} is no page of fastrank and not replaced: choose another --output")
    return target
