"""Refusing models that are random: two passes over them would compute two different functions.

What modules and configurations say about dropout and noise is read and named first. What they do
not say (a rate read from elsewhere, experts that are sampled) shows in the random numbers that a
forward pass draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastrank.errors import InputError
from fastrank.modeling.dropout import random_rates
from fastrank.modeling.unwrap import causal_lm
from fastrank.training.engine import unwrap


def check_deterministic(model: nn.Module) -> None:
    """Refuse a model with a dropout or jitter: its two phases would compute different functions.

    Raises:
        InputError: naming the rates.
    """
    rates = random_rates(model)
    if rates:
        more = f" and {len(rates) - 3} more" if len(rates) > 3 else ""
        raise InputError(
            "two-phase training needs a model without randomness, expected rates of 0, got "
            f"{', '.join(rates[:3])}{more}; fastrank.modeling.dropout.disable_dropout(model) sets "
            "dropouts to 0, the model's configuration the others"
        )


@contextlib.contextmanager
def no_random_numbers(model: nn.Module, device: torch.device, *, watch: bool) -> Iterator[None]:
    """Raise InputError if the model draws random numbers meanwhile, whatever it does with them:
    some read a rate from their configuration, others sample their experts."""
    if not watch:
        yield
        return
    before = _random_states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)):
        config = causal_lm(unwrap(model)).config.get_text_config().to_dict()
        named = [
            f"{name}={value}"
            for name, value in config.items()
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value
        ]
        raise InputError(
            "two-phase training needs a model without randomness, but "
            f"{type(model).__name__} draws random numbers in training mode (its configuration has "
            f"{', '.join(named) or 'no dropout or jitter'})"
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
