"""Layer names and paths are text: on the page, in its pictures, in the JSON and in files."""

import html.parser
import json
import re
from importlib import resources

import peft
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, EvaPlan, EvaStatistics, collect, eva_initialize, plan

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

HOSTILE = [
    "<script>alert(1)</script>",
    "</svg><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "'; DROP TABLE layers; --",
    "{{ 7 * 7 }}{% raise %}",
    "$\\frac{1}{$",
    "$x_{y$",
    "&lt;b&gt;",
    "]]>--><!--",
    "javascript:alert(1)",
    "名前\u202e\u0000\ttab\nline",
    "%s%n{0}",
    "\\etc\\passwd",
]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in HOSTILE})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def model():
    torch.manual_seed(0)
    return peft.get_peft_model(Named(), peft.LoraConfig(r=2, target_modules=[*HOSTILE]))


def batches():
    return [torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def report():
    return eva_initialize(model(), batches(), EvaConfig(max_batches=3), progress=False)


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, text, and what scripts hold."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.scripts = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        if self.cdata_elem is None:  # not in a script or a style sheet
            self.texts.append(data)
        elif self.cdata_elem == "script":
            self.scripts.append(data)


def test_a_page_shows_hostile_names_as_text_and_runs_nothing_but_its_own_script(report, tmp_path):
    text = (report.save(tmp_path) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not set(page.tags) & {"iframe", "object", "embed", "base", "form", "img"}
    own = resources.files("eva_lora.reporting").joinpath("templates", "report.js").read_text(encoding="utf-8")
    assert page.tags.count("script") == 1
    assert "".join(page.scripts).strip() == own.strip()
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function|import", own) == []
    scripts_and_links = [(tag, name, value) for tag, name, value in page.attributes if tag in ("script", "link")]
    icon = [("link", "rel", "icon"), ("link", "href", "data:,")]  # an empty one, or browsers ask for it
    assert scripts_and_links == icon
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    links = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert [link for link in links if not link.startswith(("#", "data:image/png;base64,")) and link != "data:,"] == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import", text) == []
    shown = re.sub(r"\s+", " ", "".join(page.texts)).replace("\ufffd", "\0")
    for name in HOSTILE:
        assert re.sub(r"\s+", " ", f"layers.{name}") in shown.replace("\0", "") or "\0" in name


def test_the_json_and_the_text_hold_the_names_as_they_are(report, tmp_path):
    stored = json.loads((report.save(tmp_path) / "report.json").read_text(encoding="utf-8"))
    assert list(stored["ranks"]) == [f"layers.{name}" for name in HOSTILE]
    assert str(report)


def test_files_hold_the_names_as_they_are(tmp_path):
    statistics = collect(model(), batches(), EvaConfig(max_batches=3), progress=False, checkpoint=tmp_path / "c")
    again = EvaStatistics.load(statistics.save(tmp_path / "<b>s</b>"))
    assert [site.name for site in again.sites] == [f"layers.{name}" for name in HOSTILE]
    eva_plan = plan(again)
    assert EvaPlan.load(eva_plan.save(tmp_path / "p")).ranks == eva_plan.ranks
    resumed = collect(model(), batches(), EvaConfig(max_batches=3), progress=False, checkpoint=tmp_path / "c")
    assert [site.name for site in resumed.sites] == [site.name for site in statistics.sites]
