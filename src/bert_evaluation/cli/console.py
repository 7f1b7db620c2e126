"""Standard output for what is coloured on a terminal."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output() -> "Console":
    """Standard output, in colour where it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
