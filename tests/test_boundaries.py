"""Dependencies point one way, and importing costs no more than it must."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import eva_kernels
import eva_lora

KERNELS, LORA = Path(eva_kernels.__file__).parent, Path(eva_lora.__file__).parent


# The rooms of eva_lora, and which of them each may import. Modules beside the rooms may import any; ``config`` imports
# nothing, and everything may import it.
ROOMS = {
    "planning": set(),
    "distributed": set(),
    "adapters": {"planning"},
    "collecting": {"adapters", "planning", "distributed"},
    "reporting": {"planning"},
    "fitting": {"adapters", "collecting", "planning"},
    "integrations": {"", "reporting", "collecting", "planning"},
    "cli": {"", "planning", "distributed", "adapters", "collecting", "reporting", "fitting", "integrations"},
}

INTERFACES = {"eva_lora.planning.storage"}  # modules that a room offers as they are, beside what its __init__ names


@functools.cache
def modules_of(package):
    """Dotted name → parsed source of every module of a package."""
    folder = Path(package.__file__).parent
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package.__name__, *path.relative_to(folder).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py"
    return found


def imports_of(name, tree, is_package, modules):
    """The modules of its own package that a module imports, anywhere in it and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{source}.{alias.name}"
                if inside in modules or source in modules:
                    yield inside if inside in modules else source


def graph_of(modules):
    return {name: set(imports_of(name, *module, modules)) for name, module in modules.items()}


def trespasses(graph):
    """Imports from one room into another that may not be, or that go past its interface."""
    room = lambda name: next((part for part in name.split(".")[1:2] if part in ROOMS), "")  # noqa: E731
    for name, imported in graph.items():
        for other in imported:
            mine, its = room(name), room(other)
            is_interface = not its or other == f"eva_lora.{its}" or other in INTERFACES
            may = mine == its or other == "eva_lora.config" or not mine or its in ROOMS[mine]
            if not may or (mine != its and not is_interface):
                yield name, other


def require_no_circle(graph):
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"modules import each other in a circle: {' -> '.join(error.args[1])}") from None


def modules_after(code):
    script = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def imported(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.partition(".")[0]


def test_importing_eva_kernels_imports_no_torch_triton_peft_or_eva_lora():
    assert modules_after("import eva_kernels").isdisjoint({"torch", "triton", "peft", "transformers", "eva_lora"})


def test_the_numerics_import_no_triton_peft_or_eva_lora():
    loaded = modules_after("from eva_kernels import GramStatistic, SubspaceStatistic, gram_accumulate_, orthonormalize")
    assert "torch" in loaded
    assert loaded.isdisjoint({"triton", "peft", "transformers", "eva_lora"})


def test_importing_eva_lora_imports_no_triton_peft_or_matplotlib():
    assert modules_after("import eva_lora").isdisjoint({"triton", "peft", "transformers", "matplotlib"})


def test_eva_kernels_names_no_model_library():
    allowed_lazily = KERNELS / "__init__.py"  # for type checkers: where eva_initialize lives
    bad = [
        (path.name, name)
        for path, name in imported(KERNELS)
        if name in {"peft", "transformers", "accelerate", "eva_lora"} and path != allowed_lazily
    ]
    assert bad == []


def test_eva_lora_names_no_triton_and_not_the_compiled_module():
    assert [path.name for path, name in imported(LORA) if name == "triton"] == []
    assert [path.name for path in LORA.rglob("*.py") if "eva_kernels._core" in path.read_text(encoding="utf-8")] == []


def test_nobody_asks_a_device_for_float64_that_it_may_not_have():
    """``eva_kernels._double.double`` knows where it is; these have it at home already, or on the CPU from a file."""
    at_home = {
        "_double.py",
        "kernel_check.py",  # of kernels that run on GPUs with float64 only
        "orthonormal/__init__.py",
        "orthonormal/core.py",
        "streaming_svd/refresh.py",
        "streaming_svd/statistics.py",
        "adapters/export.py",
        "fitting/layer_fit.py",
        "fitting/rescaling.py",
        "planning/eva_plan.py",
        "planning/merging.py",
        "planning/statistics.py",
    }
    found = {
        path.relative_to(package).as_posix()
        for package in (KERNELS, LORA)
        for path in package.rglob("*.py")
        if ".double()" in path.read_text(encoding="utf-8")
    }
    assert found <= at_home


def test_the_numerics_know_no_process_groups():
    assert [path.name for path in KERNELS.rglob("*.py") if "distributed" in path.read_text(encoding="utf-8")] == []


def test_eva_initialize_is_found_where_strangers_look():
    assert eva_kernels.eva_initialize is eva_lora.eva_initialize


def test_every_public_name_resolves():
    for package in (eva_kernels, eva_lora):
        for name in package.__all__:
            assert getattr(package, name) is not None


@pytest.mark.parametrize("package", [eva_kernels, eva_lora], ids=lambda package: package.__name__)
def test_no_modules_import_each_other_in_a_circle(package):
    require_no_circle(graph_of(modules_of(package)))


def test_rooms_import_only_what_they_may_and_only_from_interfaces():
    assert sorted(trespasses(graph_of(modules_of(eva_lora)))) == []


def test_every_room_has_an_interface_that_says_what_it_knows():
    for room in ROOMS:
        tree, _ = modules_of(eva_lora)[f"eva_lora.{room}"]
        assert ast.get_docstring(tree), room
    assert {
        name.split(".")[1] for name, (_, is_package) in modules_of(eva_lora).items() if is_package and "." in name
    } == (set(ROOMS))


def test_a_forbidden_import_is_seen():
    modules = modules_of(eva_lora)
    for name, line, seen in (
        ("eva_lora.planning.trace", "from ..collecting import collect", True),
        ("eva_lora.adapters.sites", "def f():\n    from ..reporting import EvaReport", True),
        ("eva_lora.collecting.run", "from ..adapters.sites import LoraSite", True),
        ("eva_lora.initializing", "from .adapters.sites import LoraSite", True),
        ("eva_lora.collecting.run", "from ..adapters import LoraSite", False),
    ):
        changed = {**modules, name: (ast.parse(line), False)}
        assert (name in {one for one, _ in trespasses(graph_of(changed))}) == seen, line
    closed = {
        **modules,
        "eva_lora.collecting.inputs": (ast.parse("if TYPE_CHECKING:\n    from .run import Run"), False),
    }
    with pytest.raises(AssertionError, match=r"in a circle: .*eva_lora\.collecting\.run"):
        require_no_circle(graph_of(closed))


def test_no_two_test_files_have_one_name():
    """pytest imports a test file under its bare name: of two, the second would fail to be collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
