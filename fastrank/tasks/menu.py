"""The built-in task: rank meals by how much of them a guest likes.

A prompt names the dishes that one guest likes; a response is a meal, a list of dishes; its
score is the share of the meal's dishes that the guest likes:

    guest likes fig plum soup ; meal :      →  fig soup fig plum   1.0
                                               plum rice fig tea   0.5
                                               rice tea bean tea   0.0

The same meal is right for one guest and wrong for another, so nothing can be learnt from the
responses alone, and the guests held out have tastes that no training prompt has: accuracy on
them measures learning and not memory. A two-layer Llama of a few ten thousand weights learns it
from scratch in seconds.

Text and a word tokenizer, not token ids: the task then takes the same way as a user's file, through
records, tokenisation, packing and a checkpoint with its tokenizer.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastrank.data.records import Record

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["MenuTask", "menu_records", "menu_task", "tiny_llama", "word_tokenizer"]

DISHES = tuple(
    "apple bean bread cake corn egg fig fish grape kale leek lime melon nut olive onion "
    "pasta peach pear plum rice soup tea yam".split()
)
LIKED = 3  # dishes a guest likes: 2024 different guests
DISHES_A_MEAL = 4
_WORDS = ("guest", "likes", ";", "meal", ":", *DISHES)
_SPECIAL = ("<pad>", "<unk>", "<eos>")


@dataclass(frozen=True)
class MenuTask:
    """Records for training, records of held-out guests, and their model and tokenizer."""

    train: list[Record]
    heldout: list[Record]
    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM


def menu_task(*, num_train: int = 1536, num_heldout: int = 128, seed: int = 0) -> MenuTask:
    """The task and an untrained model for it; the same seed gives the same of both."""
    records = menu_records(num_train + num_heldout, seed=seed)
    return MenuTask(records[:num_train], records[num_train:], word_tokenizer(), tiny_llama(seed))


def menu_records(count: int, *, seed: int = 0) -> list[Record]:
    """``count`` guests, no two with the same taste, each with 4 to 6 meals of 4 dishes.

    Raises:
        ValueError: more guests asked for than there are tastes (2024).
    """
    generator = random.Random(f"menu-{seed}")
    tastes = list(itertools.combinations(DISHES, LIKED))
    if count > len(tastes):
        raise ValueError(f"count must be at most {len(tastes)} (different tastes), got {count}")
    records = []
    for number, taste in enumerate(generator.sample(tastes, count), start=1):
        liked = generator.sample(taste, LIKED)
        meals = _meals(set(taste), generator)
        scores = [sum(dish in taste for dish in meal) / len(meal) for meal in meals]
        records.append(
            Record(
                prompt=f"guest likes {' '.join(liked)} ; meal : ",
                responses=[" ".join(meal) for meal in meals],
                scores=scores,
                line=number,
                id=f"guest-{number}",
            )
        )
    return records


def _meals(taste: set[str], generator: random.Random) -> list[list[str]]:
    """4 to 6 meals whose share of liked dishes differs widely; at least one strict pair."""
    others = [dish for dish in DISHES if dish not in taste]
    liked = sorted(taste)
    while True:
        meals = []
        for _ in range(generator.randint(4, 6)):
            good = generator.randint(0, DISHES_A_MEAL)
            meal = generator.choices(liked, k=good)
            meal += generator.choices(others, k=DISHES_A_MEAL - good)
            generator.shuffle(meal)
            meals.append(meal)
        if len({sum(dish in taste for dish in meal) / len(meal) for meal in meals}) > 1:
            return meals


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; an unknown word is ``<unk>``. Loads with ``AutoTokenizer`` once saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=64,
    )


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama (2 layers, hidden 64, context 64) for `word_tokenizer`'s vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<eos>"),
        pad_token_id=_SPECIAL.index("<pad>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
