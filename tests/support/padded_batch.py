"""What a training script has at the start of its step: the names that printed snippets use."""

from __future__ import annotations

from typing import Any

import torch
from architectures import build
from pack_cases import random_groups
from torch.nn.utils.rnn import pad_sequence

import fastrank


def padded_batch() -> dict[str, Any]:
    """Two prompts with two and three candidates, padded, and as groups."""
    groups = random_groups([(5, [3, 4]), (7, [3, 4, 5])])
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.response_ids]
    sequences = [torch.cat(row) for row in rows]
    labels = [torch.cat((torch.full_like(prompt, -100), ids)) for prompt, ids in rows]
    return {
        "model": build("llama", tie_word_embeddings=False), "torch": torch, "fastrank": fastrank,
        "groups": groups, "batch": [(g.prompt_ids, g.response_ids, g.rewards) for g in groups],
        "input_ids": pad_sequence(sequences, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
        "rewards": torch.cat([group.rewards for group in groups]),
        "cu_groups": torch.tensor([0, 2, 5], dtype=torch.int32),
    }  # fmt: skip
