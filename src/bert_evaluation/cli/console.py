"""Standard output: tables on a terminal, plain lines anywhere else. This is the one place that decides."""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def console() -> "Console":
    """Standard output, in colour where it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def show(lines: Iterable[str], laid_out: Iterable["RenderableType"]) -> None:
    """Print what is laid out on a terminal, the lines elsewhere; what is not printed is not made, given generators.

    FORCE_COLOR makes no terminal: what is piped stays as it is for programs to read.
    """
    output = console()
    if sys.stdout.isatty() and output.is_terminal and not output.is_dumb_terminal:
        for each in laid_out:
            output.print(each, crop=False)
    else:
        for line in lines:
            print(line)
    sys.stdout.flush()
