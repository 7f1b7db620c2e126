"""Checks as files that continuous integration shows: JUnit XML, and a table in GitHub's Markdown.

Names and sentences may hold what a checkpoint or a file was called. XML is written by the standard library, and in the
Markdown every sign that could mean something is written as its number.
"""

import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

from bert_evaluation.regression import Regression
from bert_evaluation.report.comparing import explained, marks, regression_lines, summary
from bert_evaluation.report.writing import clean

# All but letters, digits, blanks and harmless punctuation; a point before a letter could begin an address.
SIGNS = re.compile(r"[^\w .,;()%+-]|_|\.(?=[^\W\d])|^[\W\d]")


def junit(regression: Regression) -> str:
    """One test case a check: a failure is one, what cannot be told is skipped, with the reason."""
    counts = {
        "tests": str(len(regression.checks)),
        "failures": str(regression.count("fail")),
        "errors": "0",
        "skipped": str(regression.count("cannot tell")),
    }
    root = ET.Element("testsuites", {"name": "bert-evaluation check", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": "bert-evaluation check", **counts})
    for check in regression.checks:
        said = _xml(explained(check) + marks(regression.comparison))
        names = {"classname": _xml(check.row), "name": _xml(f"{check.row}, {check.measure}")}
        case = ET.SubElement(suite, "testcase", names)
        if check.verdict == "fail":
            ET.SubElement(case, "failure", {"message": said}).text = said
        elif check.verdict == "cannot tell":
            ET.SubElement(case, "skipped", {"message": f"cannot tell: {said}"})
        else:
            ET.SubElement(case, "system-out").text = said
    ET.SubElement(suite, "system-out").text = _xml("\n".join(regression_lines(regression)))
    ET.indent(root, " ")
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def _xml(text: str) -> str:
    """Text without the characters that XML 1.0 has no way to write."""
    return str(clean(text))


def markdown(regression: Regression) -> str:
    """The verdict, what is to be known of all, and a table with a row a check."""
    return "\n".join(_markdown(regression)) + "\n"


def _markdown(regression: Regression) -> Iterator[str]:
    title, *lines = regression_lines(regression)
    yield f"**{escaped(summary(regression) + marks(regression.comparison))}**"
    yield ""
    yield escaped(title)
    yield ""
    remarks = lines[: len(lines) - len(regression.checks) - len(regression.comparison.only_after) - 1]
    yield from (f"- {escaped(line)}" for line in remarks)
    yield ""
    yield "| row | what | verdict | why |"
    yield "|---|---|---|---|"
    for check in regression.checks:
        said = explained(check) + marks(regression.comparison)
        cells = (f"<code>{escaped(check.row)}</code>", check.measure, check.verdict, escaped(said))
        yield f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Text of which no sign is taken for markup: each is written as its number, a line's end as a blank."""
    return SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", " ".join(str(clean(text)).split()))
