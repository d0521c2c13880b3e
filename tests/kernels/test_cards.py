"""Which card gets kernels, and which the reference: one table, and what is in none of its rows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eva_kernels import _cards, _devices, _dispatch
from eva_kernels._cards import CARDS, card_named

NEWEST = (99, 0)


@pytest.fixture
def on_card(monkeypatch):
    """Dispatch as it would be for a tensor on a card of some name."""

    def choose(name, impl="auto", triton=NEWEST, dtype=torch.float32):
        card = card_named(name, triton)
        monkeypatch.setattr(_dispatch, "HAS_TRITON", True)
        monkeypatch.setattr(_dispatch, "has_tiles", lambda device: card.tiles is not None)
        monkeypatch.setattr(_dispatch, "card_of", lambda device: card)
        x = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
        return _dispatch.choose_impl(impl, x, SimpleNamespace(dtype=torch.float32))

    return choose


@pytest.mark.parametrize("name", [*CARDS, "sm_61", "sm_130", "gfx1030", "gfx1300"])
def test_every_card_gets_kernels_or_the_reference_and_a_reason(name, on_card):
    card = card_named(name, NEWEST)
    assert card.why
    if card.tiles is None:
        assert on_card(name) == "reference"
        with pytest.raises(ValueError, match=f"^impl: expected a GPU that there are kernels for .*, got {name}: "):
            on_card(name, "triton")
    else:
        assert on_card(name) == on_card(name, "triton") == "triton"
        assert on_card(name, dtype=torch.float64) == "reference"
    assert on_card(name, "reference") == "reference"


@pytest.mark.parametrize("card", [card for card in CARDS.values() if card.triton > (3, 2)], ids=lambda card: card.name)
def test_a_card_that_triton_is_too_old_for_gets_the_reference(card, on_card):
    assert on_card(card.name, triton=(3, 2)) == "reference"
    assert on_card(card.name, triton=card.triton) == "triton"
    with pytest.raises(ValueError, match=r"needs Triton 3\.\d, and this is 3\.2$"):
        on_card(card.name, "triton", triton=(3, 2))


@pytest.mark.parametrize(("hip", "name"), [(None, "sm_89"), ("7.1", "gfx942")])
def test_the_card_of_a_device_is_looked_up_once_and_said(hip, name, monkeypatch):
    asked = []
    properties = SimpleNamespace(major=8, minor=9, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: (asked.append(device), properties)[1])
    _cards.card_of.cache_clear()
    device = torch.device("cuda", 0)
    try:
        assert _cards.card_of(device) is _cards.card_of(device) is CARDS[name]
        assert asked == [device]
        assert _devices._kernels_of(device) == f"{name} with tiles of {CARDS[name].tiles}"
        monkeypatch.setattr(_devices, "card_of", lambda device: CARDS["sm_75"])
        assert _devices._kernels_of(device) == f"none for sm_75, {CARDS['sm_75'].why}"
    finally:
        _cards.card_of.cache_clear()


def test_compiled_code_is_told_at_once(monkeypatch):
    """torch.compile asks while it traces, and takes the answer for good."""
    monkeypatch.setattr(_cards, "card_of", lambda device: CARDS["sm_90"])

    def chosen(x):
        return x + 1 if _cards.has_tiles(torch.device("cuda", 0)) else x - 1

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


def test_the_page_has_the_table():
    lines = ["| architecture | found in | tiles | why | Triton |", "| --- | --- | --- | --- | --- |"]
    for card in CARDS.values():
        since = "≥ " + ".".join(map(str, card.triton)) if card.tiles else ""
        cells = card.name, card.found_in, card.tiles or "none: the reference", card.why, since
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    page = Path(__file__).parents[2] / "docs" / "versions.md"
    written = page.read_text(encoding="utf-8").partition("<!-- cards -->")[2].partition("<!-- end -->")[0]
    assert written.strip().splitlines() == lines
