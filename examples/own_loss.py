"""A ranking loss of one's own, trained through the same memory-saving paths as the built-in ones.

python examples/own_loss.py MODEL RANKED.jsonl runs/own
"""

import sys

import torch

import fastrank

model, data, output_dir = sys.argv[1:4]


def expected_regret(scores, rewards):
    """Reward lost on average by drawing a candidate with probability softmax(scores), instead of
    taking the best: anything that autograd can differentiate in the scores of one prompt will do.
    """
    return (torch.softmax(scores, 0) * (rewards.max() - rewards)).sum()


# On scores alone, to look at it: two prompts, of three and of two candidates.
scores = torch.tensor([-1.0, -2.0, -3.0, -1.5, -1.0], requires_grad=True)
rewards = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0])
ends = torch.tensor([0, 3, 5], dtype=torch.int32)
value = fastrank.ranking_loss(scores, rewards, loss=expected_regret, cu_groups=ends)
value.backward()
print(f"expected regret {value.item():.3f}, its gradient {scores.grad.tolist()}")

# With a supervised term beside it: a ranking term alone can be met by a model that writes no
# language any more.
loss = fastrank.FunctionLoss(expected_regret, sft_weight=0.1)
args = fastrank.RankConfig(output_dir=output_dir, loss=loss, num_train_epochs=1, logging_steps=1)
trainer = fastrank.RankTrainer(model, args, train_dataset=data)
trainer.train()
trainer.save_model()
