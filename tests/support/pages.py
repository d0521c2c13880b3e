"""Markdown pages as tests read them: their code, block by block, and their commands, one by one."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^(?P<tick>```+)(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=tick)$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``not_run`` is the reason given in a comment before it; most have none and are run."""

    language: str
    code: str
    line: int
    not_run: str = ""


def pages():
    """Every page a reader is shown, by its path from the root."""
    found = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("eva_kernels/**/README.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        reason = _REASON.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], match["code"], line, reason[1] if reason else ""))
    return found


def commands(code):
    """The simple commands of a shell block, as lists of words; comments and redirections left out."""
    plain = re.sub(r"(^|[ \t])#[^\n'\"]*$", "", code.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    command, target = [], False
    for word in [*lexer, "\n"]:
        if target:
            target = False
        elif set(word) <= set("<>"):
            target = True  # of a redirection
        elif set(word) <= set("();|&\n"):
            if command:
                yield command
            command = []
        else:
            command.append(word)
