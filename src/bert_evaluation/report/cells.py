"""What the terminal's tables are made of: cells with verdicts in their colours, and the sentences below."""

from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from bert_evaluation.report import terminal
from bert_evaluation.report.headline import short
from bert_evaluation.report.layout import Prose, text
from bert_evaluation.report.writing import tone
from bert_evaluation.rows import Row
from bert_evaluation.stats import Difference, Interval, Ratio

COLOURS = {"good": "green", "bad": "red", "open": "yellow"}


def verdict_of(verdict: str) -> Text:
    """A verdict's word in its colour."""
    return text(verdict, COLOURS[tone(verdict)])


def two(first: Text, second: str, style: str = "dim") -> Text:
    """Two lines of one cell."""
    return Text.assemble(first, "\n", text(second, style))


def interval(found: Interval, estimate: str, form: str, verdict: str = "") -> Text:
    """An estimate, what it says, and below them the ends of the interval."""
    first = Text.assemble(text(estimate), " " if verdict else "", verdict_of(verdict))
    return two(first, terminal.between(found, form))


def ratio(found: Ratio | None) -> Text:
    """A ratio; empty where there is none."""
    if found is None:
        return Text()
    return interval(found, f"{found.estimate:{terminal.TIMES}}", terminal.TIMES, found.verdict)


def difference(found: Difference | None) -> Text:
    """A difference of quality; empty where there is none."""
    if found is None:
        return Text()
    return interval(found, f"{found.estimate:{terminal.POINTS}}", terminal.POINTS, found.verdict)


def sentence(line: str) -> Prose:
    """A line below a table."""
    return Prose(text(line), hang=2)


def said(row: Row, line: str, style: str = "") -> Prose:
    """A sentence about one row."""
    return Prose(Text.assemble(text(short(row)), ": ", text(line, style)), hang=2)


def alike(lines: Iterable[tuple[Row, str]]) -> Iterator[Prose]:
    """What is said of several rows, once."""
    names: dict[str, list[str]] = {}
    for row, line in lines:
        names.setdefault(line, []).append(short(row))
    for line, about in names.items():
        yield sentence(f"{', '.join(about)}: {line}")


def speeds(found: Iterable[Ratio | None]) -> Iterator[Prose]:
    """How often each verdict on speed was given."""
    verdicts = [each.verdict for each in found if each is not None]
    words = {"faster": "{} faster", "slower": "{} slower", "cannot tell": "cannot tell for {}"}
    if verdicts:
        yield verdicts_of("Speed against Base's", verdicts, words)


def verdicts_of(what: str, verdicts: Sequence[str], words: dict[str, str]) -> Prose:
    """How often each verdict was given."""
    counted = [
        text(words[each].format(verdicts.count(each)), COLOURS[tone(each)]) for each in words if each in verdicts
    ]
    return Prose(Text.assemble(f"{what}: ", Text(", ").join(counted), "."), hang=2)
