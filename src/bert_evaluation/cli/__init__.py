"""The command line: arguments → an experiment; no logic."""

from bert_evaluation.cli.program import main

__all__ = ["main"]
