"""What every process of the two-phase tests runs; a child process has to be able to import it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

import fastrank

MAX_TOKENS = 24
# Process 0 has more packs than process 1; in the last step process 1 has no group at all.
SHARES = {"uneven": ([0, 1, 3], [2, 4]), "empty": ([0, 1, 2, 3, 4], [])}


ENGINES = ("ddp", "fsdp2", "fsdp2 tied", "fsdp2 head apart")


def make_model(engine: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=None, tie_word_embeddings=engine == "fsdp2 tied",
    )  # fmt: skip
    return fastrank.prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def make_groups() -> list[fastrank.Group]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11, 5, 5, 7]), (9, [15, 3, 8])]
    return [
        fastrank.Group(
            torch.randint(0, 61, (prompt,), generator=generator),
            tuple(torch.randint(0, 61, (n,), generator=generator) for n in lengths),
            torch.rand(len(lengths), generator=generator),
        )
        for prompt, lengths in shapes
    ]


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if engine == "fsdp2 head apart":
        fully_shard(model.lm_head)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the bare model's names."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name.removeprefix("module.")] = whole.clone()
    return found


def run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    groups = make_groups()
    loss = fastrank.RRHF(margin=0.1)
    results = {}
    for engine in ENGINES:
        model = wrap(make_model(engine), engine)
        for case, shares in SHARES.items():
            mine = [groups[i] for i in shares[rank]]
            output = fastrank.two_phase_backward(model, mine, loss=loss, max_tokens=MAX_TOKENS)
            results[engine, case] = (gradients(model), output.loss, output.scores)
            model.zero_grad()
        mine = [groups[i] for i in SHARES["uneven"][rank]]
        (pack,) = fastrank.pack(mine, max_tokens=4096)
        output = model(pack=pack, loss=loss, reduction="sum")
        (output.loss * world_size / len(groups)).backward()
        results[engine, "joint"] = (
            gradients(model),
            output.loss.detach() / len(groups),
            output.scores,
        )
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
