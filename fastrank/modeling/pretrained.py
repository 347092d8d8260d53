"""Models and tokenizers from a folder or a Hub name, and the device and dtype for inference.

Weights are read from safetensors only (no pickle), code from a model's repository runs only on
request, and a name that can only be meant as a path is never looked up on the Hub. A model with
incomplete weights is refused: transformers would initialise the missing ones at random.

The folder of a PEFT adapter, as ``fastrank train --use_peft`` writes it, is loaded as its base
model with the adapter merged in: a plain model, which every command takes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank.data.files import looks_like_path
from fastrank.data.hub import in_cache, use_hub
from fastrank.data.limits import bounded
from fastrank.data.manifest import content_hash
from fastrank.data.render import set_chat_template
from fastrank.errors import InputError, one_line
from fastrank.modeling.model_files import check_model_files
from fastrank.options.paths import local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastrank.options import TemplateOptions


#: Tokenizers without a limit state 1e30; no context comes near this.
_NO_LIMIT = 10**9

#: Files of a model folder that its output depends on.
_CONTENT = ("*.json", "*.jinja", "*.safetensors")

#: Weights as pickles.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: What older versions of transformers saved beside the weights.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|position_ids)$")

_PATTERN_SECONDS = 5.0
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def choose_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is the first CUDA device, or the CPU without one.

    Raises:
        InputError: the name is no device, or the device is not on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"--device must be auto, cpu or cuda[:index], got '{name[:40]}'"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(f"--device {name}: {found} CUDA devices are here")
    return device


def choose_dtype(dtype: str, device: torch.device) -> tuple[str, str]:
    """The dtype to load weights in, and why: "auto" is the stored one, or float32 on a CPU."""
    if dtype != "auto":
        return dtype, "asked for"
    if device.type == "cpu":
        return "float32", "on a CPU"
    return "auto", "as stored"


def check_model_path(path: str | Path, needed: str = "config.json") -> str:
    """The path as text, if it is a folder with the ``needed`` file or may be a Hub name.

    For the folder of an adapter, the path of its base model.

    Raises:
        InputError: it is a file, a folder without the needed file, a path that does not exist, or
            a Hub name when neither the Hub nor its cache has it.
    """
    if needed == "config.json" and is_adapter(path):
        return check_model_path(adapter_base(path))
    name = str(path)
    local = local_path(name)
    if not name:
        raise InputError("the model path is empty")
    try:
        if local.is_dir():
            if not (local / needed).is_file():
                raise InputError(f"{name}: not a model folder, it has no {needed}")
            if needed == "config.json":
                check_model_files(local, name)
            return str(local)
        if local.exists():
            raise InputError(f"{name}: expected a model folder, got a file")
    except OSError as error:
        raise InputError(f"{one_line(name)}: {error.strerror}") from error
    if looks_like_path(name) or any(c.isspace() or c in ":\0" for c in name):
        raise InputError(f"{one_line(name)}: no such model folder")
    if not use_hub() and not in_cache(name, needed):
        raise InputError(
            f"{one_line(name)}: no such model folder, and it is not in the cache of the Hub, which "
            "cannot be reached"
        )
    return name


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder with an adapter but no model."""
    local = local_path(path)
    return (local / ADAPTER_CONFIG).is_file() and not (local / "config.json").is_file()


def adapter_base(path: str | Path) -> str:
    """The base model that an adapter's folder names.

    Raises:
        InputError: it names none, names another adapter, or has no weights in safetensors.
    """
    folder = local_path(path)
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {ADAPTER_CONFIG} cannot be read: {one_line(error)}") from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: {ADAPTER_CONFIG} must name base_model_name_or_path, got {base}")
    if is_adapter(base):
        raise InputError(f"{path}: its base model {base} is an adapter too; merge that one first")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{path}: not a whole adapter, it has no {ADAPTER_WEIGHTS}")
    return base


def model_identity(path: str | Path) -> str:
    """Hash of a model folder's configuration, tokenizer and weights, to recognise the model by.

    The hash of an adapter covers its folder and its base model, that of a Hub name only the name.
    Of weight files beyond 64 MiB only evenly spaced blocks are read: training changes every tensor,
    and with it every block.
    """
    local = local_path(path)
    digest = hashlib.blake2b(digest_size=16)
    if not local.is_dir():
        digest.update(str(path).encode())
        return digest.hexdigest()
    if is_adapter(local):
        digest.update(model_identity(adapter_base(local)).encode())
    for file in sorted(found for pattern in _CONTENT for found in local.glob(pattern)):
        digest.update(f"{file.name} {content_hash(file)}\n".encode())
    return digest.hexdigest()


def load_tokenizer(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name.

    ``chat_template`` and ``chat_template_kwargs``: see `fastrank.data.render.set_chat_template`.

    Raises:
        InputError: it does not exist or cannot be read; the template cannot be used.
    """
    from transformers import AutoTokenizer

    name = check_model_path(path, needed="tokenizer_config.json")
    with _errors_in_one_line(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return set_chat_template(tokenizer, chat_template, chat_template_kwargs)


def template_values(given: TemplateOptions | None) -> dict[str, Any]:
    """The chat template that options ask for, as arguments of `load_tokenizer`."""
    if given is None:
        return {}
    names = ("chat_template", "chat_template_kwargs")
    return {name: getattr(given, name) for name in names}


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The causal language model of a folder or Hub name, on the CPU, in evaluation mode.

    Models that read images and text count as causal language models, for their text.

    Args:
        path: a folder with ``config.json`` and safetensors, the folder of an adapter, or a Hub
            name.
        dtype: a torch dtype, its name, or "auto" (as stored).
        trust_remote_code: run the model code that comes with the weights.
        options: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: it does not exist, cannot be read, is no causal language model, lacks weights,
            or has weights that a causal language model has no place for: a reward model's head.
    """
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with _errors_in_one_line(path, "causal language model"):
        auto_class = _causal_class(check_model_path(path), trust_remote_code)
    return _load(auto_class, path, "causal language model", lossless=True, **options)


def _causal_class(name: str, trust_remote_code: bool) -> Any:
    """The class that loads a text model, or one of images and text, by its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    text_alone = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    with_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if with_images is None or text_alone in (config.architectures or []):
        return AutoModelForCausalLM
    if text_alone is None or with_images in (config.architectures or []):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_reward_model(
    path: str | Path, dtype: torch.dtype | str = "auto", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The sequence-classification model with one label of a folder or Hub name; see `load_model`.

    Raises:
        InputError: it does not exist, cannot be read, lacks weights, or has more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    what = "sequence-classification model"
    model = _load(AutoModelForSequenceClassification, path, what, **options)
    labels = model.config.num_labels
    if labels != 1:
        raise InputError(f"{path}: a reward model must have one label, got {labels}")
    return model


def _load(
    auto_class: Any, path: str | Path, what: str, *, lossless: bool = False, **options: Any
) -> PreTrainedModel:
    """``lossless``: refuse weights that the class has no place for."""
    name = check_model_path(path)
    _refuse_pickles(name, auto_class.__name__)
    model: PreTrainedModel
    with _errors_in_one_line(path, what), _bars_on_terminals_only():
        model, info = auto_class.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **options
        )
    extra = sorted(key for key in info["unexpected_keys"] if not _BUFFERS.search(key))
    if lossless and extra:
        made_by = ", ".join(model.config.architectures or []) or "none"
        raise InputError(
            f"{path}: {len(extra)} weights would be lost, the first is {extra[0]}: "
            f"{type(model).__name__} has no place for them (its folder names {made_by}); expected "
            f"a {what}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{path}: {len(missing)} weights are missing, the first is {missing[0]}; "
            f"expected a complete {what}"
        )
    return _with_adapter(model, path, what) if is_adapter(path) else model


def _refuse_pickles(name: str, auto_class: str) -> None:
    """Refuse a folder whose weights are pickles alone: reading one can run any program."""
    folder = Path(name)
    pickled = [file for file in _PICKLES if (folder / file).is_file()]
    if pickled and not any(folder.glob("*.safetensors")):
        target = f"{folder.name}-safetensors"
        raise InputError(
            f"{name}: its weights are pickles ({pickled[0]}), which are not read; convert them: "
            f'python -c "from transformers import {auto_class} as M, AutoTokenizer as T; '
            f"[C.from_pretrained('{name}').save_pretrained('{target}') for C in (M, T)]\""
        )


def _with_adapter(base: PreTrainedModel, path: str | Path, what: str) -> PreTrainedModel:
    from peft import PeftModel

    from fastrank.modeling.merge import merge_adapter

    with _errors_in_one_line(path, f"{what} with an adapter"), warnings.catch_warnings():
        _try_patterns(base, local_path(path), f"{path}: a pattern of {ADAPTER_CONFIG}")
        # Weights that the adapter's folder lacks would keep their initial values.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        return merge_adapter(PeftModel.from_pretrained(base, local_path(path))).eval()


def _try_patterns(base: PreTrainedModel, folder: Path, what: str) -> None:
    """Match the patterns of an adapter's configuration with the names of all modules, within limits
    of time: a regular expression may take for ever."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    kept = (settings.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha"))
    patterns = [pattern for own in kept for pattern in own]
    patterns += [settings.get(name) for name in ("target_modules", "exclude_modules")]
    names = [name for name, _ in base.named_modules()]
    with bounded(what, seconds=_PATTERN_SECONDS):
        for pattern in patterns:
            for name in names if isinstance(pattern, str) else ():
                re.fullmatch(pattern, name)
                re.match(rf"(.*\.)?({pattern})$", name)


@contextmanager
def _errors_in_one_line(path: str | Path, what: str) -> Iterator[None]:
    """Corrupt folders and the network raise unrelated types, whose text may have many lines."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: cannot be loaded as a {what}: {reason}") from error


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Show transformers' loading bar only on a terminal."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def tokenizer_context(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Context length for a tokenizer: of the model beside it, or the one that it states."""
    from transformers import AutoConfig

    from fastrank.modeling.context import context_length

    name = str(local_path(adapter_base(path) if is_adapter(path) else path))
    if not Path(name).is_dir() or (Path(name) / "config.json").is_file():
        if Path(name).is_dir():
            check_model_files(Path(name), str(path))
        try:
            return context_length(AutoConfig.from_pretrained(name))
        except (OSError, ValueError, KeyError):  # a tokenizer without a model, or an unknown one
            pass
    stated = tokenizer.model_max_length
    return int(stated) if 0 < stated < _NO_LIMIT else None
