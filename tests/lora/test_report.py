"""The report: its members, its text, its files."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, eva_initialize
from eva_lora.layout import Grid
from eva_lora.page import plot_convergence, plot_ranks, plot_spectra
from support.models import lora, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


@pytest.fixture(scope="module")
def report():
    return eva_initialize(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=4), progress=False)


def test_members_are_keyed_by_layer(report):
    for members in (report.ranks, report.explained_variance_ratio, report.converged, report.components_converged):
        assert list(members) == list(report.ranks)
    assert "model.layers.0.self_attn.q_proj" in report.ranks
    for ratios in report.explained_variance_ratio.values():
        assert len(ratios) == 8
        assert list(ratios) == sorted(ratios, reverse=True)
        assert 0 < sum(ratios) <= 1
    assert (report.num_batches, report.num_rows) == (4, 4 * 96)
    assert report.seconds["total"] >= report.seconds["forward"] > 0


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
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "td":
            self.cells.append(data.strip())


def test_the_page_stands_alone_and_holds_every_layer(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))  # nothing from outside the page
    assert not [tag for tag, _ in page.tags if tag == "script"]
    for name, rank in report.ranks.items():
        position = page.cells.index(name)
        assert page.cells[position + 1] == str(rank)
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    assert len(figures) == 3
    assert all(figure.get("aria-label") for figure in figures)


def test_the_json_holds_the_same(report, tmp_path):
    report.save(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["format_version"] == 1
    assert stored["ranks"] == report.ranks
    assert stored["converged"] == report.converged
    assert stored["config"]["rho"] == 2.0
    assert stored["versions"]["torch"] == torch.__version__


def test_layer_names_are_escaped(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<img src=x onerror=alert(1)>", nn.Linear(4, 4))

        def forward(self, x):
            return next(iter(self.children()))(x)

    import peft

    model = peft.get_peft_model(Odd(), peft.LoraConfig(r=2, target_modules=["<img src=x onerror=alert(1)>"]))
    report = eva_initialize(model, [torch.randn(20, 4)], EvaConfig(tau=0.0), progress=False)
    text = (report.save(tmp_path) / "report.html").read_text()
    assert "<img" not in text
    assert "&lt;img" in text


def test_plots_show_the_numbers(report):
    image = plot_ranks(report).axes[0].images[0].get_array()
    assert image.shape == (3, 7)
    assert image.sum() == 84
    curves = [line.get_ydata() for line in plot_spectra(report).axes[0].lines]
    assert len(curves) == 21
    assert curves[0][-1] == pytest.approx(sum(next(iter(report.explained_variance_ratio.values()))))
    assert list(plot_convergence(report).axes[0].lines[0].get_ydata()) == report.history


def test_layers_are_laid_out_by_block():
    grid = Grid.of({"h.0.attn.c_attn": 3, "h.1.attn.c_attn": 4, "h.1.mlp.c_fc": 5, "head": 6})
    assert grid.rows == ["h.0", "h.1", ""]
    assert grid.columns == ["attn.c_attn", "mlp.c_fc", "head"]
    text = grid.text()
    assert re.search(r"^h\.0 +3 +· +·$", text, re.MULTILINE)
    assert re.search(r"^ +· +· +6$", text, re.MULTILINE)
