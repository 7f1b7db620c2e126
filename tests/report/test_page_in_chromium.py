"""The page in a real browser: it draws, sorts, folds; asks for nothing, runs nothing hostile; anyone can use it."""

import os
import shutil
from pathlib import Path

import pytest
from examples import ATTACKS, base, entry, hostile, outcome, rich, row

from bert_evaluation.report.html import page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium, or CHROMIUM=path)"),
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Containers have no user namespaces to make the sandbox of.
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, (found, times, batches), command in (
        ("rich", rich(), "bert-evaluation --evaluate --transform"),
        ("hostile", hostile(), "\n".join(ATTACKS)),
        ("plain", (outcome(base(), row("A", 0.9)), {}, {}), "bert-evaluation --evaluate"),
    ):
        (folder / f"{name}.html").write_text(page(entry(found, command=command), times, batches), encoding="utf-8")
    return folder


@pytest.fixture
def visit(browser, files):
    """Open a page from disk; at the end nothing was asked for, said in the console, or raised."""
    opened, requests, complaints = [], [], []

    def open_page(name, viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        opened.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.goto((files / f"{name}.html").as_uri())
        return tab

    yield open_page
    for context in opened:
        context.close()
    assert [each for each in requests if not each.startswith(("file:", "data:,"))] == []
    assert len([each for each in requests if each.startswith("file:")]) == len(opened)
    assert complaints == []


def column(tab, number):
    return [each.strip() for each in tab.locator(f"#rows tbody:last-child tr > :nth-child({number})").all_inner_texts()]


def unfold(tab):
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


def test_it_opens_with_the_answer_and_draws(visit):
    tab = visit("rich")
    assert tab.locator("h1").inner_text().startswith("QuantizeDynamic is 1.62 times faster")
    assert tab.locator("h1").bounding_box()["y"] < 200
    assert tab.title().startswith("QuantizeDynamic is 1.62 times faster")
    unfold(tab)
    for selector, least in (
        ("#speed .bar", 36),
        ("#times .area", 38),
        ("#times .rug", 38),
        ("#front .dot", 19),
        ("#front .front", 5),
        ("#attribution .bar", 60),
        ("#regime .up-1, #regime .up-2, #regime .up-3, #regime .up-4", 100),
    ):
        drawn = tab.locator(selector)
        assert drawn.count() >= least, selector
        boxes = [each.bounding_box() for each in drawn.all()[:5]]
        assert all(box and (box["width"] > 1 or box["height"] > 1) for box in boxes), selector
    # A ratio of 2.05 lies to the right of one of 0.95.
    marks = [each.bounding_box()["x"] for each in tab.locator("#speed figure").first.locator("svg svg path").all()]
    assert marks == sorted(marks, reverse=True)


def test_first_paint_takes_less_than_a_second(visit):
    def paint():
        tab = visit("rich")
        tab.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
        return tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")

    # The best of a few: what else a busy machine does is not the page's.
    assert any(paint() < 1000 for _ in range(5))


def test_sorting(visit):
    tab = visit("rich")
    head = tab.get_by_role("columnheader", name="Speed on the data set")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(tab, 1)[0] == "20"
    assert column(tab, 5)[-1].startswith("·")  # what was not timed is last
    tab.keyboard.press("Enter")  # the focus has stayed
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(tab, 1)[0] == "3"
    assert column(tab, 5)[-1].startswith("·")
    assert tab.locator("#rows tbody").first.inner_text().strip().startswith("0")  # Base stays on top
    tab.get_by_role("columnheader", name="Recipe").get_by_role("button").click()
    assert column(tab, 2) == sorted(column(tab, 2))
    assert head.get_attribute("aria-sort") == "none"
    assert tab.get_by_role("status").first.inner_text() == "Sorted by Recipe, ascending"


def test_folding(visit):
    tab = visit("rich")
    fold = tab.locator("#regime details").first
    assert fold.get_attribute("open") is None
    fold.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert fold.locator("table").first.is_visible()
    tab.get_by_role("button", name="Fold all regime maps", exact=True).click()
    assert tab.locator("#regime details[open]").count() == 0
    tab.get_by_role("button", name="Unfold all regime maps").click()
    assert tab.locator("#regime details:not([open])").count() == 0
    answers = tab.locator("#rows a").first
    answers.click()
    assert tab.evaluate("location.hash").startswith("#answers-")


def test_it_is_whole_without_its_script(visit):
    tab = visit("rich", java_script_enabled=False)
    assert tab.locator("#rows tbody tr").count() == 21
    assert not tab.get_by_text("Unfold all").first.is_visible()


@pytest.mark.parametrize(
    ("name", "viewport", "scheme"),
    [("rich", DESKTOP, "light"), ("rich", PHONE, "dark"), ("hostile", DESKTOP, "dark"), ("plain", PHONE, "light")],
)
def test_anyone_can_use_it(visit, name, viewport, scheme):
    """axe-core finds nothing, with everything unfolded."""
    tab = visit(name, viewport, color_scheme=scheme)
    unfold(tab)
    found = axe.Axe().run(tab, options=RULES)
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found.response["violations"]] == []
    assert found.response["passes"]


@pytest.mark.parametrize("name", ["rich", "hostile", "plain"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE, {"width": 320, "height": 600}])
def test_nothing_sticks_out(visit, name, viewport):
    tab = visit(name, viewport)
    unfold(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_hostile_text_runs_nothing(visit):
    tab = visit("hostile")
    unfold(tab)
    tab.mouse.move(300, 300)
    assert tab.title().startswith("Nothing pays: Evil0+<script>")
    assert tab.locator("img, script[src], iframe, object, b[onmouseover], svg[onload]").count() == 0
    assert tab.locator("#answers").get_by_text("<img src=x onerror").first.is_visible()
    assert Path(tab.evaluate("location.pathname")).name == "hostile.html"


def test_the_policy_stops_what_escaping_would_miss(browser, files):
    """With escaping undone nothing runs either."""
    text = (files / "plain.html").read_text(encoding="utf-8")
    attack = "document.title='owned'"
    bad = f'<script>{attack}</script><img src=x onerror="{attack}"><style>h1 {{ color: red }}</style>'
    file = files / "broken.html"
    file.write_text(text.replace("<main", bad + "<main", 1), encoding="utf-8")
    tab = browser.new_page()
    blocked = []
    tab.on("console", lambda message: blocked.append(message.text))
    tab.goto(file.as_uri())
    assert tab.title() != "owned"
    assert sum("Content Security Policy" in each for each in blocked) >= 3
    tab.close()


def test_print(visit, tmp_path):
    tab = visit("rich", color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator("nav").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(26, 28, 32)"
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").stat().st_size > 100_000
