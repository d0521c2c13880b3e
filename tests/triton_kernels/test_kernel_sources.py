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
    assert {"_gram_kernel", "_flush", "_lift_kernel", "_jacobi_kernel", "arrives_last"} <= set(definitions)
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


def launches():
    """File, line, kernel and call of every launch, ``kernel[grid](...)``, in the package."""
    for path in sorted(Path(eva_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                if kernel.endswith("_kernel"):
                    yield f"{path.name}:{node.lineno}", kernel, node


def test_every_launch_takes_its_options_from_one_place():
    """The gate compiles with the same ones, so that what it judges is what runs; none is left to Triton's defaults."""
    found = list(launches())
    assert {kernel for _, kernel, _ in found} == {name for name, _ in jitted() if name.endswith("_kernel")}
    for where, kernel, call in found:
        options = [k.value for k in call.keywords if k.arg is None and "launch_options(" in ast.unparse(k.value)]
        assert len(options) == 1, f"{where}: {kernel} is launched without launch_options"
        assert ast.unparse(options[0].args[0]) == kernel, f"{where}: {kernel} takes the options of another kernel"
        assert not {k.arg for k in call.keywords} & {"num_warps", "num_stages", "enable_fp_fusion"}, where


def test_options_say_whether_products_are_fused():
    from eva_kernels import _triton
    from tools.kernel_gate.variants import all_variants

    kernels = {v.kernel.fn.__name__: v.kernel for v in all_variants()}
    assert set(kernels) == {name for name, _ in jitted() if name.endswith("_kernel")}
    unfused = {name for name, kernel in kernels.items() if not _triton.launch_options(kernel)["enable_fp_fusion"]}
    assert unfused == set(_triton.UNFUSED) == {"_jacobi_kernel", "_prepare_kernel"}
