"""The documentation site: it builds without a warning, asks for nothing from elsewhere, and can be read on a phone."""

import inspect
import subprocess
import sys

import pytest

import eva_kernels
import eva_lora
from support.browser import LOWEST_CONTRAST
from support.pages import DOCS, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as ``make docs`` builds it."""
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    target = tmp_path_factory.mktemp("site")
    build = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", target / "doctrees", DOCS, target / "html"]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / "html"


@pytest.fixture(scope="module")
def pages(site):
    found = sorted(path for path in site.rglob("*.html"))
    assert len(found) > 15
    return found


def test_every_page_is_built_and_its_links_lead_somewhere(site):
    missing = [
        page for page in DOCS.rglob("*.md") if not (site / page.relative_to(DOCS)).with_suffix(".html").is_file()
    ]
    assert missing == []
    checked = [sys.executable, ROOT / "tools" / "check_links.py", site]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_link_to_a_page_that_is_missing_stops_the_build(tmp_path):
    (tmp_path / "conf.py").write_text('extensions = ["myst_parser"]\n', encoding="utf-8")
    (tmp_path / "index.md").write_text("# Here\n\n[there](missing.md)\n", encoding="utf-8")
    build = ["-m", "sphinx", "-q", "-W", "-b", "html", tmp_path, tmp_path / "html"]
    assert subprocess.run([sys.executable, *build], capture_output=True).returncode != 0


@pytest.mark.parametrize("package", [eva_lora, eva_kernels], ids=lambda package: package.__name__)
def test_the_reference_shows_every_public_name_with_its_arguments(package, site):
    text = (site / "api" / f"{package.__name__}.html").read_text(encoding="utf-8")
    for name in package.__all__:
        value = getattr(package, name)
        home = getattr(value, "__module__", "").partition(".")[0]
        if home == package.__name__:
            assert f'id="{package.__name__}.{name}"' in text, name
        if inspect.isfunction(value) and home == package.__name__:
            assert all(f">{argument}<" in text for argument in inspect.signature(value).parameters), name


@pytest.fixture
def opened(browser):
    """A page of the site; at the end the browser must not have complained or asked anyone else for anything."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    page.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith(("file:", "data:"))} == set()


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_scrolls_sideways(width, opened, pages):
    opened.set_viewport_size({"width": width, "height": 800})
    too_wide = {}
    for page in pages:
        opened.goto(page.as_uri())
        found = opened.evaluate("document.documentElement.scrollWidth")
        if found > width:
            too_wide[page.name] = found
    assert too_wide == {}


def test_a_wide_table_scrolls_in_its_own_box(opened, site):
    opened.set_viewport_size({"width": 360, "height": 800})
    opened.goto((site / "comparison.html").as_uri())
    boxes = opened.locator(".table-wrapper").evaluate_all(
        "all => all.map(box => [box.scrollWidth > box.clientWidth, getComputedStyle(box).overflowX])"
    )
    assert [True, "auto"] in boxes


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(scheme, opened, pages):
    opened.emulate_media(color_scheme=scheme)
    least = {}
    for page in pages:
        opened.goto(page.as_uri())
        least[page.name] = opened.evaluate(LOWEST_CONTRAST, scheme)
    worst = {name: found for name, found in least.items() if found and found[0] < 4.5}  # WCAG 2.2, 1.4.3, level AA
    assert worst == {}


def test_every_figure_has_a_text_alternative(opened, pages):
    shown = 0
    for page in pages:
        opened.goto(page.as_uri())
        for text, width in opened.locator("article img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])"):
            assert len(text) > 20
            assert width > 100
            shown += 1
    assert shown >= 3
