"""Ranking losses for aligning language models: exact, fused, with shared prompts.

Five lines replace the loss of a training step:

>>> import fastrank
>>> loss = fastrank.loss_from_name("rrhf")
>>> loss
RRHF()

`rank` is the loss of a padded batch under a transformers model, `linear_ranking_loss` the fused
loss of hidden rows and a head, `ranking_loss` that of scores. `pack` and `prepare_model`
share prompts inside a transformers model; `RankTrainer` and ``fastrank train`` put a training loop
around them.

Names are imported when they are first used, so that ``fastrank --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "losses": [
        "DPO", "IPO", "LIRE", "NCA", "PRO", "REBEL", "RRHF", "ApproxNDCG", "LambdaRank", "ListMLE",
        "ListNet", "Loss", "RankNet", "SLiC", "SimPO", "loss_from_name",
    ],
    "function_loss": ["FunctionLoss"],
    "outputs": ["RankingOutput"],
    "ranking": ["ranking_loss"],
    "logprobs": ["flatten", "sequence_scores", "token_logprobs"],
    "linear_loss": ["linear_ranking_loss"],
    "data.load": ["load_groups"],
    "data.packing": ["Group", "Pack", "pack"],
    "modeling.prepare": ["prepare_model"],
    "modeling.rank_batch": ["rank"],
    "modeling.score": ["score"],
    "training.config": ["RankConfig"],
    "training.trainer": ["RankTrainer"],
    "training.two_phase": ["TwoPhaseOutput", "two_phase_backward"],
    "errors": ["InputError", "TrainingInterrupted"],
}  # fmt: skip
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

_SUBMODULES = ("losses", "metrics")

__all__ = sorted([*_MODULES, *_SUBMODULES, "__version__"])

if TYPE_CHECKING:
    from . import losses as losses
    from . import metrics as metrics
    from .data.load import load_groups as load_groups
    from .data.packing import Group as Group
    from .data.packing import Pack as Pack
    from .data.packing import pack as pack
    from .errors import InputError as InputError
    from .errors import TrainingInterrupted as TrainingInterrupted
    from .function_loss import FunctionLoss as FunctionLoss
    from .linear_loss import linear_ranking_loss as linear_ranking_loss
    from .logprobs import flatten as flatten
    from .logprobs import sequence_scores as sequence_scores
    from .logprobs import token_logprobs as token_logprobs
    from .losses import DPO as DPO
    from .losses import IPO as IPO
    from .losses import LIRE as LIRE
    from .losses import NCA as NCA
    from .losses import PRO as PRO
    from .losses import REBEL as REBEL
    from .losses import RRHF as RRHF
    from .losses import ApproxNDCG as ApproxNDCG
    from .losses import LambdaRank as LambdaRank
    from .losses import ListMLE as ListMLE
    from .losses import ListNet as ListNet
    from .losses import Loss as Loss
    from .losses import RankNet as RankNet
    from .losses import SimPO as SimPO
    from .losses import SLiC as SLiC
    from .losses import loss_from_name as loss_from_name
    from .modeling.prepare import prepare_model as prepare_model
    from .modeling.rank_batch import rank as rank
    from .modeling.score import score as score
    from .outputs import RankingOutput as RankingOutput
    from .ranking import ranking_loss as ranking_loss
    from .training.config import RankConfig as RankConfig
    from .training.trainer import RankTrainer as RankTrainer
    from .training.two_phase import TwoPhaseOutput as TwoPhaseOutput
    from .training.two_phase import two_phase_backward as two_phase_backward


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
