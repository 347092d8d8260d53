"""The actor of a reinforcement-learning loop, its update made of packs.

    python examples/packs_in_a_verl_like_worker.py MODEL

Frameworks such as verl hand a worker one batch of padded tensors: prompts padded on the left,
responses on the right, a ``uid`` for the prompt that a row was drawn for, and rewards. The update
below keeps that interface and ranks the responses of each prompt, every prompt encoded once.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import fastrank


class RankingActor:
    """Holds the policy and its optimiser; `update_policy` makes one step."""

    def __init__(self, path, loss, learning_rate=1e-5, max_tokens=16384):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model = fastrank.prepare_model(self.model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate)
        self.loss, self.max_tokens = loss, max_tokens

    def groups(self, batch):
        """Rows with the same ``uid`` as one group, padding left behind."""
        width = batch["prompts"].shape[1]
        mask = batch["attention_mask"].bool()
        rows = {}
        for i, uid in enumerate(batch["uid"]):
            rows.setdefault(uid, []).append(i)
        return [
            fastrank.Group(
                batch["prompts"][own[0]][mask[own[0], :width]],
                [batch["responses"][i][mask[i, width:]] for i in own],
                batch["rewards"][own],
                name=str(uid),
            )
            for uid, own in rows.items()
        ]

    def update_policy(self, batch):
        """One optimiser step over the batch; returns what a dashboard shows."""
        groups = self.groups(batch)
        total, scores = 0.0, torch.empty(0)
        for pack in fastrank.pack(groups, max_tokens=self.max_tokens):
            out = self.model(pack=pack, loss=self.loss, reduction="sum")
            (out.loss / len(groups)).backward()
            total += out.loss.item() / len(groups)
            scores = torch.cat([scores, out.scores.cpu()])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"actor/loss": total, "actor/grad_norm": norm.item(), "actor/score": scores.mean()}


if __name__ == "__main__":
    actor = RankingActor(sys.argv[1], fastrank.RRHF(), learning_rate=1e-3)
    # What rollout and reward workers would give: two prompts, three responses each.
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 100, (6, 14), generator=make)
    ids[:3, :8], ids[3:, :8] = ids[0, :8].clone(), ids[3, :8].clone()
    attention_mask = torch.ones_like(ids)
    attention_mask[:3, :2] = 0  # the first prompt is shorter
    attention_mask[1, 12:] = 0  # and so is one response
    batch = {
        "prompts": ids[:, :8], "responses": ids[:, 8:], "attention_mask": attention_mask,
        "uid": ["a"] * 3 + ["b"] * 3, "rewards": torch.tensor([0.1, 0.9, 0.4, 1.0, 0.0, 0.5]),
    }  # fmt: skip
    for step in range(5):
        print(step, actor.update_policy(batch))
