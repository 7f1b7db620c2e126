"""`bert-evaluation score`: anybody's answers, scored as the official script does."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bert_evaluation.errors import DatasetError


def score(
    dataset: Annotated[str, typer.Argument(help="questions: built-in, a SQuAD JSON file, or a hub name")],
    predictions: Annotated[Path, typer.Argument(help="JSON file: an answer for each question id")],
    no_answer_probabilities: Annotated[
        Path | None, typer.Option(help="JSON file: the probability that there is none, for each question id")
    ] = None,
    no_answer_threshold: Annotated[float, typer.Option(help="above it an answer counts as empty")] = 1.0,
) -> None:
    """Score a file of predictions, and print what the official SQuAD 2.0 script would."""
    from bert_evaluation.checkpoints import load_dataset
    from bert_evaluation.squad.scores import score as scored
    from bert_evaluation.squad.scores import some

    answers = _read(predictions, str, "an answer in quotes")
    odds = None if no_answer_probabilities is None else _read(no_answer_probabilities, (int, float), "a number")
    data = load_dataset(dataset)
    ids = {example.id for example in data.examples}
    for file, content in ((predictions, answers), (no_answer_probabilities, odds or {})):
        if unknown := [each for each in content if each not in ids]:
            print(
                f"bert-evaluation: {file} has {len(unknown)} ids that {data.name} does not have: {some(unknown)};"
                " they are left out.",
                file=sys.stderr,
            )
    print(json.dumps(scored(data, answers, odds, no_answer_threshold), indent=2))


def _read(file: Path, kind: type | tuple[type, ...], what: str) -> dict[str, Any]:
    """A JSON object of values of one kind, by question id. Raises DatasetError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DatasetError(f"There is no file {file}.") from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file} is no JSON object of question ids; it is a {type(content).__name__}.")
    for each, value in content.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DatasetError(f"{file} has {value!r} for question {each}; it needs {what}.")
    return content
