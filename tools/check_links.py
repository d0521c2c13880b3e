"""Every link of the built site, or of the Markdown pages, leads somewhere; offline.

    python tools/check_links.py build/docs           a folder of HTML: files and anchors
    python tools/check_links.py README.md docs ...   Markdown files, and all below a folder

Links within must name a file that exists and, if they have one, an anchor in it. Links to elsewhere are not followed:
they must be well-formed https addresses, and are listed.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

ELSEWHERE = ("http", "https", "mailto")


class Page(HTMLParser):
    """What a page links to, and what in it can be linked to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.heading: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        for name in ("href", "src"):
            if (value := values.get(name)) is not None:
                self.links.append(value)
        if re.fullmatch(r"h[1-6]", tag):
            self.heading = ""

    def handle_data(self, data: str) -> None:
        if self.heading is not None:
            self.heading += data

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch(r"h[1-6]", tag) and self.heading is not None:
            self.anchors.add(re.sub(r"[^\w\- ]", "", self.heading.strip().lower()).replace(" ", "-"))
            self.heading = None


@cache
def page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return Page(text)


def broken(path: Path) -> Iterator[str]:
    """What is wrong with each link of a page that leads nowhere."""
    for link in page(path).links:
        parts = urlsplit(link)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc:
            if parts.scheme != "https" or "." not in parts.netloc or re.search(r"\s", link):
                yield f"{link}: expected a well-formed https address"
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target = target / "index.html" if path.suffix == ".html" else target
        if not target.exists():
            yield f"{link}: there is no {target}"
        elif (
            parts.fragment and target.suffix in (".md", ".html") and unquote(parts.fragment) not in page(target).anchors
        ):
            yield f"{link}: there is no such anchor in {target.name}"


def found(arguments: list[str]) -> list[Path]:
    """The pages that arguments name: files, and below folders HTML if there is any, else Markdown."""
    paths = []
    for argument in map(Path, arguments):
        if not argument.exists():
            raise SystemExit(f"there is no {argument}")
        html = sorted(argument.rglob("*.html"))
        paths += [argument] if argument.is_file() else html or sorted(argument.rglob("*.md"))
    return paths


def elsewhere(paths: list[Path]) -> list[str]:
    """The addresses elsewhere that pages link to."""
    return sorted({link for path in paths for link in page(path).links if urlsplit(link).scheme in ELSEWHERE})


def main(arguments: list[str]) -> None:
    paths = found(arguments or ["."])
    wrong = [f"{path}: {message}" for path in paths for message in broken(path)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    outside = elsewhere(paths)
    print(f"{len(paths)} pages; {len(outside)} addresses elsewhere, not followed:", *outside, sep="\n  ")
    if wrong:
        raise SystemExit(f"{len(wrong)} links lead nowhere")


if __name__ == "__main__":
    main(sys.argv[1:])
