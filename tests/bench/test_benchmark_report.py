"""The report of a run, and that the committed pages say what the committed results say."""

import copy
import getpass
import json
import re
import socket
from pathlib import Path

import pytest

import report
import roofline
from harness.figures import standalone
from harness.page import WARNING, markdown, render
from harness.plots import figures_of
from harness.regression import changes
from harness.results import Results
from harness.tables import goals_table, group_table, losses_table, parts_table
from support.benchmark_results import MACHINE, entry, results_of, spread


def test_results_load_to_what_was_saved(results, tmp_path):
    results.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert [record.key for record in loaded.records] == [record.key for record in results.records]
    assert loaded.records[0].of_forward == pytest.approx(0.5)
    assert loaded.machine == results.machine


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: expected results of format 1"):
        Results.load(tmp_path / "other.json")


def test_a_group_s_table_holds_its_figures(results):
    table = group_table(results, "Gram")
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert first["ms"] == "1"
    assert first["p10 to p90"] == "0.9 to 1.1"
    assert first["of the forward"] == "0.50"
    assert first["MiB"] == "3.0"
    assert first["error"] == "1.0e-07"
    assert first["full product"] == "2.00x; 2.0e-03; 5.0"


def test_a_case_s_own_figures_have_a_column():
    table = group_table(results_of(entry("Hooks", facts={"microseconds a hook": 8.256, "sites": 36})), "Hooks")
    assert dict(zip(table.header, table.rows[0], strict=True))["microseconds a hook"] == "8.26"
    assert "sites" not in table.header


def test_the_forward_s_share_is_counted(results):
    """A fourth of the forwards was timed beside the pass, which took 0.94 of all of them."""
    (row,) = group_table(results, "End to end").rows
    assert row[group_table(results, "End to end").header.index("of the forward")] == "0.94"


def test_shapes_where_a_peer_is_faster_are_shown_the_worst_first(results):
    rows = losses_table(results).rows
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("Gram: wide", "full product", "2.50x"),
        ("Streams: a stream", "svd", "2.00x"),
    ]
    assert losses_table(results_of(entry())).note == "No peer was faster anywhere."


def test_goals_say_what_was_not_reached(results):
    reached = {row[0]: row[3] for row in goals_table(results).rows}
    assert reached["B1 float32: our pass over its full forwards"] == "**no**"  # 0.94
    assert reached["B1 float32: PEFT's time over ours"] == "**no**"
    assert reached["B1 float32: variance missed by 32, over PEFT's"] == "yes"


@pytest.mark.parametrize(("form", "verdict"), [("amx", "yes"), ("avx512bf16", "**no**"), ("avx2", "**no**")])
def test_goals_are_those_of_the_kind_of_processor(form, verdict, results):
    one = copy.deepcopy(next(r.content for r in results.of("End to end") if r.facts.get("benchmark") == "B1"))
    one["dtype"], one["ratio"]["forward"] = "bfloat16", spread(one["forward_share"] / 1.03)
    machine = {"cpu": {**MACHINE["cpu"], "cpu_form": form}}
    reached = {row[0]: row[3] for row in goals_table(results_of(one, machine=machine)).rows}
    assert reached["B1 bfloat16: our pass over its full forwards"] == verdict


def test_a_quick_run_is_held_against_no_goal(results):
    assert goals_table(results_of(*(record.content for record in results.records), quick=True)).rows == ()


def test_the_parts_of_a_pass_with_its_memory(results):
    (row,) = parts_table(results).rows
    assert row == ("B1: float32", "70 %", "30 %", "1.0", "100.0")


def test_the_markdown_has_every_table_with_provenance(results):
    text = markdown(results, changes(results, results))
    for group in results.groups:
        assert f"### {group}\n" in text
    for expected in ("A processor, 2 cores, 2 threads", "100 GFLOP/s float32", "commit: 0123456789ab",
                     "gate: tests passed in 60 s", "same within noise", "### Where we lose"):  # fmt: skip
        assert expected in text
    assert WARNING not in text
    widths = {len(block.splitlines()[0].split("|")) for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)}
    assert min(widths) >= 4
    assert WARNING in markdown(results_of(entry(), quick=True))


def test_the_page_has_a_figure_of_each_kind_and_escapes_names(results):
    page = render(results)
    for title in ("Time.", "Peers.", "Ratio to the forward.", "Memory.", "Accuracy against cost.", "Scaling in rows."):
        assert f'aria-label="{title}' in page
    hostile = render(results_of(entry(case="<script>alert(1)</script>", peers={"<b>": 2.0})))
    assert "<script>" not in hostile
    assert "&lt;script&gt;" in hostile


def test_failures_and_regressions_lead_the_page(results):
    slow = results_of(entry(forward=0.9))
    slow.suites["gram"]["status"] = "failed with exit status 1"
    page = render(slow, changes(slow, results_of(entry())))
    assert "suite gram: failed with exit status 1" in page
    assert "costs 1.80 times what it did" in page


def test_dots_stand_where_their_values_are(results):
    """The middle of a decade lies in its middle; the peer of half our time left of the rule, that of four right."""
    figure = str(figures_of(results, "Streams")["peers"])
    places = [
        float(x) for x in re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="4" fill="currentColor"/></g>(?!<text)', figure)
    ]
    rule = float(re.search(r'class="rule" d="M([\d.]+)', figure)[1])
    svd, peft = sorted(places)[:2] if len(places) == 2 else (min(places), max(places))
    assert svd < rule < peft
    decade = rule - 20  # from 0.1, at the left margin, to 1
    assert peft - rule == pytest.approx(decade * 0.602, abs=0.2)  # log10 of 4
    assert rule - svd == pytest.approx(decade * 0.301, abs=0.2)


def test_a_figure_as_a_file_is_whole(results):
    import xml.etree.ElementTree as ElementTree

    root = ElementTree.fromstring(standalone(figures_of(results, "Gram")["time"]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}style") is not None


def test_publishing_writes_data_page_and_figures(results, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PUBLISHED", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    report.PAGE.write_text("before\n<!-- generated: begin -->\nstale\n<!-- generated: end -->\nafter\n")
    report.publish(results)
    page = report.PAGE.read_text()
    assert page.startswith("before\n<!-- generated: begin -->\n## A processor, 2 threads\n")
    assert page.endswith("<!-- generated: end -->\nafter\n")
    assert "stale" not in page
    for file in re.findall(r"\(figures/(.*?)\)", page):
        assert (tmp_path / "figures" / file).is_file()
    assert report.with_results(page, report.committed()) == page
    with pytest.raises(ValueError, match="expected the marks"):
        report.with_results("no marks", [results])


def test_the_committed_page_says_what_the_committed_results_say():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.committed()
    assert report.with_results(page, report.committed()) == page
    for results in report.committed():
        for file, (_, figure) in report.figure_files(results).items():
            assert (report.FIGURES / file).read_text(encoding="utf-8") == figure


def test_the_roofline_s_page_follows_from_the_gate_s_figures():
    gate, host = (json.loads(path.read_text(encoding="utf-8")) for path in (roofline.RECORDED, roofline.HOST))
    page = roofline.page(gate, host)
    assert roofline.PAGE.read_text(encoding="utf-8") == page
    assert "No figure on it was measured on a GPU" in page
    gate["sm_90"]["project"] /= 2
    assert roofline.page(gate, host) != page


def test_a_batch_takes_as_long_as_the_slower_of_host_and_device():
    gate, host = (json.loads(path.read_text(encoding="utf-8")) for path in (roofline.RECORDED, roofline.HOST))
    rows = [line.split(" | ") for line in roofline.batch_table(gate, host)[4:]]
    assert len(rows) == 9
    for _, _, _, on_host, on_device, batch, set_by, _ in rows:
        assert float(batch) == max(float(on_host), float(on_device))
        assert set_by == ("host" if float(on_host) > float(on_device) else "device")
    assert {row[6] for row in rows} == {"host", "device"}


def test_no_result_names_its_machine():
    for file in report.PUBLISHED.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert str(Path.home()) not in text or str(Path.home()) == "/"
        assert str(report.ROOT) not in text
        assert socket.gethostname() not in text
        assert getpass.getuser() == "root" or getpass.getuser() not in text


@pytest.fixture(params=["made up", "committed"])
def page(request, tmp_path, results):
    if request.param == "committed":
        results = report.committed()[0]
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    import shutil

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser")
    (tmp_path / "report.html").write_text(render(results), encoding="utf-8")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened, complaints = browser.new_page(), []
        opened.on("console", lambda message: complaints.append(message.text))
        opened.goto((tmp_path / "report.html").as_uri())
        yield opened
        assert complaints == []
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_fits_wide_and_narrow_in_a_browser(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.locator("figure svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
    assert len(drawn) >= 4
    assert min(drawn) > 250
    outside = page.locator("svg").evaluate_all(
        """all => all.flatMap(svg => { const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].filter(t => {
            const r = t.getBoundingClientRect(); return r.right > box.right + 1 || r.left < box.left - 1;
          }).map(t => t.textContent); })"""
    )
    assert outside == []
