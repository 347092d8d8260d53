"""``fastrank doctor``: installed versions, and the choices made on this machine with reasons.

Nothing is guessed here: backends and strategies come from the functions that choose them in a run,
the required versions from the installed distribution's own metadata.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

from fastrank import options as shared
from fastrank.errors import DISTRIBUTION, InputError, install_command
from fastrank.options.declare import change, check_least, option, options

if TYPE_CHECKING:
    import torch

#: Extras whose packages are of use to users, with what they bring.
_EXTRAS = {
    "train": "fastrank train, data sets, LoRA, plots",
    "flash-attn": "flash-attn's kernels for shared prompts",
    "peers": "other libraries in fastrank bench",
}


@options
class DoctorOptions(
    shared.ModelOptions, shared.TrustOptions, shared.ShapeOptions, shared.JsonOptions
):
    """Versions, devices, and which backend and strategy would be chosen and why. The step that is
    planned for has 4 prompts with 4 responses of 128 tokens unless options say otherwise."""

    model: str | None = change(
        "Model folder or Hub name: whether it can share prompts, its vocabulary."
    )
    tokens: int = change("Response tokens of a pack.", default=2048)
    vocab: int | None = change("Vocabulary (default: the model's, else 32000).")
    group_tokens: int = option("Response tokens of its largest group.", default=512)
    logits_memory: int | None = option(
        "Bytes of logits at once (default: by device).", default=None
    )

    def __post_init__(self) -> None:
        check_least(self, "--", tokens=1, group_tokens=1, vocab=1, logits_memory=1)
        super().__post_init__()


def examine(options: DoctorOptions) -> dict[str, Any]:
    """Collect the report, as JSON types."""
    import torch

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    model = None if options.model is None else _model(options)
    vocab = options.vocab or (32000 if model is None else model["vocab"])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "model": model,
        "devices": [_device(device, options, vocab) for device in devices],
    }


def packages(name: str = DISTRIBUTION) -> list[dict[str, Any]]:
    """Required and optional packages: version installed, version required, how to install.

    ``status`` is "ok", "missing", "too old" or "too new"; ``install`` is the command that mends it.
    """
    import fastrank

    found = [_package(name, fastrank.__version__, "", None)]
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source folder, not installed
        return found
    from packaging.requirements import Requirement

    for requirement in map(Requirement, required):
        for extra in ("", *_EXTRAS):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            needed = requirement.marker is None or "extra" not in str(requirement.marker)
            if applies and needed == (extra == ""):
                version = _installed(requirement.name)
                entry = _package(requirement.name, version, extra, requirement)
                found.append(entry)
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, version: str | None, extra: str, requirement: Any) -> dict[str, Any]:
    bounds = [] if requirement is None else sorted(requirement.specifier, key=str, reverse=True)
    specifier = ",".join(map(str, bounds))  # lower bounds first
    status = "ok"
    if version is None:
        status = "missing"
    else:
        for bound in bounds:
            if not bound.contains(version, prereleases=True):
                status = "too new" if bound.operator.startswith("<") else "too old"
    install = install_command(extra) if extra else f"pip install '{name}{specifier}'"
    return {
        "name": name,
        "version": version,
        "requires": specifier,
        "extra": extra,
        "status": status,
        "install": None if status == "ok" else install,
    }


def _model(options: DoctorOptions) -> dict[str, Any]:
    """Whether the model can share prompts, from its configuration alone: no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastrank.attention.gate import refusal
    from fastrank.errors import one_line
    from fastrank.modeling.context import context_length
    from fastrank.modeling.heads import not_plain
    from fastrank.modeling.pretrained import check_model_path

    name = check_model_path(str(options.model))
    trust = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:  # corrupt folders and the network raise unrelated types here
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{name}: no causal language model: {reason}") from error
    refused = refusal(model)
    obstacle = not_plain(model, model)
    plain = "a plain linear layer; that it reproduces the logits is measured when a run starts"
    return {
        "path": str(options.model),
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "vocab": config.get_text_config().vocab_size,
        "context": context_length(config),
        "shared_prompts": refused is None,
        "reason": refused or "every layer is attention that a pack can be laid out for",
        "head": {"path": "fused" if obstacle is None else "logits", "reason": obstacle or plain},
    }


def _device(device: torch.device, options: DoctorOptions, vocab: int) -> dict[str, Any]:
    import torch

    from fastrank_kernels import choose_backend
    from fastrank_kernels.planner import default_logits_memory

    dtype = torch.float32
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        memory = properties.total_memory
        with torch.cuda.device(device):
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    else:
        threads = torch.get_num_threads()
        described = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads in use"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    budget = options.logits_memory or default_logits_memory(device.type, device.index)
    backend, why = choose_backend(None, device)
    return {
        "device": str(device),
        "description": described,
        "memory": memory,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "loss_backend": {"name": backend, "reason": why},
        "narrow_products": _narrow_products(device),
        "logits_memory": budget,
        "strategies": _strategies(device, options, vocab, budget),
        "attention": _attention(device, dtype),
    }


def _narrow_products(device: torch.device) -> str:
    """How products of bfloat16 and float16 matrices are made."""
    import torch

    from fastrank_kernels.products import narrow_products

    if device.type != "cpu":
        return "bfloat16 and float16 with float32 results"
    return "; ".join(narrow_products(dtype)[1] for dtype in (torch.bfloat16, torch.float16))


def _strategies(
    device: torch.device, options: DoctorOptions, vocab: int, budget: int
) -> list[dict[str, Any]]:
    from fastrank_kernels.planner import plan_logprobs, plan_ranking

    common: dict[str, Any] = {
        "rows": options.tokens,
        "vocab": vocab,
        "logits_itemsize": 4,  # logits are float32 on a GPU, and on a CPU outside of autocast
        "budget": budget,
        "device_type": device.type,
    }
    groups = common | {"largest_group": min(options.group_tokens, options.tokens)}
    train: dict[str, Any] = {"hidden_grad": True, "head_grad": True}
    frozen: dict[str, Any] = {"hidden_grad": True, "head_grad": False}
    score: dict[str, Any] = {"hidden_grad": False, "head_grad": False}
    plans = {
        "ranking loss": plan_ranking(**groups, **train),
        "ranking loss, frozen head": plan_ranking(**groups, **frozen),
        "token log-probs": plan_logprobs(**common, **train),
        "token log-probs, frozen head": plan_logprobs(**common, **frozen),
        "scoring": plan_logprobs(**common, **score),
    }
    return [{"call": call, "vocab": vocab, **plan._asdict()} for call, plan in plans.items()]


def _attention(device: torch.device, dtype: torch.dtype) -> list[dict[str, str]]:
    import torch

    from fastrank.attention.backends import LayerProperties, choose_attention
    from fastrank.attention.visibility import Visibility

    window = Visibility("sliding", 4096)
    chunk = Visibility("chunked", 8192)
    layers = {
        "full": (dtype, LayerProperties()),
        "sliding, sequences shorter than the window": (dtype, LayerProperties(visibility=window)),
        "sliding": (dtype, LayerProperties(visibility=window, covered=False)),
        "chunked": (dtype, LayerProperties(visibility=chunk, covered=False)),
        "soft-capped": (dtype, LayerProperties(softcap=True)),
        "with sinks": (dtype, LayerProperties(sinks=True)),
        "full, float64": (torch.float64, LayerProperties()),
    }
    chosen = {name: choose_attention(device, kind, layer) for name, (kind, layer) in layers.items()}
    return [{"layer": name, "backend": c.name, "reason": c.reason} for name, c in chosen.items()]


def doctor_text(result: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"Python {result['python']} on {result['platform']}", "", "Packages"]
    for item in result["packages"]:
        extra = f" [{item['extra']}]" if item["extra"] else ""
        state = item["version"] or "not installed"
        if item["status"].startswith("too "):
            state += f" (expected {item['requires']})"
        fix = f"    {item['install']}" if item["install"] else ""
        lines.append(f"  {item['name'] + extra:<32} {state}{fix}")
    if result["model"] is not None:
        model = result["model"]
        shares = "shares prompts" if model["shared_prompts"] else "cannot share prompts"
        lines += [
            "",
            f"Model {model['path']}: {model['class']}, {model['parameters']:,} parameters, "
            f"vocabulary {model['vocab']:,}, context {model['context']}",
            f"  {shares}: {model['reason']}",
            f"  head path {model['head']['path']}: {model['head']['reason']}",
        ]
    for device in result["devices"]:
        lines += ["", *_device_text(device)]
    return "\n".join(lines)


def _device_text(device: dict[str, Any]) -> list[str]:
    gib = 2**30
    backend = device["loss_backend"]
    lines = [
        f"Device {device['device']}: {device['description']}, {device['memory'] / gib:.1f} GiB, "
        f"computes in {device['compute_dtype']}",
        f"  loss backend  {backend['name']}: {backend['reason']}",
        f"  products      {device['narrow_products']}",
        f"  logits        at most {device['logits_memory'] / gib:.2f} GiB at once (logits_memory)",
    ]
    for plan in device["strategies"]:
        lines.append(
            f"    {plan['call']:<30} {plan['strategy']:<10} {plan['products']} products: "
            f"{plan['reason']}"
        )
    lines.append("  attention of shared-prompt packs")
    for layer in device["attention"]:
        lines.append(f"    {layer['layer']:<40} {layer['backend']:<7} {layer['reason']}")
    return lines
