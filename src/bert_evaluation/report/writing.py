"""How text, numbers and verdicts are written on the page and in tables.

What a data set brings is cleaned here; on the page jinja2 escapes it.
"""

import math
import re
from typing import Any

from markupsafe import Markup, escape

from bert_evaluation.stats import Interval

# Control characters, surrogates, and those that turn the direction of the text after them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
STEP = re.compile(r"(?<=\+)(?=[A-Za-z_])")
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
LONGEST = 600  # characters shown of a text that a data set brings
TONES = {
    "faster": "good",
    "kept": "good",
    "not worse": "good",
    "slower": "bad",
    "broken": "bad",
    "worse": "bad",
    "helps": "good",
    "harms": "bad",
}


def clean(value: Any) -> Any:
    """A value as it may be shown: with a sign in the place of every character that cannot be seen."""
    assert value is not None  # a missing part is told of or left out, never printed
    return value if isinstance(value, Markup) else UNSEEN.sub("�", str(value))


def breaks(text: str) -> Markup:
    """Text that may break between the words of a composed name, not within an interval; with a true minus."""
    shown = re.sub(r"(?<=[\s(])-(?=\d)", "−", clean(text))
    shown = re.sub(r"(?<=\d) to (?=[+−\d])", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}", shown)
    return Markup(re.sub(r"\S+", _steps, str(escape(shown))))  # noqa: S704


def _steps(name: re.Match[str]) -> str:
    """A composed name that breaks between its steps, and within a step only where one alone is too long."""
    steps = STEP.split(HUMP.sub("<wbr>", name[0]))
    if len(steps) == 1:
        return steps[0]
    return "<wbr>".join(f'<span class="step">{step}</span>' for step in steps)


def shorten(text: str, longest: int = LONGEST) -> str:
    """The beginning of a text that is long."""
    return text if len(text) <= longest else text[:longest] + "…"


def error(value: float) -> str:
    """A number of any size, or what it is instead of one."""
    if math.isfinite(value):
        return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
    return "no number" if math.isnan(value) else "infinitely much"


def milliseconds(value: float) -> str:
    """A time with as many digits as it is read with."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def rate(found: Interval, unit: str) -> str:
    """So many billion units a second; in thousands of billions where those are many."""
    prefix, of = ("T", 1000) if found.estimate > 10_000 else ("G", 1)
    estimate, low, high = (getattr(found, each) / of for each in ("estimate", "low", "high"))
    return f"{estimate:.1f} {prefix}{unit} ({low:.1f} to {high:.1f})"


def mebibytes(value: int) -> str:
    """A number of bytes."""
    return f"{value / 2**20:,.1f} MiB"


def sortable(value: float | None) -> str:
    """A number for the page's script; nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def signed(value: float) -> str:
    """A difference, with a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def tone(verdict: str) -> str:
    """How a verdict is coloured: good, bad, or open."""
    return TONES.get(verdict, "open")
