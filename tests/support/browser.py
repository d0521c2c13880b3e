"""A real browser, if the machine has one."""

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: The text that stands out least from what is behind it: contrast ratio as WCAG defines it, and where.
LOWEST_CONTRAST = """scheme => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = color => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const luminance = color => {
    const [r, g, b] = rgba(color).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgba(color)[3] > 250) return color;
    }
    return scheme === "dark" ? "black" : "white";
  };
  const found = [];
  for (const element of document.querySelectorAll("h1, h2, dt, dd, td, th, figcaption, p, a, li, button, code")) {
    if (!element.textContent.trim() || element.closest(".hidden")) continue;
    const pair = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    found.push([(Math.max(...pair) + .05) / (Math.min(...pair) + .05), element.outerHTML.slice(0, 80)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""


def launched():
    """Yields the browser; skips by name where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser; looked for {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
