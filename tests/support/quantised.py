"""Bases that are quantised by rounding to nearest, as a quantiser of any library might."""

import copy

import torch
from torch import nn


def rounded(weight, bits=4, group=64):  # (out, in)
    """To the nearest of 2^bits equal steps between the least and the largest of each group of a row."""
    groups = weight.reshape(len(weight), -1, min(group, weight.shape[1]))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def quantised(model, bits=4, group=64, keep=("lm_head",)):
    """A copy of a float model with every linear layer's weight rounded."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in keep:
            module.weight.data = rounded(module.weight.data, bits, group)
    return model


def output_errors(model, floats, rows):
    """Layer → mean ‖(W − Q) x‖² and mean ‖(W − Q − s B A) x‖² over rows x, and mean ‖W x‖², in float64."""
    found = {}
    for name, x in rows.items():
        layer = model.get_base_model().get_submodule(name)
        adapted = hasattr(layer, "lora_A")
        q = (layer.base_layer if adapted else layer).weight.detach().double()
        w = floats.get_submodule(name).weight.detach().double()
        change = layer.get_delta_weight("default").detach().double() if adapted else torch.zeros_like(q)
        moment = x.T @ x / len(x)
        found[name] = tuple(float(torch.einsum("ij,jk,ik->", e, moment, e)) for e in (w - q, w - q - change, w))
    return found


def least_errors(floats, bases, rows, ranks):
    """Layer → the least that ‖(W − Q − L) x‖² can be on average, L being of the layer's rank."""
    found = {}
    for name, x in rows.items():
        error = (floats.get_submodule(name).weight - bases.get_submodule(name).weight).detach().double()
        variances, directions = torch.linalg.eigh(x.T @ x / len(x))
        values = torch.linalg.svdvals(error @ (directions * variances.clamp_min(0).sqrt())).square()
        found[name] = float(values[ranks[name] :].sum())
    return found
