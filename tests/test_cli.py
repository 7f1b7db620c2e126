"""The command line, in a process of its own: what is printed, the exit code, and what is said of bad input."""

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from families import tiny

from bert_evaluation import builtin
from bert_evaluation.cli import main

ROOT = Path(__file__).parents[1]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


PROGRAM = (sys.executable, str(ROOT / "bert-evaluation.py"))


def run_apart(*arguments, program=PROGRAM, cwd=None):
    """Run the program in a process of its own."""
    command = [*program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=OFFLINE, cwd=cwd)


def run(*arguments):
    """Run the program in this process, which saves the seconds that imports take."""
    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["bert-evaluation", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def heed_ctrl_c():
    """What a shell runs in the background ignores Ctrl-C, with all that it starts: tests too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*PROGRAM, *map(str, arguments)], **streams, env=OFFLINE, preexec_fn=heed_ctrl_c)


def says(result, code, *parts):
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    return result


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(builtin.CHECKPOINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that a user might have: the built-in tokenizer, random weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("distilbert", vocab_size=30522).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_everything_at_once(tmp_path):
    file = tmp_path / "result.json"
    options = ("--samples", 6, "--rounds", 8, "--json", file, "--device", "cpu")
    result = run_apart("--infer", "--evaluate", "--transform", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "Question: Which zelda game is my favorite?" in result.stdout
    assert "Answer: Ocarina of time or The Wind Waker" in result.stdout
    assert "Base average inference: " in result.stdout
    assert "Base+MergeLinears average inference: " in result.stdout
    assert "6 of 6 sites; max difference" in result.stdout
    assert "Base+LintAndRecompile: no sites, the graph stays the same; not timed" in result.stdout
    assert "Base+FuseBiasInLinear: F1 " in result.stdout

    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["schema"] == 1
    assert content["model"]["name"] == "built-in"
    assert content["model"]["parameters"] > 20_000_000
    assert content["dataset"] == {"name": "built-in", "samples": 6, "seed": 42}
    assert content["machine"]["torch"] == torch.__version__
    assert content["conditions"]["infer"]["own_share"] > 0
    names = ["LintAndRecompile", "MergeLinears", "FuseBiasInLinear", "ChangeTrueDivToMulByInverse", "RemoveDropout"]
    assert list(rows) == ["Base", *(f"Base+{name}" for name in names), "Base+" + "+".join(names)]
    assert all(row["quality"]["samples"] == 6 for row in rows.values())
    assert all(row["quality"]["f1"] == pytest.approx(rows["Base"]["quality"]["f1"], abs=1e-6) for row in rows.values())
    merged, lint = rows["Base+MergeLinears"], rows["Base+LintAndRecompile"]
    assert merged["recipe"] == "MergeLinears()"
    assert merged["sites"] == [{"transformation": "MergeLinears", "found": 6, "applied": 6, "refused": []}]
    assert merged["promise"]["kind"] == "reassociates"
    assert all(row["promise"]["verdict"] == "kept" for row in list(rows.values())[1:])
    assert merged["latency_ms"]["samples"] == 8
    assert merged["speedup"]["low"] <= merged["speedup"]["estimate"] <= merged["speedup"]["high"]
    assert merged["speedup"]["verdict"] in ("faster", "slower", "cannot tell")
    assert lint["latency_ms"] is lint["speedup"] is lint["samples_per_second"] is None
    assert rows["Base"]["promise"] is rows["Base"]["speedup"] is None


def test_transform_alone_times_nothing(folder):
    result = run("--transform", "--recipe", "RemoveDropout+MergeLinears", "--recipe", "MergeLinears", "--model", folder)
    assert result.returncode == 0, result.stderr
    assert "Base+RemoveDropout+MergeLinears: 6 of 6 sites; reassociates promise kept" in result.stdout
    assert "Base+MergeLinears: 2 of 2 sites" in result.stdout
    assert " ms" not in result.stdout


def test_ones_own_question_through_the_console_script(folder):
    script = Path(sys.executable).with_name("bert-evaluation")
    if not script.is_file():
        pytest.skip("the package is not installed beside this Python, so there is no console script")
    options = ("--infer", "--model", folder, "--question", "Who?", "--context", "Ann.", "--rounds", 2)
    result = run_apart(*options, program=(str(script),))
    assert result.returncode == 0, result.stderr
    assert "Context: Ann.\nQuestion: Who?\nAnswer: " in result.stdout


def test_ones_own_squad_1_file(folder, tmp_path):
    qas = [{"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}]
    data = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Ann.", "qas": qas}]}]}
    (tmp_path / "own.json").write_text(json.dumps(data))
    result = run("--evaluate", "--model", folder, "--dataset", tmp_path / "own.json", "--null-threshold", "1e9")
    assert result.returncode == 0, result.stderr
    assert "Data set: own.json, 1 questions" in result.stdout
    assert "Base: F1 100.00, exact 100.00" in result.stdout


def test_quiet_prints_nothing(folder):
    result = run("--infer", "--quiet", "--model", folder, "--rounds", 1)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_help_and_the_list_of_transformations_do_not_import_torch():
    result = run("-h")
    assert result.returncode == 0
    assert all(f"--{option}" in result.stdout for option in ("device", "infer", "evaluate", "transform"))
    code = "import sys, bert_evaluation, bert_evaluation.cli; sys.exit('torch' in sys.modules)"
    assert run_apart("-c", code, program=(sys.executable,)).returncode == 0
    assert "MergeLinears (reassociates, reversible): Linears that read the same" in run("transformations").stdout


def test_nothing_asked_for():
    says(run_apart(), 2, "--infer", "--evaluate", "--transform")


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--transform", "--recipe", "MergeLinear"), 2, ("MergeLinear", "did you mean MergeLinears")),
        (("--transform", "--recipe", "RemoveDropout+"), 2, ("not a recipe",)),
        (("--transform", "--recipe", "MergeLinears(x=1)"), 2, ("does not take", "x")),
        (("--infer", "--device", "cpuu"), 2, ("cpuu", "did you mean cpu")),
        (("--infer", "--device", "tpu:0"), 2, ("tpu",)),
        (("--evaluate", "--samples", "0"), 2, ("0 samples", "1 to 216")),
        (("--evaluate", "--samples", "-4"), 2, ("-4 samples",)),
        (("--evaluate", "--samples", "217"), 2, ("217 samples", "1 to 216")),
        (("--infer", "--rounds", "0"), 2, ("round",)),
        (("--evaluate", "--batch-size", "0"), 2, ("batch size",)),
        (("--evaluate", "--batch-tokens", "0"), 2, ("batch size",)),
        (("--evaluate", "--batch-tokens", "9", "--batch-size", "9"), 2, ("not both",)),
        (("--evaluate", "--margin", "1.5"), 2, ("margin",)),
        (("--evaluate", "--max-length", "900"), 2, ("at most 512 tokens, not 900",)),
        (("--evaluate", "--doc-stride", "400"), 2, ("share 0 to 379",)),
        (("--evaluate", "--doc-stride", "-1"), 2, ("share 0 to 379",)),
        (("--evaluate", "--n-best", "0"), 2, ("at least 1 best",)),
        (("--infer", "--predictions", "p.json"), 2, ("--evaluate",)),
        (("--evaluate", "--predictions", "/nowhere/p.json"), 1, ("no folder /nowhere",)),
        (("--infer", "--store", "/nowhere/at/all.sqlite"), 1, ("/nowhere/at/all.sqlite", "--store")),
        (("--infer", "--store", "/proc/results.sqlite"), 1, ("/proc/results.sqlite", "--store")),
        (("--infer", "--store", __file__), 1, ("no store", "--store")),
        (("--infer", "--json", "/nowhere/at/all.json"), 1, ("no folder /nowhere/at",)),
        (("--infer", "--model", "./absent"), 1, ("no checkpoint folder ./absent",)),
        (("--infer", "--model", "someone/not-in-the-cache"), 1, ("someone/not-in-the-cache", "give a folder")),
        (("--evaluate", "--dataset", "someone/not-in-the-cache"), 1, ("someone/not-in-the-cache", "cannot be had")),
        (("--evaluate", "--dataset", "absent.json"), 1, ("no data set file absent.json",)),
    ],
)
def test_bad_requests(options, code, parts):
    says(run(*options), code, *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    says(run("--infer", "--device", "cuda"), 1, "no device cuda", "it has cpu")


def test_the_device_may_be_said_by_the_environment(monkeypatch):
    monkeypatch.setenv("BERT_EVALUATION_DEVICE", "cpuu")
    for command in ((), ("verify",), ("map", "--recipe", "RemoveDropout"), ("doctor",)):
        says(run(*command, *(() if command else ("--infer",))), 2, "no kind of device 'cpuu'")
    says(run("verify", "--device", "gpu"), 2, "no kind of device 'gpu'")


def test_an_unknown_option_is_named():
    result = run("--infre")
    assert result.returncode == 2
    assert "--infre" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "part"),
    [("{nope", "not JSON"), ('{"a": 1}', "not SQuAD"), ('{"data": []}', "no questions")],
)
def test_bad_data_sets(tmp_path, content, part):
    (tmp_path / "bad.json").write_text(content)
    says(run("--evaluate", "--dataset", tmp_path / "bad.json"), 1, part)


def test_an_answer_that_is_elsewhere(tmp_path):
    content = json.loads(builtin.QUESTIONS.read_text(encoding="utf-8"))
    question = content["data"][0]["paragraphs"][0]["qas"][0]
    question["answers"][0]["answer_start"] += 1
    (tmp_path / "off.json").write_text(json.dumps(content))
    says(run("--evaluate", "--dataset", tmp_path / "off.json"), 1, question["id"], "does not stand at", "answer_start")


def without_weights(path):
    tiny("bert").config.save_pretrained(path)


def pickled(path):
    without_weights(path)
    torch.save({}, path / "pytorch_model.bin")


def without_head(path):
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def of_no_question_answering_kind(path):
    config = transformers.ViTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(path)


def damaged(path):
    tiny("bert").save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"rubbish")


def without_tokenizer(path):
    tiny("bert").save_pretrained(path)


def with_broken_config(path):
    tiny("bert").save_pretrained(path)
    (path / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no config.json"),
        (without_weights, "has no weights"),
        (pickled, "pickled weights (pytorch_model.bin)"),
        (without_head, "no question-answering head: it is a BertForMaskedLM without the weights qa_outputs.bias"),
        (of_no_question_answering_kind, "no question-answering head"),
        (damaged, "damaged"),
        (without_tokenizer, "tokenizer"),
        (with_broken_config, "cannot be loaded"),
    ],
)
def test_bad_checkpoints(tmp_path, make, part):
    make(tmp_path)
    says(run("--infer", "--model", tmp_path), 1, part)


def test_ctrl_c_is_one_sentence(folder):
    with start("--infer", "--transform", "--model", folder, "--rounds", 10**6, "--recipe", "MergeLinears") as process:
        assert process.stdout.readline() == "Transformations\n"  # timing has begun or is about to
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.startswith("bert-evaluation: Interrupted: ")
    assert len(errors.splitlines()) == 1


EVALUATION = ("--evaluate", "--transform", "--recipe", "MergeLinears", "--batch-tokens", 256)


def batches_in(store):
    """What each batch brought, as it is on disk."""
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        found = connection.execute("SELECT evaluation, number, session, spans FROM batches").fetchall()
    return {(evaluation, number): (session, spans) for evaluation, number, session, spans in found}


def wait_for_batches(store, count):
    while not store.is_file():
        time.sleep(0.05)
    while True:
        try:
            if len(batches_in(store)) >= count:
                return
        except sqlite3.OperationalError:  # the tables are being made
            pass
        time.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_cut_off_at_any_moment_and_taken_up(folder, tmp_path, end):
    store, whole, files = (
        tmp_path / "part.sqlite",
        tmp_path / "whole.sqlite",
        [tmp_path / "a.json", tmp_path / "b.json"],
    )
    with start(*EVALUATION, "--model", folder, "--store", store) as process:
        wait_for_batches(store, 15)
        process.send_signal(end)
        _, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    if end == signal.SIGINT:
        assert errors == (
            f"bert-evaluation: Interrupted: what was answered so far is kept in {store}; the same command goes on from"
            " there.\n"
        )
    before = batches_in(store)
    assert run(*EVALUATION, "--model", folder, "--store", store, "--predictions", files[0]).returncode == 0
    assert run(*EVALUATION, "--model", folder, "--store", whole, "--predictions", files[1]).returncode == 0
    after, uninterrupted = batches_in(store), batches_in(whole)
    assert 15 <= len(before) < len(after)
    assert {place: after[place] for place in before} == before  # nothing was computed twice
    assert {place: spans for place, (_, spans) in after.items()} == {
        place: spans for place, (_, spans) in uninterrupted.items()
    }
    assert files[0].read_bytes() == files[1].read_bytes()
    states = [line.split(": ")[1].split(",")[0] for line in run("history", "--store", store).stdout.splitlines()]
    assert states == ["running" if end == signal.SIGKILL else "interrupted", "finished"]


def test_history_shows_what_was_printed(folder, tmp_path):
    store, file = tmp_path / "results.sqlite", tmp_path / "result.json"
    options = ("--samples", 8, "--model", folder, "--store", store, "--batch-tokens", 2000)
    first = run("--evaluate", "--infer", "--transform", "--rounds", 7, "--json", file, *options)
    assert first.returncode == 0, first.stderr
    assert f"Kept as experiment 1 in {store}" in first.stdout
    shown = run("history", 1, "--store", store)
    assert shown.returncode == 0, shown.stderr
    for part in first.stdout.split("\n\n")[:-1]:
        assert part.strip() in shown.stdout
    listed = run("history", "--store", store).stdout
    assert "8 questions: finished, 7 rows: bert-evaluation --evaluate --infer --transform" in listed
    says(run("history", 2, "--store", store), 1, "no experiment 2; it has 1 to 1")
    says(run("history", "--store", tmp_path / "absent"), 1, "no store")
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT count(*) FROM timings").fetchone() == (5,)
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (5 * 8,)
    quality = json.loads(file.read_text())["rows"][2]["quality"]
    assert quality["changed_answers"] == 0
    assert quality["f1_difference"]["verdict"] == quality["exact_difference"]["verdict"] == "not worse"
    assert (quality["margin"], quality["mcnemar_p"], quality["changes"]) == (0.99, 1.0, [])
    # The same again computes nothing, compares what was timed side by side then, and scores with another threshold.
    again = run("--evaluate", "--transform", *options, "--null-threshold", -1e9)
    speeds = [[line for line in each.stdout.splitlines() if " samples/s" in line] for each in (first, again)]
    assert [line.split("exact")[1].split(" samples")[0].split()[-1] for line in speeds[0]] == [
        line.split("exact")[1].split(" samples")[0].split()[-1] for line in speeds[1]
    ]
    assert "without: 100.00" in again.stdout
    # Another recipe is not compared in speed with what ran before it.
    other = run("--evaluate", "--transform", "--recipe", "RemoveDropout+MergeLinears", *options)
    assert "speed not compared" in other.stdout
    assert "speed not compared" not in run(*other.args, "--fresh").stdout


def test_predictions_are_scored_as_they_were(folder, tmp_path):
    answers, odds = tmp_path / "answers.json", tmp_path / "odds.json"
    options = ("--evaluate", "--model", folder, "--null-threshold", 0.1, "--max-answer-length", 4, "--n-best", 5)
    options += ("--max-length", 200, "--doc-stride", 50, "--batch-size", 16, "--json", tmp_path / "result.json")
    done = run(*options, "--predictions", answers, "--no-answer-probabilities", odds)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "result.json").read_text())["rows"][0]["quality"]
    scores = json.loads(run("score", "built-in", answers).stdout)
    assert scores["f1"] == pytest.approx(quality["f1"])
    assert scores["HasAns_exact"] == pytest.approx(quality["has_answer_exact"])
    assert scores["total"] == 216
    assert "best_f1" in json.loads(run("score", "built-in", answers, "--no-answer-probabilities", odds).stdout)
    content = json.loads(answers.read_text())
    assert all(len(answer.split()) <= 4 for answer in content.values())
    removed = [content.pop(each) for each in list(content)[:2]]
    assert len(removed) == 2
    answers.write_text(json.dumps(content))
    says(run("score", "built-in", answers), 1, "2 of 216 questions have no prediction: ")
    answers.write_text(json.dumps(json.loads(odds.read_text()) | {"x": ""}))
    says(run("score", "built-in", answers), 1, "needs an answer in quotes")


def test_unknown_ids_are_named_and_left_out(tmp_path):
    questions = json.loads(builtin.QUESTIONS.read_text(encoding="utf-8"))
    ids = [each["id"] for part in questions["data"] for passage in part["paragraphs"] for each in passage["qas"]]
    (tmp_path / "answers.json").write_text(json.dumps(dict.fromkeys([*ids, "strange"], "")))
    done = says(run("score", "built-in", tmp_path / "answers.json"), 0, "1 ids that built-in does not have: strange")
    assert json.loads(done.stdout)["NoAns_f1"] == 100


@pytest.mark.parametrize(
    ("content", "part"),
    [("[1]", "no JSON object"), ("{", "not JSON"), ('{"a": 3}', "has 3 for question a"), (None, "There is no file")],
)
def test_bad_predictions(tmp_path, content, part):
    if content is not None:
        (tmp_path / "answers.json").write_text(content)
    says(run("score", "built-in", tmp_path / "answers.json"), 1, part)


def test_verify_and_diff(folder, tmp_path):
    recipe = ("--model", folder, "--recipe", "RemoveDropout+MergeLinears")
    checked = run("verify", *recipe, "--questions", 1, "--json", tmp_path / "verify.json")
    assert checked.returncode == 0, checked.stderr
    assert "step 1, RemoveDropout(): 4 of 4 sites; bitwise promise kept on" in checked.stdout
    assert "step 2, MergeLinears(): 2 of 2 sites; reassociates promise kept on" in checked.stdout
    assert json.loads((tmp_path / "verify.json").read_text())["verdict"] == "kept"
    shown = run("diff", *recipe)
    assert shown.returncode == 0, shown.stderr
    assert "MergeLinears(): 2 of 2 sites" in shown.stdout
    assert "\n-    " in shown.stdout
    assert "\x1b" not in shown.stdout
    says(run("verify", "--recipe", "Nothing"), 2, "Nothing")
    says(run("diff", "--recipe", "Nothing"), 2, "Nothing")
    says(run("verify", *recipe, "--probe", "rubbish"), 2, "rubbish")


def test_the_page_of_a_run_is_that_of_the_store(folder, tmp_path):
    store, page, again = tmp_path / "results.sqlite", tmp_path / "page.html", tmp_path / "again.html"
    options = ("--recipe", "MergeLinears", "--model", folder, "--samples", 8, "--rounds", 7, "--store", store)
    done = run("--evaluate", "--infer", "--transform", *options, "--html", page)
    assert done.returncode == 0, done.stderr
    assert run("report", 1, "--html", again, "--store", store).returncode == 0
    assert page.read_bytes() == again.read_bytes()
    content = page.read_text(encoding="utf-8")
    assert "Base+MergeLinears" in content
    assert "query_key_value" in content or "q_lin" in content  # what changed in the graph
    says(run("report", 2, "--html", again, "--store", store), 1, "no experiment 2")
    says(run("report", 1, "--html", tmp_path / "no folder" / "x.html", "--store", store), 1, "no folder")


def test_debug_shows_the_traceback():
    result = run_apart("--infer", "--model", "./absent", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no checkpoint folder" in result.stderr


def test_a_map_is_kept_and_taken_up(folder, tmp_path):
    asked = ("map", "--model", folder, "--recipe", "RemoveDropout", "--recipe", "LintAndRecompile", "--rounds", 6)
    asked += ("--batches", "1,2", "--lengths", "4,8", "--threads", "1", "--store", tmp_path / "s.sqlite")
    first = run(*asked, "--json", tmp_path / "first.json", "--html", tmp_path / "page.html")
    assert first.returncode == 0, first.stderr
    assert "of 4 shapes" in first.stdout
    assert "2×8 on 1 thread" in first.stdout
    assert "Base+LintAndRecompile: no sites, the graph stays the same; not timed" in first.stdout
    assert "Regime map" in (tmp_path / "page.html").read_text()
    cells = [json.loads((tmp_path / "first.json").read_text())["rows"][i]["regime"] for i in (0, 1, 2)]
    assert cells[0] is cells[2] is None
    assert [(cell["batch"], cell["length"]) for cell in cells[1]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    run(*asked, "--json", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["rows"][1]["regime"] == cells[1]
    run(*asked, "--fresh", "--json", tmp_path / "fresh.json")
    assert json.loads((tmp_path / "fresh.json").read_text())["rows"][1]["regime"] != cells[1]


def test_bad_maps(folder):
    asked = ("map", "--recipe", "RemoveDropout", "--model", folder)
    says(run(*asked, "--lengths", "4,x"), 2, "'4,x' is no list of numbers")
    says(run(*asked, "--batches", "0"), 2, "batches of 1 or more, not 0")
    says(run(*asked, "--lengths", "100000"), 2, "tokens at most, not 100000")


def test_steps_are_told_apart(folder, tmp_path):
    recipe = "LintAndRecompile+RemoveDropout+MergeLinears"
    asked = ("--infer", "--evaluate", "--transform", "--attribute", "--model", folder, "--recipe", recipe)
    found = run(*asked, "--rounds", 6, "--samples", 8, "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    assert "step LintAndRecompile, left out: does nothing" in found.stdout
    assert "step MergeLinears, alone: " in found.stdout
    _, row = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(each["step"], each["way"]) for each in row["effects"]] == [
        (step, way) for step in ("LintAndRecompile", "RemoveDropout", "MergeLinears") for way in ("left out", "alone")
    ]
    assert all((each["throughput_speedup"] is None) == (each["verdict"] == "does nothing") for each in row["effects"])
    assert row["memory_bytes"]["peak"] > row["memory_bytes"]["weights"] > 0
    says(run("--transform", "--attribute", "--model", folder), 2, "--infer or --evaluate")
