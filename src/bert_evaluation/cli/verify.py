"""`bert-evaluation verify`: is the promise of each step of a recipe kept, and which site breaks it?"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bert_evaluation.cli.console import show
from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import DeviceOption
from bert_evaluation.errors import UsageError

if TYPE_CHECKING:
    from bert_evaluation.blame import StepCheck


def verify(
    model: Annotated[str, typer.Option(help="checkpoint: built-in, a folder, or a hub name")] = "built-in",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='instead of the default ones, e.g. "RemoveDropout+MergeLinears"; repeatable'),
    ] = None,
    dataset: Annotated[str, typer.Option(help="questions: built-in, a SQuAD JSON file, or a hub name")] = "built-in",
    questions: Annotated[int, typer.Option(help="so many of its questions are probes too")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the other probes' ids")] = 0,
    probe: Annotated[str | None, typer.Option(help='only this one, e.g. "batch 1, length 2"')] = None,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
) -> None:
    """Check the promise of each step on probes; for a broken one name the smallest probe, the site, and a command."""
    if questions < 0:
        raise UsageError(f"{questions} questions were asked for; give 0 or more.")
    require_folders(json_file)

    from bert_evaluation.blame import verify_steps
    from bert_evaluation.capturing import capture, longest_input
    from bert_evaluation.checkpoints import load, load_dataset
    from bert_evaluation.device import choose_device
    from bert_evaluation.probes import TextProbes, parse_shape
    from bert_evaluation.report import tables
    from bert_evaluation.transformations import recipes
    from bert_evaluation.verification import observe

    target = choose_device(device)
    chosen = recipes(recipe or (), target)
    asked = None if probe is None else parse_shape(probe)
    data = load_dataset(dataset) if (questions if asked is None else asked.question) else None
    checkpoint, tokenizer = load(model, target)
    maker = TextProbes(checkpoint, seed, tokenizer, data)
    probes = [*maker.chosen(longest_input(checkpoint), questions)] if asked is None else [maker.make(asked)]
    reference = observe(capture(checkpoint), probes)
    options = ["--model", model, "--dataset", dataset, "--seed", str(seed), "--device", str(target)]

    checks = []
    for each in chosen:
        for check in verify_steps(reference, each, options):
            show(_lines(check), tables.whole(_lines(check)))
            checks.append(check)
    kept = all(check.kept for check in checks)
    if json_file is not None:
        content = {"schema": 1, "model": model, "seed": seed, "verdict": "kept" if kept else "broken"}
        write_json(json_file, content | {"steps": [_as_json(check) for check in checks]})
    if not kept:
        raise typer.Exit(1)


def _lines(check: "StepCheck") -> Iterator[str]:
    """One line of a step, and of a broken promise what there is to know."""
    found, report, blame = check.verification, check.report, check.blame
    sites = f"{len(report.applied)} of {report.found} sites; " if report.found else ""
    line = f"{check.recipe}, step {check.number}, {check.step}: {sites}{found.promise} promise {found.verdict}"
    line += f" on {found.probes} {'probe' if found.probes == 1 else 'probes'}, max difference {found.max_abs_error:.1e}"
    line += f", {found.compared}" if found.compared else ""
    yield line if found.promise == "approximates" else f"{line}; {found.error:.1e} of {found.tolerance:.1e} allowed"
    if blame is not None:
        yield f"  smallest failing probe: {blame.probe}"
        yield f"  the graphs part at: {found.first_difference}"
        yield f"  caused by: step {check.number}, {blame.step}, site {blame.site}"
        yield f"  to see it again: {blame.command}"


def _as_json(check: "StepCheck") -> dict[str, Any]:
    """A step in the published form; what is infinite or no number is None."""
    found, report = check.verification, check.report
    numbers = {name: getattr(found, name) for name in ("max_abs_error", "max_ulp", "error", "tolerance")}
    return {
        "recipe": check.recipe,
        "number": check.number,
        "step": check.step,
        "found": report.found,
        "applied": len(report.applied),
        "promise": {
            "kind": found.promise,
            "verdict": found.verdict,
            "probes": found.probes,
            "compared_where": found.where,
            **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        },
        "blame": None if check.blame is None else asdict(check.blame),
    }
