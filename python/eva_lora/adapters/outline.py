"""A model gone through once, for all that is asked of it before a pass."""

from collections.abc import Iterator

from torch import nn

__all__ = ["ModelOutline", "plain_modules"]

#: Where wrappers of PyTorch, DeepSpeed and Lightning keep the module that they wrap.
_INSIDE = {
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}


class ModelOutline:
    """What a model is made of as it stands. Not kept beyond what it was made for: a model may change.

    Attributes:
        named_modules: Names and modules, each once.
        modules: Those without their names.
        parameters: Of all modules; one that several share, once for each.
        class_names: Of the modules' classes and of those they derive from, in order of appearance.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named_modules = list(model.named_modules())
        self.modules = [module for _, module in self.named_modules]
        self.parameters = [p for module in self.modules for p in module._parameters.values() if p is not None]
        classes = dict.fromkeys(map(type, self.modules))
        self.class_names = list(dict.fromkeys(kind.__name__ for cls in classes for kind in cls.__mro__))


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, by the names that the modules have without such wrappers.

    A wrapper has the name of what it wraps.
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    inside: dict[type[nn.Module], str | None] = {}  # of each class that has children, asked once
    for path, module in model.named_modules():
        name, _, child = path.rpartition(".")
        if path:
            name, holder = found[name]
            kind = type(holder)
            if kind not in inside:
                inside[kind] = _inside(kind)
            if child != inside[kind]:
                name = f"{name}.{child}" if name else child
        found[path] = name, module
        yield name, module


def _inside(wrapper: type[nn.Module]) -> str | None:
    return next((_INSIDE[kind.__name__] for kind in wrapper.__mro__ if kind.__name__ in _INSIDE), None)
