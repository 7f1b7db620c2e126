"""`bert-evaluation transformations`: what there is to put into a recipe."""

import inspect

from bert_evaluation.cli.console import show


def transformations() -> None:
    """List the transformations, what each promises and what it does, and the recipes that have a name."""
    from bert_evaluation.promise import weakest
    from bert_evaluation.report import tables
    from bert_evaluation.transformation import ReversibleTransformation
    from bert_evaluation.transformations import PRESETS, PRESETS_ON_CUDA, REGISTRY

    kinds = []
    for kind in REGISTRY:
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        undo = "reversible" if issubclass(kind, ReversibleTransformation) else "not reversible"
        kinds.append((kind.__name__, kind.promise.kind, undo, first))
    on_cuda = {f"{name} on cuda": steps for name, steps in PRESETS_ON_CUDA.items()}
    for name, steps in (*PRESETS.items(), *on_cuda.items()):
        promise = weakest(kind.promise for kind in steps).kind
        kinds.append((name, promise, "recipe", "+".join(kind.__name__ for kind in steps)))
    lines = (f"{name} ({promise}, {undo}): {first}" for name, promise, undo, first in kinds)
    show(lines, tables.transformations(kinds))
