"""The Triton backend: the functions of `reference` under the same names and signatures.

Importing this module imports triton; importing the package does not: `dispatch` imports this module
when the backend is chosen, and names what is missing.
"""

from __future__ import annotations

from .compact import live_rows, segment_sum
from .dlogits import dlogits
from .rank import rank_scores, rank_tokens
from .rescale import rescale_
from .row_stats import row_stats
from .unit_dlogits import unit_dlogits

__all__ = [
    "dlogits",
    "live_rows",
    "rank_scores",
    "rank_tokens",
    "rescale_",
    "row_stats",
    "segment_sum",
    "unit_dlogits",
]
