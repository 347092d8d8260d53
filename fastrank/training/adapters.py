"""LoRA adapters of a run: from the command line's options to an adapted model and a merged export.

Option names are those of TRL. The adapter is saved as PEFT saves it; with ``--merge_adapter`` the
finished run also writes a plain model, made from what is on disk: that works under every engine
that shards the model in training, and what is merged is what was saved.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from fastrank.errors import InputError, one_line
from fastrank.modeling.pretrained import is_adapter, load_model
from fastrank.training import checkpoint
from fastrank.training.config import RankConfig
from fastrank.training.inputs import quantized_loading
from fastrank.training.model_card import copy_card_of_merged
from fastrank.training.run_options import TrainOptions

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

MERGED = "merged"  # in the output folder


def lora_config(options: TrainOptions) -> LoraConfig | None:
    """The adapter that the options ask for; None without ``--use_peft``.

    Raises:
        InputError: the model to adapt is itself an adapter, which the new one would not know of.
    """
    if not options.use_peft:
        return None
    from peft import LoraConfig

    if options.model is not None and is_adapter(options.model):
        raise InputError(
            f"--use_peft needs a whole model, got the adapter {options.model}; train it with "
            "--merge_adapter true and start from its merged model, or leave out --use_peft"
        )
    modules: Any = options.lora_target_modules
    if modules is not None and [name.lower() for name in modules] == ["all-linear"]:
        modules = "all-linear"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=modules,
        target_parameters=options.lora_target_parameters,
        modules_to_save=options.lora_modules_to_save,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )


def quantization(options: TrainOptions, config: RankConfig) -> dict[str, Any]:
    """Arguments of `load_model` for the quantised model that the options ask for; none without.

    Products are computed in bfloat16 where the run is, and the output head keeps its own type.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    if not options.quantized:
        return {}
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import BitsAndBytesConfig

    wanted = BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else config.weights_dtype,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
    )
    return quantized_loading(wanted, config)


def adapt(model: nn.Module, peft_config: PeftConfig, seed: int) -> nn.Module:
    """The model wrapped with a fresh adapter, the same for the same seed.

    Raises:
        InputError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    set_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT warns of merging into tied embeddings, which `merge_adapter` takes care of.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            return get_peft_model(model, peft_config)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the adapter does not fit {type(model).__name__}: {one_line(error)}"
        ) from error


def export_merged(
    folder: Path,
    config: RankConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Write the model of the adapter in ``folder`` with the adapter merged in; returns where.

    The weights have the run's own type. Every file is replaced at once.
    """
    model = load_model(folder, config.weights_dtype, trust_remote_code=trust_remote_code)
    name = checkpoint.new_staging_name()
    staged = checkpoint.begin_staging(folder, name) / MERGED
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    copy_card_of_merged(folder, staged)
    checkpoint.publish_files(staged, folder / MERGED)
    checkpoint.clean_staging(folder, name)
    return folder / MERGED


def trainable(model: nn.Module) -> str:
    """One line: the adapter, and how much of the model it trains."""
    adapter: Any = next(iter(model.peft_config.values()))  # type: ignore[operator]
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    count = sum(size for size, wanted in sizes if wanted)
    share = count / sum(size for size, _ in sizes)
    modules = ", ".join(sorted(adapter.target_modules or ()))
    if adapter.modules_to_save:
        modules += f"; whole: {', '.join(sorted(adapter.modules_to_save))}"
    return f"LoRA of rank {adapter.r} on {modules}: {count:,} parameters ({share:.1%})"
