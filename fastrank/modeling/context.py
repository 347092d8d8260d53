"""Checks of a pack against a model's context length and position-dependent RoPE.

Both concern single sequences, [prompt; response], not the row of the pack, which may be much longer
than the model's context.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from fastrank.data.packing import Pack


def context_length(config: PretrainedConfig) -> int | None:
    """Maximum number of positions; None if the configuration does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def rope_boundary(config: PretrainedConfig) -> int | None:
    """Length beyond which longrope uses other frequencies, for every position of the row."""
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            boundary = parameters.get("original_max_position_embeddings")
            return int(boundary) if boundary else context_length(config)
    return None


def check_sequences(pack: Pack, config: PretrainedConfig) -> None:
    """Raise ValueError if a sequence is too long, or if sequences need different frequencies."""
    limit = context_length(config)
    longest, shortest = pack.longest_sequence, pack.shortest_sequence
    if limit is not None and longest > limit:
        raise ValueError(
            f"{_name(pack, longest)}: prompt and response must fit into the model's context of "
            f"{limit} tokens, got {longest}"
        )
    boundary = rope_boundary(config)
    if boundary is not None and shortest <= boundary < longest:
        raise ValueError(
            f"longrope turns sequences of up to {boundary} tokens differently from longer ones, "
            f"and this pack has both: {_name(pack, shortest)} with {shortest} and "
            f"{_name(pack, longest)} with {longest}; pack them apart"
        )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """RoPE parameters of the model, or one set per layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _name(pack: Pack, sequence_length: int) -> str:
    candidate = pack.sequence_lengths.index(sequence_length)
    group = sum(int(offset) <= candidate for offset in pack.cu_groups[1:])
    return pack.names[group] or f"group {pack.group_index[group]}"
