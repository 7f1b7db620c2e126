"""What `gpu.py` prints: results of its parts as tables in Markdown, and whether what is aimed at is reached."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpu_profile import Profile
from gpu_rows import BASE, Row

from bert_evaluation.evaluation import Evaluation
from bert_evaluation.measurement import Measurement
from bert_evaluation.quality import quality
from bert_evaluation.stats import Interval, median, speedup
from bert_evaluation.verification import Verification

PEAK = "peak "  # begins the names of the peaks among what takes turns
SHARE, TIMES, SAMPLES, MILLISECONDS = 0.60, 2.0, 8_800, 1.0  # what is aimed at
GATES = {"bf16": 0.999, "fp16": 0.999, "fp8": 0.99}  # the share of float32's F1 that has to be kept
TOP = 12  # kernels


def throughput(rows: Mapping[str, Row], seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Figures of each row, slowest first, from seconds for a window, and of the peaks for an operation, by round."""

    def share(name: str, of: str) -> dict[str, float] | None:
        if PEAK + of not in seconds:
            return None
        work = rows[name].work
        pairs = zip(seconds[name], seconds[PEAK + of], strict=True)
        return asdict(median([work.flops / work.windows * of_one / own for own, of_one in pairs]))

    table = []
    for name, row in rows.items():
        per_second = 1 / median(seconds[name]).estimate
        table.append(
            {
                "name": name,
                "ours": row.is_ours,
                "precision": row.precision,
                "batches": row.work.how,
                "padding": row.work.padding,
                "per_second": per_second,
                "tflops": 1e-12 * per_second * row.work.flops / row.work.windows,
                "of_bf16": share(name, "bf16"),
                "of_own": share(name, row.precision),
                "to_base": asdict(speedup(seconds[BASE], seconds[name])),
                "error": row.error,
            }
        )
    return sorted(table, key=lambda row: row["per_second"])


def print_throughput(table: Sequence[Mapping[str, Any]], found: Measurement) -> None:
    """The table of `throughput`, the peaks, and how far the targets are."""
    print("| | batches | padding | windows/s | useful TFLOP/s | of bf16's peak | of its own peak |", end="")
    print(f" × {BASE} | error |\n|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in table:
        own = "" if row["precision"] == "bf16" else _percent(row["of_own"])
        figures = f"{row['per_second']:,.0f} | {row['tflops']:.1f} | {_percent(row['of_bf16'])} | {own}"
        padding = f"{row['padding']:.1%}{', removed' if row['ours'] else ''}"
        print(
            f"| {bold(row['name'])} | {row['batches']} | {padding} | {figures} |"
            f" {interval(row['to_base'])} | {row['error']:.1e} |"
        )
    peaks = {name.removeprefix(PEAK): each for name, each in found.seconds.items() if name.startswith(PEAK)}
    reached = ", ".join(f"{name} {1e-12 / median(each).estimate:,.1f}" for name, each in peaks.items())
    print(f"\nPeak, of large products in the same rounds, in TFLOP/s: {reached}.")
    if found.noise is not None:
        print(f"{BASE} against itself: {interval(asdict(found.noise))}.")
    for row in table:
        if row["ours"]:
            share, times, speed = row["of_bf16"]["estimate"], row["to_base"]["estimate"], row["per_second"]
            print(
                f"{row['name']}: {SHARE:.0%} of bf16's peak {met(share >= SHARE)} ({share:.1%});"
                f" {TIMES:g} × {BASE} {met(times >= TIMES)} ({times:.2f});"
                f" {SAMPLES:,} windows/s {met(speed >= SAMPLES)} ({speed:,.0f}).",
                flush=True,
            )


def print_latency(found: Measurement, errors: Mapping[str, float], aim: float | None) -> None:
    """Milliseconds of each variant, and whether the fastest stays below what is aimed at."""
    print(f"| | median, ms | p90 | p99 | × {found.base} | error |\n|---|--:|--:|--:|--:|--:|")
    for name in found.seconds:
        p50, p90, p99 = found.percentiles(name)
        times = "1" if name == found.base else interval(asdict(found.speedup(name)))
        print(f"| {bold(name)} | {p50:.3f} | {p90:.3f} | {p99:.3f} | {times} | {errors[name]:.1e} |")
    if found.noise is not None:
        print(f"\n{found.base} against itself: {interval(asdict(found.noise))}.")
    if aim is not None:
        least, best = min((found.percentiles(name)[0], name) for name in found.seconds)
        print(f"Below {aim:g} ms: {met(least < aim)} ({best}, {least:.3f}).", flush=True)


def print_quality(
    found: Mapping[str, Evaluation], base: str, precisions: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Scores of each row, and its share of the base's F1 against the gate of its precision; as figures too."""
    result = dict[str, dict[str, Any]]()
    print("| | F1 | exact | of fp32's F1 | gate | F1 difference, points | changed answers |")
    print("|---|--:|--:|--:|---|--:|--:|")
    for name, each in found.items():
        gate, share = GATES.get(precisions[name], 1.0), each.f1 / found[base].f1 if found[base].f1 else 1.0
        against = quality(each, gate, found[base], wary=True)
        difference = against.f1_difference
        assert difference is not None
        verdict = "" if name == base else f"{gate:.1%} {met(share >= gate)}; {difference.verdict}"
        print(
            f"| {bold(name)} | {each.f1:.2f} | {each.exact:.2f} | {share:.2%} | {verdict} |"
            f" {interval(asdict(difference))} | {against.changed_answers} |",
            flush=True,
        )
        figures = {"f1": each.f1, "exact": each.exact, "share": share, "gate": gate}
        result[name] = figures | {"f1_difference": asdict(difference), "changed": against.changed_answers}
    return result


def print_promise(name: str, found: Verification) -> None:
    """A row of the table of promises."""
    verdict = found.verdict if found.kept else f"**broken** on {found.failing_probe}"
    allowed = "any" if found.tolerance > 1e300 else f"{found.tolerance:.1e}"
    numbers = f"{found.max_abs_error:.1e} | {found.error:.1e} | {allowed}"
    print(f"| {bold(name)} | {found.promise} | {verdict} | {numbers} |", flush=True)


def print_profile(found: Profile) -> None:
    """Shares of the kernels' time by what they do, and the longest kernels."""
    print("| | of the kernels' time |\n|---|--:|")
    for each, share in found.shares.items():
        print(f"| {each} | {share:.1%} |")
    print("\n| kernel | ms | calls |\n|---|--:|--:|")
    for kernel, seconds, calls in found.top(TOP):
        print(f"| `{kernel[:110].replace('|', '/')}` | {1000 * seconds:.2f} | {calls} |", flush=True)


def span(states: Iterable[Mapping[str, float]]) -> str:
    """The least and the most of each figure of a GPU's states."""
    told = list(states)
    parts = []
    for name, unit in (("clock_mhz", "MHz"), ("temperature_c", "°C"), ("power_w", "W")):
        if values := [each[name] for each in told if name in each]:
            parts.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
    return ", ".join(parts) or "not told"


def bold(name: str) -> str:
    """A name, in bold if it is one of ours."""
    return f"**{name}**" if name.startswith("ours") else name


def met(reached: bool) -> str:
    """Whether something is reached, in a word."""
    return "met" if reached else "missed"


def interval(found: Interval | Mapping[str, Any]) -> str:
    """An estimate with its interval."""
    of = found if isinstance(found, Mapping) else asdict(found)
    return f"{of['estimate']:.2f} ({of['low']:.2f} to {of['high']:.2f})"


def _percent(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['estimate']:.1%} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
