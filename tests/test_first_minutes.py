"""The README is followed block by block, in an empty virtual environment, on a fresh clone.

Installing torch takes longer than all the rest: the environment sees the packages of the one that
runs the tests, by a path file. pip finds them there and has nothing to download; what is installed
is the clone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

#: What a reader has in hand at "five lines instead of yours": one prompt, three candidates, padded.
READER = """
import torch
from transformers import AutoModelForCausalLM

import fastrank

model = AutoModelForCausalLM.from_pretrained("MODEL")
prompt, responses = [5, 6, 7, 8], [[9, 10], [11], [12, 13, 14]]
rewards = torch.tensor([0.2, 1.0, 0.2])
batch = [(prompt, responses, rewards)]
rows = [prompt + response + [0] * (3 - len(response)) for response in responses]
input_ids = torch.tensor(rows)
mask = torch.tensor([[1] * (4 + len(r)) + [0] * (3 - len(r)) for r in responses])
labels = torch.where(mask.bool(), input_ids, -100)
labels[:, :4] = -100
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("first") / "fastrank"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    # What is not committed yet is followed as well.
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in changed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(clone: Path) -> dict[str, str]:
    """An empty environment's variables."""
    place = clone / ".venv"
    venv.create(place, with_pip=True)
    # Before Python 3.12 an environment comes with a setuptools that is too old.
    pip = [str(place / "bin" / "pip"), "uninstall", "--yes", "--quiet", "setuptools"]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    unwanted = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as "no isolation"
        "PIP_CONFIG_FILE": os.devnull,
    }


def run(command: str | list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a line as a shell, or a program; its output, or an error with all of it."""
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}"
    return done.stdout


def test_the_readme_is_followed(clone: Path, environment: dict[str, str]) -> None:
    text = (clone / "README.md").read_text(encoding="utf-8")
    model = save_llama(clone.parent / "model")
    lines = [
        line.split("#")[0].strip()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
        for line in block.splitlines()
        if not language
    ]
    assert [line.split()[0] for line in lines] == ["make", "fastrank", "pip", "fastrank"]
    see_it_learn, train, install, doctor = lines

    assert not (clone / ".venv/bin/fastrank").exists()
    said = run(f"{see_it_learn} ARGS='--max_steps 12'", clone, environment)
    assert "12 steps in" in said and (clone / "runs/built-in/training.png").is_file()
    run(install, clone, environment)
    find = "python -c 'import fastrank; print(fastrank.__file__)'"
    where = run(find, clone / "docs", environment)
    assert Path(where.strip()) == clone / "fastrank" / "__init__.py"
    assert "fastrank" in run(doctor, clone, environment)

    (record,) = re.findall(r"^```json\n(.*?)^```", text, re.S | re.M)
    rows = [json.loads(record) | {"prompt": f"What is {thing}?"} for thing in ("it", "that", "so")]
    (clone / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run(f"{train.replace('MODEL', str(model))} --eval_fraction 0", clone, environment)
    assert "3 read, 3 kept" in said and (clone / "runs/first/model.safetensors").is_file()
    shutil.rmtree(clone / "runs")

    blocks = dict(re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", text, re.S))
    same = textwrap.dedent("""
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
        print("the same loss")
    """)
    code = READER + blocks["today"] + blocks["rank"] + same + blocks["packs"]
    program = [str(clone / ".venv/bin/python"), "-c", code.replace("MODEL", str(model))]
    assert "the same loss" in run(program, clone, environment)
    code = blocks["trainer"].replace("Qwen/Qwen3-0.6B", str(model))
    run([str(clone / ".venv/bin/python"), "-c", code], clone, environment)
    assert (clone / "runs/first/README.md").is_file()


def test_wheel_and_source_archive_are_sound(clone: Path) -> None:
    pytest.importorskip("twine")
    # The source archive first, and the wheel from what is in it.
    build = [sys.executable, "-m", "build", "--no-isolation", str(clone)]
    run(build, clone, dict(os.environ))
    made = sorted(map(str, (clone / "dist").iterdir()))
    assert [Path(name).name.split("-")[0] for name in made] == ["fastrank_lm"] * 2
    said = run([sys.executable, "-m", "twine", "check", "--strict", *made], clone, dict(os.environ))
    assert said.count("PASSED") == 2
    (wheel,) = (name for name in made if name.endswith(".whl"))
    tracked = run(["git", "ls-files", "fastrank", "kernels/torch-ext"], clone, dict(os.environ))
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {name.removeprefix("kernels/torch-ext/") for name in tracked.split()} <= inside
