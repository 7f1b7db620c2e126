"""Results on disk: experiments, their rows and raw times, and what each batch of an evaluation brought.

One SQLite file in WAL mode, which several processes may write to at once and any SQLite program can read. Every batch
is a transaction, so whatever ends a process costs no more than the batch it was at.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from bert_evaluation.errors import StoreError

MEMORY = ":memory:"
BUSY_SECONDS = 60

# Each entry brings the schema from the version of its index to the next. Entries are never changed, only added.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE experiments (
            id INTEGER PRIMARY KEY, started TEXT NOT NULL, finished TEXT, state TEXT NOT NULL, command TEXT NOT NULL,
            outcome TEXT NOT NULL)""",
        """CREATE TABLE rows (
            experiment INTEGER NOT NULL REFERENCES experiments, position INTEGER NOT NULL, name TEXT NOT NULL,
            evaluation TEXT, row TEXT NOT NULL, PRIMARY KEY (experiment, position))""",
        """CREATE TABLE timings (
            experiment INTEGER NOT NULL REFERENCES experiments, name TEXT NOT NULL, seconds TEXT NOT NULL,
            PRIMARY KEY (experiment, name))""",
        """CREATE TABLE evaluations (
            key TEXT PRIMARY KEY, graph_hash TEXT NOT NULL, weights_hash TEXT NOT NULL, data_hash TEXT NOT NULL,
            settings TEXT NOT NULL, created TEXT NOT NULL)""",
        """CREATE TABLE batches (
            evaluation TEXT NOT NULL REFERENCES evaluations, number INTEGER NOT NULL, session INTEGER NOT NULL,
            seconds REAL NOT NULL, model_seconds REAL NOT NULL, spans TEXT NOT NULL,
            PRIMARY KEY (evaluation, number)) WITHOUT ROWID""",
        """CREATE TABLE answers (
            evaluation TEXT NOT NULL REFERENCES evaluations, question TEXT NOT NULL, span TEXT NOT NULL,
            score REAL, null_odds REAL, gap REAL, PRIMARY KEY (evaluation, question)) WITHOUT ROWID""",
        "CREATE TABLE tuned (key TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    ),
)
