"""What a group costs to compute, in floating-point operations.

Processes that work side by side wait for the slowest, so packs are dealt by their cost. Tokens are
not it: the head is computed for ranked tokens alone, and attention grows with the square of a
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastrank.data.columns import GroupSizes
from fastrank.modeling.unwrap import causal_lm, unwrap


@dataclass(frozen=True)
class PackCost:
    """FLOPs of a forward pass over groups: N tokens, T ranked tokens, A pairs of a query and a
    key that it sees.

        per_token · N + per_pair · A + per_label · T

    A backward pass costs twice as much, whatever the group, so the shares are those of training.
    By default tokens alone are counted.

    Attributes:
        per_token: 2 per weight of the layers; of experts, those that a token is sent to.
        per_pair: 4 per layer and unit of its heads: two products, queries by keys and
            probabilities by values.
        per_label: 2 · D · V, the output head.

    Example:
        >>> import numpy as np
        >>> sizes = GroupSizes.of_lengths(np.array([3]), np.array([2, 1]), np.array([2]))
        >>> PackCost().of_groups(sizes, shared_prompts=True)  # 3 + 2 + 1 tokens
        array([6.])
        >>> PackCost(0.0, 1.0, 0.0).of_groups(sizes, shared_prompts=True)
        array([19.])
    """

    per_token: float = 1.0
    per_pair: float = 0.0
    per_label: float = 0.0

    @classmethod
    def of_model(cls, model: nn.Module) -> PackCost:
        """The cost for a transformers model, wrapped or not. Windows of attention are not counted
        as such."""
        lm = causal_lm(unwrap(model))
        config: Any = lm.config.get_text_config()
        outer = (lm.get_input_embeddings(), lm.get_output_embeddings())
        embeddings = {id(weight) for module in outer for weight in module.parameters()}
        sent = getattr(config, "num_experts_per_tok", None) or 1
        experts = next(
            filter(None, (getattr(config, name, None) for name in _EXPERTS)), sent
        )  # all of them, where the configuration does not tell
        weights = 0.0
        for name, weight in lm.named_parameters():
            if id(weight) not in embeddings:
                weights += weight.numel() * (sent / experts if ".experts." in name else 1)
        heads = getattr(config, "num_attention_heads", 0)
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
        head: Any = lm.get_output_embeddings()
        return cls(
            per_token=2.0 * weights,
            per_pair=4.0 * config.num_hidden_layers * width,
            per_label=2.0 * head.weight.numel(),
        )

    def of_groups(self, sizes: GroupSizes, shared_prompts: bool) -> NDArray[np.float64]:
        """FLOPs of each group: float64 [N]; without shared prompts in padded rows of its own."""
        tokens, pairs = sizes.num_tokens, sizes.num_pairs
        if not shared_prompts:
            tokens = sizes.pack_tokens(False)
            pairs = tokens * (sizes.longest_sequence + 1) // 2
        return self.per_token * tokens + self.per_pair * pairs + self.per_label * sizes.num_labels


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
