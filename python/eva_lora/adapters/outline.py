"""A model gone through once, for all that is asked of it before a pass."""

from torch import nn

__all__ = ["ModelOutline"]


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
