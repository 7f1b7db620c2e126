"""`compare` and `check` on the command line: of real runs, and of stored experiments made up for each exit code."""

import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from families import tiny
from markdown_it import MarkdownIt
from report.examples import ATTACKS
from stored_experiments import BROKEN, MACHINE, OUTCOME, keep
from test_cli import run, says, tokenizer

from bert_evaluation.report import ci
from bert_evaluation.store import Store

ROWS = {"Base": 1.0, "Base+Merge": 1.2}
ELSEWHERE = replace(OUTCOME, weights_hash="e3b0c44298fc1c14", machine=MACHINE | {"threads": 4})
MARK = " [other weights, other machine]"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A store with two runs of a tiny model that differ in null threshold."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny("distilbert", vocab_size=30522).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    store = folder / "results.sqlite"
    options = ("--infer", "--evaluate", "--transform", "--recipe", "MergeLinears", "--recipe", "LintAndRecompile")
    options += ("--model", folder, "--samples", 20, "--rounds", 12, "--batch-tokens", 256, "--store", store)
    for threshold in (1e9, -1e9):
        done = run(*options, "--null-threshold", threshold)
        assert done.returncode == 0, done.stderr
    return store


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.sqlite"


def stored(file, *experiments, **options):
    with Store(file) as store:
        for seed, (rows, parts) in enumerate(experiments):
            keep(store, rows, **({"seed": seed} | options | parts))


def test_two_real_runs(real, tmp_path):
    done = run("compare", 1, 2, "--store", real, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Experiment 2 against experiment 1"
    assert lines[1] == (
        "Note: other settings, null threshold 1e+09 in experiment 1 and null threshold -1e+09 in experiment 2"
    )
    assert lines[2].startswith("Base itself, inference: ")
    assert any(line.startswith("Base+MergeLinears, inference: ") and "against Base in each" in line for line in lines)
    assert "Base+MergeLinears, throughput: not compared: one stored evaluation stands for both" in done.stdout
    assert "Base+LintAndRecompile, inference: not compared: the graph is Base's in both" in done.stdout
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["schema"] == 1
    quality = content["pairs"][0]["quality"]
    assert quality["samples"] == 20
    # Of the second run every answer was dropped, so it has right what has no answer.
    shown = run("history", 2, "--store", real).stdout
    assert f"Base: F1 {quality['f1_after']:.2f}, exact {quality['exact_after']:.2f}" in shown
    assert f"Base: F1 {quality['f1_before']:.2f}, " in run("history", 1, "--store", real).stdout


def test_two_rows_of_a_real_run(real):
    done = run("compare", "1:Base", "1:MergeLinears", "--store", real)
    assert done.returncode == 0, done.stderr
    assert "Base+MergeLinears against Base, inference: " in done.stdout
    assert "in the same rounds: " in done.stdout
    assert "Base+MergeLinears against Base, answers: 0 of 20 changed; " in done.stdout
    assert "Base itself" not in done.stdout
    assert "Base+MergeLinears, answers: " in run("compare", "1:Base+MergeLinears", 2, "--store", real).stdout


def test_a_real_check_ends_as_it_says(real):
    done = run("check", 1, "--store", real)
    verdict = done.stdout.splitlines()[-1].partition(": ")[2].partition(" (")[0]
    assert done.returncode == {"pass": 0, "fail": 1, "cannot tell": 3}[verdict]
    assert "Base+MergeLinears, promise: pass: reassociates promise kept" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("compare", "x", 2), 2, ("'x' is no experiment", "7:MergeLinears")),
        (("compare", 1, 1), 2, ("the same", "1:Base 1:MergeLinears")),
        (("compare", "1:Base", "1:Base"), 2, ("the same",)),
        (("compare", "1:MergeLinear", 2), 2, ("no row 'MergeLinear'", "did you mean Base+MergeLinears")),
        (("compare", 1, 9), 1, ("no experiment 9; it has 1 to 2",)),
        (("compare", 1, 2, "--margin", 0), 2, ("margin",)),
        (("compare", 1, 2, "--json", "/nowhere/x.json"), 1, ("no folder /nowhere",)),
        (("check", 2), 2, ("no finished experiment after the baseline",)),
        (("check", 1, 1), 2, ("the baseline itself",)),
        (("check", 1, "--max-slowdown", "3"), 2, ("3% or 0.03, not '3'",)),
        (("check", 1, "--max-slowdown", "nan%"), 2, ("not 'nan%'",)),
        (("check", 1, "--max-slowdown", "a bit"), 2, ("not 'a bit'",)),
        (("check", 1, "--min-f1-ratio", "0"), 2, ("above 0 and up to 1",)),
        (("check", 1, "--baseline-store", "/nowhere/x.sqlite"), 1, ("no store /nowhere/x.sqlite",)),
        (("check", 1, "--junit", "/nowhere/x.xml"), 1, ("no folder /nowhere",)),
    ],
)
def test_bad_requests(real, arguments, code, parts):
    says(run(*arguments, "--store", real), code, *parts)


@pytest.mark.parametrize("command", ["compare", "check"])
def test_what_cannot_be_compared_is_refused_or_marked_on_every_line(file, tmp_path, command):
    stored(file, (ROWS, {}), (ROWS | {"Base+Fuse": 1.0}, {"found": ELSEWHERE}))
    says(
        run(command, 1, 2, "--store", file), 2, "other weights, built-in (9f86d081884c) in experiment 1 and",
        "other machine, threads 2 in experiment 1 and threads 4 in experiment 2", "--force",
    )  # fmt: skip
    done = run(command, 1, 2, "--store", file, "--force", "--json", tmp_path / "result.json")
    assert done.returncode in (0, 1, 3)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) > 6
    assert all(line.endswith(MARK) for line in done.stdout.splitlines())
    content = json.loads((tmp_path / "result.json").read_text())
    obstacles = content.get("comparison", content)["obstacles"]
    assert [each["kind"] for each in obstacles] == ["weights", "machine"]


def test_exit_codes(file):
    everything = {"measured": ["inference", "answers"]}
    stored(
        file,
        (ROWS, {}),
        (ROWS, {}),
        ({"Base": 1.0, "Base+Merge": 1.0}, {}),
        (ROWS, {"noise": 0.5}),
        (ROWS, {"verification": BROKEN}),
        ({"Base": 1.0}, {}),
        **everything,
    )
    codes = {number: run("check", 1, number, "--store", file).returncode for number in range(2, 7)}
    assert codes == {2: 0, 3: 1, 4: 3, 5: 1, 6: 1}
    assert run("check", 1, 3, "--max-slowdown", "30%", "--store", file).returncode == 0
    assert run("check", 1, 3, "--max-slowdown", "0.3", "--store", file).returncode == 0


def test_the_latest_finished_one_is_checked(file):
    stored(file, (ROWS, {}), (ROWS, {}), (ROWS, {"state": "interrupted"}))
    assert run("check", 1, "--store", file).stdout.startswith("Experiment 2 against the baseline, experiment 1: ")


def test_a_baseline_in_another_file(file, tmp_path):
    stored(tmp_path / "main.sqlite", (ROWS, {}))
    stored(file, (ROWS, {"seed": 7}))
    before = (tmp_path / "main.sqlite").read_bytes()
    done = run("check", 1, "--baseline-store", tmp_path / "main.sqlite", "--store", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Experiment 1 against the baseline, experiment 1 of main.sqlite: ")
    assert "Base+Merge, throughput: pass: " in done.stdout
    assert "one stored evaluation" not in done.stdout  # the same key, but measured twice
    assert (tmp_path / "main.sqlite").read_bytes() == before


def cases(text):
    return list(ET.fromstring(text).iter("testcase"))  # noqa: S314


def test_junit_has_a_case_for_each_check(file, tmp_path):
    stored(
        file,
        (ROWS | {"Base+Fuse": 1.0}, {}),
        ({"Base": 1.0, "Base+Merge": 1.1}, {"settings": {"stride": 64}, "wrong": {"Base": range(4)}}),
    )
    xml, table = tmp_path / "junit.xml", tmp_path / "table.md"
    assert run("check", 1, "--store", file, "--junit", xml, "--markdown", table).returncode == 1
    root = ET.fromstring(xml.read_text(encoding="utf-8"))  # noqa: S314
    (suite,) = root
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    found = cases(xml.read_text(encoding="utf-8"))
    failed = {case.get("name") for case in found if case.find("failure") is not None}
    skipped = {case.get("name") for case in found if case.find("skipped") is not None}
    assert {"Base+Merge, inference", "Base+Fuse, row"} <= failed
    assert "Base, F1" in skipped
    assert counts == {"tests": len(found), "failures": len(failed), "errors": 0, "skipped": len(skipped)}
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| <code>")]
    assert len(rows) == len(found)


def test_hostile_names_break_neither_file(file, tmp_path):
    attacks = [each for each in (*ATTACKS, "a | b `c` *d* [e](http://f) www.g.org @h") if "\ud800" not in each]
    rows = {"Base": 1.0} | {f"Base+{each}": 1.0 for each in attacks}
    stored(file, (rows, {}), (rows, {}), measured=["inference"])
    xml, table = tmp_path / "junit.xml", tmp_path / "table.md"
    done = run("check", 1, "--store", file, "--junit", xml, "--markdown", table)
    assert done.returncode in (0, 3), done.stderr
    names = {case.get("classname") for case in cases(xml.read_text(encoding="utf-8"))}
    assert f"Base+{ATTACKS[0]}" in names
    assert len(names) == len(rows)
    _is_a_plain_table(table.read_text(encoding="utf-8"), 2 * len(rows) - 1)


def _is_a_plain_table(text, count):
    """Nothing but the table, its code elements, the verdict in bold, and a list; every row of four cells."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    flat = [inner for token in tokens for inner in (token.children or [token])]
    assert {token.content for token in flat if token.type == "html_inline"} <= {"<code>", "</code>"}
    assert {token.type for token in flat} <= {
        "text", "text_special", "html_inline", "strong_open", "strong_close", "paragraph_open", "paragraph_close",
        "bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close", "softbreak",
        *(f"{part}_{side}" for part in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")),
    }  # fmt: skip
    kinds = [token.type for token in tokens]
    assert kinds.count("tr_open") == count + 1
    assert kinds.count("td_open") == 4 * count


@pytest.mark.parametrize("text", [*ATTACKS[:7], "a|b", "1. a", "- a", "# a", "> a", "`a`", "a\n\n<b>", "http://a.b"])
def test_markdown_shows_text_as_it_is(text):
    (_, inline, _) = MarkdownIt("gfm-like", {"linkify": False}).parse(ci.escaped(text))
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == " ".join(text.split())
    assert "://" not in ci.escaped(text)  # or GitHub would make a link of it
