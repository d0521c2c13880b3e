"""docs/what-can-go-wrong.md lists the errors that there are: each of them, and no other."""

import ast
import re
from pathlib import Path

import eva_kernels
import eva_lora

PAGE = Path(__file__).parents[2] / "docs" / "what-can-go-wrong.md"
#: Functions that say which part of a file does not fit; their callers' messages, which are listed, end in theirs.
DETAILS = {"_check", "check", "checked", "load_state_", "_as", "_no_number", "_checked", "_restore", "_unpacked"}


def text_of(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def normal(text):
    return re.sub(r"\s+", " ", re.sub("…+", "…", text)).strip()


def messages(package, details=frozenset()):
    """(file, message) of everything that is raised or warned of, "…" for what is filled in."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name in details:
                continue
            for node in ast.walk(function):
                call = node.exc if isinstance(node, ast.Raise) else node
                warns = isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn"
                if isinstance(call, ast.Call) and (warns or isinstance(node, ast.Raise)) and call.args:
                    yield path.name, normal(text_of(call.args[0]))


def listed():
    rows = re.findall(r"^\| `(.+?)` \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {normal(message): (cause, remedy) for message, cause, remedy in rows}


def is_listed(message, pattern):
    """Whether ``message`` begins as ``pattern`` does, whose "…" may stand for more than one thing."""
    if not re.search(r"\w", pattern):  # an entry without a word of its own lists that very message, not all
        return message == pattern
    filled = "".join(".*" if piece == "…" else re.escape(piece) for piece in re.split("(…)", pattern))
    same_start = message.startswith("…") == pattern.startswith("…")
    return same_start and re.match(filled, message) is not None


def test_every_error_is_listed():
    missing = [(file, m) for file, m in messages(eva_lora, DETAILS) if not any(is_listed(m, p) for p in listed())]
    assert missing == []


def test_every_entry_is_an_error_that_exists():
    there = [message for package in (eva_lora, eva_kernels) for _, message in messages(package)]
    assert [entry for entry in listed() if not any(is_listed(message, entry) for message in there)] == []


def test_every_entry_has_a_remedy():
    assert len(listed()) > 80
    assert [entry for entry, (_, remedy) in listed().items() if len(remedy.strip()) < 5] == []


def test_no_line_of_the_page_is_lost_on_the_parser():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == len(listed())
