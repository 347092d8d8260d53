"""`rank`: the ranking loss of a padded batch under any causal language model, in one call.

The alternative, `fastrank.linear_ranking_loss`, leaves it to the caller to know where a model keeps
its head, its softcap and its scale, and is silently wrong where the caller does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.arguments import Reduction, check_choice
from fastrank.attention.gate import refusal
from fastrank.data.packing import Pack
from fastrank.data.padded_rows import PaddedRows, PerCandidate, read_rows
from fastrank.function_loss import as_loss
from fastrank.loss import Loss
from fastrank.modeling.prepare import prepare_model, prepared_state
from fastrank.modeling.unwrap import causal_lm, evaluation_mode, unwrap, vocab_size
from fastrank.outputs import RankingOutput
from fastrank_kernels import Backend

logger = logging.getLogger(__name__)


def rank(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    rewards: PerCandidate,
    *,
    loss: Loss | Callable[..., Any],
    attention_mask: Tensor | None = None,
    cu_groups: Tensor | None = None,
    reference_scores: PerCandidate | None = None,
    ref_model: nn.Module | None = None,
    reduction: Reduction = "mean",
    logits_memory: int | None = None,
    backend: Backend | None = None,
) -> RankingOutput:
    """Ranking loss of a padded batch: C candidates of G prompts, one per row.

    Head, bias, softcap and scale are the model's own, measured once. The candidates of a prompt
    share it where the model can and it pays, and no logits of prompts and padding are made.
    Positions count from a row's first real token, whichever side is padded.

    The first call prepares the model (`fastrank.prepare_model`, which may be called before, to
    choose an attention backend or padded rows). That costs a few passes over a few tokens and
    changes no weight, no name and no mode; every other call of the model, and ``save_pretrained``,
    stay as they were. A model that cannot share prompts (recurrent, ALiBi, with attention dropout)
    takes padded rows, and a log line says why.

    Args:
        model: a transformers causal language model, PEFT-wrapped or not, in DDP or not.
        input_ids: int64 [C, L], prompt and response, padded on either side. It is read on the host:
            a batch on a GPU is waited for.
        labels: int64 [C, L], ``input_ids`` where a response is and -100 elsewhere; *not* shifted.
        rewards: higher is better. A list per prompt, [G, n], or flat [C] with ``cu_groups``; flat
            without them is one prompt.
        loss: e.g. ``fastrank.RRHF()``, or a function, see `fastrank.FunctionLoss`.
        attention_mask: [C, L], 0 where padding is; needed only where rows are padded on the left.
        cu_groups: int32 [G + 1], prompt g has the rows ``cu_groups[g]`` to ``cu_groups[g + 1]``.
        reference_scores: in the forms of ``rewards``, log-probabilities of the responses under the
            reference model, for a loss with ``uses_reference``: their sum for ``DPO()``, in general
            as its ``normalize`` says.
        ref_model: or the reference model itself, asked here without gradients; by default the model
            below a PEFT adapter.
        reduction: ``"mean"`` over prompts, ``"sum"``, or ``"none"`` for [G].
        logits_memory: see `fastrank.linear_ranking_loss`.
        backend: likewise.

    Returns:
        `RankingOutput`; scores in the order of the rows. Only ``loss`` carries gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        InputError: the model is no causal language model that fastrank can prepare.

    Example::

        out = fastrank.rank(model, input_ids, labels, [[0.1, 0.9], [1, 0, 2]], loss=fastrank.RRHF())
        out.loss.backward()
    """
    loss = as_loss(loss)
    check_choice("reduction", reduction, Reduction)
    if reference_scores is not None and ref_model is not None:
        raise ValueError("reference_scores and ref_model are two ways of one thing, got both")
    if not loss.uses_reference and (reference_scores is not None or ref_model is not None):
        given = "ref_model" if reference_scores is None else "reference_scores"
        raise ValueError(f"{given} needs a loss with uses_reference=True, got {loss!r}")
    known = vocab_size(causal_lm(unwrap(model)))
    rows = read_rows(
        input_ids,
        labels,
        rewards,
        cu_groups=cu_groups,
        attention_mask=attention_mask,
        vocab_size=known,
    )
    pack = _pack_for(model, rows)
    if loss.uses_reference:
        if reference_scores is None:
            scores = _reference(model, ref_model, loss, rows)
        else:
            scores = torch.cat(rows.per_prompt("reference_scores", reference_scores))
        pack = pack.replace(reference_scores=scores)
    options = {"reduction": reduction, "logits_memory": logits_memory, "backend": backend}
    found: RankingOutput = model(pack=pack, loss=loss, **options)
    return found


def _pack_for(model: nn.Module, rows: PaddedRows) -> Pack:
    """The rows as the model can take them; prepares the model."""
    state = prepared_state(model)
    if state is None:
        inner = unwrap(model)
        lm = causal_lm(inner)
        reason = refusal(lm)
        if reason is not None:
            logger.warning("%s takes a row per response: %s", type(lm).__name__, reason)
        prepare_model(inner, shared_prompts=reason is None)
        state = prepared_state(inner)
        assert state is not None
    return rows.pack(shared_prompts=state.shared_prompts)


def _reference(
    model: nn.Module, ref_model: nn.Module | None, loss: Loss, rows: PaddedRows
) -> Tensor:
    """[C] scores of the reference model, or of the model below an adapter."""
    below: Any = nullcontext
    if ref_model is None:
        below = getattr(unwrap(model), "disable_adapter", None)
        if below is None:
            raise ValueError(f"{loss!r} needs reference_scores or ref_model, got neither")
        ref_model = model
    pack = _pack_for(ref_model, rows)
    with torch.no_grad(), evaluation_mode(ref_model), below():
        scores: Tensor = ref_model(pack=pack, normalize=loss.normalize).scores
    return scores
