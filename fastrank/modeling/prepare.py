"""`prepare_model`: a transformers model that takes packs.

The model keeps its class, its parameters, its ``save_pretrained`` and its behaviour for every call
without a pack. Only ``forward`` is replaced on the instance, because that is where DDP, FSDP2 and
accelerate hook in: the ranking loss must be computed *inside* the wrapped forward, or gradients are
not synchronised. A wrapping ``nn.Module`` would change parameter names and checkpoints.

Shapes: N tokens of a pack with shared prompts (one row), C candidates, L tokens of the longest
sequence, D hidden size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastrank.arguments import HeadPathName, Normalize, Reduction, check_choice
from fastrank.attention.adapter import attention_modules, hook_attention, shared_prompt_attention
from fastrank.attention.backends import BACKENDS, AttentionName
from fastrank.attention.gate import check_shareable, text_decoder, trunk
from fastrank.data.packing import Pack
from fastrank.errors import InputError
from fastrank.function_loss import as_loss
from fastrank.linear_loss import linear_ranking_loss
from fastrank.logprobs import sequence_scores, token_logprobs
from fastrank.loss import Loss
from fastrank.modeling.context import check_sequences
from fastrank.modeling.heads import (
    Head,
    HeadPath,
    call_head,
    choose_path,
    logits_fallback,
    remove_forwards,
    uncast,
    without_forward,
)
from fastrank.modeling.mesh import check_placement
from fastrank.modeling.probe import check_causal, check_sharing, probe_head
from fastrank.modeling.token_statistics import TokenStatistics
from fastrank.modeling.unwrap import (
    causal_lm,
    evaluation_mode,
    is_materialized,
    keep_differentiable,
    model_configs,
    unwrap,
)
from fastrank.outputs import RankingOutput, ScoreOutput
from fastrank.ranking import ranking_from_logprobs
from fastrank_kernels import Backend

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
OutputT = TypeVar("OutputT", RankingOutput, ScoreOutput)

_STATE = "_fastrank"
_REDUCE = "__reduce_ex__"  # which pickle and copy ask an instance for


@dataclass(eq=False)
class Prepared:
    """State that `prepare_model` keeps on a model."""

    shared_prompts: bool
    attention: AttentionName
    inner_forward: Callable[..., Any] | None  # an instance's own forward, if it had one
    num_attention_modules: int
    handles: list[Any]
    head_path: HeadPathName
    head: Head | None = None
    last_path: HeadPath | None = None
    result: RankingOutput | ScoreOutput | None = None  # until the model's hooks have run
    keeps_result: bool = False
    statistics: TokenStatistics | None = None  # while they are asked for


def prepare_model(
    model: ModelT,
    *,
    attention: AttentionName = "auto",
    shared_prompts: bool = True,
    head_path: HeadPathName = "auto",
) -> ModelT:
    """Prepare a causal language model to take packs, in place, and return it.

    Afterwards ``model(pack=pack, loss=fastrank.RRHF(), reduction="mean")`` returns a
    `RankingOutput` and ``model(pack=pack)`` a `ScoreOutput` whose token log-probabilities carry
    gradients. A pack on another device is moved to the model's. Every other call behaves as before.

    The auxiliary load-balancing loss of mixtures of experts is not added to the ranking loss; with
    shared prompts it would count a prompt's tokens once instead of once per response.

    Args:
        model: a transformers causal language model, PEFT-wrapped or not. Prepare it before DDP,
            FSDP2 or ``torch.compile`` wrap it.
        attention: ``"auto"``, or the backend for shared prompts by name: ``"cpu"`` and, on a GPU,
            ``"merge"`` (parts of one softmax merged), ``"varlen"``, ``"flex"``, ``"segmentwise"``
            (every sequence by itself). ``"auto"`` tries them in this order, per layer.
        shared_prompts: False for models that cannot share prompts (recurrent, hybrid, ALiBi); they
            take packs made with ``shared_prompts=False``.
        head_path: ``"fused"`` computes the loss inside the head's own forward, without the logits
            of all response rows at once, under DDP, FSDP2 and ZeRO-3 too; ``"logits"`` lets the
            model make them, which no CUDA graph captures; ``"auto"`` is fused wherever the head is
            a plain linear layer, and logs a warning where that changes from one pack to the next.
            `head_path_of` tells.

    Raises:
        TypeError: the model is not a transformers model.
        InputError: the model cannot share prompts, has 4-bit weights that gradients do not pass (an
            evaluation repacked them before), is spread over devices by a ``device_map``, or its
            head cannot take the fused path asked for; the message says why.
        ValueError: the backend or the head path is unknown.
    """
    check_choice("head_path", head_path, HeadPathName)
    if attention not in ("auto", *BACKENDS):
        expected = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"attention must be one of {expected}, got {attention!r}")
    lm = causal_lm(model)
    check_placement(lm)
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        logger.warning(
            "the auxiliary load-balancing loss (output_router_logits=True) is not added to the "
            "ranking loss of packs"
        )
    keep_differentiable(lm)
    if shared_prompts:
        check_shareable(lm)
    release_model(model)
    modules = attention_modules(text_decoder(lm)) if shared_prompts else []
    state = Prepared(
        shared_prompts=shared_prompts,
        attention=attention,
        inner_forward=model.__dict__.get("forward"),
        num_attention_modules=len(modules),
        handles=hook_attention(modules),
        head_path=head_path,
    )
    model.__dict__[_STATE] = state
    model.__dict__[_REDUCE] = functools.partial(_reduced, model)
    model.forward = MethodType(_forward_of(type(model)), model)
    try:
        if is_materialized(lm):
            _check(model, state)
            _choose_path(model, lm, state)
    except Exception:
        release_model(model)
        raise
    return model


def release_model(model: nn.Module) -> None:
    """Undo `prepare_model`; leave a model that is not prepared alone."""
    state = model.__dict__.pop(_STATE, None)
    if state is None:
        return
    del model.__dict__[_REDUCE]
    for handle in state.handles:
        handle.remove()
    remove_forwards(model)
    del model.forward
    if state.inner_forward is not None:
        model.forward = state.inner_forward


def _reduced(model: nn.Module, protocol: int) -> tuple[Any, ...]:
    """What pickle and ``copy.deepcopy`` make a prepared model again of: the model as it was before,
    over the same weights, and the arguments of `prepare_model`."""
    del protocol
    state: Prepared = model.__dict__[_STATE]
    arguments = (state.attention, state.shared_prompts, state.head_path)
    hooks = {(id(found), handle.id) for handle in state.handles for found in _hooks_of(handle)}
    made: dict[int, nn.Module] = {}

    def bare(module: nn.Module) -> nn.Module:
        """A copy of the module and those in it without what was added; the rest is shared."""
        if id(module) not in made:
            copied = made[id(module)] = type(module).__new__(type(module))
            own = {name: value for name, value in vars(module).items() if name != _REDUCE}
            for name, value in own.items():
                if isinstance(value, OrderedDict):
                    own[name] = OrderedDict(
                        (key, item) for key, item in value.items() if (id(value), key) not in hooks
                    )
            without_forward(own)
            own["_modules"] = {
                name: None if inner is None else bare(inner)
                for name, inner in module._modules.items()
            }
            vars(copied).update(own)
        return made[id(module)]

    plain = bare(model)
    del plain.__dict__[_STATE], plain.__dict__["forward"]
    if state.inner_forward is not None:
        plain.__dict__["forward"] = state.inner_forward
    return _prepared_again, (plain, *arguments)


def _hooks_of(handle: Any) -> list[Any]:
    """The dictionaries that a hook's handle removes it from."""
    extra = handle.extra_dict_ref
    references = (handle.hooks_dict_ref, *((extra,) if callable(extra) else extra))
    return [found for reference in references if (found := reference()) is not None]


def _prepared_again(
    model: nn.Module, attention: AttentionName, shared_prompts: bool, head_path: HeadPathName
) -> nn.Module:
    return prepare_model(
        model, attention=attention, shared_prompts=shared_prompts, head_path=head_path
    )


def prepared_state(model: nn.Module) -> Prepared | None:
    """State of a prepared model, wrapped or not; None if it is not prepared."""
    return unwrap(model).__dict__.get(_STATE)


@contextmanager
def token_statistics(model: nn.Module) -> Iterator[TokenStatistics]:
    """Record the next-token statistics of every pack that a prepared model, wrapped or not,
    computes meanwhile."""
    state = prepared_state(model)
    if state is None:
        raise ValueError(f"model must be prepared, got {type(unwrap(model)).__name__}")
    state.statistics = TokenStatistics()
    try:
        yield state.statistics
    finally:
        state.statistics = None


def head_path_of(model: nn.Module) -> HeadPath | None:
    """How a prepared model, wrapped or not, would compute its next pack, and why; None if that is
    measured with the first pack, when every weight is there.

    Raises:
        InputError: the fused path was asked for and is not possible.
        ValueError: the model is not prepared.
    """
    inner = unwrap(model)
    state = prepared_state(inner)
    if state is None:
        raise ValueError(f"model must be prepared, got {type(inner).__name__}")
    if state.head is None:
        return None
    return choose_path(inner, causal_lm(inner), state.head, state.head_path)


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward of prepared models of a class.

    It has the signature of the class's own, from which transformers' Trainer reads the columns and
    keyword arguments that the model takes. ``__wrapped__`` must not be set, because accelerate
    follows it to the class's forward when it unwraps.
    """

    @functools.wraps(cls.forward)
    def forward(
        self: nn.Module,
        *args: Any,
        pack: Pack | None = None,
        loss: Loss | Callable[..., Any] | None = None,
        reduction: Reduction = "mean",
        normalize: Normalize = "mean",
        logits_memory: int | None = None,
        backend: Backend | None = None,
        **kwargs: Any,
    ) -> Any:
        if pack is None:
            if loss is not None:
                raise TypeError("loss needs pack=, got no pack")
            return _inner(self)(*args, **kwargs)
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            raise TypeError(f"pack= takes no other model inputs, got {given or 'positional ones'}")
        options = {"logits_memory": logits_memory, "backend": backend}
        return _pack_forward(self, pack, loss, reduction, normalize, options)

    del forward.__wrapped__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


def _inner(model: nn.Module) -> Callable[..., Any]:
    """The forward of the model before it was prepared."""
    state: Prepared = model.__dict__[_STATE]
    return state.inner_forward or MethodType(type(model).forward, model)


def _pack_forward(
    model: nn.Module,
    pack: Pack,
    loss: Loss | Callable[..., Any] | None,
    reduction: Reduction,
    normalize: Normalize,
    options: dict[str, Any],
) -> RankingOutput | ScoreOutput:
    if not isinstance(pack, Pack):
        raise TypeError(f"pack must be one of fastrank.pack(...), got {type(pack).__name__}")
    state: Prepared = model.__dict__[_STATE]
    lm = causal_lm(model)
    if pack.shared_prompts and not state.shared_prompts:
        raise ValueError(
            "pack has shared prompts, but the model was prepared with shared_prompts=False; "
            "make it with pack(groups, ..., shared_prompts=False)"
        )
    check_sequences(pack, lm.config)
    if pack.device != lm.device:
        pack = pack.to(lm.device, non_blocking=True)
    if state.head is None:
        _check(model, state)
    assert state.head is not None
    path = _choose_path(model, lm, state)
    groups: dict[str, Any] = {}
    if loss is not None:
        loss = as_loss(loss)
        groups = {
            "cu_responses": pack.cu_responses,
            "cu_groups": pack.cu_groups,
            "loss": loss,
            "reference_scores": pack.reference_scores if loss.uses_reference else None,
            "reduction": reduction,
        }
    if not path.fused:
        logprobs = _model_logprobs(model, lm, state, pack)
        if loss is not None:
            rewards = pack.rewards.to(logprobs.dtype)
            found = ranking_from_logprobs(logprobs, rewards, backend=options["backend"], **groups)
            return _keep(model, state, found)
    else:
        hidden = _pack_hidden(lm, state, pack)
        head, statistics = state.head, state.statistics

        def record(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
        ) -> None:
            if statistics is not None:
                scaling: dict[str, Any] = {"softcap": head.softcap, "logit_scale": head.logit_scale}
                statistics.add(hidden, weight, bias, pack, divided=group is not None, **scaling)

        common = {
            "rows": pack.rows,
            "softcap": state.head.softcap,
            "logit_scale": state.head.logit_scale,
            **options,
        }
        if loss is not None:

            def rank(
                hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
            ) -> RankingOutput:
                hidden = hidden.flatten(0, -2)
                record(hidden, weight, bias, group)
                rewards = pack.rewards.to(torch.promote_types(hidden.dtype, torch.float32))
                there = (pack.cu_responses_device, pack.cu_groups_device)
                how: dict[str, Any] = {"bias": bias, "vocab_group": group, **groups, **common}
                how["device_offsets"] = there
                return linear_ranking_loss(hidden, weight, pack.labels, rewards, **how)

            return _keep(model, state, call_head(lm, hidden, rank))

        def read(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
        ) -> Tensor:
            hidden = hidden.flatten(0, -2)
            record(hidden, weight, bias, group)
            how: dict[str, Any] = {"bias": bias, "vocab_group": group, **common}
            return token_logprobs(hidden, weight, pack.labels, **how)

        logprobs = call_head(lm, hidden, read)
    scores = sequence_scores(logprobs, pack.cu_responses, normalize=normalize)
    return _keep(model, state, ScoreOutput(scores, logprobs))


def _choose_path(model: nn.Module, lm: PreTrainedModel, state: Prepared) -> HeadPath:
    """Choose the path of the next pack; a change is no secret."""
    assert state.head is not None
    path = choose_path(model, lm, state.head, state.head_path)
    if not torch.compiler.is_compiling():
        if state.last_path is not None and state.last_path.fused != path.fused:
            logger.warning("the head path changes from %s to %s", state.last_path, path)
        state.last_path = path
    return path


def _keep(model: nn.Module, state: Prepared, result: OutputT) -> OutputT:
    """The result of a forward, in its own dtypes whatever FSDP2's hooks on the model cast it to."""
    if isinstance(model, FSDPModule):
        if not state.keeps_result:
            # Registered when it is first needed, it runs after those of ``fully_shard``.
            state.handles.append(model.register_forward_hook(_give_back))
            state.keeps_result = True
        state.result = result
    return result


def _give_back(model: nn.Module, args: Any, returned: Any) -> Any:
    state: Prepared = model.__dict__[_STATE]
    made, state.result = state.result, None
    return returned if made is None else uncast([made], returned)


def _pack_hidden(lm: PreTrainedModel, state: Prepared, pack: Pack) -> Tensor:
    """Last hidden states: [1, N, D] with shared prompts, [C, L, D] without."""
    return _run(lm, state, pack, functools.partial(_hidden_states, lm))


def _model_logprobs(model: nn.Module, lm: PreTrainedModel, state: Prepared, pack: Pack) -> Tensor:
    forward = _inner(model)
    return _run(lm, state, pack, lambda **inputs: logits_fallback(lm, forward, inputs, pack))


def _run(
    lm: PreTrainedModel, state: Prepared, pack: Pack, function: Callable[..., Tensor]
) -> Tensor:
    """Call ``function`` with the pack's model inputs, under the attention that the pack needs."""
    if pack.segments is None:
        # No token attends to what follows it: padding needs no mask.
        return function(input_ids=pack.input_ids)
    with shared_prompt_attention(model_configs(lm), pack.segments, state.attention) as context:
        # The mask of ones keeps transformers from looking for packed rows in the positions.
        result = function(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=torch.ones_like(pack.input_ids),
        )
    if context.calls < state.num_attention_modules and not torch.compiler.is_compiling():
        raise InputError(
            f"{type(lm).__name__} cannot share prompts: {context.calls} of "
            f"{state.num_attention_modules} attention layers took the pack's layout; use "
            "shared_prompts=False"
        )
    return result


def _hidden_states(lm: PreTrainedModel, **inputs: Any) -> Tensor:
    output = trunk(lm)(**inputs, use_cache=False)
    hidden: Tensor | None = getattr(output, "last_hidden_state", None)
    if hidden is None:
        hidden = output[0]
    return hidden


def _check(model: nn.Module, state: Prepared) -> None:
    """Run the start-up checks, which set the state's head, in the model's own precision: under the
    caller's autocast, rounding would be taken for an error of sharing."""
    lm = causal_lm(model)
    hidden_states = functools.partial(_hidden_states, lm)
    exact = torch.autocast(lm.device.type, enabled=False)
    with torch.no_grad(), evaluation_mode(model), exact:
        state.head = probe_head(model, lm, _inner(model), hidden_states)
        if state.shared_prompts:
            # Segmentwise: the wiring is checked, and no kernel compiled that training may not use.
            segmentwise = replace(state, attention="segmentwise")
            check_sharing(lm, functools.partial(_pack_hidden, lm, segmentwise), hidden_states)
        else:
            check_causal(lm, hidden_states)
