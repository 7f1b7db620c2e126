"""What pyproject.toml allows is what is tested."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pinned(file):
    lines = (line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_lowest_versions_allowed_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(each) for each in project["dependencies"] + project["optional-dependencies"]["test"]]
    lowest, usual = pinned("constraints-lowest.txt"), pinned("constraints.txt")
    for each in wanted:
        name = canonicalize_name(each.name)
        (limit,) = each.specifier
        # The processor's build of the lowest torch cannot be had everywhere; CONTRIBUTING.md says where it is tested.
        expected = usual[name] if name == "torch" else Version(limit.version)
        assert (limit.operator, lowest[name]) == (">=", expected), each
        assert usual[name] in each.specifier
