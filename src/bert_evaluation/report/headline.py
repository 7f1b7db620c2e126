"""The answer in a sentence: what pays, that nothing does, or why it cannot be told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bert_evaluation.outcome import Outcome
from bert_evaluation.promise import Approximates
from bert_evaluation.rows import Quality, Row
from bert_evaluation.stats import Interval, Ratio

Measure = Literal["evaluation", "inference"]
MEASURED: dict[Measure, str] = {"evaluation": "on the data set", "inference": "for one inference"}


@dataclass(frozen=True)
class Headline:
    """The answer. `subject` is the row it speaks for, if there is one; `details` are sentences that qualify it."""

    sentence: str
    subject: Row | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objection:
    """What speaks against a row however fast it is. `is_open` where more questions might still clear it."""

    text: str
    is_open: bool = False


def measure(outcome: Outcome) -> Measure | None:
    """Which speed a run is judged by: that of the evaluation, where F1 is from too, or else of one inference."""
    if any(row.throughput_speedup for row in outcome.rows):
        return "evaluation"
    return "inference" if any(row.speedup for row in outcome.rows) else None


def speed(row: Row, by: Measure | None) -> Ratio | None:
    """A row's speed against Base's, as it is measured by."""
    if by is None:
        return None
    return row.throughput_speedup if by == "evaluation" else row.speedup


def objection(row: Row) -> Objection | None:
    """Why a row is no answer even if it is faster; None if it kept its promise and its quality is not worse."""
    check, found = row.verification, row.quality
    if check is None:
        return Objection("its promise was not checked", is_open=True)
    if not check.kept:
        return Objection(f"its promise ({check.promise}) is broken")
    if found is not None and (difference := found.f1_difference) is not None:
        interval = f"F1 {difference.estimate:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
        if difference.verdict == "worse":
            return Objection(f"it answers worse: {interval}")
        if difference.verdict == "cannot tell":
            return Objection(f"{found.samples:,} questions cannot tell whether its quality holds: {interval}", True)
    elif check.promise == Approximates.kind:
        return Objection("it approximates and its quality was not measured", is_open=True)
    return None


def headline(outcome: Outcome) -> Headline:
    """The fastest row that kept its promise and whose quality is not worse, or why there is none."""
    by, recipes = measure(outcome), outcome.rows[1:]
    changed = [row for row in recipes if not row.unchanged]
    if not outcome.rows:
        return Headline("Nothing is kept of this experiment.")
    if not recipes:
        return Headline(_base_alone(outcome.rows[0]))
    if not changed:
        return Headline("Nothing pays: no recipe finds anything to change in this model, every graph stays Base's.")
    if by is None:
        return Headline(_promises(changed))
    timed = sorted(
        ((ratio, row) for row in changed if (ratio := speed(row, by)) is not None),
        key=lambda pair: -pair[0].estimate,
    )
    apart = _not_compared(len(changed) - len(timed))
    faster = [pair for pair in timed if pair[0].verdict == "faster"]
    for ratio, row in faster:
        if objection(row) is None:
            passed_over = [pair for pair in faster if pair[0].estimate > ratio.estimate]
            sentence = f"{short(row)} is {_times_faster(ratio)}, {_answers(row, outcome)}."
            return Headline(sentence, row, (*_other_speed(row, by), *_faster_still(passed_over), *apart))
    if faster:
        return _but(faster, apart)
    apart = _faster_otherwise(changed, by) + apart
    unsure = [(ratio, row) for ratio, row in timed if ratio.verdict == "cannot tell"]
    if not unsure:
        return Headline(_all_slower(timed), details=apart)
    ratio, row = unsure[0]
    sentence = f"Cannot tell whether anything pays: the fastest, {short(row)}, has {_times_base(ratio)}."
    slower = len(timed) - len(unsure)
    also = (f"{_count(slower, 'recipe is', 'recipes are')} slower than Base.",) if slower else ()
    return Headline(sentence, details=also + apart)


def _but(faster: Sequence[tuple[Ratio, Row]], apart: tuple[str, ...]) -> Headline:
    """All that is faster is objected to: name the fastest that might still be cleared, or else the fastest."""
    reasons = [(ratio, row, objection(row)) for ratio, row in faster]
    undecided = [each for each in reasons if each[2] and each[2].is_open]
    ratio, row, reason = (undecided or reasons)[0]
    begin = "Cannot tell whether anything pays" if undecided else "Nothing pays"
    assert reason is not None  # or it would pay
    return Headline(f"{begin}: {short(row)} is {_times_faster(ratio)}, but {reason.text}.", details=apart)


def _base_alone(base: Row) -> str:
    found = []
    if base.quality is not None:
        found.append(f"scores F1 {base.quality.f1:.2f} on {base.quality.samples:,} questions")
    if base.latency is not None:
        time = base.latency
        found.append(f"takes {time.estimate:.1f} ms for one inference ({time.low:.1f} to {time.high:.1f})")
    return f"Base {' and '.join(found) or 'was captured'}; no recipe was compared with it."


def _promises(changed: Sequence[Row]) -> str:
    broken = [row for row in changed if row.verification and not row.verification.kept]
    if broken:
        return f"{_count(len(broken), 'promise is', 'promises are')} broken, by {_named(broken)}; nothing was timed."
    checked = sum(1 for row in changed if row.verification)
    kept = "keeps its promise" if checked == 1 else "keep their promises"
    return f"{_count(checked, 'recipe', 'recipes')} that {_changes(checked)} the graph {kept}; nothing was timed."


def _all_slower(timed: Sequence[tuple[Ratio, Row]]) -> str:
    if not timed:
        return "Cannot tell whether anything pays: no recipe was timed side by side with Base."
    ratio, row = timed[0]
    if len(timed) == 1:
        return f"Nothing pays: {short(row)} is slower, with {_times_base(ratio)}."
    return (
        f"Nothing pays: all {len(timed)} recipes timed are slower; the fastest, {short(row)}, has {_times_base(ratio)}."
    )


def _faster_still(passed_over: Sequence[tuple[Ratio, Row]]) -> tuple[str, ...]:
    """What is faster than the answer, and why it is not the answer: the fastest, and how many more."""
    if not passed_over:
        return ()
    (ratio, row), *rest = passed_over
    reason = objection(row)
    assert reason is not None  # or it would be the answer
    more = f" {len(rest)} more such {'row is' if len(rest) == 1 else 'rows are'} faster, too." if rest else ""
    return (f"{short(row)} is faster still, {decimals(ratio)[0]} times, but {reason.text}.{more}",)


def _other_speed(row: Row, by: Measure) -> tuple[str, ...]:
    """The other way to measure speed, where it does not say the same."""
    other: Measure = "inference" if by == "evaluation" else "evaluation"
    found = speed(row, other)
    if found is None or found.verdict == "faster":
        return ()
    said = "slower" if found.verdict == "slower" else "cannot be told from Base"
    estimate, low, high = decimals(found)
    verb = "it is " if found.verdict == "slower" else "it "
    return (f"{MEASURED[other].capitalize()} {verb}{said}: {estimate} times its speed, {low} to {high}.",)


def _faster_otherwise(rows: Sequence[Row], by: Measure) -> tuple[str, ...]:
    """The fastest row by the other way to measure speed, where by this one none pays."""
    other: Measure = "inference" if by == "evaluation" else "evaluation"
    found = [(ratio, row) for row in rows if (ratio := speed(row, other)) and ratio.verdict == "faster"]
    sound = [(ratio, row) for ratio, row in found if objection(row) is None]
    if not sound:
        return ()
    ratio, row = max(sound, key=lambda pair: pair[0].estimate)
    return (f"{MEASURED[other].capitalize()} {short(row)} is {_times_faster(ratio)}.",)


def _not_compared(count: int) -> tuple[str, ...]:
    return (f"{_count(count, 'recipe was', 'recipes were')} not timed side by side with Base.",) if count else ()


def _answers(row: Row, outcome: Outcome) -> str:
    """What became of the answers."""
    found = row.quality
    if found is None:
        same = row.answer is not None and row.answer == outcome.rows[0].answer
        return ("the same answer to the one question, " if same else "") + "quality not measured"
    return answers_kept(found)


def answers_kept(found: Quality) -> str:
    """How many answers changed, and whether F1 held."""
    if not found.changed_answers:
        return f"answers unchanged on {found.samples:,} questions"
    text = f"{found.changed_answers:,} of {found.samples:,} answers changed"
    if (difference := found.f1_difference) is not None:
        text += (
            f", F1 {difference.estimate:+.2f} ({difference.low:+.2f} to {difference.high:+.2f}): {difference.verdict}"
        )
    return text


def decimals(found: Interval) -> tuple[str, str, str]:
    """Estimate, low and high with as many decimals as the interval's width is worth."""
    places = 3 if found.high - found.low < 0.02 else 2
    return (f"{found.estimate:.{places}f}", f"{found.low:.{places}f}", f"{found.high:.{places}f}")


def _times_faster(ratio: Ratio) -> str:
    return "{} times faster, {} to {}".format(*decimals(ratio))


def _times_base(ratio: Ratio) -> str:
    return "{} times Base's speed, {} to {}".format(*decimals(ratio))


def short(row: Row) -> str:
    """A recipe's name without Base's."""
    return row.name.removeprefix("Base+")


def _named(rows: Sequence[Row]) -> str:
    names = [short(row) for row in rows[:3]]
    more = len(rows) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _changes(number: int) -> str:
    return "changes" if number == 1 else "change"
