import multiprocessing
import resource
import signal
import sqlite3

import pytest

from bert_evaluation import database, store
from bert_evaluation.answering import BatchResult
from bert_evaluation.errors import StoreError
from bert_evaluation.squad.answers import Span
from bert_evaluation.store import AnswerRecord, EvaluationKey, Store

KEY = EvaluationKey("graph", "weights", "data", {"stride": 128})
RESULT = BatchResult((Span(0, 3, 7, 1.5, float("-inf"), 0.1), Span(4, 0, 0, float("-inf"), 0.0, 2.0)), 0.25, 0.2, 7)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.sqlite"


def test_results_come_back_as_they_went(file):
    with Store(file) as one:
        one.results(KEY).put(3, RESULT)
    with Store(file) as other:
        assert other.results(KEY).get(3) == RESULT
        assert other.results(KEY).get(4) is None


@pytest.mark.parametrize("part", ["graph_hash", "weights_hash", "data_hash", "settings"])
def test_a_result_stands_only_for_what_agrees_in_all(part):
    with Store(":memory:") as results:
        results.results(KEY).put(0, RESULT)
        other = EvaluationKey(**{**KEY.__dict__, part: {"stride": 64} if part == "settings" else "other"})
        assert results.results(KEY).get(0) == RESULT
        assert results.results(other).get(0) is None


def test_fresh_forgets(file):
    with Store(file) as results:
        results.results(KEY).put(0, RESULT)
        results.save_answers(KEY.key, [AnswerRecord("q", "a", 1.0, 0.5, 0.1, 1.0, 1.0, True)])
        assert results.results(KEY, fresh=True).get(0) is None
        assert list(results.answers(KEY.key)) == []


def test_the_first_result_stays():
    with Store(":memory:") as results:
        kept = results.results(KEY)
        kept.put(0, RESULT)
        kept.put(0, BatchResult((), 1.0, 1.0, 8))
        assert kept.get(0) == RESULT


def test_answers_and_what_they_say():
    answer = AnswerRecord("q", "span", 5.0, 0.5, float("inf"), 1.0, 0.5, False)
    with Store(":memory:") as results:
        results.results(KEY)
        results.save_answers(KEY.key, [answer])
        assert list(results.answers(KEY.key)) == [answer]
    assert (answer.text(0.5), answer.text(0.4)) == ("span", "")
    assert answer.no_answer_probability == pytest.approx(0.6224593)


def test_experiments_rows_and_times(file):
    with Store(file) as results:
        number = results.begin("bert-evaluation --infer", "{}")
        results.save(number, '{"a": 1}', [("Base", None, '{"row": 1}')])
        results.save_times(number, "Base", [0.1, 0.2])
        results.end(number, "finished")
        assert results.begin("again", "{}") == number + 1
    with Store(file, readonly=True) as results:
        first, second = results.experiments()
        assert (first.state, first.outcome, first.rows) == ("finished", '{"a": 1}', ('{"row": 1}',))
        assert (second.state, second.finished, second.rows) == ("running", None, ())
        assert results.times(number) == {"Base": [0.1, 0.2]}
        with pytest.raises(StoreError, match="no experiment 9; it has 1 to 2"):
            results.experiment(9)
        with pytest.raises(StoreError, match="cannot be opened or written"):
            results.begin("x", "{}")


def test_what_was_found_by_measuring_is_found_once():
    with Store(":memory:") as results:
        assert results.tuned("key", lambda: 512) == 512
        assert results.tuned("key", lambda: 1024) == 512
        assert results.tuned("other", lambda: 1024) == 1024


def test_an_older_schema_is_brought_up_to_date(file, monkeypatch):
    with Store(file) as results:
        results.results(KEY).put(0, RESULT)
    newer = (*database.MIGRATIONS, ("ALTER TABLE experiments ADD COLUMN note TEXT",))
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with Store(file) as results:
            assert results.results(KEY).get(0) == RESULT
        columns = {row[1] for row in sqlite3.connect(file).execute("PRAGMA table_info(experiments)")}
        assert "note" in columns
    before = file.read_bytes()
    known = len(database.MIGRATIONS)
    with pytest.raises(StoreError, match=rf"newer bert-evaluation \(schema {known + 1}, this one knows {known}\)"):
        Store(file)
    assert file.read_bytes() == before


def test_a_migration_that_fails_changes_nothing(file, monkeypatch):
    Store(file).__exit__()
    version = len(database.MIGRATIONS)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, ("DROP TABLE timings", "NO SQL")))
    with pytest.raises(StoreError):
        Store(file)
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA user_version").fetchone() == (version,)
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'timings'").fetchone()


def test_files_that_are_no_store_are_left_alone(file, tmp_path):
    file.write_text("a letter to a friend, which is long enough to be no SQLite file at all " * 20)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"is no store of bert-evaluation.*--store"):
        Store(file)
    assert file.read_bytes() == before
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE letters (text)")
    connection.close()
    with pytest.raises(StoreError, match="another program's SQLite file"):
        Store(other)
    with pytest.raises(StoreError, match=r"There is no store .* yet"):
        Store(tmp_path / "absent.sqlite", readonly=True)
    with pytest.raises(StoreError, match="cannot be opened or written"):
        Store(tmp_path / "no folder" / "results.sqlite")


def test_a_folder_stands_for_a_file_in_it(tmp_path):
    with Store(tmp_path) as results:
        assert results.file == tmp_path / "results.sqlite"


def test_the_users_own_store_is_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store.platformdirs, "user_data_dir", lambda name, appauthor: str(tmp_path / "data" / name))
    with Store():
        assert (tmp_path / "data" / "bert-evaluation" / "results.sqlite").is_file()


def test_a_full_disk_is_a_sentence_and_costs_nothing_stored(file):
    with Store(file) as results:
        kept = results.results(KEY)
        kept.put(0, RESULT)
        pages = results._database.do("PRAGMA page_count").fetchone()[0]
        results._database.do(f"PRAGMA max_page_count = {pages}")

        def fill():
            for number in range(1, 500):
                kept.put(number, RESULT)

        with pytest.raises(StoreError, match=r"full or failing .* stays readable.*same command"):
            fill()
    with Store(file, readonly=True) as results:
        assert 1 <= results._database.do("SELECT count(*) FROM batches").fetchone()[0] < 500


def _write_beyond_the_limit(file, said):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store(file) as results:
        kept = results.results(KEY)
        size = file.with_name(file.name + "-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, size + 20_000))
        try:
            for number in range(10_000):
                kept.put(number, RESULT)
        except StoreError as error:
            said.put((str(error), number))


def test_a_disk_that_takes_no_more_is_a_sentence(file):
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    process = context.Process(target=_write_beyond_the_limit, args=(file, said))
    process.start()
    sentence, written = said.get(timeout=120)
    process.join()
    assert "full or failing" in sentence
    with Store(file) as results:
        assert all(results.results(KEY).get(number) == RESULT for number in range(written))
        assert results.results(KEY).get(written) is None


def _write_many(file, session):
    with Store(file) as results:
        number = results.begin(f"process {session}", "{}")
        kept = results.results(KEY)
        for index in range(session, 400, 2):
            kept.put(index, BatchResult((), float(session), 0.0, number))
        kept.put(1000, BatchResult((), float(session), 0.0, number))


def test_two_processes_write_at_once(file):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(file, session)) for session in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with Store(file, readonly=True) as results:
        assert len(list(results.experiments())) == 2
        assert results._database.do("SELECT count(*) FROM batches").fetchone()[0] == 401


def test_what_an_evaluation_is_known_by_and_when_its_batches_ran():
    with Store(":memory:") as results:
        results.results(KEY).put(3, RESULT)
        assert results.evaluation(KEY.key) == KEY
        assert results.evaluation("other") is None
        assert results.batch_times(KEY.key) == {3: (7, 0.25)}
