"""The task of the comparison: openings of children's stories, and a model that goes on with them.

The model is the pre-trained one of 260 K parameters where it is at hand; otherwise a model of like
size is trained here, in a minute, on stories that a small grammar writes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrank import Group, RankConfig, RankTrainer

PRETRAINED = Path(__file__).resolve().parents[2] / "shared" / "models" / "tinystories-260k"

NAMES = "Lily Tim Ben Sue Amy Tom Max Mia Sam Anna Jack Lucy Emma Jill Bob Sara".split()
ANIMALS = "girl boy dog cat bird bear rabbit fox duck frog".split()
PLACES = "park forest beach garden farm lake store school house zoo".split()
OPENINGS = (
    "Once upon a time, there was a little {a} named {n}.",
    "One day, {n} went to the {p}.",
    "{n} was a little {a} who lived near the {p}.",
    "One day, a {a} and a {b} met in the {p}.",
    "{n} and {m} were playing in the {p}.",
)
#: Sentences of the grammar; about as many happy as sad ones.
SENTENCES = (
    "{n} was very happy.",
    "{n} was sad.",
    "The {a} saw a big {b}.",
    "{n} wanted to play with the {a}.",
    "{n} lost the ball and cried.",
    "They had fun in the {p}.",
    "The {b} was angry.",
    "{n} found a red box in the {p}.",
    "The {a} was scared of the {b}.",
    "{n} smiled at {m}.",
    "It was a long day.",
    "{m} said, “Let us go to the {p}.”",
    "They looked at the tree.",
    "The {a} hurt its leg.",
    "{n} and {m} were friends.",
    "{m} asked {n} for help.",
    "Then they went home.",
    "The {b} ate some food.",
)


def _fill(template: str, rng: random.Random) -> str:
    a, b = rng.sample(ANIMALS, 2)
    n, m = rng.sample(NAMES, 2)
    return template.format(a=a, b=b, n=n, m=m, p=rng.choice(PLACES))


def openings(count: int, seed: int = 0) -> list[str]:
    """Different openings, in a seeded order."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_fill(rng.choice(OPENINGS), rng)] = None
    shuffled = list(found)
    rng.shuffle(shuffled)
    return shuffled


def write_prompts(prompts: list[str], path: Path) -> None:
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")


def story_model(folder: Path, *, steps: int = 400) -> Path:
    """The pre-trained model, or one trained into ``folder`` (once)."""
    if PRETRAINED.is_dir():
        return PRETRAINED
    if not (folder / "model.safetensors").is_file():
        train_story_model(folder, steps=steps)
    return folder


def grammar_stories(count: int, seed: int = 0) -> list[str]:
    """An opening and eight sentences each."""
    rng = random.Random(seed)
    return [
        " ".join(_fill(t, rng) for t in [rng.choice(OPENINGS), *rng.choices(SENTENCES, k=8)])
        for _ in range(count)
    ]


def train_story_model(folder: Path, *, steps: int, seed: int = 0) -> None:
    """Train tokenizer and model on the grammar's stories and save them.

    A group with one candidate has no pair to rank: what remains of RRHF is its supervised term,
    the plain language-model loss.
    """
    stories = grammar_stories(16 * steps, seed)
    tokenizer = _story_tokenizer(stories[:2000])
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    groups = [
        Group([tokenizer.bos_token_id], (ids[1:] + [tokenizer.eos_token_id],), [0.0])
        for ids in tokenizer(stories)["input_ids"]
    ]
    arguments = RankConfig(
        output_dir=str(folder),
        learning_rate=3e-3,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=seed,
    )
    trainer = RankTrainer(LlamaForCausalLM(config), arguments, train_dataset=groups)
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _story_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
