"""`bert-evaluation compare`: two stored experiments, or two rows of one."""

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bert_evaluation.cli.files import require_folders, write_json
from bert_evaluation.cli.options import StoreOption
from bert_evaluation.errors import UsageError

if TYPE_CHECKING:
    from bert_evaluation.comparison import Comparison
    from bert_evaluation.stored import Stored

ForceOption = Annotated[
    bool, typer.Option("--force", help="compare in spite of other weights, data, machine or versions, and say so")
]


def compare(
    before: Annotated[str, typer.Argument(metavar="A", help="an experiment, or a row of it: 7, 7:MergeLinears")],
    after: Annotated[str, typer.Argument(metavar="B", help="what is compared with it")],
    margin: Annotated[float, typer.Option(help="share of A's F1 that B has to keep; strict: 0.999")] = 0.99,
    force: ForceOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    store: StoreOption = None,
) -> None:
    """Compare stored experiments, rows of the same name, or two rows: B against A.

    Across experiments speed is judged in units of each one's own Base, which takes out a slower machine. Exit code 2 if
    they cannot be compared and --force is not given.
    """
    if not 0 < margin <= 1:
        raise UsageError(f"A margin is the share of A's F1 to be kept, above 0 and up to 1, not {margin:g}.")
    require_folders(json_file)
    (number, row), (new_number, new_row) = _parsed(before), _parsed(after)

    from bert_evaluation import comparison
    from bert_evaluation.report.comparing import comparison_lines
    from bert_evaluation.store import Store
    from bert_evaluation.stored import read

    with Store(store, readonly=True) as results:
        one, other = read(results, number), read(results, new_number)
    rows = (_row(one, row or new_row), _row(other, new_row or row)) if row or new_row else None
    if one.is_as(other) and (rows is None or rows[0] == rows[1]):
        raise UsageError(
            f"{before} and {after} are the same; name two experiments, or two rows of one, such as"
            f" {number}:Base {number}:MergeLinears."
        )
    found = comparison.compare(one, other, margin, rows)
    refuse(found, force)
    print(*comparison_lines(found), sep="\n")
    if json_file is not None:
        write_json(json_file, {"schema": 1, **comparison_as_json(found)})


def refuse(found: "Comparison", force: bool) -> None:
    """Raise UsageError for what cannot be compared, unless it is forced."""
    from bert_evaluation.report.comparing import refusal

    if found.obstacles and not force:
        raise UsageError(refusal(found))


def comparison_as_json(found: "Comparison") -> dict[str, Any]:
    """A comparison in the published form."""
    return asdict(found)


def _parsed(text: str) -> tuple[int, str]:
    """The number of an experiment, and the name of a row or nothing."""
    number, _, row = text.partition(":")
    if not number.isdecimal():
        raise UsageError(
            f"{text!r} is no experiment; give a number, or a number and a row, such as 7:MergeLinears (`history` lists"
            " them)."
        )
    return int(number), row


def _row(stored: "Stored", name: str) -> str:
    """The name of a row, given with or without `Base+`. Raises UsageError that says which come near it."""
    from bert_evaluation.rows import BASE

    for each in (name, f"{BASE}+{name}"):
        if each in stored.rows:
            return each
    near = difflib.get_close_matches(f"{BASE}+{name}", stored.rows, n=3, cutoff=0)
    hint = f"did you mean {' or '.join(near)}?" if near else "it has no rows."
    raise UsageError(f"E{stored.name[1:]} has no row {name!r}; {hint}")
