"""Rewards from a model: a sequence classifier's label, or a causal model's log-probability.

The input of a classifier follows its tokenizer. One that joins two texts by itself (a ``cls`` and a
``sep`` token, no chat template) gets prompt and response as a pair; every other one gets the tokens
that training would use: the chat template with its end of turn, or prompt, response and EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrank.attention.gate import refusal
from fastrank.data.load import fit_context
from fastrank.data.packing import Group
from fastrank.data.render import PLAIN, render_plain
from fastrank.data.report import Report
from fastrank.data.tokenize import (
    TokenizeOptions,
    as_group,
    cut_record,
    encode_record,
    truncate,
)
from fastrank.data.turns import bare_id
from fastrank.errors import InputError
from fastrank.modeling.context import context_length
from fastrank.modeling.prepare import prepare_model
from fastrank.modeling.pretrained import (
    choose_device,
    choose_dtype,
    load_reward_model,
    load_tokenizer,
    template_values,
)
from fastrank.modeling.score import enough_tokens, score
from fastrank.options import LoadOptions, TemplateOptions
from fastrank.workflow.items import PromptItem, Scores
from fastrank.workflow.policy import load_policy, read_config, refusals_of

_PACK_TOKENS = 16384


def reward_kind(path: str, loading: LoadOptions) -> str:
    """``"classifier"`` or ``"logprob"``, by the architecture that the model's folder names.

    Raises:
        InputError: the configuration cannot be read, or names neither.
    """
    architectures = read_config(path, loading).architectures or []
    if any("SequenceClassification" in kind or "RewardModel" in kind for kind in architectures):
        return "classifier"
    if any("CausalLM" in kind or "LMHead" in kind for kind in architectures):
        return "logprob"
    raise InputError(
        f"{path}: expected a sequence-classification or causal language model, got "
        f"{', '.join(architectures) or 'no architecture'}; name one with --reward_kind"
    )


class ClassifierReward:
    """The one label of a sequence-classification model.

    Args:
        path: a model folder or Hub name.
        loading: device, type of the weights.
        batch_size: responses at once.
        template: the chat template, and whether a text prompt is one user message.

    Attributes:
        report: notes on the texts that the model was given.
    """

    def __init__(
        self, path: str, loading: LoadOptions, *, batch_size: int, template: TemplateOptions
    ) -> None:
        self.path = path
        self.batch_size = batch_size
        self.as_chat = template.as_chat
        self.report = Report()
        device = choose_device(loading.device)
        trust = loading.trust_remote_code
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust, **template_values(template))
        dtype, _ = choose_dtype(loading.dtype, device)
        self.model = load_reward_model(path, dtype, trust_remote_code=trust).eval()
        torch.nn.Module.to(self.model, device)
        self.context = context_length(self.model.config)
        self.pad = self.model.config.get_text_config().pad_token_id
        if self.pad is None:  # transformers then cannot tell where a row ends
            self.batch_size = 1

    def __call__(self, items: Sequence[PromptItem]) -> list[Scores]:
        """Rewards of every item's responses."""
        encoded = [row for item in items for row in self._encode(item)]
        values: Scores = [None] * len(encoded)
        order = sorted((len(row["input_ids"]), i) for i, row in enumerate(encoded) if row)
        for at in range(0, len(order), self.batch_size):
            members = [i for _, i in order[at : at + self.batch_size]]
            found = self._forward([encoded[i] for i in members])
            for i, value in zip(members, found.tolist(), strict=True):
                values[i] = value
        rewards, start = [], 0
        for item in items:
            rewards.append(values[start : start + len(item.responses)])
            start += len(item.responses)
        return rewards

    def _encode(self, item: PromptItem) -> list[dict[str, list[int]]]:
        """Model inputs of each response, empty ones where there are none."""
        tokenizer = self.tokenizer
        if not item.responses:
            return []
        if _joins_pairs(tokenizer) and not self.as_chat:
            prompt = item.prompt
            if not isinstance(prompt, str):
                prompt = render_plain(prompt)
                self.report.note(PLAIN, item.place.line)
            limits: dict[str, Any] = {"truncation": self.context is not None}
            if self.context is not None:
                limits["max_length"] = self.context
            rows = [
                # A pair of texts has no place for calls, reasoning and turns.
                tokenizer(prompt, said, **limits) if isinstance(said, str) else {}
                for said in item.responses
            ]
            return [{name: list(values) for name, values in row.items()} for row in rows]
        record = item.as_record()
        encoded = encode_record(record, tokenizer, self.report, as_chat=self.as_chat)
        if encoded is None:
            return [{} for _ in item.responses]
        limit = TokenizeOptions(max_length=self.context)
        prompt_ids, responses = truncate(encoded, tokenizer, limit, Report(), record.line)
        return [{"input_ids": [*prompt_ids, *map(bare_id, response)]} for response in responses]

    def _forward(self, rows: list[dict[str, list[int]]]) -> Tensor:
        longest = max(len(row["input_ids"]) for row in rows)
        inputs = {}
        for name in rows[0]:
            fill = (self.pad or 0) if name == "input_ids" else 0
            padded = [row[name] + [fill] * (longest - len(row[name])) for row in rows]
            inputs[name] = torch.tensor(padded, device=self.model.device)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = torch.arange(longest)[None, :] < lengths[:, None]
        inputs["attention_mask"] = mask.long().to(self.model.device)
        with torch.no_grad():
            try:
                logits = self.model(**inputs).logits
            except torch.cuda.OutOfMemoryError as error:
                raise InputError(
                    f"{self.path}: {len(rows)} responses of up to {longest} tokens do not fit into "
                    "memory; lower --batch_size"
                ) from error
        return logits.float().reshape(len(rows)).cpu()


class LogprobReward:
    """A causal language model's own mean log-probability of the response, given the prompt."""

    def __init__(
        self, path: str, loading: LoadOptions, *, batch_size: int, template: TemplateOptions
    ) -> None:
        del batch_size  # packs are filled by tokens
        self.path = path
        self.report = Report()
        self.model, self.tokenizer = load_policy(path, loading, template)
        context = context_length(self.model.config)
        self.options = fit_context(TokenizeOptions(as_chat=template.as_chat), context)
        prepare_model(self.model, shared_prompts=refusal(self.model) is None)

    def __call__(self, items: Sequence[PromptItem]) -> list[Scores]:
        """Rewards of every item's responses."""
        groups: list[Group] = []
        members: list[tuple[int, tuple[int, ...]]] = []
        rewards: list[Scores] = [[None] * len(item.responses) for item in items]
        for i, item in enumerate(items):
            if not item.responses:
                continue
            record = item.as_record()
            encoded = encode_record(
                record, self.tokenizer, self.report, as_chat=self.options.as_chat
            )
            cut = encoded and cut_record(record, encoded, self.tokenizer, self.options, self.report)
            if cut is not None:
                groups.append(as_group(*cut, item.place.name))
                members.append((i, cut[0].positions))
        if not groups:
            return rewards
        tokens = enough_tokens(groups, _PACK_TOKENS)
        with refusals_of(self.path):
            found = score(self.model, groups, max_tokens=tokens)
        for (i, positions), values in zip(members, found, strict=True):
            for position, value in zip(positions, values.tolist(), strict=True):
                rewards[i][position] = value
        return rewards


def _joins_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return None not in special and tokenizer.chat_template is None
