"""What passes over gradients leave behind, which is nothing, however they end; and what they hold meanwhile."""

import copy
import gc
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eva_lora import METHODS, EvaConfig, initialize
from eva_lora.adapters import find_adapter
from eva_lora.collecting import GradientPasses, gradients
from eva_lora.fitting import fit_leading
from eva_lora.fitting.gradients import PASSES
from harness.memory import tensor_bytes
from support.gradients import labelled
from support.models import lora, tiny_llama
from support.tiny import state_of

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.data == "gradients"]


class Interrupting(torch.autograd.Function):
    """Itself, whose gradient never comes."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def in_the_loss(model, batch, error):
    model(**batch)
    raise error


def in_a_forward(model, batch, error):
    def fail(*_):
        raise error

    handle = model.get_base_model().model.layers[1].mlp.register_forward_hook(fail)
    try:
        return model(**batch).loss
    finally:
        handle.remove()


def in_a_backward(model, batch, error):
    """After some layers have had their gradients, before the others have."""
    middle = model.get_base_model().model.layers[1].mlp
    handle = middle.register_forward_hook(lambda module, args, output: Interrupting.apply(output, error))
    try:
        return model(**batch).loss
    finally:
        handle.remove()


def traces(model):
    """What a run must not leave, beside the model's own state: hooks of any kind, gradients, random numbers drawn."""
    tables = [name for name in vars(nn.Module()) if "hooks" in name]
    return {
        **state_of(model),
        "all hooks": {n: [list(getattr(m, table)) for table in tables] for n, m in model.named_modules()},
        "tensors' hooks": [
            n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks
        ],
        "gradients": {n: p.grad.sum().item() for n, p in model.named_parameters() if p.grad is not None},
        "graphs": [n for n, t in model.state_dict(keep_vars=True).items() if t.grad_fn is not None],
        "Python's and NumPy's": (random.getstate(), repr(np.random.get_state())),  # noqa: NPY002
    }


def allocated(run):
    """Bytes of PyTorch's allocator beyond those before: at most during a run, and after it, where a graph would hold
    activations."""
    gc.collect()
    return tensor_bytes(lambda: (run(), gc.collect()))


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("where", [in_the_loss, in_a_forward, in_a_backward])
def test_a_run_that_is_cut_off_leaves_nothing(where, error):
    model = lora(tiny_llama(), lora_dropout=0.5, target_modules=["q_proj", "down_proj"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    norm.grad = torch.ones_like(norm)
    batches, seen, ended = labelled(2, shape=(1, 6)), [], []

    def loss_fn(model, batch):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        seen.append(len(seen))
        return where(model, batch, error) if len(seen) == 4 else model(**batch).loss  # in the second pass

    def run():
        seen.clear()
        try:
            initialize(model, batches, "gora" if where is in_a_forward else "lora-ga", loss_fn=loss_fn)
        except (RuntimeError, KeyboardInterrupt) as got:
            ended.append(str(got) == str(error) and type(got) is type(error))
        error.__traceback__ = None  # whose frames hold the loss

    before = traces(model)
    run()  # the first allocates what the process keeps
    _, left = allocated(run)
    assert ended == [True, True]
    assert len(seen) == 4
    assert traces(model) == before
    assert left == 0


def switched_on(model, batch):
    """As losses do that change adapters."""
    model.base_model.enable_adapter_layers()
    return model(**batch).loss


def unfrozen(model, batch):
    model.requires_grad_(True)
    return model(**batch).loss


def cleared(model, batch):
    model.zero_grad()
    return model.train()(**batch).loss


@pytest.mark.parametrize("loss_fn", [switched_on, unfrozen, cleared])
def test_what_a_loss_function_does_to_parameters_is_not_left(loss_fn):
    model = lora(tiny_llama(), target_modules=["q_proj", "down_proj"])
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    norm.grad = torch.ones_like(norm)
    before = traces(model)
    initialize(model, labelled(1), "lora-one", loss_fn=loss_fn, dry_run=True)
    assert traces(model) == before
    assert torch.equal(norm.grad, torch.ones_like(norm))


class Chain(nn.Module):
    """Nothing but layers: what a backward keeps are their inputs, and those only where it forms weights' gradients."""

    def __init__(self, width, depth):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


def off_target(model, x):
    return (model(x) - 1).square().mean()


def test_an_eighth_of_all_gradients_is_more_than_what_is_held_beside_the_same_forwards_and_backwards():
    """Beside those that form each weight's gradient and let go of it at once: what a method that holds them has more is
    the gradients."""
    width, depth, rank = 256, 8, 2
    base = Chain(width, depth).requires_grad_(False)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules=[str(i) for i in range(depth)]))
    batches = [torch.randn(64, width, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    gradients = depth * 4 * width**2
    inputs = depth * batches[0].nbytes
    passes = GradientPasses(find_adapter(model), model, batches, off_target)
    names = [site.name for site in find_adapter(model).sites]

    def sketched():
        fit_leading(
            METHODS["lora-ga"], lambda asked: passes.run(asked).products, dict.fromkeys(names, (width, width)),
            dict.fromkeys(names, rank), dict.fromkeys(names, 1.0), EvaConfig(rho=1.0, oversampling=5.0),
        )  # fmt: skip

    def formed():
        for batch in batches:
            off_target(base, batch).backward()

    with passes.frozen():
        most, _ = allocated(sketched)
    for parameter in base.parameters():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    beside, left = allocated(formed)
    assert left == 0
    assert inputs > gradients / 8  # or holding them twice would not be seen
    assert most - beside <= gradients / 8


def test_what_is_free_is_given_back_twice_in_a_forward_whose_activations_are_kept(monkeypatch):
    given_back = []
    monkeypatch.setattr(gradients, "give_back_freed_memory", lambda: given_back.append(None))
    depth = 20
    model = get_peft_model(Chain(6, depth), LoraConfig(r=1, target_modules=[str(i) for i in range(depth)]))
    config = EvaConfig(rho=1.0, max_batches=2)
    initialize(model, [torch.randn(4, 6) for _ in range(2)], "lora-one", config, loss_fn=off_target)
    assert len(given_back) == PASSES * 2 * 2  # of each batch
    model = lora(tiny_llama(), target_modules=["q_proj", "down_proj"]).train()
    for checkpointing, times in ((True, 0), (False, PASSES * 2)):
        switch = "enable" if checkpointing else "disable"
        getattr(model, f"gradient_checkpointing_{switch}")()
        given_back.clear()
        initialize(model, labelled(1), "lora-one", dry_run=True)
        assert len(given_back) == times


@pytest.mark.parametrize(("asked", "taken"), [(3, 3), (None, 32)])
def test_max_batches_bounds_what_is_asked_of_a_loader(asked, taken):
    given = []

    def endless():
        generator = torch.Generator().manual_seed(0)
        while True:
            given.append(torch.randn(4, 6, generator=generator))
            yield given[-1]

    model = get_peft_model(Chain(6, 2), LoraConfig(r=1, target_modules=["0", "1"]))
    config = EvaConfig(rho=1.0, max_batches=asked)
    report = initialize(model, endless(), "lora-one", config, loss_fn=off_target)
    assert report.num_batches == len(given) == taken
