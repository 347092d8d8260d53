"""Compile the launches of a kernel ahead of time, without a GPU; one JSON line for each.

Run by ``test_ahead_of_time.py`` in a process of its own (compiling and interpreting exclude each
other):

    python ahead_of_time.py {rows|unit|rank} {few|some|all}

``few`` are chosen by what they have shown; ``some`` are a sample of ``all``.

A launch is planned by the package itself, from CPU tensors, so what is compiled here are the
argument types and the pinned settings that a GPU would be given.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "torch-ext"))

from fastrank_kernels import RankSpec  # noqa: E402
from fastrank_kernels.compact import plan_segment_sum  # noqa: E402
from fastrank_kernels.dlogits import plan_dlogits  # noqa: E402
from fastrank_kernels.launch import Launch  # noqa: E402
from fastrank_kernels.planner import row_pitch  # noqa: E402
from fastrank_kernels.rank import plan_rank  # noqa: E402
from fastrank_kernels.rescale import plan_rescale  # noqa: E402
from fastrank_kernels.row_stats import plan_row_stats  # noqa: E402
from fastrank_kernels.unit_dlogits import plan_unit_dlogits  # noqa: E402

NVIDIA = [GPUTarget("cuda", architecture, 32) for architecture in (80, 90)]
TARGETS = [*NVIDIA, GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)]
# One of each vendor, for what differs in nothing that an architecture would show.
PAIR = [NVIDIA[-1], TARGETS[-1]]
POINTERS = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
# Every so many-th program makes the sample. A prime number meets every option and target.
SAMPLE = 23
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HINGE = RankSpec("pairwise")
LAMBDA = RankSpec("pairwise", "logistic", "best_worst", "lambda")
PRO = RankSpec("staged", stage_scale="reward_gap")
SOFTMAX = RankSpec("softmax")
# What takes most registers among margins and label smoothing, and among the forms without pairs.
EXTREMES = (
    RankSpec("pairwise", "logistic", margin_by="rank", wrong=0.1),
    RankSpec("positions"),
)
FORMS = [
    *(RankSpec("pairwise", *x) for x in product(
        ("hinge", "logistic", "square"), ("all", "best_worst"), ("one", "lambda")
    )),
    RankSpec("pairwise", "square", margin_by="reward"),
    RankSpec("staged"),
    PRO,
    SOFTMAX,
    RankSpec("expected"),
    RankSpec("expected", target="reward"),
    RankSpec("pointwise"),
    *EXTREMES,
]  # fmt: skip
Case = tuple[str, Launch, list[GPUTarget]]


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """What the just-in-time compiler would make of a launch on ``target``."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = "i32", value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned and not parameter.do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = launch.options(nvidia=target.backend == "cuda")
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack (where spilled registers go) and local memory, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"no resource usage in: {report}")
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def memory_steps(assembly: str) -> str:
    """Loads, stores, barriers and waits for loads of a program in textual order, a letter each."""
    pattern = (
        r"(?P<L>ld\.global|(?:global|buffer)_load)|(?P<S>st\.global|(?:global|buffer)_store)"
        r"|(?P<B>bar\.sync|s_barrier)|(?P<W>s_waitcnt vmcnt\(0\))"
    )
    return "".join(match.lastgroup or "" for match in re.finditer(pattern, assembly))


def accesses(ptx: str) -> dict[str, int]:
    """How many loads and stores of global memory a program has, by their bytes per thread."""
    found = re.findall(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return dict(Counter(f"{kind}{int(many or 1) * int(bits) // 8}" for kind, many, bits in found))


def padded_rows(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits as the fused loss holds them: V columns in rows of an aligned pitch."""
    return torch.empty(4, row_pitch(vocab), dtype=dtype)[:, :vocab]


def row_cases(few: bool) -> Iterator[Case]:
    """Row statistics and logits gradients: types, options, block sizes, vocabularies that 16
    divides or not."""
    vocabs = (128256, 50257) if few else (128256, 50257, 33, 64, 200, 500, 1000, 2000)
    options = [(False, 1.0, None), (True, 0.5, 30.0)]
    if not few:
        options += [(True, 1.0, None), (False, 0.5, None), (False, 1.0, 30.0)]
    for dtype, vocab, (with_bias, scale, cap) in product(FLOATS, vocabs, options):
        # A large vocabulary has the largest block; the smaller blocks differ in nothing else.
        large, everything = vocab > 50000, (with_bias, scale, cap) == (True, 0.5, 30.0)
        most = everything and dtype == torch.float32
        targets = TARGETS if most or not few else PAIR
        if (few and (vocab == 50257) != with_bias) or not (large or everything):
            continue
        # Of float16, what spilled on sm_90.
        live_only = few and dtype == torch.float16
        if live_only and not everything:
            continue
        logits = padded_rows(vocab, dtype)
        labels = torch.zeros(4, dtype=torch.int64)
        stats = torch.empty(4)
        bias = torch.empty(vocab, dtype=dtype) if with_bias else None
        name = f"{dtype} V={vocab} bias={with_bias} scale={scale} softcap={cap}"
        launch = plan_row_stats(logits, labels, bias, scale, cap, stats, stats)
        if not live_only:
            yield f"row_stats {name}", launch, targets
        if most and large:
            launch = plan_row_stats(logits, labels, bias, scale, cap, stats, stats, True)
            yield f"sharded row_stats {name}", launch, PAIR if few else TARGETS
            launch = plan_dlogits(
                logits, labels, stats, stats, stats, bias, scale, cap, logits, None, True
            )
            yield f"sharded dlogits {name}", launch, PAIR if few else TARGETS

        def gradient(out, live=None, *, at=(logits, labels, stats, bias, scale, cap)) -> Launch:
            logits, labels, stats, bias, scale, cap = at
            return plan_dlogits(
                logits, labels, stats, stats, stats, bias, scale, cap, out=out, live=live
            )

        outs = FLOATS if large and not few else sorted({dtype, torch.bfloat16}, key=str)
        for narrow in outs:
            separate = padded_rows(vocab, narrow)
            if everything:
                places = NVIDIA[-1:] if live_only else PAIR if few else TARGETS
                yield f"dlogits live {narrow} {name}", gradient(separate, labels), places
            if live_only:
                continue
            yield f"dlogits separate {narrow} {name}", gradient(separate), targets
            if narrow.itemsize <= dtype.itemsize:
                overlay = logits.view(narrow)[:, :vocab]
                yield f"dlogits in place {narrow} {name}", gradient(overlay), targets


def unit_cases(few: bool) -> Iterator[Case]:
    """The one pass over float32 logits: options, block sizes, over the logits or not."""
    options = [(False, 1.0, None), (True, 0.5, 30.0)]
    for vocab, (with_bias, scale, cap) in product(
        (128256, 50257) if few else (128256, 50257, 33, 200, 1000), options
    ):
        logits, labels, stats = (
            padded_rows(vocab, torch.float32),
            torch.zeros(4).long(),
            torch.empty(4),
        )
        bias = torch.empty(vocab, dtype=torch.bfloat16) if with_bias else None
        outs = {"in place": logits.view(torch.bfloat16)[:, :vocab]}
        if not few:
            outs |= {"separate": padded_rows(vocab, torch.bfloat16)}
        for place, out in outs.items():
            launch = plan_unit_dlogits(logits, labels, bias, scale, cap, out, stats, stats)
            yield f"unit {place} V={vocab} bias={with_bias}", launch, TARGETS


def rank_cases(few: bool) -> Iterator[Case]:
    """The rank kernel: forms, blocks, from tokens or from scores; segment sums; rescaling."""
    for dtype in (torch.bfloat16,) if few else FLOATS:
        launch = plan_rescale(torch.empty(32, 128, dtype=dtype), torch.empty(()))
        yield f"rescale {dtype}", launch, TARGETS
    values, offsets = torch.empty(9), torch.tensor([0, 9], dtype=torch.int32)
    for dtype in FLOATS if few else (*FLOATS, torch.float64):
        sums = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32))
        launch = plan_segment_sum(values.to(dtype), offsets, sums)
        yield f"segment_sum {dtype}", launch, PAIR if few else TARGETS
    if few:
        # PRO in the largest block takes most registers; every form and block is in the slow test.
        for spec in (HINGE, LAMBDA, SOFTMAX, *EXTREMES):
            yield *rank_from_tokens(spec, 64), PAIR
        yield *rank_from_tokens(PRO, 8), PAIR
        yield *rank_from_tokens(SOFTMAX, 16), NVIDIA[:1]
        yield *rank_from_tokens(PRO, 64), TARGETS
        yield *rank_from_scores(PRO, 64, valid=True), PAIR
        return
    for tile, spec in product((8, 16, 32, 64), FORMS):
        targets = TARGETS if tile in (8, 64) else NVIDIA
        yield *rank_from_tokens(spec, tile), targets
        yield *rank_from_scores(spec, tile), targets
    for tile, spec in product((8, 16, 32, 64), (HINGE, LAMBDA, PRO, SOFTMAX)):
        yield *rank_from_tokens(spec, tile, reference=True, integer=torch.int64), NVIDIA
        yield *rank_from_scores(spec, tile, valid=True), NVIDIA
        yield *rank_from_tokens(spec, tile, dtype=torch.bfloat16, reward=torch.float64), NVIDIA


def rank_from_tokens(
    spec, tile, *, reference=False, dtype=torch.float32, reward=torch.float32, integer=torch.int32
) -> tuple[str, Launch]:
    scores = torch.empty(2 * tile)
    launch = plan_rank(
        spec,
        rewards=torch.empty(2 * tile, dtype=reward),
        cu_groups=torch.tensor([0, tile, 2 * tile], dtype=integer),
        scores=scores,
        rank_loss=scores,
        token_logprobs=torch.empty(100, dtype=dtype),
        cu_responses=torch.zeros(2 * tile + 1, dtype=integer),
        reference_scores=scores if reference else None,
        sft_loss=scores,
        coefficients=torch.empty(100),
    )
    return f"rank tokens n={tile} reference={reference} {dtype} {reward} {spec}", launch


def rank_from_scores(spec, tile, *, valid=False) -> tuple[str, Launch]:
    scores = torch.empty(2 * tile)
    launch = plan_rank(
        spec,
        rewards=scores,
        cu_groups=torch.tensor([0, tile, 2 * tile], dtype=torch.int32),
        scores=scores,
        rank_loss=scores,
        valid=torch.ones(2 * tile, dtype=torch.bool) if valid else None,
        score_grads=scores,
    )
    return f"rank scores n={tile} valid={valid} {spec}", launch


def main(subject: str, extent: str) -> None:
    subjects = {"rows": row_cases, "unit": unit_cases, "rank": rank_cases}
    cases = subjects[subject](extent == "few")
    programs = ((name, launch, target) for name, launch, targets in cases for target in targets)
    for name, launch, target in islice(programs, 0, None, SAMPLE if extent == "some" else 1):
        compiled = compile_launch(launch, target)
        nvidia = target.backend == "cuda"
        record = {
            "case": name,
            "target": f"{target.backend} {target.arch}",
            "steps": memory_steps(compiled.asm["ptx" if nvidia else "amdgcn"]),
        }
        if nvidia:
            record |= resources(compiled.asm["cubin"])
            record["accesses"] = accesses(compiled.asm["ptx"])
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
