"""Entropy and accuracy of a model's next-token distributions over the responses of a pack.

The fused loss keeps neither, and both need the whole row of logits: one more product with the head
and one more pass over the vocabulary. So they are computed where they are asked for, without
gradients, a block of rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.data.packing import Pack
from fastrank.errors import InputError
from fastrank.logprobs import compute_dtype

_BLOCK_BYTES = 1 << 26


class TokenStatistics:
    """Statistics of the packs that a prepared model computes meanwhile, in their order.

    Attributes:
        entropies: float32 [T] of each pack, −Σ p log p in nats.
        hits: bool [T] of each pack, whether the label is the most likely token.
    """

    def __init__(self) -> None:
        self.entropies: list[Tensor] = []
        self.hits: list[Tensor] = []

    @torch.no_grad()
    def add(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pack: Pack,
        *,
        softcap: float | None,
        logit_scale: float,
        divided: bool,
    ) -> None:
        """Add a pack, whose hidden rows are [N, D] and whose head is [V, D].

        Raises:
            InputError: the vocabulary is divided among processes.
        """
        if divided:
            raise InputError(
                "eval_token_statistics needs the whole vocabulary, got one that is divided over "
                "processes"
            )
        dtype = compute_dtype(hidden, weight)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        entropies, hits = [], []
        block = max(1, _BLOCK_BYTES // (4 * weight.shape[0]))
        for rows, labels in zip(pack.rows.split(block), pack.labels.split(block), strict=True):
            logits = F.linear(hidden[rows].to(dtype), weight, bias)
            logits = logits.float() * logit_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1))
            hits.append(logits.argmax(-1) == labels)
        self.entropies.append(torch.cat(entropies))
        self.hits.append(torch.cat(hits))

    def sums(self, num_tokens: int) -> tuple[float, float, int]:
        """Sum of the entropies, number of hits, and the number of tokens: of the first
        ``num_tokens``, behind which packs that only fill a process's turn may follow.

        Raises:
            InputError: the model's head took another path, which records nothing.
        """
        if not self.entropies:
            raise InputError("eval_token_statistics needs head_path=fused, got logits")
        entropies, hits = (torch.cat(x)[:num_tokens] for x in (self.entropies, self.hits))
        assert len(entropies) == num_tokens
        return float(entropies.double().sum()), float(hits.sum()), num_tokens
