"""What the API reference shows beyond the docstrings, and where their short names lead."""

import inspect
import re
from typing import Any

ARGUMENT = re.compile(r"^    (\w+): [^#\n]*#\s*(.+)$", re.MULTILINE)
RESULT = re.compile(r"^\) -> [^#\n]*:\s*#\s*(.+)$", re.MULTILINE)


def add_shapes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Append the shapes and dtypes that stand as comments behind the arguments in the source."""
    if what not in ("function", "method"):
        return
    signature = inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(obj))).partition('"""')[0]
    if found := ARGUMENT.findall(signature):
        lines += ["", ".. rubric:: Shapes", "", *(f"- ``{argument}``: {shape}" for argument, shape in found)]
        lines += [f"- returned: {shape}" for shape in RESULT.findall(signature)] + [""]


def find_public(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A reference from a docstring to a name as its own module knows it: the one public object of that name."""
    if node.get("refdomain") != "py" or node["reftype"] == "mod":
        return None
    domain, last = env.domains["py"], node["reftarget"].rpartition(".")[2]
    named = [name for name, entry in domain.objects.items() if name.rpartition(".")[2] == last and not entry.aliased]
    if len(named) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], named[0], node, content)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", add_shapes, priority=400)  # before napoleon, which reads sections
    app.connect("missing-reference", find_public)
    return {"parallel_read_safe": True}
