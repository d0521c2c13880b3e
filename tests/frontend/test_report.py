"""The report: its members, its text, its files."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from importlib.resources import files

import jsonschema
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, EvaReport, collect, eva_initialize, plan
from eva_lora.reporting.layout import Grid, short_names
from support.models import lora, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def schema():
    return json.loads(files("eva_lora.reporting").joinpath("report.schema.json").read_text(encoding="utf-8"))


def test_members_are_keyed_by_layer(report):
    for members in (report.ranks, report.explained_variance_ratio, report.converged, report.components_converged):
        assert list(members) == list(report.ranks)
    assert "model.layers.0.self_attn.q_proj" in report.ranks
    for ratios in report.explained_variance_ratio.values():
        assert len(ratios) == 8
        assert list(ratios) == sorted(ratios, reverse=True)
        assert 0 < sum(ratios) <= 1
    assert (report.num_batches, report.num_rows) == (4, 4 * 96)
    assert report.in_features["model.layers.0.mlp.down_proj"] == 48


def test_the_parts_of_the_time_fit_into_the_whole(report):
    seconds = report.seconds
    assert seconds["total"] >= seconds["forward"] + seconds["refresh"]
    assert seconds["forward"] > seconds["statistics"] > 0
    assert report.peak_memory["cpu"] > sum(state["nbytes"] for state in report.statistic.values())


def test_the_trace_leads_to_the_result(report):
    trace = report.trace
    assert trace.batch == sorted(set(trace.batch))
    assert trace.batch[-1] == report.num_batches
    assert trace.rows[-1] == report.num_rows
    assert trace.converged[-1] == [int(value) for value in report.converged.values()]
    assert trace.agreement[0] == [None] * 21  # nothing to compare the first refresh with
    for agreement, converged in zip(trace.agreement[-1], trace.converged[-1], strict=True):
        assert 0 <= agreement <= 1
        assert converged or agreement < report.config["tau"]
    assert report.history[-1] == sum(report.converged.values())


def test_the_text_shows_every_rank_and_the_totals(report):
    text = str(report)
    assert "84 of a budget of 84" in text
    assert "21, fed by 12 distinct inputs" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("model.layers.")]
    assert [[int(v) for v in row[1:]] for row in rows] == [
        [rank for name, rank in report.ranks.items() if name.startswith(row[0])] for row in rows
    ]
    assert len(rows) == 3


class Page(HTMLParser):
    """The page's tags, and the text of its table of layers, row by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self._in_table = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._in_table = dict(attributes).get("id") == "table"
        if tag == "tr" and self._in_table:
            self.rows.append([])
        if tag in ("td", "th") and self._in_table:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_stands_alone_and_holds_every_layer(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))  # nothing from outside the page
    assert "http" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
    assert {row[0]: row[1] for row in page.rows[1:]} == {name: str(rank) for name, rank in report.ranks.items()}
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 4 + len(report.ranks)
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"]) > 20


def test_the_json_holds_the_same_and_follows_its_schema(report, tmp_path):
    report.save(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(stored, schema(), jsonschema.Draft202012Validator)
    assert stored["ranks"] == report.ranks
    assert stored["config"]["rho"] == 2.0
    assert stored["versions"]["torch"] == version("torch")
    assert stored["warnings"] == report.warnings()


def test_the_schema_describes_every_field_and_refuses_others(report):
    stored = json.loads(json.dumps(report.to_dict()))
    jsonschema.Draft202012Validator.check_schema(schema())
    for key in stored:
        assert schema()["properties"][key]["description"] if key != "format_version" else True
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: value for name, value in stored.items() if name != key}, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**stored, "ranks": {"layer": "four"}}, schema())


def test_a_report_survives_its_file(report, tmp_path):
    assert EvaReport.load(report.save(tmp_path)) == report
    (tmp_path / "report.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"is no complete report: 'ranks'"):
        EvaReport.load(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a report of format version 1"):
        EvaReport.load(tmp_path / "report.json")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        EvaReport.load(tmp_path / "nowhere")


def test_the_trace_survives_the_statistics_file(tmp_path):
    statistics = collect(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=2), progress=False)
    loaded = type(statistics).load(statistics.save(tmp_path / "s.safetensors"))
    assert loaded.trace == statistics.trace
    assert EvaReport.of(loaded, plan(loaded)) == EvaReport.of(statistics, plan(statistics))


def test_warnings_name_what_deserves_a_look(report):
    waiting = [name for name, converged in report.converged.items() if not converged]
    assert waiting
    assert any(f"{len(waiting)} of 21 layers had not converged" in text for text in report.warnings())
    emptied = eva_initialize(lora(tiny_llama(), r=1), token_batches(), EvaConfig(tau=0.0, rho=3.0), progress=False)
    removed = [name for name, rank in emptied.ranks.items() if rank == 0]
    assert removed
    [warning] = [text for text in emptied.warnings() if "rank 0" in text]
    assert removed[0] in warning
    few = eva_initialize(lora(tiny_llama()), [{"input_ids": torch.arange(40)[None]}], EvaConfig(max_batches=1))
    assert "Only 40 rows were seen, fewer than the widest input has features (48)" in "".join(few.warnings())


def test_a_layer_without_data_has_its_row_and_no_curve(report, tmp_path):
    name = "model.layers.2.mlp.down_proj"
    bare = dataclasses.replace(
        report,
        explained_variance_ratio={**report.explained_variance_ratio, name: ()},
        statistic={**report.statistic, name: {}},
    )
    bare.save(tmp_path, plots=["svg"])
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text()), schema())
    page = Page((tmp_path / "report.html").read_text())
    [row] = [row for row in page.rows if row[0] == name]
    assert (row[4], row[8]) == ("0.0 %", "none")
    assert "11 curves, one per distinct input" in "".join(a["aria-label"] for t, a in page.tags if t == "svg")


def test_layer_names_are_escaped(tmp_path):
    odd = "<img src=x onerror=alert(1)>"

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(odd, nn.Linear(4, 4))

        def forward(self, x):
            return next(iter(self.children()))(x)

    import peft

    model = peft.get_peft_model(Odd(), peft.LoraConfig(r=2, target_modules=[odd]))
    report = eva_initialize(model, [torch.randn(20, 4)], EvaConfig(tau=0.0), progress=False)
    report.save(tmp_path, plots=["svg"])
    for text in (
        (tmp_path / "report.html").read_text(),
        report._repr_html_(),
        *(path.read_text() for path in tmp_path.glob("*.svg")),
    ):
        assert "<img" not in text
    assert "&lt;img" in (tmp_path / "report.html").read_text()


def test_notebooks_show_the_summary_and_every_rank(report):
    fragment = report._repr_html_()
    assert "21, fed by 12 distinct inputs" in fragment
    assert [int(rank) for rank in re.findall(r"<td[^>]*title=[^>]*>(\d+)</td>", fragment)] == list(
        report.ranks.values()
    )
    assert "<script" not in fragment


def test_plots_show_the_numbers(report):
    image = report.plot_ranks().axes[0].images[0].get_array()
    assert image.shape == (3, 7)
    assert image.sum() == 84
    single, cumulative = report.plot_spectra().axes
    assert len(single.lines) == 21
    first = next(iter(report.explained_variance_ratio.values()))
    assert cumulative.lines[0].get_ydata()[-1] == pytest.approx(sum(first))
    count, change = report.plot_convergence().axes
    assert list(count.lines[0].get_ydata()) == report.history
    assert change.lines[-1].get_ydata()[0] == pytest.approx(0.01)
    kinds, blocks = report.plot_budget().axes
    assert len(kinds.patches) == 7
    assert sum(bar.get_width() for bar in blocks.patches) == sum(report.ranks.values()) - 84


def test_plots_are_saved_in_the_formats_asked_for(report, tmp_path):
    report.save(tmp_path, plots=["png", "svg"])
    names = {f"{name}.{suffix}" for name in ("ranks", "spectra", "convergence", "budget") for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "report.json", "report.html"}
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"^plots: expected formats of 'png', 'svg' and 'pdf', got \['gif'\]"):
        report.save(tmp_path / "other", plots=["gif"])
    assert not (tmp_path / "other").exists()


def test_layers_are_laid_out_by_block():
    grid = Grid.of({"h.0.attn.c_attn": 3, "h.1.attn.c_attn": 4, "h.1.mlp.c_fc": 5, "head": 6})
    assert grid.rows == ["h.0", "h.1", ""]
    assert grid.columns == ["attn.c_attn", "mlp.c_fc", "head"]
    text = grid.text()
    assert re.search(r"^h\.0 +3 +· +·$", text, re.MULTILINE)
    assert re.search(r"^ +· +· +6$", text, re.MULTILINE)


def test_names_are_shortened_as_far_as_they_stay_apart():
    names = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    assert short_names(names) == ["query", "attention.output.dense", "output.dense", "intermediate.dense"]


def test_the_page_of_a_run_that_no_command_started(report, tmp_path):
    """A notebook's, for instance."""
    without = dataclasses.replace(report, run={})
    page = (without.save(tmp_path / "report") / "report.html").read_text(encoding="utf-8")
    assert "<h3>Call</h3>" in page
    assert "<h3>Command</h3>" not in page
