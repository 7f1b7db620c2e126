"""What is shown of a run: progress bars on a terminal, and each stage as it ends."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bert_evaluation.cli.console import show

if TYPE_CHECKING:
    from bert_evaluation.outcome import Outcome
    from bert_evaluation.stages import Listener

ALL = "in all"


def shown(call: "Callable[[Listener], Outcome]", quiet: bool, show_changes: bool) -> "Outcome":
    """Carry out `call(listener)`: a bar for each task, and one for all, with the time left; nothing with `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from bert_evaluation.report import tables
    from bert_evaluation.report.terminal import stage_lines
    from bert_evaluation.stages import Listener

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def clear() -> None:
            while tasks:
                bar.remove_task(tasks.popitem()[1])

        def begin(what: str, parts: Mapping[str, int | None]) -> None:
            clear()
            for name, total in parts.items():
                tasks[name] = bar.add_task(f"{what} {name}".strip(), total=total)
            if len(parts) > 1:
                tasks[ALL] = bar.add_task(f"{what} {ALL}", total=sum(total or 0 for total in parts.values()))

        def advance(task: str, count: float) -> None:
            for name in {task, ALL} & tasks.keys():
                bar.advance(tasks[name], count)

        def stage(name: str, outcome: "Outcome") -> None:
            clear()
            if not quiet:
                bar.stop()  # while there is a bar, rich would send to its console, stderr, what is printed
                show([*stage_lines(name, outcome, show_changes), ""], tables.stage(name, outcome, show_changes))
                bar.start()

        return call(Listener(stage, begin, advance))
