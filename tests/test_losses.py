"""The specifications of the losses: names, options, hashing, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch

import fastrank
from fastrank.losses import LOSSES


def test_every_loss_of_the_contract_is_there_with_its_defaults() -> None:
    assert sorted(LOSSES) == sorted(
        "rrhf pro ranknet slic simpo ipo dpo rebel lambdarank".split()
        + "listmle listnet nca lire approxndcg".split()
    )
    assert fastrank.RRHF() == fastrank.RRHF(margin=0.0, sft_weight=1.0, sft_reduction="mean")
    assert fastrank.PRO() == fastrank.PRO(sft_weight=0.05, sft_reduction="sum")
    assert fastrank.DPO().normalize == "sum" and fastrank.DPO().uses_reference
    for name, cls in LOSSES.items():
        loss = cls()
        of_sums = name in ("dpo", "rebel", "nca", "lire")
        assert loss.normalize == ("sum" if of_sums else "mean")
        assert loss.uses_reference == (name in ("dpo", "ipo", "rebel", "nca"))
        assert loss.sft_weight == {"rrhf": 1.0, "pro": 0.05}.get(name, 0.0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_are_frozen_hashable_and_found_by_name(name) -> None:
    loss = fastrank.loss_from_name(name.upper(), sft_weight=0.25)
    assert loss == fastrank.loss_from_name(name, sft_weight=0.25)
    assert len({loss, fastrank.loss_from_name(name, sft_weight=0.25)}) == 1
    assert loss.spec().sft_weight == 0.25
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.sft_weight = 1.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fastrank.loss_from_name("rhf"), "did you mean 'rrhf'"),
        (lambda: fastrank.loss_from_name("rrhf", magin=1), "got 'magin'; did you mean 'margin'"),
        (lambda: fastrank.RRHF(margin="x"), "RRHF: margin must be a finite number, got 'x'"),
        (lambda: fastrank.RRHF(margin=float("nan")), "margin must be a finite number, got nan"),
        (lambda: fastrank.RRHF(sft_weight=-1), "sft_weight must not be negative, got -1"),
        (lambda: fastrank.RRHF(sft_reduction="avg"), "sft_reduction must be 'mean' or 'sum'"),
        (lambda: fastrank.DPO(pairs="some"), "pairs must be 'all' or 'best_worst', got 'some'"),
        (lambda: fastrank.IPO(beta=0), "IPO: beta must be positive, got 0"),
        (lambda: fastrank.ListMLE(top_k=1.5), "top_k must be an integer, got 1.5"),
        (lambda: fastrank.ListMLE(top_k=0), "top_k must be positive, got 0"),
        (
            lambda: fastrank.RRHF(margin_by="reward"),
            "RRHF: margin_by='reward' needs a margin other",
        ),
        (
            lambda: fastrank.RRHF(margin=1, margin_by="x"),
            "margin_by must be 'constant' or 'reward'",
        ),
        (lambda: fastrank.DPO(robust=True), "robust=True needs a label_smoothing other than 0"),
        (lambda: fastrank.DPO(label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\), got"),
        (lambda: fastrank.DPO(uses_reference=1), "uses_reference must be True or False, got 1"),
        (lambda: fastrank.RRHF(rank_weight=-1), "rank_weight must not be negative, got -1"),
        (lambda: fastrank.RRHF(normalize=-0.5), "normalize must be 'mean', 'sum' or a number >= 0"),
        (
            lambda: fastrank.RRHF(normalize="max"),
            "normalize must be 'mean', 'sum' or a number >= 0",
        ),
        (lambda: fastrank.REBEL(eta=0), "REBEL: eta must be positive, got 0"),
        (lambda: fastrank.ListNet(temperature=True), "temperature must be a finite number"),
    ],
)
def test_bad_options_are_refused_by_name(call, text) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_number_that_is_taken_gives_numbers(name) -> None:
    """Options at their bounds and beyond, rewards at theirs: finite in float32, or refused."""
    cls = LOSSES[name]
    rewards = torch.tensor([0.1, 0.9, 0.5])

    def check(loss, rewards) -> None:
        for values in ([-1.0, -3.0, -2.0], [-300.0, -0.1, -40.0]):
            scores = torch.tensor(values, requires_grad=True)
            value = fastrank.ranking_loss(scores, rewards, loss=loss)
            value.backward()
            assert value.isfinite() and scores.grad.isfinite().all(), (loss, rewards, values)

    for field in dataclasses.fields(cls):
        if not isinstance(field.default, float):
            continue
        for number in (-1e15, -1.0, 0.0, 1e-15, 0.3, 1e15):
            with contextlib.suppress(ValueError):
                check(cls(**{field.name: number}), rewards)
        for number in (1e16, -1e16, 1e39, 1e308, 10**400, -math.inf, math.inf, math.nan, "1"):
            with pytest.raises(ValueError, match=f"{cls.__name__}: {field.name} must "):
                cls(**{field.name: number})
        if field.name in ("beta", "eta", "temperature"):
            for number in (1e-16, 1e-40, 5e-324):
                with pytest.raises(ValueError, match=f"{field.name} must lie within from 1e-15"):
                    cls(**{field.name: number})
    for given in ([1e15, -1e15, 0.0], [1e-38, 0.0, -1e-38], [1e-45, 0.0, 1e15]):
        check(cls(), torch.tensor(given))
    for given in ([3e38, -3e38, 0.0], [0.0, 1e20, 1.0], [0.0, -2e16, 1.0]):
        with pytest.raises(ValueError, match="rewards must lie within ±1e[+]16, got"):
            check(cls(), torch.tensor(given))
