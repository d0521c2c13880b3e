"""Forwards of somebody else's that are watched: the statistics are a pass's, and nothing else is any different."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from eva_lora import EvaConfig, collect, eva_initialize, watching
from eva_lora.planning import merged
from support.bounds import gamma
from support.models import ATTENTION, LINEARS, lora, lora_a_of, tiny_gpt2, tiny_llama, token_batches
from support.pages import blocks
from support.tiny import fingerprint_of, state_of, tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at", "ignore:.*as many sequences as tokens")

SUBSPACE, GRAM = (EvaConfig(statistic=kind) for kind in ("subspace", "gram"))


def padded(shape=(4, 24), *, labels=False):
    """Batches of tokens whose first sequence ends early, with labels for their second half alone."""
    batches = token_batches(5, shape)
    for batch in batches:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        batch["attention_mask"][0, 15:] = 0
        if labels:
            batch["labels"] = batch["input_ids"].masked_fill(torch.arange(shape[1]) < shape[1] // 2, -100)
    return batches


def passed(model, batches, config=None, **options):
    return collect(model, iter(batches), config, progress=False, **options)


def watched(model, call, batches, config=None, **options):
    with watching(model, config, **options) as watch:
        for batch in batches:
            call(batch)
    return watch.statistics()


# The statistics


@pytest.mark.parametrize("config", [SUBSPACE, GRAM], ids=["subspace", "gram"])
def test_statistics_are_bit_equal_to_those_of_a_pass(config):
    batches = padded(labels=True)
    expected = passed(lora(tiny_llama()), batches, config)
    model = lora(tiny_llama())
    found = watched(model, lambda batch: model(**batch), batches, config)
    assert found.sites[0].rows == "attention_mask and labels"
    assert fingerprint_of(found) == fingerprint_of(expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batch: model(batch["x"], batch["attention_mask"]),
        lambda model, batch: model(batch["x"], attention_mask=batch["attention_mask"]),
        lambda model, batch: model.base_model.model(**batch),
    ],
    ids=["by position", "mixed", "what is inside the wrapper"],
)
def test_masks_are_found_however_the_model_is_called(call):
    expected = passed(tiny_model(), tiny_batches())
    model = tiny_model()
    assert fingerprint_of(watched(model, lambda batch: call(model, batch), tiny_batches())) == fingerprint_of(expected)


def test_the_model_inside_may_be_called_without_its_head():
    batches = padded()
    expected = passed(lora(tiny_llama()), batches)
    model = lora(tiny_llama())
    found = watched(model, lambda batch: model.base_model.model.model(**batch), batches)
    assert fingerprint_of(found) == fingerprint_of(expected)


def test_a_mapping_that_is_handed_over_whole_is_the_batch():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, batch):
            return self.inner(batch["x"], batch["attention_mask"])

    expected = passed(tiny_model(), tiny_batches())
    model = Wrapped(tiny_model())
    assert fingerprint_of(watched(model, model, tiny_batches())) == fingerprint_of(expected)


def test_autocast_changes_what_layers_see_and_not_how_it_is_added_up():
    batches = padded()
    model, other = lora(tiny_llama()), lora(tiny_llama())
    with torch.autocast("cpu", torch.bfloat16):
        expected = passed(model, batches, GRAM)
        found = watched(other, lambda batch: other(**batch), batches, GRAM)
    assert fingerprint_of(found) == fingerprint_of(expected)


def test_what_accelerate_prepares_is_watched_like_any_model():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    batches = padded()
    expected = passed(lora(tiny_llama()), batches)
    try:
        model = Accelerator(cpu=True, mixed_precision="no").prepare_model(lora(tiny_llama()))
        assert fingerprint_of(watched(model, lambda b: model(**b), batches)) == fingerprint_of(expected)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_in_inference_mode_layers_share_nothing_since_edits_cannot_be_seen():
    config = EvaConfig(share_inputs=False)
    batches = padded()
    expected = passed(lora(tiny_llama()), batches, config)
    model = lora(tiny_llama())
    with torch.inference_mode():
        found = watched(model, lambda batch: model(**batch), batches, config)
    assert fingerprint_of(found) == fingerprint_of(expected)
    eva_initialize(model, found)
    assert not any(a.is_inference() for a in lora_a_of(model).values())


def test_row_mask_fn_is_given_the_calls_arguments_by_name():
    def keep(call):
        assert set(call) == {"input_ids", "attention_mask"}
        return call["input_ids"] % 2 == 0

    batches = padded()
    expected = passed(lora(tiny_llama()), batches, row_mask_fn=keep)
    model = lora(tiny_llama())
    found = watched(model, lambda batch: model(**batch), batches, row_mask_fn=keep)
    assert fingerprint_of(found) == fingerprint_of(expected)


def test_calls_of_which_no_row_counts_are_batches_without_rows():
    batches = padded()
    batches.insert(2, {**batches[0], "attention_mask": torch.zeros(4, 24, dtype=torch.int64)})
    expected = passed(lora(tiny_llama()), batches)
    model = lora(tiny_llama())
    assert fingerprint_of(watched(model, lambda batch: model(**batch), batches)) == fingerprint_of(expected)


def test_what_statistics_are_made_of_initialises_as_a_pass_does():
    batches = padded()
    config = EvaConfig(max_batches=len(batches))
    models = [lora(tiny_llama()) for _ in range(2)]
    report = eva_initialize(models[0], batches, config, progress=False)
    found = watched(models[1], lambda batch: models[1](**batch), batches, config)
    again = eva_initialize(models[1], found)
    assert again.ranks == report.ranks
    assert len(set(report.ranks.values())) > 1
    theirs = lora_a_of(models[0])
    assert all(torch.equal(a, theirs[name]) for name, a in lora_a_of(models[1]).items())


def test_a_plan_of_statistics_may_have_options_of_its_own():
    model = lora(tiny_llama())
    found = watched(model, lambda batch: model(**batch), padded())
    report = eva_initialize(model, found, replace(found.config, max_rank=5))
    assert max(report.ranks.values()) == 5
    with pytest.raises(ValueError, match="row_mask_fn: expected None beside statistics"):
        eva_initialize(model, found, row_mask_fn=lambda batch: None)
    with pytest.raises(ValueError, match="plan"):
        eva_initialize(tiny_model(), found)


# What a call is


@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_decoding_counts_each_token_once(cache):
    model = lora(tiny_llama()).eval()
    prompts = token_batches(1, (3, 7))[0]["input_ids"]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])  # padded on the left
    new = 6

    def own(call):  # with a dynamic cache a mask's last columns are the call's own tokens
        return call["attention_mask"][:, -call["input_ids"].shape[1] :].bool()

    options = {} if cache else {"row_mask_fn": own}
    with watching(model) as watch, watching(model, **options) as told:
        model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation=cache, disable_compile=True, pad_token_id=0,
        )  # fmt: skip
    found = watch.statistics()
    assert found.num_batches == new
    assert found.num_rows == int(mask.sum()) + 3 * (new - 1)
    assert {entry.num_rows for entry in found.inputs} == {found.num_rows}
    by_hand = told.statistics()
    assert all(
        torch.equal(one.components, other.components) for one, other in zip(found.inputs, by_hand.inputs, strict=True)
    )


def test_generation_by_an_encoder_and_a_decoder_counts_each_token_once():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q", "k", "v", "o"])).eval()
    ids, mask = torch.arange(1, 11).view(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with watching(model) as watch:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found = watch.statistics()
    assert found.num_rows == 8 + 2 * 4
    rows = {site.name: found.inputs[site.input].num_rows for site in found.sites}
    encoder = [name for name in rows if name.startswith("encoder.")]
    across = [name for name in rows if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
    assert {rows[name] for name in encoder + across} == {8}
    assert {rows[name] for name in rows if name not in encoder + across} == {2 * 4}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_is_not_counted_again(reentrant):
    batches = padded(labels=True)
    plain, model = lora(tiny_llama()).train(), lora(tiny_llama()).train()
    expected = watched(plain, lambda batch: plain(**batch), batches)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layer, calls = model.base_model.model.model.layers[0].self_attn.q_proj, []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = watched(model, lambda batch: model(**batch).loss.backward(), batches)
    assert len(calls) == 2 * len(batches)  # they were computed again
    assert fingerprint_of(found) == fingerprint_of(expected)


def test_a_layer_that_is_called_by_itself_is_no_call_of_the_model():
    model = tiny_model()
    expected = passed(tiny_model(), tiny_batches())
    layer = model.base_model.model.blocks[0]["q"]

    def call(batch):
        layer(1e3 * batch["x"])
        model(**batch)

    assert fingerprint_of(watched(model, call, tiny_batches())) == fingerprint_of(expected)


def test_watchers_may_be_nested_and_one_may_follow_another():
    model, batches = tiny_model(), tiny_batches()
    with watching(model) as outer, watching(model) as inner:
        for batch in batches:
            model(**batch)
    again = watched(model, lambda batch: model(**batch), batches)
    assert fingerprint_of(outer.statistics()) == fingerprint_of(inner.statistics()) == fingerprint_of(again)


def test_when_all_have_converged_nothing_more_is_taken_in():
    model = tiny_model()
    config = EvaConfig(tau=0.5)
    expected = passed(tiny_model(), tiny_batches(40), config)
    with watching(model, config) as watch:
        calls = 0
        for batch in tiny_batches(40):
            if watch.converged:
                break
            model(**batch)
            calls += 1
        for batch in tiny_batches(3, seed=9):
            model(**batch)
    assert 0 < calls == watch.num_batches < 39
    assert watch.stop_reason == "all layers converged"
    assert watch.num_rows == watch.statistics().num_rows
    assert fingerprint_of(watch.statistics()) == fingerprint_of(expected)


def test_without_a_bound_there_is_none_and_with_one_it_holds(monkeypatch):
    monkeypatch.setattr("eva_lora.collecting.run.DEFAULT_MAX_BATCHES", 2)  # of a pass
    for bound, seen in ((None, 8), (3, 3)):
        model = tiny_model()
        with watching(model, EvaConfig(max_batches=bound, tau=1.0)) as watch, torch.no_grad():
            for batch in tiny_batches(8):
                model(**batch)
        assert watch.num_batches == seen
        assert not watch.converged


def test_layers_may_be_reached_by_different_calls_but_each_by_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))

        def forward(self, x, which="a"):
            return getattr(self, which)(x)

    model = peft.get_peft_model(Two(), peft.LoraConfig(r=2, target_modules=["a.0", "b.0"]))
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    with watching(model, EvaConfig(tau=0.0)) as watch:
        for _ in range(6):
            model(rows)
        assert not watch.converged  # one of the two has not been reached
        model(rows, "b")
    assert [entry.num_rows for entry in watch.statistics().inputs] == [180, 30]
    with watching(model) as watch:
        model(rows)
    with pytest.raises(ValueError, match=r"1 LoRA layers saw no input in the 1 calls watched: b\.0"):
        watch.statistics()


# What is left alone


class Attending(nn.Module):
    """An attention whose dropout draws, and whose output projection's input is computed a second time."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def attending():
    torch.manual_seed(0)
    return peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=["attention"]))


def trained(make, batches, around):
    """Losses, gradients and generators after a few steps' forwards and backwards, watched or not."""
    model = make().train()
    before = state_of(model)
    torch.manual_seed(3)
    seen = []
    with around(model):
        for batch in batches:
            out = model(**batch)
            loss = out.loss if hasattr(out, "loss") else out.square().mean()
            loss.backward()
            seen += [loss.detach(), torch.get_rng_state()]
    seen += [p.grad for p in model.parameters() if p.grad is not None]
    return seen, before, state_of(model)


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (lambda: lora(tiny_llama(), lora_dropout=0.2), padded(labels=True)),
        (lambda: lora(tiny_gpt2(), target_modules=["c_attn", "c_fc"]), padded(labels=True)),
        (attending, [{"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i))} for i in range(4)]),
    ],
    ids=["LoRA dropout", "dropout", "attention"],
)
def test_outputs_losses_gradients_and_generators_are_those_of_a_run_without(make, batches):
    alone, _, _ = trained(make, batches, lambda model: nullcontext())
    beside, before, after = trained(make, batches, watching)
    assert len(alone) == len(beside) > 2 * len(batches)
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
    random = {"random": before["random"]}  # which the model's dropout has moved on, by as much as without
    if make is attending:  # PEFT makes the weights of an attention's projection anew in every forward
        random["parameters"] = before["parameters"]
    assert {**after, **random} == before


@pytest.mark.parametrize("fails", [False, True])
def test_after_the_block_the_model_is_as_it_was(fails):
    model = lora(tiny_llama(), lora_dropout=0.1)
    model.train()
    model.base_model.model.model.layers[1].eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = state_of(model)
    for without_adapter in (False, True):
        with (
            pytest.raises(KeyboardInterrupt) if fails else nullcontext(),
            watching(model, without_adapter=without_adapter),
            torch.no_grad(),
        ):
            model(**padded()[0])
            if fails:
                raise KeyboardInterrupt
        torch.manual_seed(0)  # the model's own dropout has drawn
        assert {**state_of(model), "random": before["random"]} == before


def test_nothing_is_kept_but_the_statistics():
    """Neither an activation beyond its call nor, after the block, anything at all."""

    def alive():
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))

    model, batches, inputs, sizes = lora(tiny_llama()), padded(), [], []
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]

    def run(watch=None):
        handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for m in layers]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
                if watch is not None:
                    sizes.append(sum(entry.statistic.nbytes() for entry in watch._run.capture.inputs))
        for handle in handles:
            handle.remove()

    run()
    before = alive()
    with watching(model) as watch:
        run(watch)
        assert len(inputs) == 2 * len(layers) * len(batches)
        assert not any(x() is not None for x in inputs)
    assert len(set(sizes)) == 1
    del watch
    assert alive() == before


def bytes_left(run):
    """What a run leaves allocated by PyTorch, over what there was: all of it, not only what Python can name."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
        gc.collect()
    return sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    ("ends", "without_adapter"),
    [
        ("statistics()", False),
        ("an exception", False),
        pytest.param("without a word", False, marks=pytest.mark.slow),
        pytest.param("statistics()", True, marks=pytest.mark.slow),
    ],
)
def test_after_the_block_as_much_memory_is_held_as_by_a_run_without_it(ends, without_adapter):
    model, kept = lora(tiny_llama(), target_modules=ATTENTION[:2]).train(), []
    batches = padded(labels=True)[:2]

    def run(around):
        with contextlib.suppress(KeyError), around as watch:
            for batch in batches:
                with torch.set_grad_enabled(not without_adapter):
                    loss = model(**batch).loss
                if not without_adapter:
                    loss.backward()
                del loss
            if ends == "an exception":
                raise KeyError
        if ends == "statistics()" and watch is not None:
            kept.append(watch.statistics())

    def watched_run():
        run(watching(model, SUBSPACE, without_adapter=without_adapter))

    model(**batches[0]).loss.backward()  # gradients are there from now on
    run(watching(model))  # and what is made once in a process
    kept.clear()
    alone = bytes_left(lambda: run(nullcontext()))
    beside = bytes_left(watched_run)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in kept for t in tensors_of(s)}
    assert beside - alone == sum(own.values())
    assert bool(own) == (ends == "statistics()")


def tensors_of(statistics):
    return [value for entry in statistics.inputs for value in vars(entry).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_is_copied_within_the_block_is_a_model_like_any_other(copied):
    """As TRL copies a model for its reference. Calls of the copy are not the model's."""
    expected = passed(tiny_model(), tiny_batches())
    model = tiny_model()
    with watching(model) as watch:
        for batch in tiny_batches():
            model(**batch)
            copied(model)(**batch)
    assert fingerprint_of(watch.statistics()) == fingerprint_of(expected)


def test_a_model_that_was_not_called_is_said_to_have_been_not_called():
    with watching(tiny_model()) as watch:
        copy.deepcopy(tiny_model())(**tiny_batches()[0])
    with pytest.raises(ValueError, match=r"^watch: the model was not called within the block"):
        watch.statistics()


def test_calls_of_threads_at_once_are_refused():
    model = tiny_model()
    inside = model.base_model.model.blocks[0]["q"]
    inside.register_forward_pre_hook(lambda *_: None if begun else begin())
    begun = []

    def begin():  # another call, from the middle of the first one
        begun.append(threading.Thread(target=lambda: model(**tiny_batches()[0])))
        begun[0].start()
        begun[0].join()

    with watching(model) as watch:
        model(**tiny_batches()[0])
    with pytest.raises(RuntimeError, match=r"^watch: several threads called the model at once"):
        watch.statistics()


# An adapter that acts


def with_b(model, adapter="default"):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and f".{adapter}." in name:
                parameter.fill_(0.01)
    return model


def test_an_adapter_that_acts_is_refused_at_the_call_and_one_that_is_switched_off_is_not():
    batches = padded()
    expected = passed(lora(tiny_llama()), batches)
    model = with_b(lora(tiny_llama()))
    with pytest.raises(ValueError, match="an adapter is switched on whose B is not zero in 21 layers, the first is"):
        watched(model, lambda batch: model(**batch), batches)

    def switched_off(batch):
        with model.disable_adapter():
            model(**batch)

    outputs = []
    assert fingerprint_of(watched(model, switched_off, batches)) == fingerprint_of(expected)
    found = watched(model, lambda batch: outputs.append(model(**batch).logits), batches, without_adapter=True)
    assert fingerprint_of(found) == fingerprint_of(expected)
    with model.disable_adapter():
        assert torch.equal(outputs[0], model(**batches[0]).logits)
    assert not torch.equal(outputs[0], model(**batches[0]).logits)


def test_training_within_the_block_is_seen_at_the_next_call():
    model, batch = lora(tiny_llama()), padded(labels=True)[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ValueError, match="an adapter is switched on"), watching(model):  # noqa: PT012 - the second call
        model(**batch).loss.backward()
        optimizer.step()
        model(**batch)


def test_another_adapter_that_acts_is_refused_too():
    model = lora(tiny_llama())
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=LINEARS))
    batches = padded()

    def as_reference(batch):
        model.set_adapter("ref")
        try:
            model(**batch)
        finally:
            model.set_adapter("default")

    expected = passed(lora(tiny_llama()), batches)
    assert fingerprint_of(watched(model, as_reference, batches)) == fingerprint_of(expected)
    with_b(model, "ref")
    watched(model, lambda batch: model(**batch), batches)  # as long as it is not switched on
    with pytest.raises(ValueError, match="an adapter is switched on"):
        watched(model, as_reference, batches)


def test_an_adapter_that_is_merged_within_the_block_acts():
    model = with_b(lora(tiny_llama()))
    with pytest.raises(ValueError, match="an adapter is switched on"), watching(model):  # noqa: PT012
        model.merge_adapter()
        model(**padded()[0])


# What fails


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, error=None, after=1):
        if error is not None and after == 0:
            raise error
        x = self.first(x)
        if error is not None:
            raise error
        return self.second(x)


@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("more", [0, 2])
def test_a_call_that_broke_off_halfway_leaves_no_statistics(error, more):
    model = peft.get_peft_model(Failing(), peft.LoraConfig(r=2, target_modules=["first", "second"]))
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    with watching(model) as watch:
        model(rows)
        with pytest.raises(type(error)):
            model(rows, error)
        for _ in range(more):
            model(rows)
    with pytest.raises(RuntimeError, match=r"watch: call 2 of the model broke off after some of its layers"):
        watch.statistics()


@pytest.mark.parametrize("error", [ValueError("caught"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_call_that_broke_off_before_any_layer_does_no_harm(error):
    def make():
        torch.manual_seed(0)
        return peft.get_peft_model(Failing(), peft.LoraConfig(r=2, target_modules=["first", "second"]))

    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model = make()
    with watching(model) as watch:
        model(rows)
        with pytest.raises(type(error)):
            model(rows, error, 0)
        try:
            raise LookupError  # what somebody handles meanwhile is none of the call's
        except LookupError:
            model(rows)
    assert fingerprint_of(watch.statistics()) == fingerprint_of(passed(make(), [{"x": rows}] * 2))


def layer_of(model):
    return model.base_model.model.first


def without_hooks(model):
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def fused_later(model):
    def apply_lora_mlp(rows):
        return rows

    model.base_model.model.forward = apply_lora_mlp


COME_BETWEEN = {
    "hooks of one layer": (lambda m: layer_of(m)._forward_pre_hooks.clear(), "a hook was taken off layer first"),
    "hooks of all": (without_hooks, "a hook was taken off layer first"),
    "the model's hooks": (lambda m: m._forward_pre_hooks.clear(), "a hook was taken off the model"),
    "what ends a call": (lambda m: m._forward_hooks.clear(), "a hook was taken off the model"),
    "merged and unloaded": (lambda m: m.merge_and_unload(), "layer first was taken out of the model"),
    "one replaced": (lambda m: setattr(m.base_model.model, "first", nn.Linear(6, 6)), "layer first was taken out"),
    "fused": (fused_later, "fused kernels were put in the place of layers"),
}


@pytest.mark.parametrize("what", COME_BETWEEN)
@pytest.mark.parametrize("asked", ["within", "after"])
def test_what_takes_hooks_or_layers_away_leaves_no_statistics(what, asked):
    come, message = COME_BETWEEN[what]
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model = peft.get_peft_model(Failing(), peft.LoraConfig(r=2, target_modules=["first", "second"]))
    with watching(model) as watch:
        model(rows)
        come(model)
        model(rows)
        if asked == "within":
            with pytest.raises(RuntimeError, match=f"watch: {message}"):
                watch.statistics()
    with pytest.raises(RuntimeError, match=f"watch: {message}"):
        watch.statistics()


def test_statistics_that_were_asked_for_before_a_layer_is_replaced_are_those_until_then():
    def make():
        torch.manual_seed(0)
        return peft.get_peft_model(Failing(), peft.LoraConfig(r=2, target_modules=["first", "second"]))

    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model = make()
    with watching(model) as watch:
        model(rows)
        watch.statistics()
        model.merge_and_unload()
    assert fingerprint_of(watch.statistics()) == fingerprint_of(passed(make(), [{"x": rows}]))


def test_nan_is_named_in_the_call_that_brings_it():
    model = tiny_model()
    batch = tiny_batches(1)[0]
    batch["x"][0, 0, 0] = torch.nan
    batch["attention_mask"][:] = True
    with watching(model) as watch:
        with pytest.raises(ValueError, match="batch 1: NaN or Inf reached the input of"):
            model(**batch)
        model(**tiny_batches(1)[0])  # is no longer taken in
    with pytest.raises(RuntimeError, match="watch: call"):
        watch.statistics()


def fused_kernels(model):
    def apply_lora_mlp(x):
        return x

    model.base_model.model.model.layers[0].mlp.forward = apply_lora_mlp
    return model


REFUSED = {
    "compiled": (lambda: torch.compile(lora(tiny_llama())), "it is compiled by torch"),
    "in threads": (lambda: nn.DataParallel(lora(tiny_llama())), "wrapped in DataParallel"),
    "fused": (lambda: fused_kernels(lora(tiny_llama())), "fused kernels of Unsloth or axolotl"),
    "no layers": (tiny_llama, "found no LoRA layers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_watched_is_refused_before_it_is_called(what):
    make, message = REFUSED[what]
    model = make()
    with pytest.raises(ValueError, match=message), watching(model):
        pytest.fail("the block was entered")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"), watching(None):
        pytest.fail("the block was entered")


def test_fused_kernels_can_be_watched_without_the_adapter():
    model = fused_kernels(lora(tiny_llama(), target_modules=ATTENTION))
    found = watched(model, lambda batch: model(**batch), padded(), without_adapter=True)
    assert fingerprint_of(found) == fingerprint_of(passed(lora(tiny_llama(), target_modules=ATTENTION), padded()))


def test_the_page_on_watching_runs_as_it_stands():
    batches = padded()

    def evaluate(model):
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    plain = [b.code for b in blocks("docs/free.md") if b.language == "python" and "trainer" not in b.code]
    assert len(plain) == 2  # those with trainers are run in test_trainers.py
    for code in plain:
        names = {"model": lora(tiny_llama()), "loader": batches, "evaluate": evaluate}
        exec(compile(code, "free.md", "exec"), {"watching": watching, "eva_initialize": eva_initialize, **names})
        assert lora_a_of(names["model"])


def test_whole_moments_of_several_processes_add_up():
    """As those of one process that saw all rows, about the shift of each."""
    config, batches = EvaConfig(statistic="gram", keep_moments=True, max_batches=3), token_batches(6)
    halves = [collect(lora(tiny_llama()), part, config, progress=False) for part in (batches[:3], batches[3:])]
    whole = collect(lora(tiny_llama()), batches, replace(config, max_batches=6), progress=False)
    for entry, expected in zip(merged(halves).inputs, whole.inputs, strict=True):
        scale = expected.moment.diagonal().sqrt()
        error = (entry.moment - expected.moment).abs() / torch.outer(scale, scale)
        assert error.max() <= gamma(expected.num_rows)  # of rows that come in float32
    less = [halves[0], replace(halves[1], inputs=[replace(entry, moment=None) for entry in halves[1].inputs])]
    assert all(entry.moment is None for entry in merged(less).inputs)
