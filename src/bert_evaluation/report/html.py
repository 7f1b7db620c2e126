"""An experiment as one page that opens from disk, offline: what the store has of it → HTML.

The text of data sets and models is hostile. Everything is escaped by jinja2, cleaned of what could make text look like
something else, and a Content-Security-Policy lets nothing run but the page's own script.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bert_evaluation.outcome import Outcome, load
from bert_evaluation.report import listings, plots, writing
from bert_evaluation.report.columns import COLUMNS, applied
from bert_evaluation.report.headline import MEASURED, Measure, decimals, headline, measure, speed
from bert_evaluation.report.terminal import tally
from bert_evaluation.rows import Row
from bert_evaluation.stats import Ratio
from bert_evaluation.store import Entry

HERE = Path(__file__).parent

Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Intervals:
    """Ratios with their intervals, as lanes on one axis: place, row, ratio."""

    title: str
    note: str
    axis: plots.Axis
    lanes: tuple[tuple[int, Row, Ratio], ...]
    noise: Ratio | None


@dataclass(frozen=True)
class Timings:
    """How one kind of raw times is spread; `thinned` is how many are drawn at most, where there are more."""

    title: str
    note: str
    found: plots.Distributions
    thinned: int


def page(entry: Entry, times: Times, batch_times: Times) -> str:
    """The page of a stored experiment. Times are raw seconds by row: of one inference, of an evaluation's batches."""
    outcome = load(entry)
    by, answer = measure(outcome), headline(outcome)
    parts: dict[str, Any] = {
        "recipes": outcome.rows,
        "speed": _intervals(outcome, by),
        "times": _timings(outcome, times, batch_times),
        "front": _scatter(outcome, by),
        "regime": [(row, plots.grids(row.regime)) for row in outcome.rows if row.regime],
        "attribution": [row for row in outcome.rows if row.effects],
        "changed": listings.changes(outcome.rows, listings.Budget()),
        "graphs": listings.diffs(outcome.rows, listings.Budget()),
        "sites": listings.sites(outcome.rows, listings.Budget()),
    }
    found = parts["front"]
    asked = outcome.experiment.infer and any(row.answer is not None for row in outcome.rows)
    evaluated = any(row.quality and row.quality.f1_difference for row in outcome.rows)
    present = {name for name, part in parts.items() if part} | {"machine"}
    present |= {"answers"} if asked or evaluated else set()
    return (
        _environment(outcome)
        .get_template("page.html.j2")
        .render(
            entry=entry,
            outcome=outcome,
            headline=answer,
            facts=_facts(outcome, by),
            sections=[(name, title) for name, title in SECTIONS.items() if name in present],
            columns=[each for each in COLUMNS if any(each.value(row) is not None for row in outcome.rows)],
            margin=f"{outcome.experiment.margin:.3%}".rstrip("0%").rstrip(".") + " %" if evaluated else None,
            intervals=parts["speed"],
            timings=parts["times"],
            scatter=found,
            latency="milliseconds a question" if by == "evaluation" else "milliseconds an inference",
            regimes=parts["regime"],
            effects=parts["attribution"],
            effect_axis=plots.ratio_axis(
                found
                for row in outcome.rows
                for effect in row.effects
                if (found := effect.throughput_speedup or effect.speedup)
            ),
            asked=asked,
            evaluated=evaluated,
            changed=parts["changed"],
            diffs=parts["graphs"],
            sites=parts["sites"],
            settings=_settings(outcome),
            absent=[sentence for name, sentence in ABSENT.items() if name not in present],
            style=_file("page.css"),
            script=_file("page.js"),
        )
    )


SECTIONS = {
    "recipes": "Recipes",
    "speed": "Speed",
    "times": "Raw times",
    "front": "F1 against latency",
    "regime": "Regime map",
    "attribution": "Attribution",
    "answers": "Answers",
    "graphs": "Graphs",
    "sites": "Sites",
    "machine": "Machine",
}
ABSENT = {
    "speed": "a comparison of speeds",
    "times": "raw times",
    "front": "F1 against latency, which takes an evaluation with recipes",
    "regime": "a regime map",
    "attribution": "attribution of the effect to steps",
    "answers": "answers that could have changed",
    "graphs": "differences of graphs",
    "sites": "sites, since there were no recipes",
}


def _facts(outcome: Outcome, by: Measure | None) -> list[tuple[str, str, str]]:
    """The verdicts counted: a term, the figure, and what qualifies it."""
    recipes = outcome.rows[1:]
    if not recipes:
        return []
    idle = sum(row.unchanged for row in recipes)
    found = [("Recipes", f"{len(recipes):,}", f"{idle:,} of them change nothing" if idle else "all change the graph")]
    if by:
        verdicts = [ratio.verdict for row in recipes if (ratio := speed(row, by))]
        found.append((f"Speed {MEASURED[by]}", *_counted(verdicts, "faster", "slower", "cannot tell")))
    promises = [row.verification.verdict for row in recipes if row.verification]
    found.append(("Promises", *_counted(promises, "kept", "broken")))
    held = [row.quality.f1_difference.verdict for row in recipes if row.quality and row.quality.f1_difference]
    if held:
        found.append(("Quality", *_counted(held, "not worse", "worse", "cannot tell")))
    base = outcome.rows[0]
    if base.quality:
        found.append(("Base", f"F1 {base.quality.f1:.2f}", f"exact match {base.quality.exact:.2f}"))
    return found


def _counted(verdicts: Sequence[str], first: str, *others: str) -> tuple[str, str]:
    return f"{verdicts.count(first):,} {first}", ", ".join(f"{verdicts.count(each):,} {each}" for each in others)


def _intervals(outcome: Outcome, by: Measure | None) -> list[Intervals]:
    """The intervals of each speed that was compared, the one that decides first."""
    other: Measure = "inference" if by == "evaluation" else "evaluation"
    notes: dict[Measure, str] = {
        "evaluation": "Each batch was run by Base and the recipes in turn: the median of the paired ratios.",
        "inference": "Every round ran Base and the recipes in random order: the median of the paired ratios.",
    }
    made = []
    for each in (by, other) if by else ():
        lanes = [(number, row, ratio) for number, row in enumerate(outcome.rows) if (ratio := speed(row, each))]
        noise = outcome.noise if each == "inference" else None
        axis = plots.ratio_axis([ratio for *_, ratio in lanes] + ([noise] if noise else []))
        if axis is not None:
            title = MEASURED[each].capitalize()
            made.append(Intervals(title, notes[each], axis, tuple(sorted(lanes, key=_fastest_first)), noise))
    return made


def _fastest_first(lane: tuple[int, Row, Ratio]) -> float:
    return -lane[2].estimate


def _timings(outcome: Outcome, times: Times, batch_times: Times) -> list[Timings]:
    made = []
    for title, note, seconds in (
        ("Of one inference", "The same question by every row.", times),
        ("Of the evaluation's batches", "Batches differ in what they hold, so their times are spread.", batch_times),
    ):
        ordered = {row.name: [1000 * each for each in seconds.get(row.name, ())] for row in outcome.rows}
        found = plots.distributions(ordered)
        if found is not None:
            thinned = any(row.drawn + row.beyond < row.count for row in found.rows)
            made.append(Timings(title, note, found, plots.DRAWN if thinned else 0))
    return made


def _scatter(outcome: Outcome, by: Measure | None) -> plots.Scatter | None:
    """Rows by quality and latency, as far as their times may be compared with Base's."""
    rows = []
    for number, row in enumerate(outcome.rows):
        if number and speed(row, by) is None:
            continue
        if by == "evaluation" and row.samples_per_second:
            rows.append((number, row, 1000 / row.samples_per_second))
        elif by == "inference" and row.latency:
            rows.append((number, row, row.latency.estimate))
    return plots.scatter(rows)


def _settings(outcome: Outcome) -> list[tuple[str, list[tuple[str, str]]]]:
    experiment = outcome.experiment
    model = [
        ("checkpoint", experiment.model),
        ("parameters", f"{outcome.parameters:,}"),
        ("hash of the weights", outcome.weights_hash),
    ]
    run: list[tuple[str, Any]] = [("recipes named", ", ".join(experiment.recipes) or "the default ones")]
    if experiment.infer:
        run.append(("rounds", experiment.rounds))
    if outcome.dataset:
        run += [("data set", outcome.dataset), ("questions", outcome.samples), ("seed", experiment.seed)]
        run += [("share of F1 to keep", experiment.margin)]
        for part in (experiment.rule, experiment.windowing, experiment.batching):
            run += [(name.replace("_", " "), value) for name, value in asdict(part).items()]
    machine = [(name.replace("_", " "), str(value)) for name, value in outcome.machine.items()]
    plain = [(name, "chosen by the program" if value is None else str(value)) for name, value in run]
    return [("Machine", machine), ("Model", model), ("Settings", plain)]


def _environment(outcome: Outcome) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=writing.clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    places = {row.name: number for number, row in enumerate(outcome.rows)}
    environment.filters |= {
        "applied": applied,
        "breaks": writing.breaks,
        "count": "{:,}".format,
        "decimals": decimals,
        "digest": _digest,
        "error": writing.error,
        "found": lambda reports: sum(report.found for report in reports),
        "mib": writing.mebibytes,
        "ms": writing.milliseconds,
        "place": places.__getitem__,
        "refused": lambda reports: sum(len(report.refused) for report in reports),
        "shorten": writing.shorten,
        "signed": writing.signed,
        "sortable": writing.sortable,
        "span": plots.span,
        "tally": tally,
        "tone": writing.tone,
    }
    return environment


def _file(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: S704


def _digest(text: str) -> str:
    """What the Content-Security-Policy knows a script or a style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
