"""The built-in task as a user's files: a model folder, and records to rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrank.tasks.menu import menu_records, menu_task


def save_menu_model(folder: Path) -> Path:
    """The task's model and tokenizer, in a folder."""
    task = menu_task(num_train=1, num_heldout=1)
    task.tokenizer.save_pretrained(folder)
    task.model.save_pretrained(folder)
    return folder


def menu_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Canonical rows of so many prompts."""
    return [
        {"prompt": r.prompt, "responses": r.responses, "scores": r.scores}
        for r in menu_records(number, seed=seed)
    ]


def write_menu(file: Path, number: int, seed: int = 0) -> Path:
    """These rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in menu_rows(number, seed)))
    return file
