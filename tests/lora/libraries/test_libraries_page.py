"""docs/libraries.md: its table is the suite's, and its code runs."""

import importlib.metadata
from importlib.util import find_spec

import pytest

from support.other_kinds import VERSIONS, Net, loralib_linear, sequences, table
from support.pages import DOCS, blocks

PAGE = DOCS / "libraries.md"
PACKAGES = {"lycoris": "lycoris-lora"}


def test_the_table_is_that_of_the_suite():
    assert table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "library", [pytest.param(n, marks=pytest.mark.skipif(not find_spec(n), reason=f"no {n}")) for n in VERSIONS]
)
def test_the_versions_are_those_that_run(library):
    assert importlib.metadata.version(PACKAGES.get(library, library)) == VERSIONS[library]


@pytest.mark.filterwarnings("ignore:EVA stopped at")
def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def build():
        model = Net()
        for name, layer in list(model.named_children()):
            model.add_module(name, loralib_linear(layer))
        return model

    (block,) = blocks("docs/libraries.md")
    names = {"model": build(), "loader": sequences(), "build": build}
    exec(block.code, names)
    for name, value in names["model"].state_dict().items():
        assert value.equal(names["fresh"].state_dict()[name])
