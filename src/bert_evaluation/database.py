"""One SQLite file in WAL mode: opened, brought up to date, and what it refuses said in a sentence."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_evaluation.errors import StoreError

BUSY_SECONDS = 60
OTHER = "give another file with --store"


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
            score REAL NOT NULL, null_odds REAL NOT NULL, gap REAL NOT NULL, exact REAL NOT NULL, f1 REAL NOT NULL,
            answerable INTEGER NOT NULL, PRIMARY KEY (evaluation, question)) WITHOUT ROWID""",
        "CREATE TABLE tuned (key TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    ),
    ("CREATE TABLE rooflines (key TEXT PRIMARY KEY, roofline TEXT NOT NULL, measured TEXT NOT NULL)",),
)


class Database:
    """A connection to the file. Raises StoreError, with a sentence, for whatever the file or the disk will not do."""

    def __init__(self, file: Path, readonly: bool = False) -> None:
        """Open the file and make it if it is not there; with `readonly` it must exist, and nothing is written."""
        self.file = file
        with self._told():
            if readonly:
                self._connection = self._open_readonly()
                self._check()
            else:
                self._connection = _connect(str(file))
                self._migrate()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def do(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement."""
        with self._told():
            return self._connection.execute(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is done within, or nothing of it."""
        self.do("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # SQLite ends a transaction by itself when the disk is full.
            if self._connection.in_transaction:
                self.do("ROLLBACK")
            raise
        self.do("COMMIT")

    def _migrate(self) -> None:
        """Bring the file's schema up to date, in one transaction."""
        self._check()
        if self._version() == len(MIGRATIONS):
            return
        with self.transaction():
            for statements in MIGRATIONS[self._version() :]:  # another process may just have done it
                for statement in statements:
                    self.do(statement)
            self.do(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _check(self) -> None:
        """Refuse a file that is another program's, or a newer version's."""
        version = self._version()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"The store {self.file} was made by a newer bert-evaluation (schema {version}, this one knows"
                f" {len(MIGRATIONS)}); update the program, or give another file with --store."
            )
        if version == 0 and self.do("SELECT 1 FROM sqlite_master").fetchone():
            raise StoreError(f"{self.file} is another program's SQLite file; give another file with --store.")

    def _version(self) -> int:
        return int(self.do("PRAGMA user_version").fetchone()[0])

    def _open_readonly(self) -> sqlite3.Connection:
        if not self.file.is_file():
            raise StoreError(f"There is no store {self.file} yet; it is made by --infer, --evaluate or --transform.")
        address = self.file.absolute().as_uri()
        try:
            connection = _connect(f"{address}?mode=ro")
            connection.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError:
            # In a folder that cannot be written to, WAL mode has no place for its index.
            connection = _connect(f"{address}?immutable=1")
        return connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite and the disk refuse, in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "") or ""
            raise StoreError(self._sentence(name, str(error))) from error
        except OSError as error:
            raise StoreError(f"The store {self.file} cannot be made: {error.strerror}; {OTHER}.") from error

    def _sentence(self, name: str, reason: str) -> str:
        if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
            return (
                f"The disk of the store {self.file} is full or failing ({reason}); what was stored stays readable."
                f" Free some space and give the same command again, or {OTHER}."
            )
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            return f"{self.file} is no store of bert-evaluation, or a damaged one ({reason}); {OTHER}."
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return f"Another process has kept the store {self.file} locked for {BUSY_SECONDS} seconds; try again later."
        return f"The store {self.file} cannot be opened or written ({reason}); {OTHER}."


def _connect(address: str) -> sqlite3.Connection:
    connection = sqlite3.connect(address, timeout=BUSY_SECONDS, isolation_level=None, uri=address.startswith("file:"))
    if "?" not in address:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # safe against a killed process, in WAL mode
    return connection
