"""`bert-evaluation transformations`: what there is to put into a recipe."""

import inspect


def transformations() -> None:
    """List the transformations, what each promises and what it does."""
    from bert_evaluation.transformation import ReversibleTransformation
    from bert_evaluation.transformations import REGISTRY

    for kind in REGISTRY:
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        undo = "reversible" if issubclass(kind, ReversibleTransformation) else "not reversible"
        print(f"{kind.__name__} ({kind.promise.kind}, {undo}): {first}")
