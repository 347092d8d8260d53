"""Rows for the tests of tables, goals and files."""

from __future__ import annotations

import pytest

from fastrank.benchmarks.results import Measurement


@pytest.fixture
def a_row():
    """A function that makes a row of the loss suite from the fields that matter."""

    def make(variant: str = "v", workload: str = "K5", **fields: object) -> Measurement:
        sizes = "tokens groups candidates response prompt vocab hidden".split()
        text = {"suite": "loss", "device": "cpu", "dtype": "float32", "loss": "rrhf"}
        row = {**dict.fromkeys(sizes, 3), **text, "sizes": "4 x 4", "ours": variant == "fastrank"}
        return Measurement(**{**row, "workload": workload, "variant": variant, **fields})

    return make
