"""Does this graph transformation keep a Transformer's answers, its quality, and is it really faster?

What is public is named here and loaded when it is first used, since torch and transformers take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_evaluation.capturing import capture
    from bert_evaluation.checkpoints import load, load_dataset
    from bert_evaluation.evaluation import evaluate
    from bert_evaluation.measurement import measure
    from bert_evaluation.recipe import compose
    from bert_evaluation.verification import verify

_HOMES = {
    "capture": "capturing",
    "compose": "recipe",
    "evaluate": "evaluation",
    "load": "checkpoints",
    "load_dataset": "checkpoints",
    "measure": "measurement",
    "verify": "verification",
}

__all__ = ["capture", "compose", "evaluate", "load", "load_dataset", "measure", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
