"""A million records: memory, rates beside the bare tokenizer's, second start, fill of packs.

    python bench/data_scale.py --records 1000000 --output bench/results
    python bench/data_scale.py --records 1000000 --work DIR --only second   # DIR of an earlier run

Generates the records (n = 4, about 100 tokens a candidate), trains on them from the command line
twice, the first time tokenising into the cache, and writes ``data_scale.csv``. Memory is anonymous
resident memory, summed over the process and its children (pages that a fork shares are counted in
each) and sampled; the mapped cache is not in it. A start's processor time is of the whole command,
its evaluations and the saved model included. Second starts take turns with starts on the first 100
of the records, which show what imports, the model and the evaluation before the first step take by
themselves; the row is of the median one. ``--only second`` measures these again and replaces their
rows. Rates are medians of rounds in which reading,
tokenising, packing and the bare tokenizer (one call with all the texts, its own threads) take
turns; the bare tokenizer gets the same texts as the library: each prompt alone and before each
response. Uses the model in ``../shared`` if there is one, else one that is made here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORY_MODEL = ROOT.parent / "shared" / "models" / "tinystories-260k"
OASST = ROOT.parent / "shared" / "data" / "oasst_en_ranked.jsonl"
WORDS = (
    "once upon a time there was little girl named Lily she loved to play with her toys and the big "
    "red ball in park one day mom said we can go home now happy sad dog cat tree it is very fun"
).split()
CANDIDATES, TOKENS = 4, 100
FIELDS = (
    "what", "records", "seconds", "cpu_seconds", "records_per_second", "bare_records_per_second",
    "of_bare", "peak_anonymous_mib", "value",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--work", type=Path, help="folder for data and cache (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=4000, help="records of a round")
    parser.add_argument("--starts", type=int, default=3, help="second starts")
    parser.add_argument("--only", choices=["second"])
    parser.add_argument("--phase", choices=list(PHASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase is not None:
        print(json.dumps(PHASES[args.phase](args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        measured = second_starts(args) if args.only else measure(args)
        rows = [show(row) for row in measured]
    import torch

    from fastrank.benchmarks.provenance import provenance

    about = provenance(torch.device("cpu")) | {"cores": str(os.cpu_count())}
    rows = [row | about for row in rows]
    path = args.output / "data_scale.csv"
    if args.only:
        with path.open(newline="") as file:
            new = {row["what"]: row for row in rows}
            rows = [new.pop(row["what"], row) for row in csv.DictReader(file)] + [*new.values()]
    args.output.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *about])
        writer.writeheader()
        writer.writerows(rows)


def show(row: dict[str, Any]) -> dict[str, Any]:
    figures = (f"{k} {v:,.4g}" if v < 1000 else f"{k} {v:,.0f}"
               for k, v in row.items() if k != "what")  # fmt: skip
    print(f"{row['what']:<34} {'; '.join(figures)}", flush=True)
    return row


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for phase in ("generate", "rates"):
        yield from child(args, phase)
    yield start(args, "first start", args.work / "records.jsonl")
    yield from second_starts(args)
    yield from child(args, "rates after")
    yield from child(args, "packs")


def child(args: argparse.Namespace, phase: str) -> list[dict[str, Any]]:
    """Run a phase in a process of its own; its rows."""
    command = [sys.executable, __file__, "--phase", phase, "--work", str(args.work)]
    for name in ("records", "rounds", "sample"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


# ---- data and model ----------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the records, their words as many as TOKENS tokens need."""
    chance = random.Random(0)
    tokenizer = load_tokenizer(model_path(args.work))

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    trial = text(4000)
    per_word = len(tokenizer(trial).input_ids) / 4000
    words = round(TOKENS / per_word)
    began = time.perf_counter()
    with (args.work / "records.jsonl").open("w") as file:
        for number in range(args.records):
            responses = [" " + text(chance.randint(words // 2, words * 3 // 2)) + "."
                         for _ in range(CANDIDATES)]  # fmt: skip
            scores = [round(chance.random(), 4) for _ in range(CANDIDATES)]
            row = {"prompt": f"{number} {text(words // 3)}", "responses": responses}
            file.write(json.dumps(row | {"scores": scores}) + "\n")
    seconds = time.perf_counter() - began
    size = (args.work / "records.jsonl").stat().st_size
    return [{"what": "generated, MB", "records": args.records, "seconds": seconds,
             "value": size / 1e6}]  # fmt: skip


def model_path(work: Path) -> Path:
    """The story model, or a tiny one whose tokenizer is trained on such texts."""
    if STORY_MODEL.is_dir():
        return STORY_MODEL
    path = work / "model"
    if not path.is_dir():
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<s>", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator([" ".join(WORDS)] * 50, trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
        )
        config = LlamaConfig(vocab_size=len(fast), hidden_size=64, intermediate_size=128,
                             num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path)
        fast.save_pretrained(path)
    return path


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


# ---- starts ------------------------------------------------------------------------------------


def second_starts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts on all records, cached by now, and on a few, in turn; the median of each."""
    few = args.work / "few.jsonl"
    with (args.work / "records.jsonl").open() as whole, few.open("w") as part:
        part.writelines(next(whole) for _ in range(100))
    files = {"second start": args.work / "records.jsonl", "a start on few records": few}
    for what, path in files.items():  # once each unmeasured: files in memory, entries there
        start(args, what, path)
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in files}
    for _ in range(args.starts):
        for what, path in files.items():
            row = start(args, what, path)
            print(f"{what}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
            found[what].append(row)
    return [sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2] for rows in found.values()]


def start(args: argparse.Namespace, what: str, data: Path) -> dict[str, Any]:
    """``fastrank train`` up to its first step: seconds from the start of the process."""
    with data.open("rb") as file:
        records = sum(1 for _ in file)
    output = Path(tempfile.mkdtemp(dir=args.work))
    command = [
        *(sys.executable, "-u", "-m", "fastrank.cli.main", "train"),
        *("--model", str(model_path(args.work)), "--data", str(data)),
        *("--cache_dir", str(args.work / "cache"), "--output_dir", str(output)),
        *("--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "16"),
        *("--eval_fraction", "0.00001", "--eval_groups", "16", "--use_cpu", "true"),
        *("--save_strategy", "no", "--eval_strategy", "no"),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    with PeakAnonymous(process.pid) as memory:
        seconds, said = None, []
        for line in process.stdout:
            said.append(line)
            if seconds is None and line.startswith("step 1"):
                seconds = time.perf_counter() - began
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or seconds is None:
        raise SystemExit(f"fastrank train failed with {process.returncode}:\n{''.join(said)}")
    row = {"what": f"{what}, to the first step", "records": records, "seconds": seconds}
    row["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    if what == "first start":
        row["records_per_second"] = records / seconds
    return row | {"peak_anonymous_mib": memory.peak / 1024}


class PeakAnonymous:
    """The most anonymous memory of a process and its descendants, in KiB, sampled."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, sum(map(anonymous, family(self._pid))))

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # ended meanwhile
        return 0
    return next((int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")), 0)


def family(pid: int) -> list[int]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(p.pid for p in process.children(recursive=True))]
    except psutil.Error:
        return []


# ---- rates -------------------------------------------------------------------------------------


def rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    from fastrank.data.cache import default_num_proc
    from fastrank.data.load import load_groups
    from fastrank.data.records import read_records
    from fastrank.training.batching import StepCutter

    tokenizer = load_tokenizer(model_path(args.work))
    count = min(args.sample, args.records)
    sample = args.work / "sample.jsonl"
    with (args.work / "records.jsonl").open() as whole, sample.open("w") as part:
        lines = [next(whole) for _ in range(count)]
        part.writelines(lines)
    parsed = [json.loads(line) for line in lines]
    texts = [t for r in parsed for t in (r["prompt"], *(r["prompt"] + x for x in r["responses"]))]
    cutter = StepCutter(max_tokens=16384)

    def tokenize(processes: int) -> Any:
        return load_groups(sample, tokenizer, cache=False, num_proc=processes)[0]

    groups = tokenize(1)

    def pack_steps() -> None:
        for first in range(0, count, 64):
            cutter(groups, range(first, min(first + 64, count)))

    cores = default_num_proc()
    work: dict[str, Callable[[], Any]] = {
        "bare tokenizer": lambda: tokenizer(texts, add_special_tokens=False),
        "reading": lambda: list(read_records(sample)),
        "read and tokenise, 1 process": lambda: tokenize(1),
        f"read and tokenise, {cores} processes": lambda: tokenize(cores),
        "groups into packs": pack_steps,
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bare = count / medians["bare tokenizer"]
    rows = []
    for name, taken in medians.items():
        rate = count / taken
        rows.append({"what": name, "records": count, "seconds": taken, "records_per_second": rate,
                     "bare_records_per_second": bare, "of_bare": rate / bare})  # fmt: skip
    return rows


def rates_after(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [row | {"what": row["what"] + ", again"} for row in rates(args)]


# ---- packs -------------------------------------------------------------------------------------


def packs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The plan of all the records' packs from the cache, and the fill at OASST-like lengths."""
    import numpy as np

    from fastrank.data.bins import best_fit
    from fastrank.data.cached_groups import CachedGroups
    from fastrank.data.columns import group_sizes
    from fastrank.training.batching import plan_step

    files = (args.work / "cache").glob("*/*.arrow")
    largest = max(files, key=lambda file: file.stat().st_size)
    began = time.perf_counter()
    table = CachedGroups(largest.parent, "records")
    sizes = group_sizes(table).num_tokens.tolist()
    rows: list[dict[str, Any]] = [{"what": "sizes of all groups", "records": len(sizes),
             "seconds": time.perf_counter() - began}]  # fmt: skip
    some = [len(ids) for group in table[:1000] for ids in group.response_ids]
    rows.append({"what": "tokens a candidate", "records": len(some) // CANDIDATES,
                 "value": statistics.fmean(some)})  # fmt: skip
    if OASST.is_file():
        records = [json.loads(line) for line in OASST.read_text().splitlines()]
        lengths = [
            sum(len(m["content"]) for m in r["prompt"]) // 4
            + sum(max(1, len(x) // 4) for x in r["responses"])
            for r in records
        ]
        real = np.random.default_rng(0).choice(lengths, len(sizes)).tolist()
    else:  # the same quantiles
        drawn = np.random.default_rng(0).lognormal(6.3, 0.9, len(sizes))
        real = np.clip(drawn, 20, 12000).astype(int).tolist()
    for name, values in (("generated", sizes), ("OASST-like", real)):
        for count in (len(values) // 4, len(values)):
            began = time.perf_counter()
            bins = best_fit(values[:count], 16384)
            taken = time.perf_counter() - began
            fill = sum(values[:count]) / (16384 * len(bins))
            rows.append({"what": f"packs of {name} groups, fill", "records": count,
                         "seconds": taken, "records_per_second": count / taken,
                         "value": fill})  # fmt: skip
    for step in (64, 256, 1024):
        groups = _Sized(real[:step])
        plan = plan_step(groups, 1, max_tokens=16384, shared_prompts=True)  # type: ignore[arg-type]
        rows.append({"what": f"a step of {step} OASST-like groups, fill", "records": step,
                     "value": sum(real[:step]) / (16384 * len(plan))})  # fmt: skip
    return rows


class _Sized:
    """Groups of which only the sizes are known."""

    def __init__(self, tokens: list[int]) -> None:
        import numpy as np

        from fastrank.data.columns import GroupSizes

        column = np.array(tokens)
        self.sizes = GroupSizes.of_lengths(0 * column, column, np.ones_like(column))

    def __len__(self) -> int:
        return len(self.sizes)


PHASES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "generate": generate,
    "rates": rates,
    "rates after": rates_after,
    "packs": packs,
}

if __name__ == "__main__":
    main()
