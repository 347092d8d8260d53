"""A training loop on one page: packs, an optimiser, a schedule, one line per step.

python examples/own_loop.py MODEL RANKED.jsonl OUTPUT_DIR [STEPS]
"""

import math
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastrank

path, data, output_dir = sys.argv[1:4]
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 100
prompts_per_step, max_tokens, peak, warmup = 8, 16384, 1e-5, 5

# model and data: weights in float32, because bfloat16 ones do not move at such learning rates
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
model = fastrank.prepare_model(model).train()
context = model.config.max_position_embeddings
groups, report = fastrank.load_groups(data, tokenizer, context_length=context)
print(report.as_text())

# the first tenth is held out
order = random.Random(0)
shuffled = order.sample(range(len(groups)), len(groups))
cut = max(1, len(groups) // 10)
held_out = [groups[i] for i in shuffled[:cut]]
train = [groups[i] for i in shuffled[cut:]]

loss = fastrank.RRHF()
optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def learning_rate(step):
    """A short way up, and down again along half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def accuracy():
    """Share of pairs in the order of their rewards, over the prompts that are held out."""
    scores = fastrank.score(model, held_out, max_tokens=max_tokens)
    return fastrank.metrics.pairwise_accuracy(scores, [group.rewards for group in held_out])


print(f"step 0 | held-out accuracy {accuracy():.3f}")
for step in range(steps):
    started = time.perf_counter()
    batch = order.sample(train, min(prompts_per_step, len(train)))
    total, tokens = 0.0, 0
    # as many passes as the step's prompts need; each divides by the prompts of the whole step
    for pack in fastrank.pack(batch, max_tokens=max_tokens):
        with autocast:
            out = model(pack=pack, loss=loss, reduction="sum")
        (out.loss / len(batch)).backward()
        total, tokens = total + out.loss.item() / len(batch), tokens + pack.num_tokens
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    rate = tokens / (time.perf_counter() - started)
    print(f"step {step + 1}/{steps} | loss {total:.4f} | grad {norm:.2f} | {rate:,.0f} tokens/s")
print(f"step {steps} | held-out accuracy {accuracy():.3f}")
model.save_pretrained(output_dir)
tokenizer.save_pretrained(output_dir)
