"""Prints docs/families.md: what each transformation finds in each family."""

import inspect
import re
from collections import Counter

import torch
import transformers
from families import FAMILIES, tiny

from bert_evaluation import capture, hashes
from bert_evaluation import graph as graphs
from bert_evaluation.calibration import Calibration, calibrate
from bert_evaluation.capturing import text_inputs
from bert_evaluation.transformations import REGISTRY

NAMES = [kind.__name__ for kind in REGISTRY]
PAGE = """# Transformations on the families

How many sites each transformation applies, of those that it finds (– where it finds none), in a question-answering
model of each family. The models are tiny, with two layers and random weights, captured with torch {torch} and
transformers {transformers}; another version may write a family differently. A family whose attention can also be loaded
written out (`attn_implementation="eager"`) has a second line. Pruning has a budget of 0.5 here, and tokens that mean
nothing to calibrate with: its numbers say what can go, not what should. `make families` makes this page.

{table}

## Why sites were refused

Numbers of nodes and layers are left out; (2×) is a reason that two sites share.

{refusals}"""


def reports():
    """What each transformation did to a fresh capture of each family."""
    for family in FAMILIES:
        usual, eager = (capture(tiny(family, **more)) for more in ({}, {"attn_implementation": "eager"}))
        written = {family: usual}
        if hashes.graph_hash(usual) != hashes.graph_hash(eager):
            written[f"{family}, eager"] = eager
        for line, base in written.items():
            calibrate(base, Calibration((text_inputs(tiny(family), 2, 16),)))
            for name, kind in zip(NAMES, REGISTRY, strict=True):
                # What a family has, not what this processor can, nor what 10 % of a tiny model leaves whole.
                taken = inspect.signature(kind).parameters
                usual = {"anyway": True, "budget": 0.5}
                transformation = kind(**{name: value for name, value in usual.items() if name in taken})
                transformation(graphs.fork(base))
                yield (line, name), transformation.report


def cell(report):
    return f"{len(report.applied)}/{report.found}" if report.found else "–"


def reasons(report):
    """The refusals' distinct reasons: they name nodes, whose numbers tell a reader nothing."""
    plain = (re.sub(r"\.\d+\.", ".N.", re.sub(r"_\d+\b", "", refusal.reason)) for refusal in report.refused)
    plain = (re.sub(r"(matters|errs) \S+ times", r"\1 N times", reason) for reason in plain)
    return " ".join(reason if count == 1 else f"{reason} ({count}×)" for reason, count in Counter(plain).items())


def table():
    """The page, as Markdown."""
    of = dict(reports())
    rows = [
        ["family", *NAMES],
        ["---", *["---:"] * len(NAMES)],
        *([line, *(cell(of[line, name]) for name in NAMES)] for line in dict.fromkeys(line for line, _ in of)),
    ]
    return PAGE.format(
        torch=torch.__version__.partition("+")[0],  # without the build, as in 2.13.0+cpu
        transformers=transformers.__version__,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        refusals="\n".join(
            f"- {line}, {name}: {reasons(report)}" for (line, name), report in of.items() if report.refused
        ),
    )


if __name__ == "__main__":
    print(table())
