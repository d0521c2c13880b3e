"""What plain calls of a model bring its layers, and whether EVA has found the directions of that."""

from dataclasses import replace

import torch
from peft.tuners.lora.layer import LoraLayer

from eva_lora import EvaConfig, eva_initialize
from support.models import captured_share, scatter

EXACT = EvaConfig(max_batches=3, tau=1.0, rho=1.0, statistic="gram")
ENOUGH = 0.999  # of the variance that any subspace of the rank can hold


def recorded(model, batches, call=lambda model, batch: model(**batch)):
    """Layer → what plain calls bring it, one (batch's number, input) for each of its calls."""
    calls, handles, now = {}, [], [0]
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        calls[name] = []
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, name=name: calls[name].append((now[0], args[0].clone())))
        )
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        for now[0], batch in enumerate(batches):
            call(model, batch)
    for handle in handles:
        handle.remove()
    return calls


def require_directions_of(model, calls, kept=lambda name, number, x: None):
    """Each A holds the leading directions of the rows that ``kept`` keeps (None: all) of a layer's recorded calls."""
    layers = dict(model.get_base_model().named_modules())
    for name, inputs in calls.items():
        rows = []
        for number, x in inputs:
            keep = kept(name, number, x)
            rows.append((x if keep is None else x[keep]).reshape(-1, x.shape[-1]).double())
        share = captured_share(layers[name].lora_A["default"].weight.detach(), scatter(torch.cat(rows)))
        assert share >= ENOUGH, f"{name} holds {share:.4f}"


def initialised(model, batches, **options):
    """EVA on each batch once, and its report."""
    batches = [*batches]
    config = replace(EXACT, max_batches=len(batches))
    return eva_initialize(model, batches, config, progress=False, **options)
