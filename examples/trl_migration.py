"""A TRL script for DPO, moved to fastrank: what was there stands beside what replaces it.

    python examples/trl_migration.py MODEL PAIRS.jsonl runs/dpo

PAIRS.jsonl has ``prompt``, ``chosen`` and ``rejected``; a Hub name such as
trl-lib/ultrafeedback_binarized will do as well. With lists of ``responses`` and ``scores`` the same
script ranks any number of candidates.
"""

import sys

from peft import LoraConfig

import fastrank  # from trl import DPOConfig, DPOTrainer

model, pairs, output_dir = sys.argv[1:4]

args = fastrank.RankConfig(  # DPOConfig(
    output_dir=output_dir,
    loss="dpo",
    loss_kwargs={"beta": 0.1},  # beta=0.1,
    learning_rate=5e-5,
    per_device_train_batch_size=4,  # counts prompts, each with all of its candidates
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    max_length=512,
    logging_steps=5,
    save_strategy="epoch",
)


def share_of_wins(found):
    """Prompts whose best candidate scores highest: scores and rewards are lists, one per prompt."""
    both = zip(found.predictions, found.label_ids, strict=True)
    wins = [s.argmax() == r.argmax() for s, r in both]
    return {"share_of_wins": sum(wins) / len(wins)}


trainer = fastrank.RankTrainer(  # DPOTrainer(
    model=model,
    args=args,
    train_dataset=pairs,
    eval_dataset=pairs,
    peft_config=LoraConfig(r=8, task_type="CAUSAL_LM"),  # its base is the reference
    compute_metrics=share_of_wins,
)
trainer.train()
trainer.save_model()
print(trainer.state.log_history[-2])
