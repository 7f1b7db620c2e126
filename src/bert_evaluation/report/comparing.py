"""Comparisons and checks as lines of text."""

from collections.abc import Iterator

from bert_evaluation.comparison import Absent, Comparison, Pair, PairedQuality, Speed
from bert_evaluation.regression import Check, Regression
from bert_evaluation.report.headline import decimals
from bert_evaluation.rows import BASE
from bert_evaluation.stats import Ratio


def refusal(comparison: Comparison) -> str:
    """Why two experiments are not compared, and what to do."""
    differ = "; ".join(each.sentence for each in comparison.obstacles)
    return (
        f"{capitalized(comparison.before)} and {comparison.after} cannot be compared: {differ}."
        " --force compares them all the same."
    )


def marks(comparison: Comparison) -> str:
    """What is to be said with every result of a comparison that was forced; nothing of another."""
    labels = ", ".join(each.label for each in comparison.obstacles)
    return f" [{labels}]" if labels else ""


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Both experiments, what differs between them, what Base did, and each pair of rows."""
    mark = marks(comparison)
    for line in _comparison_lines(comparison):
        yield line + mark


def _comparison_lines(comparison: Comparison) -> Iterator[str]:
    yield f"{capitalized(comparison.after)} against {comparison.before}"
    yield from _remarks(comparison)
    for pair in comparison.pairs:
        name = pair.after if pair.before == pair.after else f"{pair.after} against {pair.before}"
        if pair.note:
            yield f"{name}: {pair.note}"
        if comparison.base is None or not pair.before == pair.after == BASE:
            yield f"{name}, inference: {speed(pair.inference)}"
            yield f"{name}, throughput: {speed(pair.throughput)}"
        yield f"{name}, answers: {quality(pair.quality)}"
    for names, where in ((comparison.only_before, comparison.before), (comparison.only_after, comparison.after)):
        for name in names:
            yield f"{name}: only in {where}"


def regression_lines(regression: Regression) -> Iterator[str]:
    """What is checked, what Base did, each check, and the verdict of all."""
    comparison, limits = regression.comparison, regression.limits
    mark = marks(comparison)
    yield (
        f"{capitalized(comparison.after)} against the baseline, {comparison.before}: at least"
        f" {limits.least_speed:g} of its speed and {limits.min_f1_ratio:g} of its F1{mark}"
    )
    for line in _remarks(comparison):
        yield line + mark
    for check in regression.checks:
        yield f"{check.row}, {check.measure}: {check.verdict}: {explained(check)}{mark}"
    for name in comparison.only_after:
        yield f"{name}: not in the baseline, not checked{mark}"
    yield f"{summary(regression)}{mark}"


def summary(regression: Regression) -> str:
    """The verdict of all, with the number of checks behind it."""
    counts = ((regression.count("pass"), "pass"), (regression.count("fail"), "fail"))
    said = ", ".join(f"{number} {verdict}" for number, verdict in counts)
    return f"Verdict: {regression.verdict} ({said}, {regression.count('cannot tell')} cannot tell)"


def explained(check: Check) -> str:
    """What was found, what was asked for, and on what grounds."""
    if check.found is None or check.least is None:
        return check.reason
    found = check.found
    if check.measure == "F1":
        interval = f"{found.estimate:+.2f} ({found.low:+.2f} to {found.high:+.2f}) points"
        return f"{interval}, {check.least:+.2f} allowed; {check.reason}"
    estimate, low, high = decimals(found)
    return f"{estimate} times the baseline's speed ({low} to {high}), {check.least:g} asked for; {check.reason}"


def _remarks(comparison: Comparison) -> Iterator[str]:
    """What a reader has to know of all lines that follow."""
    for each in comparison.obstacles:
        yield f"Not comparable, but forced: {each.sentence}"
    yield from (f"Note: {each}" for each in comparison.notes)
    if (base := comparison.base) is not None:
        yield from (f"Base itself, {line}" for line in _base(base))


def _base(base: Pair) -> Iterator[str]:
    for measure, found in (("inference", base.inference), ("throughput", base.throughput)):
        if isinstance(found, Absent):
            yield f"{measure}: not compared: {found.reason}"
        elif found.raw is None:
            yield f"{measure}: not compared: other batches"
        else:
            yield f"{measure}: {_times(found.raw)} in another session: the machine's doing, or the program's"


def speed(found: Speed | Absent) -> str:
    """The ratios of a pair and the verdict, or why there is none."""
    if isinstance(found, Absent):
        return f"not compared: {found.reason}"
    if found.together:
        return f"{_times(found.judged)}, in the same rounds: {found.judged.verdict}"
    said = "other batches" if found.raw is None else f"{_times(found.raw)} in another session"
    if found.relative is None:
        return f"{said}: no verdict, since no Base takes out what the machine did"
    return f"{said}; against Base in each {_times(found.relative)}: {found.relative.verdict}"


def quality(found: PairedQuality | Absent) -> str:
    """Scores, differences, changed answers and the verdict."""
    if isinstance(found, Absent):
        return f"not compared: {found.reason}"
    f1, exact = found.f1_difference, found.exact_difference
    asked = f"{found.margin:g} of the F1 before"
    verdict = f"cannot tell whether {asked} is kept" if f1.verdict == "cannot tell" else f"{f1.verdict} than {asked}"
    return (
        f"{found.changed_answers} of {found.samples} changed;"
        f" F1 {found.f1_before:.2f} became {found.f1_after:.2f}, {f1.estimate:+.2f} ({f1.low:+.2f} to {f1.high:+.2f});"
        f" exact {found.exact_before:.2f} became {found.exact_after:.2f}, {exact.estimate:+.2f}"
        f" ({exact.low:+.2f} to {exact.high:+.2f}), McNemar p {found.mcnemar_p:.2g}: {verdict}"
    )


def capitalized(sentence: str) -> str:
    """A sentence with a capital, and the rest as it was."""
    return sentence[:1].upper() + sentence[1:]


def _times(ratio: Ratio) -> str:
    return "{} times as fast ({} to {})".format(*decimals(ratio))
