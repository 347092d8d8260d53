"""A language model as a reranker: trained listwise, then asked to order candidates it never saw.

    python examples/reranker.py MODEL TRAIN.jsonl QUERIES.jsonl runs/reranker

Both files have ``prompt``, ``responses`` and ``scores``: a query, its candidates, and how relevant
each is. The scores of QUERIES.jsonl serve for the metrics alone.
"""

import sys

from transformers import AutoTokenizer

import fastrank
from fastrank import metrics

path, train, queries, output_dir = sys.argv[1:5]

trainer = fastrank.RankTrainer(
    path,
    fastrank.RankConfig(
        output_dir=output_dir,
        loss=fastrank.ListNet(temperature=0.5, normalize="sum"),  # the whole list at once
        learning_rate=2e-5,
        num_train_epochs=1,
        logging_steps=5,
    ),
    train_dataset=train,
)
tokenizer = AutoTokenizer.from_pretrained(path)
context = trainer.model.config.max_position_embeddings
groups, _ = fastrank.load_groups(queries, tokenizer, context_length=context)


def report(when):
    """Accuracy of pairs, NDCG, MRR and how often the best candidate comes first."""
    scores = fastrank.score(trainer.model, groups, normalize="sum")
    rewards = [group.rewards for group in groups]
    found = metrics.ranking_metrics(scores, rewards)
    print(f"{when}: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return scores


report("before")
trainer.train()
scores = report("after")
trainer.save_model()

best = scores[0].argsort(descending=True)
print("the first query's candidates, best first:")
for place, index in enumerate(best.tolist(), 1):
    print(f"{place}. {tokenizer.decode(groups[0].response_ids[index])!r} ({scores[0][index]:.2f})")
