"""Tables on a terminal: they fit, say everything, obey no text, and give way to plain lines elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace

import examples
import pytest
from families import tiny
from rich.cells import cell_len
from rich.console import Console

from bert_evaluation.cli import main
from bert_evaluation.outcome import Experiment, dump
from bert_evaluation.report import tables, terminal
from bert_evaluation.report.headline import headline, short
from bert_evaluation.report.layout import Prose, text
from bert_evaluation.stats import Interval, Ratio
from bert_evaluation.store import Store
from bert_evaluation.transformation import Refusal, Report

WIDTHS = (60, 80, 120)
STAGES = ("transform", "infer", "evaluate")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
ATTACK = (
    "[bold red]not bold[/] [link=https://example.com]no link[/link] :smile: \x1b]8;;https://example.com\x07\x1b[2J\x1b[31m"
    "\x9b31m\r\u202e\x00\ud800 \t文字文字"
)


def printed(renderables, width, **options):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, highlight=False, **options)
    for each in renderables:
        console.print(each, crop=False)
    return file.getvalue()


def everything(outcome):
    entry = examples.entry(outcome) if outcome.machine == examples.MACHINE else None
    if entry:
        yield from tables.experiments([(entry, outcome)] * 2)
        yield from tables.experiment(entry, outcome)
    for stage in STAGES:
        yield from tables.stage(stage, outcome, show_changes=True)
    yield from tables.answer(outcome)


def stage(name, outcome, width):
    return printed(tables.stage(name, outcome), width, color_system=None)


OUTCOMES = {
    "rich": examples.rich()[0],
    "hostile": examples.hostile()[0],
    "Base alone": examples.outcome(examples.base(latency=Interval(8.1, 8.0, 8.3), rounds=3, answer="")),
    "cut off": examples.outcome(examples.base(), *(replace(examples.row("A"), quality=None, verification=None),)),
}


@pytest.mark.parametrize("width", [*WIDTHS, 30])
@pytest.mark.parametrize("name", OUTCOMES)
def test_no_line_is_wider_than_the_terminal(name, width):
    lines = COLOUR.sub("", printed(everything(OUTCOMES[name]), width, color_system="standard")).splitlines()
    assert len(lines) > 20
    assert max(map(cell_len, lines)) <= width


def names_in(shown, width):
    """What the column of names holds, without the places where it is broken."""
    if width == 60:
        return re.sub(r"\s", "", shown)
    lines = shown.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("recipe"))
    return "".join(line[: lines[head].index("exact")].strip() for line in lines[head:])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_row_with_its_figures_and_verdicts(width):
    outcome = OUTCOMES["rich"]
    shown = {name: stage(name, outcome, width) for name in STAGES}
    names = names_in(shown["evaluate"], width)
    for row in outcome.rows:
        assert short(row) in names
        assert row.quality is None or f"{row.quality.f1:.2f}" in shown["evaluate"]
    for name, verdicts in {
        "transform": [row.verification.verdict for row in outcome.rows[1:]],
        "infer": [row.speedup.verdict for row in outcome.rows if row.speedup],
        "evaluate": [
            *(row.throughput_speedup.verdict for row in outcome.rows if row.throughput_speedup),
            *(row.quality.f1_difference.verdict for row in outcome.rows[1:] if not row.unchanged),
        ],
    }.items():
        assert len(verdicts) >= 18
        for verdict in set(verdicts):
            # Not those within other words ("not worse"), and those that the sentences below repeat.
            found = len(re.findall(rf"(?<!not )\b{verdict}\b", shown[name]))
            assert found >= verdicts.count(verdict), (name, verdict)
    assert "6 of 7" in shown["transform"]
    assert "0 of 3" in shown["transform"]
    assert "not timed" in shown["infer"]
    assert "as Base" in shown["evaluate"]


@pytest.mark.parametrize("width", WIDTHS)
def test_sentences_stand_below_the_tables(width):
    outcome = OUTCOMES["rich"]
    spoken = re.sub(r"\s+", " ", "".join(stage(name, outcome, width) for name in STAGES)).replace("+ ", "+")
    broken = next(row for row in outcome.rows[1:] if not row.verification.kept)
    for sentence in (
        "Question Which zelda game is my favorite?",
        "Promises checked on 9 probes: 19 kept, 1 broken.",
        "LintAndRecompile: no sites, the graph stays the same; not timed",
        f"{short(broken)}: {terminal.promise(broken)}",
        "PruneHeads: ANSWERS OTHERWISE: The Wind Waker",
        "ALARM: 1 answer changed though",
        *terminal.timing_lines(outcome),
        *terminal.base_lines(outcome.rows[0], outcome.rows[0].quality),
    ):
        assert re.sub(r"\+ ?", "+", sentence) in re.sub(r"\+ ", "+", spoken)
    answer = printed(tables.answer(outcome), width, color_system=None)
    assert re.sub(r"\W", "", headline(outcome).sentence) in re.sub(r"\W", "", answer)


def test_refusals_name_the_step_and_are_counted():
    refused = tuple(Refusal(f"layer.{number} (linear)", "Its input is read elsewhere.") for number in range(7))
    row = examples.row("A+B", sites=(Report("A()", ("x",)), Report("B()", (), refused)))
    shown = stage("transform", examples.outcome(examples.base(), row), 80)
    assert "\n  B refused layer.0 (linear): Its input is read elsewhere.\n" in shown
    assert "\n  B and 3 more refusals" in shown
    assert re.search(r"^A\+ +1 of 1\s*$", shown, re.MULTILINE)
    assert re.search(r"together +1 of 8 +reassociates kept", shown)


def test_an_experiment_that_ended_before_it_had_a_row_has_no_stages():
    assert terminal.stages(examples.outcome()) == []
    assert terminal.stages(OUTCOMES["rich"]) == list(STAGES)


def test_a_speed_that_was_not_compared():
    row = examples.row("A", throughput_speedup=None)
    shown = stage("evaluate", examples.outcome(examples.base(), row), 80)
    assert "not compared" in shown
    assert "A: speed not compared: not run side by side with Base (--fresh does)" in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_inert(width):
    experiment = Experiment(
        infer=True, evaluate=True, transform=True, model=ATTACK, question=ATTACK, context=f"{ATTACK}\nAnswer: faked",
    )  # fmt: skip
    row = examples.row(
        ATTACK, answer=ATTACK, alarm=ATTACK, latency=Interval(1, 1, 1),
        sites=(Report(ATTACK, (), (Refusal(ATTACK, ATTACK),)),),
        verification=replace(examples.verified(kept=False), failing_probe=ATTACK, first_difference=ATTACK),
    )  # fmt: skip
    outcome = examples.outcome(
        examples.base(latency=Interval(1, 1, 1), answer=ATTACK + "!"), row, experiment=experiment, dataset=ATTACK,
        remarks=(ATTACK,), noise=Ratio(1, 1, 1, "cannot tell"),
    )  # fmt: skip
    found = printed(everything(outcome), width, color_system="truecolor")
    found += printed(tables.whole([ATTACK]), width, color_system="truecolor")
    shown = COLOUR.sub("", found)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    assert "[bold red]not bold[/]" in shown
    assert ":smile:" in shown
    assert "\nAnswer: faked" not in shown


def test_colour_supports_and_never_carries():
    outcome = OUTCOMES["rich"]
    coloured = printed(everything(outcome), 80, color_system="standard")
    assert "\x1b[32mfaster\x1b[0m" in coloured
    assert "\x1b[31mslower\x1b[0m" in coloured
    assert "\x1b[33mcannot tell\x1b[0m" in coloured
    assert COLOUR.sub("", coloured) == printed(everything(outcome), 80, color_system=None)


@pytest.mark.parametrize(
    ("line", "width", "parts"),
    [
        ("one two three", 8, ["one two", "  three"]),
        ("LintAndRecompile+MergeLinears", 18, ["LintAndRecompile+", "  MergeLinears"]),
        ("ChangeTrueDivToMulByInverse", 20, ["ChangeTrueDivToMulBy", "  Inverse"]),
        ("x" * 10, 4, ["xxxx", "  xx", "  xx", "  xx"]),
        ("文字文字", 6, ["文字", "  文字"]),
        ("a\nb", 9, ["a", "  b"]),
        ("", 9, [""]),
    ],
)
def test_where_text_is_broken(line, width, parts):
    assert printed([Prose(text(line), hang=2)], width, color_system=None).splitlines() == parts


# In processes of their own, on a pseudo-terminal and in a pipe.


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one experiment, of which all is made up."""
    file = tmp_path_factory.mktemp("store") / "results.sqlite"
    outcome = examples.rich()[0]
    about, rows = dump(outcome)
    with Store(file) as results:
        number = results.begin("bert-evaluation --infer --evaluate --transform", about)
        results.save(number, about, [(row.name, None, each) for row, each in zip(outcome.rows, rows, strict=True)])
        results.end(number, "finished")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("distilbert", vocab_size=30522).save_pretrained(path)
    from transformers import AutoTokenizer

    from bert_evaluation import builtin

    AutoTokenizer.from_pretrained(builtin.CHECKPOINT).save_pretrained(path)
    return path


def program(*arguments):
    return [sys.executable, "-c", "from bert_evaluation.cli import main; main()", *map(str, arguments)]


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"TERM": "xterm-256color"} | variables


def on_terminal(*arguments, width=80, **variables):
    """What the program writes to a terminal that is so wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    with subprocess.Popen(program(*arguments), env=environment(**variables), **streams) as process:
        os.close(slave)
        parts = []
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # which is how a pseudo-terminal ends on Linux
                break
            if not part:
                break
            parts.append(part)
    os.close(master)
    assert process.returncode == 0, parts
    return b"".join(parts).decode().replace("\r\n", "\n")


def piped(*arguments, **variables):
    done = subprocess.run(program(*arguments), env=environment(**variables), capture_output=True, check=True)
    return done.stdout.decode()


def test_history_is_a_table_on_a_terminal_and_lines_in_a_pipe(store):
    shown = on_terminal("history", "--store", store)
    assert "\x1b[32mfinished\x1b[0m" in shown
    assert re.search(r"│|──", shown)
    plain = piped("history", "--store", store, FORCE_COLOR="1")
    assert "\x1b" not in plain
    assert "──" not in plain
    assert re.match(r"1  \S+  built-in on squad2-dev-a.json, 2794 questions: finished, 21 rows: bert-ev", plain)


def test_an_experiment_of_the_store_with_and_without_colour(store):
    outcome = OUTCOMES["rich"]
    shown = on_terminal("history", 1, "--store", store, NO_COLOR="1")
    assert "\x1b" not in shown
    assert "".join(stage(name, outcome, 80) for name in STAGES) in shown
    assert on_terminal("history", 1, "--store", store, TERM="dumb") == piped("history", 1, "--store", store)


@pytest.mark.slow
def test_a_run_shows_tables_on_a_terminal(checkpoint):
    options = ("--transform", "--recipe", "RemoveDropout+MergeLinears", "--model", checkpoint)
    shown = re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", on_terminal(*options))
    assert re.search(r"^RemoveDropout\+ +4 of 4\s*$", shown, re.MULTILINE)
    assert re.search(r"together +6 of 6 +reassociates kept", shown)
    assert max(map(cell_len, re.split("[\r\n]", shown))) <= 80
    assert "Base+RemoveDropout+MergeLinears: 6 of 6 sites; reassociates promise kept" in piped(*options)


def test_quiet_is_quiet_on_a_terminal_too(checkpoint, monkeypatch):
    master, slave = pty.openpty()
    options = ["--transform", "--quiet", "--recipe", "MergeLinears", "--model", str(checkpoint)]
    with os.fdopen(slave, "w") as terminal_file:
        monkeypatch.setattr(sys, "argv", ["bert-evaluation", *options])
        monkeypatch.setattr(sys, "stdout", terminal_file)
        monkeypatch.setattr(sys, "stderr", terminal_file)
        with pytest.raises(SystemExit) as end:
            main()
        terminal_file.flush()
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):  # nothing was written
            os.read(master, 1)
    os.close(master)
    assert not end.value.code
