"""Whatever fails, and wherever, the model and the process are afterwards what they were before."""

import contextlib
import gc
import inspect
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import eva_kernels
import eva_lora
from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from eva_lora.adapters import same_generators
from support.models import lora, tiny_llama, token_batches
from support.tiny import state_of, tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

OURS = tuple(str(Path(package.__file__).parent) for package in (eva_lora, eva_kernels))
#: What gives things back; an exception of its own inside it is not a failed pass any more.
RESTORING = {"restore", "_switch_cache", "borrowed", "disabled", "hooks", "_set_submodule"}
#: Asked, too, of a tensor that has come to lie where another has been: how often is up to the memory.
NOT_COUNTED_ON = {"is_same"}


class Tracing:
    """Sees every call of a function of ours, and raises from inside one of them."""

    def __init__(self, target=None, number=0, error=KeyboardInterrupt):
        self.calls, self.target, self.number, self.error = Counter(), target, number, error

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            key = (code.co_filename, code.co_name, code.co_firstlineno, code.co_flags)
            self.calls[key] += 1
            if key == self.target and self.calls[key] == self.number:
                raise self.error

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def prepared():
    """A model in a state that no default would restore."""
    model = tiny_model()
    model.train()
    model.get_base_model().blocks[0]["k"].eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    vars(model.get_base_model())["gradient_checkpointing"] = True
    model.register_forward_pre_hook(lambda *_: None)
    return model


def initialise(model, path=None):
    config = EvaConfig(max_batches=3, tau=1.0, max_rank=3)
    return eva_initialize(model, tiny_batches(2), config, progress=False, checkpoint=path, checkpoint_every=path and 1)


def steps():
    """Every function of ours that a run enters, with the first, a middle and the last of its calls."""
    initialise(tiny_model())  # what is done once in a process is done here
    with Tracing() as seen:
        initialise(tiny_model())
    return {
        # A generator is entered again to be closed, where nothing can be raised.
        key: [1] if key[3] & inspect.CO_GENERATOR or key[1] in NOT_COUNTED_ON else sorted({1, (count + 1) // 2, count})
        for key, count in seen.calls.items()
        if key[1] not in RESTORING
    }


@pytest.mark.parametrize("some", [16, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_an_interrupt_at_any_step_changes_nothing(some):
    model = prepared()
    before = state_of(model)
    tried = [(key, number) for key, numbers in steps().items() for number in numbers]
    assert len(tried) > 150
    for key, number in random.Random(0).sample(tried, some or len(tried)):
        with pytest.raises(KeyboardInterrupt), Tracing(key, number):
            initialise(model)
        assert state_of(model) == before, (key, number)
    initialise(model)
    assert state_of(model)["ranks"] != before["ranks"]


def test_an_error_at_any_hook_changes_nothing():
    model = prepared()
    modules = [m for m in model.get_base_model().modules() if hasattr(m, "lora_A")]
    for module in modules:
        for register, batch in ((module.register_forward_pre_hook, 1), (module.register_forward_hook, 2)):
            calls = iter(range(1, 100))

            def fail(*_, calls=calls, batch=batch):
                if next(calls) == batch:
                    raise ArithmeticError

            handle = register(fail)
            before = state_of(model)
            with pytest.raises(ArithmeticError):
                initialise(model)
            assert state_of(model) == before
            handle.remove()


def test_a_loader_that_fails_changes_nothing():
    class Failing:
        def __iter__(self):
            yield tiny_batches(1)[0]
            raise OSError("disk")

    model = prepared()
    before = state_of(model)
    with pytest.raises(OSError, match="disk"):
        eva_initialize(model, Failing(), progress=False)
    assert state_of(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_and_generators_are_given_back(fails):
    """Whatever a loader or a forward_fn does to them."""
    model = prepared()

    def unruly(inner, batch):
        inner(**batch)
        inner.train()
        inner.register_forward_hook(lambda *_: None)
        vars(inner.get_base_model().blocks[1])["gradient_checkpointing"] = True
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.manual_seed(9), random.seed(9), np.random.seed(9)  # noqa: NPY002
        if fails:
            raise RuntimeError("in the middle")

    draws = lambda: (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: E731, NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = draws()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    before = state_of(model)
    try:
        collect(model, tiny_batches(3), EvaConfig(max_batches=2), progress=False, forward_fn=unruly)
    except RuntimeError:
        assert fails
    assert state_of(model) == before
    assert draws() == expected


def test_gradient_checkpointing_is_off_while_the_pass_runs():
    model = lora(tiny_llama())
    model.gradient_checkpointing_enable()
    model.train()
    switched = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    assert switched
    seen = []

    def look(inner, batch):
        seen.append([m.gradient_checkpointing for m in switched])
        inner(**batch)

    collect(model, token_batches(2), EvaConfig(max_batches=2), progress=False, forward_fn=look)
    assert seen == [[False] * len(switched)] * 2
    assert all(m.gradient_checkpointing for m in switched)


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_no_keys_and_values_are_kept_and_the_configs_switch_is_given_back(fails):
    base = tiny_llama()
    model, kept = lora(base), []

    def look(inner, batch):
        kept.append(inner(**batch).past_key_values)
        if fails:
            raise RuntimeError("no further")

    assert base.config.use_cache
    with pytest.raises(RuntimeError, match="no further") if fails else contextlib.nullcontext():
        collect(model, token_batches(2), EvaConfig(max_batches=2), progress=False, forward_fn=look)
    assert base.config.use_cache
    assert kept == ([None] if fails else [None, None])


def test_a_batch_that_asks_for_keys_and_values_has_them():
    kept = []
    batch = {**token_batches(1)[0], "use_cache": True}
    collect(
        lora(tiny_llama()), [batch], EvaConfig(max_batches=1), progress=False,
        forward_fn=lambda inner, fields: kept.append(inner(**fields).past_key_values),
    )  # fmt: skip
    assert kept[0].get_seq_length() == batch["input_ids"].shape[1]


@pytest.mark.parametrize("statistic", ["gram", "subspace"])
def test_the_callers_autocast_rounds_the_forward_and_not_the_statistics(statistic):
    """accelerate and trainers wrap a model's forward, and with it the hooks, in autocast."""
    batches = [{"x": batch["x"]} for batch in tiny_batches(3, (20, 30))]
    config = EvaConfig(max_batches=3, tau=1.0, statistic=statistic)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = collect(tiny_model(), batches, config, progress=False)
    without = collect(tiny_model(), batches, config, progress=False)
    assert torch.equal(statistics.inputs[0].eigenvalues, without.inputs[0].eigenvalues)  # of rows that nothing rounded
    assert not torch.equal(statistics.inputs[-1].eigenvalues, without.inputs[-1].eigenvalues)


def test_eval_methods_that_merge_weights_are_not_called():
    """loralib's ``eval()`` merges the adapter into the weight."""

    class Merging(torch.nn.Linear):
        def train(self, mode=True):
            if not mode:
                pytest.fail("eval() was called")
            return super().train(mode)

    model = tiny_model()
    model.get_base_model().blocks[0]["q"].add_module("merging", Merging(2, 2))
    collect(model, tiny_batches(2), EvaConfig(max_batches=2), progress=False)


# --- what must not have happened before


def test_an_optimizer_that_holds_the_old_parameters_is_found_before_any_forward():
    model = tiny_model()
    eva_plan = plan(collect(model, tiny_batches(2), EvaConfig(max_batches=2), progress=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = state_of(model)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    message = (
        r"^model: an optimizer already holds base_model\.model\.blocks\.0\.q\.lora_A\.default\.weight, .* afterwards"
    )
    with pytest.raises(ValueError, match=message):
        eva_initialize(model, tiny_batches())
    with pytest.raises(ValueError, match=message):
        apply(model, eva_plan)
    model._forward_pre_hooks.clear()
    assert state_of(model) == before
    del optimizer
    assert initialise(model).num_batches == 3


def test_optimizers_are_looked_for_only_where_something_beside_the_model_holds_its_parameters(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("all objects were gone through"))
    initialise(model)
    held = list(model.parameters())
    with pytest.raises(pytest.fail.Exception, match="gone through"):
        initialise(model)
    del held


def test_an_optimizer_nobody_reaches_any_more_is_no_obstacle():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.itself = optimizer  # as schedulers do: only the collector gets rid of it
    del optimizer
    gc.disable()
    try:
        assert initialise(model).num_batches == 3
    finally:
        gc.enable()


def test_an_optimizer_of_other_parameters_is_no_obstacle():
    model = tiny_model()
    optimizers = [torch.optim.SGD(tiny_model().parameters(), lr=0.1)]
    optimizers.append(torch.optim.SGD([model.get_base_model().blocks[0]["q"].base_layer.bias], lr=0.1))
    assert initialise(model).num_batches == 3


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    return torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


def compiled(model):
    model.compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (torch.compile, r"compiled by torch\.compile"),
        (compiled, r"compiled by module\.compile\(\)"),
        (torch.nn.parallel.DistributedDataParallel, "wrapped in DistributedDataParallel"),
        (sharded, "sharded by fully_shard"),
    ],
)
def test_wrapped_models_are_refused_before_a_rank_changes(wrap, said, alone):
    model = tiny_model()
    eva_plan = plan(collect(model, tiny_batches(2), EvaConfig(max_batches=2), progress=False))
    assert eva_plan.ranks != dict.fromkeys(eva_plan.ranks, 2)
    wrapped = wrap(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"^model: it is {said}, and a new rank .* Initialise before wrapping; or"):
        eva_initialize(wrapped, tiny_batches(), progress=False)
    with pytest.raises(ValueError, match=rf"^model: it is {said}"):
        apply(wrapped, eva_plan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_wrapped_model_is_initialised_when_no_rank_changes(alone):
    model, plain = tiny_model(), tiny_model()
    config = EvaConfig(rho=1.0, max_batches=3)
    eva_initialize(torch.nn.parallel.DistributedDataParallel(model), tiny_batches(2), config, progress=False)
    eva_initialize(plain, tiny_batches(2), config, progress=False)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_base_on_the_meta_device_is_named():
    model = tiny_model()
    model.get_base_model().blocks[1]["up"].base_layer.to("meta")
    with pytest.raises(
        ValueError, match=r"^model: 2 weights are on the meta device, the first is base_model\.model\.bl"
    ):
        collect(model, tiny_batches(), progress=False)


def test_one_layer_under_two_names_is_one_layer():
    model = tiny_model()
    blocks = model.get_base_model().blocks
    blocks[1]["up"] = blocks[0]["up"]
    report = initialise(model)
    assert [name for name in report.ranks if name.endswith("up")] == ["blocks.0.up"]
    assert blocks[1]["up"] is blocks[0]["up"]


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_devices_own_generator_is_given_back(kind, monkeypatch):
    states = {}
    module = getattr(torch, kind)

    def set_state(state, device=None):
        states[device] = state

    monkeypatch.setattr(module, "get_rng_state", lambda device=None: states.setdefault(device, "before"))
    monkeypatch.setattr(module, "set_rng_state", set_state)
    with same_generators({torch.device(kind, 0), torch.device("cpu")}):
        assert list(states.values()) == ["before"]
        states.update(dict.fromkeys(states, "drawn from"))
    assert list(states.values()) == ["before"]
