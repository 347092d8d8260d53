"""A reward that anyone can check by eye: happy words less sad words in a story.

Used by the comparison (``make compare``) and by the README's guide, as
``fastrank reward --reward bench/happy_reward.py:reward``.
"""

from __future__ import annotations

import re

HAPPY = set(
    "happy happily smile smiled smiles smiling love loved loves fun laugh laughed laughing joy "
    "glad proud nice kind play played playing plays friend friends hug hugged excited good best "
    "better".split()
)
SAD = set(
    "sad sadly cry cried crying scared afraid angry mad hurt upset mean bad lost worried".split()
)


def reward(prompt: str, response: str) -> float:
    """Happy words less sad words of the response."""
    words = re.findall(r"[a-z]+", response.lower())
    return float(sum(word in HAPPY for word in words) - sum(word in SAD for word in words))
