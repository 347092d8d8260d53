"""A model to draw responses from, and the batches in which it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrank.data.fields import Prompt
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, encode_prompt, truncate
from fastrank.errors import InputError, one_line
from fastrank.modeling.pretrained import (
    check_model_path,
    choose_device,
    choose_dtype,
    load_model,
    load_tokenizer,
    template_values,
)
from fastrank.options import Decoding, LoadOptions, TemplateOptions
from fastrank.workflow.generation import Response, batch_seed, generate


@dataclass
class EncodedPrompts:
    """Prompts as token ids, with those that were truncated or are unusable.

    Attributes:
        ids: one list per prompt, empty for a prompt that cannot be continued.
        truncated: prompts that lost their beginning to leave room for the response.
        unusable: prompts without a token, or refused by the chat template.
    """

    ids: list[list[int]]
    truncated: list[int] = field(default_factory=list)
    unusable: list[int] = field(default_factory=list)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Positions of usable prompts, by length, in batches; the same for the same prompts."""
        order = sorted((len(ids), i) for i, ids in enumerate(self.ids) if ids)
        usable = [i for _, i in order]
        return [usable[at : at + batch_size] for at in range(0, len(usable), batch_size)]


def load_policy(
    path: str | Path, loading: LoadOptions, template: TemplateOptions | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on its device, in evaluation mode, and its tokenizer, with the chat
    template that ``template`` asks for.

    Raises:
        InputError: there is none at that path, or it does not fit into the device's memory.
    """
    device = choose_device(loading.device)
    tokenizer = load_tokenizer(
        path, trust_remote_code=loading.trust_remote_code, **template_values(template)
    )
    dtype, _ = choose_dtype(loading.dtype, device)
    model = load_model(path, dtype, trust_remote_code=loading.trust_remote_code)
    try:
        torch.nn.Module.to(model, device)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(f"{path}: does not fit into the memory of {device}") from error
    return model.eval(), tokenizer


def read_config(path: str | Path, loading: LoadOptions) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        InputError: it cannot be read.
    """
    name = check_model_path(path)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=loading.trust_remote_code)
    except Exception as error:  # corrupt folders and the network raise unrelated types here
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: its configuration cannot be read: {reason}") from error


@contextmanager
def refusals_of(path: str | Path) -> Iterator[None]:
    """Name the model whose code refuses what it is given: a tokenizer that does not go with it,
    positions that depend on the longest sequence, a lack of memory."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, torch.cuda.OutOfMemoryError) as error:
        raise InputError(f"{path}: {error}") from error


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    context: int | None,
    *,
    as_chat: bool = False,
    tools: Sequence[list[Any] | None] | None = None,
) -> EncodedPrompts:
    """Token ids of prompts, cut on the left to leave room for ``decoding.max_new_tokens``.

    ``tools`` has one entry per prompt: the tools that the chat template shows to the model.

    Raises:
        InputError: the responses alone fill the context.
    """
    limit = None if context is None else context - decoding.max_new_tokens
    if limit is not None and limit < 1:
        raise InputError(
            f"max_new_tokens must be below the model's context of {context} tokens, got "
            f"{decoding.max_new_tokens}"
        )
    result = EncodedPrompts([])
    for number, prompt in enumerate(prompts):
        try:
            offered = None if tools is None else tools[number]
            ids = encode_prompt(prompt, tokenizer, as_chat=as_chat, tools=offered)
        except InputError:  # the template refuses this conversation, others it may take
            ids = []
        if not ids:
            result.unusable.append(number)
        elif limit is not None and len(ids) > limit:
            result.truncated.append(number)
            options = TokenizeOptions(max_prompt_length=limit)
            ids = truncate((ids, [[0]]), tokenizer, options, Report(), number)[0]
        result.ids.append(ids)
    return result


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedPrompts,
    decoding: Decoding,
    *,
    batch_size: int,
    seed: Any,
    skip: Callable[[int], bool] = lambda number: False,
) -> Iterator[tuple[int, list[int], list[list[Response]]]]:
    """Yield (batch number, positions of its prompts, their responses).

    Args:
        seed: anything with a text; each batch draws by it and its own number.
        skip: batches that are not to be drawn, by number.
    """
    for number, members in enumerate(encoded.batches(batch_size)):
        if not skip(number):
            prompts = [encoded.ids[i] for i in members]
            found = generate(model, tokenizer, prompts, decoding, batch_seed(seed, number))
            yield number, members, found
