"""What every kernel must state or avoid, read from the sources: it holds for kernels that are not written yet."""

import ast
from pathlib import Path

import eva_kernels

SOURCES = sorted(Path(eva_kernels.__file__).parent.rglob("*triton.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def jitted():
    """Name and definition of every function that Triton compiles."""
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield node.name, node


def test_no_kernel_calls_itself():
    """Triton before 3.5 recurses without end while it hashes such a function, so that it cannot be launched."""
    definitions = dict(jitted())
    assert {"_gram_kernel", "_flush", "_lift_kernel", "_jacobi_kernel", "row_pointers"} <= set(definitions)
    called = {
        name: {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        for name, node in definitions.items()
    }
    for name in definitions:
        reached, waiting = set(), {name}
        while waiting:
            new = set().union(*(called.get(one, set()) for one in waiting)) - reached
            reached, waiting = reached | new, new
        assert name not in reached, f"{name} is reached from itself"
