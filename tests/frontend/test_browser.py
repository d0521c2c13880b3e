"""The page in a real browser: no errors, it sorts, filters, fits a phone, and every figure can be read aloud."""

import re

import pytest

from eva_lora import EvaConfig, eva_initialize
from support.browser import LOWEST_CONTRAST
from support.models import load_minilm, lora, minilm_text_batches

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_report():
    model = lora(load_minilm(), target_modules="all-linear", r=16)
    with pytest.warns(UserWarning, match="EVA stopped at"):
        return eva_initialize(model, minilm_text_batches(), EvaConfig(max_batches=10), progress=False)


@pytest.fixture(scope="module")
def address(real_report, tmp_path_factory):
    return (real_report.save(tmp_path_factory.mktemp("page")) / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, opened; at the end the browser must not have complained or asked for anything else."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(10_000)
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert complaints == []
    assert {url.partition("#")[0] for url in requests if not url.startswith("data:")} == {address}


def column(page, index):
    return page.locator("#table tbody tr:visible").evaluate_all(
        f"rows => rows.map(row => row.cells[{index}].textContent.trim())"
    )


def test_the_table_holds_the_reports_numbers(page, real_report):
    assert column(page, 0) == list(real_report.ranks)
    assert list(map(int, column(page, 1))) == list(real_report.ranks.values())


@pytest.mark.parametrize("name", ["rank", "change", "width", "captured", "components"])
def test_a_click_sorts_by_number_and_another_turns_it_around(page, name):
    heads = page.locator("#table thead th").evaluate_all("cells => cells.map(cell => cell.textContent.trim())")
    index = heads.index(name)

    def numbers():
        return [float(re.sub(r"[ %]", "", text)) for text in column(page, index)]

    unsorted = numbers()
    button = page.locator("#table thead").get_by_role("button", name=name, exact=True)
    button.click()
    assert numbers() == sorted(unsorted)
    assert page.locator("#table thead th").nth(index).get_attribute("aria-sort") == "ascending"
    button.click()
    assert numbers() == sorted(unsorted, reverse=True)
    assert page.locator("#table thead th[aria-sort]").count() == 1


def test_names_sort_as_people_count(page, real_report):
    button = page.locator("#table thead").get_by_role("button", name="layer", exact=True)
    button.click()
    names = column(page, 0)
    assert set(names) == set(real_report.ranks)
    blocks = [int(re.search(r"layer\.(\d+)", name)[1]) for name in names if "layer." in name]
    assert blocks == sorted(blocks)


def test_the_table_filters_by_name_and_by_what_happened(page, real_report):
    page.get_by_label("Name contains").fill("Attention.Self")
    wanted = [name for name in real_report.ranks if "attention.self" in name]
    assert column(page, 0) == wanted
    assert page.locator("#count").inner_text() == f"{len(wanted)} of {len(real_report.ranks)} layers"
    page.get_by_label("Name contains").fill("")
    for choice, chosen in (
        ("more", lambda name: real_report.ranks[name] > real_report.configured_ranks[name]),
        ("less", lambda name: real_report.ranks[name] < real_report.configured_ranks[name]),
        ("waiting", lambda name: not real_report.converged[name]),
        ("", lambda name: True),
    ):
        page.get_by_label("Show").select_option(choice)
        assert column(page, 0) == [name for name in real_report.ranks if chosen(name)]


def test_a_cell_of_the_network_leads_to_its_layer_and_marks_its_curves(page, real_report):
    page.get_by_label("Show").select_option("less")  # the layer may be hidden; following the link shows it
    name = max(real_report.ranks, key=real_report.ranks.get)
    page.locator(".network").get_by_role("link", name=re.compile(f"^{re.escape(name)}:")).click()
    page.wait_for_function("document.querySelectorAll('tr.picked').length == 1")
    assert page.locator("tr.picked th").inner_text().strip() == name
    picked = page.locator("figure svg .line.picked title").evaluate_all("titles => titles.map(t => t.textContent)")
    assert len(picked) == 3  # spectrum, cumulative, convergence
    assert all(name in title.split(", ") for title in picked)
    page.locator("tr.picked").click()
    assert page.locator(".picked").count() == 0


def test_every_figure_has_a_text_alternative(page):
    tree = page.locator("body").aria_snapshot()
    assert page.locator("figure").count() >= 8
    for figure in page.locator("figure").all():
        name = figure.get_attribute("aria-label") or figure.locator("svg").first.get_attribute("aria-label")
        assert name
        assert len(name) > 5
    drawings = page.locator("svg").evaluate_all(
        "all => all.map(svg => [svg.getAttribute('role'), svg.getAttribute('aria-label')])"
    )
    assert all(role == "img" and len(label) > 20 for role, label in drawings)
    assert 'img "Cumulative explained variance. ' in tree


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_down_only(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    narrow = page.locator("figure table tbody th, #table tbody th").evaluate_all(
        "cells => cells.filter(cell => cell.offsetParent && cell.clientWidth < 20).length"
    )
    assert narrow == 0


def test_text_stands_out_in_light_and_in_dark(page):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ratio, where = page.evaluate(LOWEST_CONTRAST, scheme)
        assert ratio >= 4.5, (scheme, where)  # WCAG 2.2, 1.4.3, level AA


def test_the_notebook_fragment_shows_without_errors(browser, real_report):
    page = browser.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.set_content(real_report._repr_html_())
    assert page.locator(".network td:not(.absent)").count() == len(real_report.ranks)
    assert complaints == []
    page.close()
