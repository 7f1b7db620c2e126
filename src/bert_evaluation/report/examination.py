"""What the doctor found: as lines, as tables within 80 columns, and in the published form."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bert_evaluation.capabilities import NOT_TOLD
from bert_evaluation.doctor import Examination, Finding
from bert_evaluation.report.writing import milliseconds, rate
from bert_evaluation.roofline import Bandwidth, Peak, Reached

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 80
CAN, REACHES, DISTURBS = "What this machine can do", "What it reaches", "What disturbs measurements"
STYLES = {"ok": "green", "disturbs": "bold yellow", "unknown": "dim"}


def lines(found: Examination) -> Iterator[str]:
    """Plain text, a line for each thing."""
    yield CAN
    yield from (f"{fact.what}: {fact.found or NOT_TOLD}" for fact in found.facts)
    yield ""
    yield _reaches(found)
    yield from (f"{what}: {rate}, {how}" for what, rate, how in _rates(found))
    yield from _remarks(found)
    yield ""
    if found.reached:
        yield _share_title(found)
        yield from (f"{what}: {time}, {share}" for what, time, share in map(_reached, found.reached))
        yield ""
    yield DISTURBS
    for finding in found.findings:
        yield f"{finding.verdict}: {finding.what}: {finding.found or NOT_TOLD}{_advice(finding, '. ')}"
    yield ""
    yield conclusion(found)


def tables(found: Examination) -> "Iterator[RenderableType]":
    """The same for a terminal, however wide."""
    from rich.constrain import Constrain
    from rich.text import Text

    def section(title: str, rows: "Iterable[tuple[str | Text, ...]]") -> "Iterator[RenderableType]":
        yield Text(title, "bold")
        yield Constrain(_table(rows), WIDTH)

    yield from section(CAN, ((fact.what, _told(fact.found)) for fact in found.facts))
    yield ""
    yield from section(_reaches(found), _rates(found))
    yield from (Constrain(Text(remark, "yellow"), WIDTH) for remark in _remarks(found))
    yield ""
    if found.reached:
        yield from section(_share_title(found), map(_reached, found.reached))
        yield ""
    verdicts = (
        (
            Text(finding.verdict, STYLES[finding.verdict]),
            finding.what,
            Text.assemble(_told(finding.found), (_advice(finding, "\n"), "italic")),
        )
        for finding in found.findings
    )
    yield from section(DISTURBS, verdicts)
    yield ""
    yield Constrain(Text(conclusion(found), "bold"), WIDTH)


def _table(rows: "Iterable[tuple[str | Text, ...]]") -> "Table":
    """Rows without lines between them; only the last cell of a row is broken into lines."""
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    made = Table.grid(padding=(0, 2, 0, 0))
    *first, _ = cells[0]
    for number in range(len(first)):
        made.add_column(no_wrap=True, style="" if number else "cyan")
    made.add_column()
    for row in cells:
        made.add_row(*row)
    return made


def published(found: Examination) -> dict[str, Any]:
    """The published form, schema 1."""
    content = {"schema": 1, **asdict(found)}
    for peak, made in zip(found.roofline.peaks, content["roofline"]["peaks"], strict=True):
        made["safe"] = peak.is_safe
    return content


def conclusion(found: Examination) -> str:
    """What to expect of measurements here, in a sentence."""
    disturbing = [finding.what for finding in found.findings if finding.verdict == "disturbs"]
    unknown = sum(finding.verdict == "unknown" for finding in found.findings)
    untold = f"; of {unknown} things it is not known" if unknown else ""
    if not disturbing:
        return f"Nothing was seen that disturbs measurements{untold}."
    count = "1 thing disturbs" if len(disturbing) == 1 else f"{len(disturbing)} things disturb"
    return f"{count} measurements: {', '.join(disturbing)}{untold}."


def _reaches(found: Examination) -> str:
    device, threads = found.roofline.device, found.roofline.threads
    on = f"{device} with {threads} thread{'' if threads == 1 else 's'}" if device == "cpu" else device
    return f"{REACHES} on {on}, measured {found.roofline.measured}"


def _share_title(found: Examination) -> str:
    return f"Base of {found.model}, and its share of the fp32 peak"


def _rates(found: Examination) -> Iterator[tuple[str, str, str]]:
    for peak in found.roofline.peaks:
        yield peak.precision, rate(peak.gflops, "FLOP/s"), _way(peak)
    for bandwidth in found.roofline.bandwidths:
        yield "memory", rate(bandwidth.gigabytes, "B/s"), _through(bandwidth)


def _remarks(found: Examination) -> Iterator[str]:
    """What disturbed the measuring of the peaks, and how to do better."""
    yield from found.roofline.remarks
    if found.roofline.remarks or any(each.share > 1 for each in found.reached):
        yield "So these are no peaks: measure them anew with --fresh when the machine is quiet."


def _way(peak: Peak) -> str:
    tokens, inputs, outputs = peak.shape
    text = f"{peak.way}, {tokens}×{inputs} by {inputs}×{outputs}"
    return text if peak.is_safe else f"{text}; UNSAFE: {peak.error:.0%} off at the largest values"


def _through(bandwidth: Bandwidth) -> str:
    return f"{bandwidth.way}, arrays of {bandwidth.array_bytes / 2**20:.0f} MiB"


def _reached(each: Reached) -> tuple[str, str, str]:
    time, low, high = (milliseconds(getattr(each.milliseconds, of)) for of in ("estimate", "low", "high"))
    texts = f"{each.batch} text{'' if each.batch == 1 else 's'} of {each.length} tokens"
    return texts, f"{time} ms ({low} to {high})", f"{each.flops / 1e9:.1f} GFLOP, {each.share:.0%}"


def _told(found: str | None) -> Any:
    from rich.text import Text

    return Text(NOT_TOLD, "dim") if found is None else Text(found)


def _advice(finding: Finding, before: str) -> str:
    return "" if finding.verdict == "ok" else before + finding.advice
