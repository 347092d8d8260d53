"""``fastrank <command> --help``: a page that is read, without the imports of a run.

The options of `train` and `iterate` are those of transformers too, which torch comes with: 170, and
five seconds. Their page is a choice, kept beside this module as JSON, and a test holds it to the
options' own declarations; ``python -m fastrank.cli.help`` writes it anew. ``--help all`` lists
everything, from the declarations.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastrank.console import stdout
from fastrank.options.declare import Options

if TYPE_CHECKING:
    from rich.text import Text

Row = tuple[str, str, str]
"""Option, default and help."""

#: What the page of a command shows, in named groups; ``--help all`` shows the rest.
CHOSEN: dict[str, dict[str, str]] = {
    "train": {
        "Model and data": "model data eval_data eval_fraction columns as_chat",
        "Loss": "loss loss_kwargs reference_model",
        "Steps": "num_train_epochs max_steps per_device_train_batch_size learning_rate",
        "Memory and speed": "max_length max_tokens backprop dtype use_peft",
        "Results": "output_dir overwrite_output_dir resume_from_checkpoint eval_strategy "
        "logging_steps report_to json",
    },
    "sample": {
        "Model and prompts": "model prompts output format columns",
        "Sampling": "num_responses strategy max_new_tokens top_p temperature stop seed",
        "Beams": "num_beam_groups diversity_penalty",
        "Chat templates": "as_chat chat_template chat_template_kwargs",
        "Run": "batch_size dtype device partial overwrite trust_remote_code json",
    },
    "reward": {
        "Records and reward": "data output reward reward_kind format columns",
        "Chat templates": "as_chat chat_template chat_template_kwargs",
        "Run": "batch_size dtype device partial overwrite trust_remote_code json",
    },
    "iterate": {
        "Model, prompts and reward": "model prompts reward reward_kind eval_prompts rounds",
        "Sampling": "num_responses strategy max_new_tokens temperature top_p",
        "Loss": "loss loss_kwargs",
        "Steps of a round": "num_train_epochs max_steps per_device_train_batch_size learning_rate",
        "Memory and results": "max_tokens backprop dtype output_dir logging_steps json",
    },
    "evaluate": {
        "Model and reward": "model prompts reward reward_kind against perplexity_model "
        "reference_key output",
        "Records": "data format columns",
        "Sampling": "num_responses strategy max_new_tokens top_p temperature seed",
        "Chat templates": "as_chat chat_template",
        "Run": "batch_size reward_batch_size dtype device json",
    },
    "score": {
        "Model and records": "model data output format columns score_key max_candidates "
        "normalize_rewards",
        "Scores": "normalize max_prompt_length max_response_length max_length",
        "Chat templates": "as_chat chat_template chat_template_kwargs",
        "Run": "max_tokens shared_prompts attention dtype device trust_remote_code json",
    },
    "inspect": {
        "Records": "data format columns score_key max_candidates normalize_rewards same_tokens",
        "Tokens": "tokenizer max_prompt_length max_response_length max_length max_tokens",
        "Chat templates": "as_chat chat_template chat_template_kwargs",
        "Output": "plot trust_remote_code json",
    },
    "view": {
        "What": "source format columns score_key",
        "Page": "output open json",
    },
    "bench": {
        "What": "suite workload variant device",
        "Your own shape": "vocab hidden groups candidates response prompt tokens dtype loss model "
        "accuracy",
        "Run": "seconds time_limit memory threads output json",
    },
    "doctor": {
        "What to choose for": "model tokens vocab group_tokens logits_memory trust_remote_code json"
    },
}
#: Options whose whole text a short page has: what is there to choose from is what is looked up.
WHOLE = {"inspect": ("format", "columns")}
#: Commands whose options come with torch and transformers.
KEPT = ("train", "iterate")
WIDTH = 100
_NAMES = 22  # columns for an option's name; a longer one has a line of its own
PAGES = Path(__file__).with_name("help_pages.json")
_TRANSFORMERS = "TrainingArguments of transformers"


def wants_help(argv: Sequence[str]) -> Literal["short", "all"] | None:
    """Whether the arguments ask for help, and for how much of it."""
    for i, argument in enumerate(argv):
        name, _, value = argument.replace("-", "_").partition("=")
        if name in ("__help_all",) or (name == "__help" and value == "all"):
            return "all"
        if argument in ("-h", "--help"):
            return "all" if list(argv[i + 1 : i + 2]) == ["all"] else "short"
    return None


def print_help(name: str, make: Callable[[], Any], *, everything: bool = False) -> None:
    """Print the help of a command.

    Args:
        name: of the command.
        make: gives the command's entry of the table; not called for a page that is kept.
        everything: list every option, with its whole text.
    """
    page = None
    if name in KEPT and not everything:
        page = json.loads(PAGES.read_text(encoding="utf-8"))[name]
    page = page or page_of(name, make(), everything=everything)
    console = stdout()
    width = min(console.width, WIDTH)
    positional = f" [{page['positional']}]" if page["positional"] else ""
    console.print(f"usage: fastrank {name}{positional} [options]\n", style="bold")
    console.print(textwrap.fill(page["description"], width))
    for title, rows in page["groups"]:
        console.print(f"\n{title}", style="bold")
        for option, default, text in rows:
            console.print(_lines(option, default, text, width))
    count = sum(len(rows) for _, rows in page["groups"])
    last = f"{count} options, each with its [default]; --config FILE.yaml sets any of them."
    if not everything:
        last += f" fastrank {name} --help all lists all there are, in full."
    console.print(f"\n{textwrap.fill(last, width)}")


def _lines(option: str, default: str, text: str, width: int) -> Text:
    """An option's lines."""
    from rich.text import Text

    indent = _NAMES + 3
    if default:
        text += f" [{default}]"
    lines = textwrap.wrap(text, width - indent, break_on_hyphens=False)
    made = Text()
    made.append(f"  {option:{_NAMES}}", "cyan")
    made.append(" " + lines.pop(0) if len(option) <= _NAMES else "")
    made.append("".join(f"\n{' ' * indent}{line}" for line in lines))
    return made


def page_of(name: str, command: Any, *, everything: bool) -> dict[str, Any]:
    """The page of a command from the declarations of its options, as JSON has it: its
    ``description``, ``positional`` option and ``groups`` of rows. A short page has the first
    sentence of each option's text."""
    rows: dict[str, Row] = {}
    groups: dict[str, list[str]] = {}
    for kind in command.options:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and field.metadata.get("help"):
                short = not everything and field.name not in WHOLE.get(name, ())
                rows[field.name] = _row(field, hints[field.name], short=short)
                groups.setdefault(_title(kind, field.name), []).append(field.name)
    if not everything:
        groups = {title: names.split() for title, names in CHOSEN[name].items()}
    return {
        "description": " ".join((command.options[0].__doc__ or "").split()),
        "positional": (command.positional or "").upper(),
        "groups": [[title, [rows[n] for n in names]] for title, names in groups.items()],
    }


def _row(field: Any, hint: Any, *, short: bool) -> Row:
    text = " ".join(field.metadata["help"].split())
    choices = [str(value) for value in _choices(hint)]
    if any(choice not in text for choice in choices):
        text = f"{text.rstrip('.')} ({', '.join(choices)})."
    if short:
        text = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
        if ":" not in re.sub(r"\(.*?\)", "", text):  # otherwise the parts of a list
            text = text.partition(";")[0].rstrip(".") + "."
    return f"--{field.name}", _default(field), text


def _default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, Enum):
        value = value.value
    if value is None or value is False or value == [] or "(default" in field.metadata["help"]:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(hint: Any) -> list[Any]:
    """The values that a type of literals or an enumeration has."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [item.value for item in hint]
    found = [_choices(member) for member in typing.get_args(hint) if member is not type(None)]
    return found[0] if len(found) == 1 else []


def _title(kind: type, name: str) -> str:
    """The first line of the docstring of the class that declares an option."""
    home = [base for base in kind.__mro__ if name in base.__dict__.get("__annotations__", {})][-1]
    if not issubclass(home, Options):
        return _TRANSFORMERS
    return (home.__doc__ or "").strip().splitlines()[0].partition(";")[0].rstrip(".:")


def main() -> None:
    """Write the kept pages."""
    from fastrank.cli.commands import COMMANDS

    pages = {name: page_of(name, COMMANDS[name](), everything=False) for name in KEPT}
    PAGES.write_text(json.dumps(pages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
