"""The page as text: complete, escaped, small, and without a word about what was not measured."""

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from examples import ATTACKS, base, difference, entry, hostile, outcome, quality, ratio, rich, row

from bert_evaluation.outcome import Experiment
from bert_evaluation.report.html import page
from bert_evaluation.report.listings import Budget, diffs
from bert_evaluation.report.plots import Axis, distributions, grids, scatter, shade
from bert_evaluation.report.writing import breaks, clean
from bert_evaluation.rows import Change, Row, StepChange

VOID = {"meta", "link", "img", "br", "wbr", "input", "hr"}


class Reader(HTMLParser):
    """What elements a page has; raises if they do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    links = {value[1:] for tag, name, value in reader.attributes if tag == "a" and name == "href"}
    assert links <= set(reader.ids)
    return reader


def shown(made, state="finished"):
    found, times, batches = made
    return page(entry(found, state), times, batches)


@pytest.fixture(scope="module")
def full():
    return shown(rich())


def test_every_part_is_there(full):
    reader = read(full)
    parts = ("recipes", "speed", "times", "front", "regime", "attribution", "answers", "graphs", "sites", "machine")
    assert set(parts) <= set(reader.ids)
    assert "<title>QuantizeDynamic is 1.62 times faster, " in full
    assert "Not part of this experiment" not in full
    assert "bert-evaluation --infer --evaluate --transform --html page.html" in full
    assert "AMD EPYC" in full
    assert full.count('<tr role="row" class="answer">') == 1


def test_it_is_small(full):
    assert len(full.encode()) < 1_000_000


def test_nothing_is_fetched_and_only_its_own_script_runs(full):
    reader = read(full)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    addresses = {value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href", "action")}
    assert {each for each in addresses if not each.startswith("#")} == {"data:,"}
    assert not [name for _, name, _ in reader.attributes if name == "style" or name.startswith("on")]
    policy = next(value for tag, name, value in reader.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", full, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text():
    found, times, batches = hostile()
    text = page(entry(found, command="\n".join(ATTACKS)), times, batches)
    plain = read(shown(rich()))
    reader = read(text)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    assert set(reader.tags) <= set(plain.tags)
    assert {name for _, name, _ in reader.attributes} <= {name for _, name, _ in plain.attributes}
    assert "&lt;img src=x onerror=" in text
    assert not re.search("[\x00\x1b\u202e\ud800]", text)
    assert len(text.encode()) < 6_000_000


@pytest.mark.parametrize(
    ("made", "absent"),
    [
        (outcome(), "recipes"),
        (outcome(base()), "speed"),
        (outcome(Row("Base", ""), row("A", throughput_speedup=None, quality=None, samples_per_second=None)), "front"),
        (outcome(base(), row("A")), "regime"),
        (outcome(base(), row("A", unchanged=True, throughput_speedup=None, samples_per_second=None)), "times"),
        (outcome(base(), row("A"), experiment=Experiment(evaluate=True)), "attribution"),
    ],
)
def test_what_was_not_asked_for_is_left_out(made, absent):
    text = page(entry(made), {}, {})
    assert absent not in read(text).ids
    assert "Not part of this experiment: " in text
    assert not re.search(r"\b(None|nan|inf)\b", re.sub("<(style|script)>.*?</", "", text, flags=re.DOTALL))


def test_a_run_cut_short_says_so(full):
    assert "was interrupted" in shown(rich(), "interrupted")
    assert "still running, or was killed" in shown(rich(), "running")
    assert "the page has what it had kept" not in full


def test_a_page_has_a_limit():
    changes = [Change(f"{each}", "<" * 500, "&" * 500, 1.0, 1.0) for each in range(3000)]
    diff = "\n".join(f"+{each}" + "<" * 100 for each in range(5000))
    rows = [
        row(
            f"R{each}",
            quality=quality(63, difference(0.0), changes),
            graph_changes=(StepChange("R", diff + str(each)),),
        )
        for each in range(20)
    ]
    text = page(entry(outcome(base(), *rows)), {}, {})
    assert len(text.encode()) < 6_000_000
    assert "And 2,800 more" in text
    assert "more lines are in the store" in text


def test_the_same_difference_is_shown_once():
    steps = (StepChange("A()", "--- a\n+++ b\n@@ -1 +1 @@\n-x\n+y\n+z"),)
    (_, [first]), (_, [second]) = diffs([row("A", graph_changes=steps), row("A+B", graph_changes=steps)], Budget())
    assert (first.added, first.removed, first.same_as) == (2, 1, None)
    assert [kind for kind, _ in first.parts] == ["hunk", "removed", "added"]
    assert (second.same_as, second.parts, second.more) == ("Base+A", (), 0)


def test_names_break_between_steps_and_numbers_do_not():
    assert breaks("Ab+<Cd> is -0.5 to +1") == ("Ab+&lt;Cd&gt; is −0.5\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}+1")
    assert breaks("A+BaseX") == '<span class="step">A+</span><wbr><span class="step">Base<wbr>X</span>'
    assert clean("a\u202eb\x00\ud800") == "a\N{REPLACEMENT CHARACTER}b" + 2 * "\N{REPLACEMENT CHARACTER}"


def test_axes():
    axis = Axis(0.5, 2.0, is_log=True)
    assert (axis.at(0.5), axis.at(1), axis.at(2), axis.at(9)) == (0, 50, 100, 100)
    assert "1" in [tick.label for tick in axis.ticks]
    for low, high in ((0.99, 1.01), (0.1, 30.0), (0.999, 1.001)):
        ticks = Axis(low, high, is_log=True).ticks
        assert 2 <= len(ticks) <= 12
        assert all(b.at - a.at >= 9 for a, b in itertools.pairwise(ticks))


def test_far_outliers_are_counted_not_drawn():
    found = distributions({"Base": [1.0, 1.1, 0.9, 1.0, 1.05, 90.0], "One": [2.0], "None": []})
    first, second = found.rows
    assert (first.count, first.drawn, first.beyond, first.largest) == (6, 5, 1, 90.0)
    assert (second.count, second.drawn, second.beyond) == (1, 1, 0)
    assert found.axis.high < 3
    assert distributions({}) is None


def test_the_front_is_what_nothing_beats():
    rows = [base(), row("A", quality=quality(64.0)), row("B", quality=quality(62.0)), row("C", quality=quality(61.0))]
    found = scatter([(0, rows[0], 10.0), (1, rows[1], 12.0), (2, rows[2], 8.0), (3, rows[3], 9.0)])
    assert [point.name for point in found.best] == ["Base+B", "Base", "Base+A"]
    assert scatter([(0, rows[0], 10.0)]) is None


def test_regimes():
    cell = rich()[0].rows[2].regime[0]
    first, second = grids([cell, replace(cell, batch=64, length=7), replace(cell, threads=9)])
    assert (first.threads, first.lengths, [batch for batch, _ in first.lines]) == (1, (7, 16), [1, 64])
    assert first.lines[0][1][0] is None
    assert second.threads == 9
    assert (shade(ratio(1.0)), shade(ratio(1.1)), shade(ratio(0.9)), shade(ratio(9.0)), shade(ratio(0.1))) == (
        0,
        1,
        -1,
        4,
        -4,
    )
