"""`bert-evaluation check`: has anything become slower or worse than it was? For continuous integration."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bert_evaluation.cli.compare import ForceOption, comparison_as_json, refuse
from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import StoreOption
from bert_evaluation.errors import UsageError

if TYPE_CHECKING:
    from bert_evaluation.store import Store

CODES = {"pass": 0, "fail": 1, "cannot tell": 3}


def check(
    baseline: Annotated[int, typer.Argument(metavar="BASELINE", help="the experiment to hold to")],
    current: Annotated[
        int | None, typer.Argument(metavar="CURRENT", help="the experiment to check [default: the latest finished]")
    ] = None,
    max_slowdown: Annotated[str, typer.Option(help="how much slower a row may be: 3% or 0.03")] = "3%",
    min_f1_ratio: Annotated[str, typer.Option(help="share of the baseline's F1 that a row has to keep")] = "0.99",
    baseline_store: Annotated[
        Path | None, typer.Option(help="the store that the baseline is in, if it is another file")
    ] = None,
    force: ForceOption = False,
    junit: Annotated[Path | None, typer.Option(help="write the checks to this file, as JUnit XML")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write them to this file, as a GitHub Markdown table")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    store: StoreOption = None,
) -> None:
    """Check every row of a stored baseline: its promise, speed and F1.

    Exit code 0: all pass. 1: something fails, surely. 3: nothing fails, but not all can be told. 2: the two cannot be
    compared, or the request is off.
    """
    require_folders(junit, markdown, json_file)
    slowdown, ratio = _share(max_slowdown), _share(min_f1_ratio)
    if slowdown is None or slowdown >= 1:
        raise UsageError(f"A slowdown is a share below 1, such as 3% or 0.03, not {max_slowdown!r}.")
    if ratio is None or not 0 < ratio <= 1:
        raise UsageError(f"A ratio of F1 is a share above 0 and up to 1, such as 0.99, not {min_f1_ratio!r}.")

    from bert_evaluation import regression
    from bert_evaluation.report import ci
    from bert_evaluation.report.comparing import regression_lines
    from bert_evaluation.store import Store
    from bert_evaluation.stored import read

    with Store(store, readonly=True) as results, Store(baseline_store or store, readonly=True) as older:
        apart = results.file.resolve() != older.file.resolve()
        number = _latest(results, None if apart else baseline) if current is None else current
        if not apart and number == baseline:
            raise UsageError(f"Experiment {number} is the baseline itself; name another one to check.")
        held_to = read(older, baseline, f"experiment {baseline} of {older.file.name}" if apart else None)
        found = regression.check(held_to, read(results, number), regression.Limits(slowdown, ratio))
    refuse(found.comparison, force)
    print(*regression_lines(found), sep="\n")
    if junit is not None:
        junit.write_text(ci.junit(found), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(ci.markdown(found), encoding="utf-8")
    if json_file is not None:
        content = {
            "schema": 1,
            "verdict": found.verdict,
            "limits": asdict(found.limits),
            "checks": [asdict(each) for each in found.checks],
            "comparison": comparison_as_json(found.comparison),
        }
        write_json(json_file, content)
    if code := CODES[found.verdict]:
        raise typer.Exit(code)


def _share(text: str) -> float | None:
    """A share, written as `3%` or `0.03`; None for what is neither."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return share if 0 <= share < float("inf") else None


def _latest(store: "Store", baseline: int | None) -> int:
    """The latest finished experiment. Raises UsageError if that is none but the baseline."""
    finished = [entry.number for entry in store.experiments() if entry.state == "finished"]
    if not finished or finished[-1] == baseline:
        raise UsageError(
            f"The store {store.file} has no finished experiment after the baseline to check; run one, or name one."
        )
    return finished[-1]
