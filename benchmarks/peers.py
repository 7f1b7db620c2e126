"""How fast is a forward pass? Our recipes against the runtimes that a user would pick instead.

    python benchmarks/peers.py [--model built-in] [--ours NAME=RECIPE]... [--skip PEER]... [--original PYTHON]

One run, one machine: every variant has the same weights and inputs, and in each round all take turns in random order.
What each returns is compared with eager float32, so that a runtime that computes something else is noticed.
"""

import json
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_runtimes import PEERS, Graph, Inputs, OriginalStack, Peer, Subject
from torch import Tensor, nn

from bert_evaluation import capture, load
from bert_evaluation import graph as graphs
from bert_evaluation.capturing import text_inputs
from bert_evaluation.device import machine
from bert_evaluation.errors import BertEvaluationError, UsageError
from bert_evaluation.measurement import Measurement, Plan, sample
from bert_evaluation.stats import median, speedup
from bert_evaluation.transformations import PRESETS, REGISTRY, parse_recipe

BASE = "eager fp32"
PRECISIONS = ("fp32", "bf16", "int8")
OURS = (
    "captured=LintAndRecompile",
    *(
        f"ours {preset}{compiled}@{precision}={preset}{step}"
        for preset, precision in zip(("exact", "bf16", "int8"), PRECISIONS, strict=True)
        for compiled, step in (("", ""), (" compiled", "+Compile"))
    ),
)
Seconds = Mapping[str, Sequence[float]]


def main(
    model: Annotated[
        str, typer.Option(help="built-in, bert-base (random weights), a folder or a hub name")
    ] = "built-in",
    shapes: Annotated[str, typer.Option(help="batch × length")] = "1x32,1x128,1x384,8x128,8x384",
    rounds: Annotated[int, typer.Option(help="calls of each variant for each shape")] = 9,
    threads: Annotated[int | None, typer.Option(help="of every variant; torch's choice if left out")] = None,
    ours: Annotated[list[str] | None, typer.Option(help="NAME=RECIPE, or NAME@bf16=RECIPE for its group")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="a peer, or the beginning of several peers' names")] = None,
    original: Annotated[Path | None, typer.Option(help="interpreter with transformers<5 and optimum<2")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every time there")] = None,
) -> None:
    """Milliseconds and ratios of every variant for every shape, as Markdown."""
    warnings.filterwarnings("ignore")
    try:
        sizes = _sizes(shapes)
        torch.set_num_threads(threads or torch.get_num_threads())
        subject_model = _model(model)
        result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "model": model, "rounds": rounds}
        shape_results, measured = dict[str, Any](), dict[str, Seconds]()
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(subject_model, Path(folder), torch.get_num_threads())
            variants = _ours(subject_model, ours or OURS)  # first: it is quick to refuse
            variants = _peers(subject, tuple(skip or ()), original) | variants
            for size in sizes:
                name, inputs = "×".join(map(str, size)), _inputs(subject_model, *size)
                differences, measurement = _measure(variants, inputs, rounds)
                measured[name], rows = measurement.seconds, _rows(measurement.seconds, variants)
                _print(f"{name} tokens, {rounds} rounds; {_noise(measurement)}", rows, differences)
                shape_results[name] = {"seconds": measurement.seconds, "difference": differences, "rows": rows}
    except BertEvaluationError as error:
        raise SystemExit(str(error)) from None
    means = _rows(_geometric_means(measured), variants)
    _print("Geometric mean over the shapes", means)
    if json_file is not None:
        result |= {"shapes": shape_results, "geometric_mean": means}
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(batch), int(length)) for batch, length in (each.split("x") for each in text.split(","))]
    except ValueError:
        raise UsageError(f"{text!r} are no shapes; write them as 1x128,8x384.") from None


def _model(name: str) -> nn.Module:
    if name != "bert-base":
        return load(name)[0]
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig()).eval()


def _inputs(model: nn.Module, batch: int, length: int) -> Inputs:
    """Random tokens, none of them padding."""
    inputs = text_inputs(model, batch, length)
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(1)
    return inputs | {"input_ids": torch.randint(vocabulary, (batch, length), generator=generator)}


def _peers(subject: Subject, skip: tuple[str, ...], original: Path | None) -> dict[str, Peer]:
    """The runtimes that are installed and not left out, ready to be called."""
    found = dict[str, Peer]()
    for name, (precision, package, make) in PEERS.items():
        if name.startswith(skip) and name != BASE:
            continue
        if find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed (pip install '.[peers]').", file=sys.stderr)
            continue
        print(f"preparing {name}", file=sys.stderr)
        with redirect_stdout(sys.stderr):  # the output is the tables alone
            found[name] = make(subject, precision)
    if original is None:
        print("The original stack is left out: no interpreter with it was given (--original).", file=sys.stderr)
    else:
        found["optimum.fx"] = OriginalStack(original, subject)
    return found


def _ours(model: nn.Module, recipes: Sequence[str]) -> dict[str, Peer]:
    base, found = capture(model), dict[str, Peer]()
    for text in recipes:
        label, equals, recipe = text.partition("=")
        name, _, precision = label.partition("@")
        if not equals or (precision or "fp32") not in PRECISIONS:
            raise UsageError(f"{text!r} is not NAME=RECIPE or NAME@PRECISION=RECIPE, of {', '.join(PRECISIONS)}.")
        found[name] = Graph(parse_recipe(recipe, REGISTRY, PRESETS)(graphs.fork(base)), precision or "fp32")
    return found


@torch.inference_mode()
def _measure(variants: Mapping[str, Peer], inputs: Inputs, rounds: int) -> tuple[dict[str, float], Measurement]:
    """How far each variant's outputs are from eager float32's, and rounds of calls in which all take turns."""
    differences = _differences(variants, inputs)
    return differences, sample(
        lambda name: variants[name].call(inputs)[0], list(variants), Plan(rounds=rounds, warm_up=1)
    )


def _differences(variants: Mapping[str, Peer], inputs: Inputs) -> dict[str, float]:
    """The largest absolute difference of each variant's outputs from eager float32's."""
    outputs = {name: variant.call(inputs)[1] for name, variant in variants.items()}
    return {name: max(map(_difference, outputs[BASE], found)) for name, found in outputs.items()}


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise UsageError(f"A runtime returned {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    return float((expected.double() - found.double()).abs().max())


def _geometric_means(measured: Mapping[str, Seconds]) -> dict[str, list[float]]:
    """The geometric mean over the shapes, round by round, so that rounds stay pairs."""
    by_shape = list(measured.values())
    return {
        name: [
            math.exp(math.fsum(map(math.log, each)) / len(each))
            for each in zip(*(s[name] for s in by_shape), strict=True)
        ]
        for name in by_shape[0]
    }


def _rows(seconds: Seconds, variants: Mapping[str, Peer]) -> dict[str, dict[str, Any]]:
    """Each variant's median, and its ratios to eager float32 and to the fastest peer of its precision."""
    medians = {name: median(each).estimate for name, each in seconds.items()}
    rows = dict[str, dict[str, Any]]()
    for name, each in seconds.items():
        precision = variants[name].precision
        peers = [other for other in seconds if not variants[other].is_ours and variants[other].precision == precision]
        best = min(peers, key=medians.__getitem__, default=None)
        rows[name] = {
            "precision": precision,
            "ours": variants[name].is_ours,
            "milliseconds": 1000 * medians[name],
            "to_eager": asdict(speedup(seconds[BASE], each)),
            "best_peer": best,
            "to_best_peer": None if best is None else asdict(speedup(seconds[best], each)),
        }
    return rows


def _noise(measurement: Measurement) -> str:
    noise = measurement.noise
    assert noise is not None
    return f"{BASE} against itself {_ratio(asdict(noise))}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    return "–" if ratio is None else f"{ratio['estimate']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _print(title: str, rows: Mapping[str, Mapping[str, Any]], differences: Mapping[str, float] | None = None) -> None:
    print(f"\n### {title}\n\n| | precision | ms | × {BASE} | × best peer of the precision | max. difference |")
    print("|---|---|--:|--:|--:|--:|")
    for name, row in sorted(
        rows.items(), key=lambda item: (PRECISIONS.index(item[1]["precision"]), item[1]["milliseconds"])
    ):
        cells = (
            f"**{name}**" if row["ours"] else name,
            row["precision"],
            f"{row['milliseconds']:.2f}",
            _ratio(row["to_eager"]),
            "best" if row["best_peer"] == name else _ratio(row["to_best_peer"]),
            "" if differences is None else f"{differences[name]:.1e}",
        )
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    typer.run(main)
