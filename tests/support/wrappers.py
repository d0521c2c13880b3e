"""What wraps a model, or parts of it: each with what it does to names and attributes."""

import functools

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class HandsOn(nn.Module):
    """One's own, which hands on every attribute that it does not have."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **batch):
        return self.inner(**batch)


class DeepSpeedEngine(HandsOn):
    """DeepSpeed's, as far as names and attributes go."""

    def __init__(self, model):
        super().__init__(model)
        self.module = self._modules.pop("inner")

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["module"], name)

    def forward(self, **batch):
        return self.module(**batch)


def keeps_to_itself(model):
    wrapper = nn.Module()
    wrapper.net = model
    wrapper.forward = lambda **batch: model(**batch)
    return wrapper


def fabric(model):
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup_module(model)


def in_place(model):
    model.compile(backend="eager")
    return model


def fsdp1(model):
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def fsdp2(model):
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    return fully_shard(model)


def each_layer(wrap):
    """Wraps every decoder layer within the model."""

    def wrapped(model):
        for module in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for i, layer in enumerate(module):
                if isinstance(layer, LlamaDecoderLayer):
                    module[i] = wrap(layer)
        return model

    return wrapped


compiled = functools.partial(torch.compile, backend="eager")

#: Ranks may change within these.
CHANGEABLE = {
    "one that hands on": HandsOn,
    "one that does not": keeps_to_itself,
    "Fabric": fabric,
    "checkpointed layers": each_layer(checkpoint_wrapper),
    "DataParallel": DataParallel,
    "one in another": lambda model: HandsOn(keeps_to_itself(HandsOn(model))),
}
#: Ranks may not, and the error names a remedy.
FIXED = {
    "torch.compile": compiled,
    "module.compile": in_place,
    "compiled layers": each_layer(compiled),
    "DistributedDataParallel": DistributedDataParallel,
    "compiled DistributedDataParallel": lambda model: compiled(DistributedDataParallel(model)),
    "FullyShardedDataParallel": fsdp1,
    "fully_shard": fsdp2,
    "DeepSpeedEngine": DeepSpeedEngine,
}
