"""Online runs of a few steps with a tiny model, for tests in one process and in several.

As a script: ``online_runs.py OUTPUT MODEL [OPTION ...]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastrank.cli.main import main

STEPS = 6
EVERY = 4  # one whole round, and one of two steps

REWARD = """
def vowels(prompt, response):
    return sum(c in "aeiouAEIOU" for c in response) - len(response) / 20
"""


def write_inputs(folder: Path, stored: bool = False) -> None:
    """Prompts and a reward in ``folder``."""
    rows: list[dict[str, Any]] = [{"prompt": "go " * (k % 4) + str(k)} for k in range(9)]
    if stored:
        for k, row in enumerate(rows):
            row["responses"] = ["stored a", "stored bb", "stored ccc"]
            row["scores"] = [0.5, None, float(k)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)


def arguments(inputs: Path, output: Path, model: Path, *more: str) -> list[str]:
    files = ["--model", str(model), "--online_prompts", str(inputs / "prompts.jsonl")]
    files += ["--reward", f"{inputs}/rewards.py:vowels", "--output_dir", str(output)]
    online = ["--online_every", str(EVERY), "--online_responses", "4"]
    online += ["--online_max_new_tokens", "6", "--online_batch_size", "2"]
    training = ["--max_steps", str(STEPS), "--learning_rate", "3e-3", "--logging_steps", "1"]
    training += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    return ["train", *files, *online, *training, "--save_strategy", "no", *more]


if __name__ == "__main__":
    output, model = Path(sys.argv[1]), Path(sys.argv[2])
    sys.exit(main(arguments(output.parent, output, model, *sys.argv[3:])))
