"""What is shipped: a question-answering checkpoint and questions of the project's own."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
QUESTIONS = Path(__file__).parent / "questions.json"
NAME = "built-in"
