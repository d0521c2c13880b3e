"""What the sources of both packages must not say: whatever takes its meaning from a switch of the whole process, and
what makes the host wait for a GPU unseen.

``torch.set_default_dtype`` and ``torch.set_default_device`` belong to the user. A tensor that the package makes has
the dtype and the device that the package states. Numbers of the host go to a device through ``sent``.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import eva_kernels
import eva_lora

SOURCES = [path for package in (eva_kernels, eva_lora) for path in Path(package.__file__).parent.rglob("*.py")]
#: PyTorch's own list of what takes its device from the default, and what makes tensors of the default dtype beside it.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"normal", "complex", "frombuffer"}
DEFAULTS = {"get_default_dtype", "set_default_dtype", "get_default_device", "set_default_device", "Tensor"}


def layers_with_parameters():
    """Names of ``nn`` whose constructors take a dtype: without one their parameters are of the default dtype."""
    modules = {name: kind for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    return {name for name, kind in modules.items() if "dtype" in inspect.signature(kind.__init__).parameters}


LAYERS = layers_with_parameters()


def is_number(node):
    return isinstance(node, ast.UnaryOp | ast.Constant)


def faults(source):
    """(line, code) of every call that leaves its dtype or its device to the process."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names}
            if (names - {"Tensor"}) & (FACTORIES | DEFAULTS):
                yield node.lineno, ast.unparse(node)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        stated = {keyword.arg for keyword in node.keywords}
        makes = (owner == "torch" and name in FACTORIES) or (owner in ("nn", "torch.nn") and name in LAYERS)
        numbers = owner == "torch" and name == "where" and len(node.args) == 3 and all(map(is_number, node.args[1:]))
        if (
            (makes and not {"dtype", "device"} <= stated)
            or numbers
            or (owner == "torch" and (name in DEFAULTS or name.endswith("Tensor")))
        ):
            yield node.lineno, ast.unparse(node)


def test_every_tensor_is_made_with_a_dtype_and_a_device():
    assert len(SOURCES) > 80
    found = [(path.name, *fault) for path in SOURCES for fault in faults(path.read_text(encoding="utf-8"))]
    assert found == []


def waiting(source):
    """(line, code) of every call that copies numbers of the host to a device from memory that is not pinned."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            device = next((ast.unparse(k.value) for k in node.keywords if k.arg == "device"), None)
            makes = ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor")
            if node.func.attr == "new_tensor" or (makes and device != "'cpu'"):
                yield node.lineno, ast.unparse(node)


def test_no_number_is_sent_to_a_device_from_memory_that_is_not_pinned():
    found = [(path.name, *fault) for path in SOURCES for fault in waiting(path.read_text(encoding="utf-8"))]
    assert found == []
    for line in ("x.new_tensor([1])", "torch.tensor([1], device=x.device)", "torch.as_tensor(a, device=x.device)"):
        assert list(waiting(line))
    assert not list(waiting("torch.tensor([1], device='cpu'); x.new_zeros(3); x.new_full((), 3)"))


@pytest.mark.parametrize(
    "line",
    [
        "torch.empty(3, 4)",
        "torch.zeros(3, dtype=torch.bool)",
        "torch.eye(3, device=x.device)",
        "torch.tensor([1.0])",
        "torch.randint(0, 2, (3,))",
        "torch.where(mask, -1.0, 1.0)",
        "torch.FloatTensor(3)",
        "torch.get_default_dtype()",
        "nn.Linear(3, 4, device='meta')",
        "from torch import zeros",
    ],
)
def test_the_walk_sees_what_it_looks_for(line):
    assert list(faults(line))
    assert not list(faults("torch.zeros(3, dtype=torch.bool, device=x.device); torch.zeros_like(x); x.new_zeros(3)"))


def test_pytorch_s_list_holds_what_packages_use():
    assert {"empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "eye", "randn", "rand"} <= FACTORIES
    assert {"Linear", "Embedding", "Conv2d"} <= LAYERS
    assert torch.zeros(1).dtype == torch.float32  # nothing imported here has changed the default
