"""The model card (``README.md``) beside a saved model: what it was made from, and how.

Values come from the run itself: base model, loss, report of the data, metrics before and after,
options, versions. A template of one's own sees the same values.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import fastrank
from fastrank.errors import InputError, one_line
from fastrank.options.paths import local_path
from fastrank.training.run_report import summary_table
from fastrank.visual.pages import SPLIT_TITLES

CARD_FILE = "README.md"
#: Ends every card written here, so that no other file of that name is replaced.
_MARK = "<!-- model card by fastrank -->"

#: What a template sees: these fields and ``card_data``, the front matter.
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ base }}, trained by ranking with [fastrank](https://github.com/fastrank-lm/fastrank): for each
prompt, the model's own log-probabilities order the candidate responses as their rewards do.

- loss: `{{ loss }}`
- steps: {{ steps }} of {{ groups_per_step }} prompts
{% for option, value in options.items() -%}
- {{ option }}: {{ value }}
{% endfor %}
## Data

{% for text in data -%}
```
{{ text }}
```
{% endfor %}
{%- if metrics %}
## Metrics

```
{{ metrics }}
```
{% endif %}
## Versions

{% for package, version in versions.items() -%}
- {{ package }} {{ version }}
{% endfor %}"""

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


def card_text(
    *,
    base: str,
    adapter: bool,
    loss: str,
    steps: int,
    groups_per_step: int,
    options: Mapping[str, Any],
    data: Sequence[str],
    logs: Sequence[Mapping[str, Any]],
    metrics: str | None = None,
    template: str | Path | None = None,
) -> str:
    """The text of a card.

    Args:
        base: folder or Hub name of the model that training began with; may be empty.
        adapter: whether what is saved is an adapter of it.
        loss: as it prints.
        steps, groups_per_step, options: of the run.
        data: what is to be said of each data set, e.g. its report.
        logs: the run's log entries, whose evaluations before the first step and after ``steps``
            become the table of metrics,
        metrics: unless it is given.
        template: a Jinja file instead of `TEMPLATE`.

    Raises:
        InputError: the template cannot be read or rendered.
    """
    local = not base or local_path(base).exists()
    name = Path(base).name or "A language model"
    front = ModelCardData(
        base_model=None if local else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fastrank", "ranking", loss.partition("(")[0].lower()],
    )
    fields: dict[str, Any] = {
        "name": f"{name}, ranked",
        "base": name,
        "loss": loss,
        "steps": steps,
        "groups_per_step": groups_per_step,
        "options": options,
        "data": data,
        "metrics": _metrics_table(logs, steps) if metrics is None else metrics,
        "versions": _versions(),
    }
    try:
        text = TEMPLATE if template is None else Path(template).read_text(encoding="utf-8")
        made = str(ModelCard.from_template(front, template_str=text, **fields))
    except Exception as error:  # of the file system, Jinja or YAML
        raise InputError(f"model_card_template {template}: {one_line(error)}") from error
    return f"{made.rstrip()}\n\n{_MARK}\n"


def write_card(folder: Path, text: str) -> None:
    """Write a card into a folder that is being filled."""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def renew_card(folder: Path, text: str) -> None:
    """Write a card into a saved model's folder, unless its card is by somebody else."""
    if not _is_foreign(folder / CARD_FILE):
        write_card(folder, text)


def keep_foreign_card(staged: Path, target: Path) -> None:
    """Remove the card from ``staged`` where ``target`` has a file of that name by somebody else."""
    if _is_foreign(target / CARD_FILE):
        (staged / CARD_FILE).unlink(missing_ok=True)


def _is_foreign(file: Path) -> bool:
    return file.is_file() and _MARK not in file.read_text(encoding="utf-8", errors="replace")


def copy_card_of_merged(source: Path, target: Path) -> None:
    """The card of an adapter, as that of the model with the adapter merged in."""
    file = source / CARD_FILE
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        write_card(target, text.replace("library_name: peft", "library_name: transformers", 1))


def _metrics_table(logs: Sequence[Mapping[str, Any]], step: int) -> str:
    """Evaluations before the first step and after ``step``, per split, as the run prints them;
    empty where none is of that step: another one's would be of other weights."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in logs:
        for key in row:
            if key.endswith("_rank_loss"):
                prefix = key.removesuffix("_rank_loss")
                own = {k.removeprefix(f"{prefix}_"): v for k, v in row.items()}
                found.setdefault(prefix, {})[int(row.get("step", 0))] = own
    splits = {
        SPLIT_TITLES.get(name, name): (rows.get(0) if step else None, rows[step])
        for name, rows in found.items()
        if step in rows
    }
    return summary_table(splits) if splits else ""


def _versions() -> dict[str, str]:
    versions = {"fastrank": fastrank.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
