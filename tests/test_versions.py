"""The oldest versions that are tested are those that are claimed."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OURS = ("peft", "cli", "demo")  # the extras that code of ours needs; the others are for tests and pages
LEFT_OUT = {"diffusers", "trl", "lycoris-lora", "ray", "playwright"}


def pinned():
    lines = (line for line in (ROOT / "tests/oldest.txt").read_text().splitlines() if line and line[0] != "#")
    return {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, lines)}


def claimed(*extras):
    """The lowest version of every package that the project and these extras ask for."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    floors = {}
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            (bound,) = requirement.specifier
            assert bound.operator in (">=", "==")
            floors.setdefault(requirement.name, set()).add(bound.version)
    assert all(len(versions) == 1 for versions in floors.values()), floors
    return {name: versions.pop() for name, versions in floors.items()}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11, which reads TOML")
def test_the_oldest_versions_are_those_that_are_claimed():
    pins = pinned()
    assert claimed(*OURS).keys() <= pins.keys()
    everything = claimed(*OURS, "test")
    assert pins.keys() == everything.keys() - LEFT_OUT
    for name, floor in everything.items():
        # The lowest version there is: some numbers, as 1.11, were never released.
        assert name in LEFT_OUT or SpecifierSet(f"=={floor}.*").contains(pins[name]), (name, floor, pins[name])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11, which reads TOML")
def test_the_languages_version_is_the_same_everywhere():
    import tomllib

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = tables["project"]["requires-python"].removeprefix(">=")
    prefix = "Programming Language :: Python :: "
    listed = [c.removeprefix(prefix) for c in tables["project"]["classifiers"] if c.startswith(prefix)]
    assert min(map(Version, listed)) == Version(oldest)
    assert tables["tool"]["mypy"]["python_version"] == oldest
    assert tables["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"OLDEST_PYTHON ?= python{oldest}" in (ROOT / "Makefile").read_text()
