"""Files that a command is told to write."""

import json
from pathlib import Path
from typing import Any

from bert_evaluation.errors import BertEvaluationError


def require_folders(*files: Path | None) -> None:
    """Refuse, before anything is computed, a file whose folder is not there."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise BertEvaluationError(f"There is no folder {file.parent} to write {file.name} to.")


def write_json(file: Path, content: Any) -> None:
    """Write what is published."""
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
