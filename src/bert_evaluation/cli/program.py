"""The program, and how it ends: one sentence and an exit code, a traceback only with --debug."""

import os
import sys
import warnings

import typer

from bert_evaluation.cli import (
    check,
    compare,
    diff,
    doctor,
    history,
    regime,
    report,
    root,
    score,
    transformations,
    verify,
)
from bert_evaluation.errors import BertEvaluationError, InterruptedRunError, UsageError

INTERRUPTED = 130
CODES = {UsageError: 2, InterruptedRunError: INTERRUPTED}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.callback(invoke_without_command=True)(root.root)
app.command("transformations")(transformations.transformations)
app.command("diff")(diff.diff)
app.command("verify")(verify.verify)
app.command("map")(regime.regime)
app.command("history")(history.history)
app.command("compare")(compare.compare)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("score")(score.score)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line. Exit code 0; 2 for a request that is off, 1 for what else fails, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    # Copying a graph makes torch warn of a use of its own.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(prog_name="bert-evaluation")
    except BertEvaluationError as error:
        if debug:
            raise
        _end(str(error), next((code for kind, code in CODES.items() if isinstance(error, kind)), 1))
    except SystemExit as end:
        # typer turns Ctrl-C into this code, without a word.
        if end.code == INTERRUPTED:
            _end("Interrupted before anything was computed.", INTERRUPTED)
        raise
    except OSError as error:
        if debug:
            raise
        _end(f"{error.strerror or error}" + (f": {error.filename}." if error.filename else "."), 1)


def _end(sentence: str, code: int) -> None:
    print(f"bert-evaluation: {sentence}", file=sys.stderr)
    if code == INTERRUPTED:
        # At once: Python would wait for streams that are in the middle of a batch.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
