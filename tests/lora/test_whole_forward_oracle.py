"""Whatever the pass spares itself, its layers are fed what a plain call of the model would have fed them."""

import inspect
import itertools
import random
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from eva_lora import EvaConfig, collect
from eva_lora.collecting import ending, forwards
from eva_lora.collecting.capture import Capture
from eva_lora.collecting.inputs import Call
from eva_lora.collecting.origins import Origins
from eva_lora.collecting.rerunning import ForwardState
from eva_lora.collecting.rows import RowMask, RowMemory
from support.kinds import call
from support.models import lora, tiny_llama, token_batches
from support.oracle import assert_rows_are_the_plain_calls, rows_taken
from support.other_kinds import OTHER_KINDS
from support.peft_kinds import KINDS
from support.stateful import OPAQUE, PLACES, in_place
from support.tiny import fingerprint_of

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at", "ignore:the inputs of")

D, TOKENS = 4, 5
PARAMETERS = inspect.signature(LlamaForCausalLM.forward).parameters
LOGITS_TO_KEEP = next(name for name in PARAMETERS if name.endswith("logits_to_keep"))  # "num_…" in older transformers
SPARED_FROM = 3  # the first batch, from 1, whose forward may be spared its rest


@pytest.fixture
def looked_at(monkeypatch):
    """Every other forward is looked at, operation by operation, as are those that shapes do not tell enough of."""
    looks = itertools.cycle([False, True])
    monkeypatch.setattr(RowMask, "leaves_rows_out", True)
    monkeypatch.setattr(RowMemory, "is_unsure", lambda self: next(looks))
    looked = []
    monkeypatch.setattr(Origins, "__enter__", lambda self, enter=Origins.__enter__: looked.append(1) or enter(self))
    yield
    assert looked


@pytest.mark.parametrize("kind", [*(kind.parameter() for kind in KINDS), *OTHER_KINDS])
@pytest.mark.usefixtures("looked_at")
def test_every_kind_of_layer(kind):
    batches = kind.batches()
    assert_rows_are_the_plain_calls(kind.model, batches, max(len(batches), SPARED_FROM + 2), **kind.config)


def padded_batches():
    batches = token_batches(5)
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 15:], mask[2, 7:] = 0, 0
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        batch.update(attention_mask=mask, labels=labels)
    return batches


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"], ["lm_head"]], ids=str)
def test_masked_rows_alone_are_left_out(targets):
    keep = lambda batch: batch["labels"] != -100  # noqa: E731
    num_rows = assert_rows_are_the_plain_calls(
        lambda: lora(tiny_llama(), target_modules=targets), padded_batches(), 5, keep=keep
    )
    assert num_rows == sum(int(keep(batch).sum()) for batch in padded_batches())


class Scripted(nn.Module):
    """A model that does with a batch what the batch says, one step after another.

    Steps: a layer's name calls it, with ":kwargs" by keyword, with ":aside" without going on from its output; "head" is
    its output embedding; "feed" goes on from the logits, "keep" keeps a part of them and "recall" adds it in a later
    forward; "edit" changes the hidden state in place, "branch" goes on depending on a value, "count" edits a buffer,
    "look" writes a value to it, "recount" adds it and "noise" draws random numbers; "tally" counts in a number,
    "log" in a list, and both change the hidden state.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.tied = (nn.Linear(D, D) for _ in range(3))
        self.tied.weight = self.b.weight
        self.head = nn.Linear(D, 2 * D)
        self.register_buffer("counter", torch.zeros(()))
        self.kept, self.tally, self.log = None, 0, []

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, steps, labels=None):
        hidden, logits = x + 0, None
        for step in steps:
            name, _, how = step.partition(":")
            if name == "head":
                logits = self.head(hidden)
            elif name == "feed":
                hidden = logits[..., :D] if logits is not None else hidden
            elif name == "keep":
                self.kept = None if logits is None else logits[..., :D]
            elif name == "recall":
                hidden = hidden if self.kept is None else hidden + self.kept
            elif name == "edit":
                hidden.mul_(0.5)
            elif name == "count":
                self.counter += 1
            elif name == "look":
                self.counter[None][:1] = float(hidden.sum())
            elif name == "recount":
                hidden = hidden + self.counter
            elif name == "noise":
                torch.rand(())
            elif name == "tally":
                self.tally += 1
                hidden = hidden * self.tally if self.tally % 2 else hidden + self.tally
            elif name == "log":
                self.log.append(name)
                hidden = hidden / len(self.log)
            elif name == "again":
                pass
            elif name == "branch":
                hidden = hidden + 1 if float((hidden if logits is None else logits).sum()) > 0 else hidden * 0.5
            else:
                layer = getattr(self, name)
                keyword = "x" if hasattr(layer, "lora_A") else "input"
                out = layer(**{keyword: hidden}) if how == "kwargs" else layer(hidden)
                hidden = hidden if how == "aside" else torch.tanh(out)
        loss = None
        if labels is not None and logits is not None:
            loss = functional.cross_entropy(logits.reshape(-1, 2 * D), labels.reshape(-1))
        return hidden, logits, loss


def scripted(targets=("a", "b", "tied")):
    def make():
        return peft.get_peft_model(Scripted(), peft.LoraConfig(r=2, target_modules=list(targets)))

    return make


def script_batches(scripts, labels=True):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(2, TOKENS, D, generator=generator), "steps": list(steps),
            **({"labels": torch.randint(0, 2 * D, (2, TOKENS), generator=generator)} if labels else {}),
        }
        for steps in scripts
    ]  # fmt: skip


def run(model, batch):
    return model(**batch)


PLAIN = ["a:aside", "b", "tied", "head"]
LATER = {
    "called more often": ["a:aside", "b", "b", "tied", "a", "tied", "head"],
    "called less often": ["a", "head"],
    "called after the head": [*PLAIN, "a"],
    "called after the head, by keyword": [*PLAIN, "b:kwargs", "tied:aside"],
    "fed from the logits": [*PLAIN, "feed", "b", "a"],
    "after a look at the logits": [*PLAIN, "branch", "a"],
    "after a look at the hidden state": ["a", "branch", "b", "head", "tied"],
    "between two heads": ["a", "head", "b", "tied", "head"],
    "the input edited before and after": ["edit", "a", "b", "head", "edit", "tied"],
    "a buffer changed after the head": [*PLAIN, "count"],
    "a look at the hidden state": [*PLAIN, "look", "noise"],
    "a draw after the head": [*PLAIN, "noise", "a"],
    "logits kept": [*PLAIN, "keep"],
    "sharing, and parting after the head": ["a:aside", "b:aside", "head", "tied", "a:aside", "b"],
}
HARMLESS = {"called more often", "called less often", "a buffer changed after the head", "a look at the hidden state"}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.filterwarnings("ignore:batch .* every forward runs whole")
@pytest.mark.usefixtures("looked_at")
def test_what_only_some_batches_do(later, at):
    scripts = [PLAIN] * 6
    scripts[at] = LATER[later]
    assert_rows_are_the_plain_calls(scripted(), script_batches(scripts), 6, forward=run, uncalled="default")


@pytest.mark.parametrize("later", sorted(HARMLESS))
def test_what_has_nothing_to_do_with_the_logits_goes_on_as_ever(later, recwarn):
    scripts = [PLAIN] * 3 + [LATER[later], ["recount", *PLAIN], LATER[later], ["recount", *PLAIN]]
    assert_rows_are_the_plain_calls(scripted(), script_batches(scripts), 7, forward=run)
    assert not any("output head" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("later", sorted({*LATER} - HARMLESS))
def test_giving_the_saving_up_is_said_once(later):
    scripts = [PLAIN] * 3 + [LATER[later], PLAIN, LATER[later]]
    with pytest.warns(UserWarning, match=r"^batch 4: .* every forward runs whole") as told:
        assert_rows_are_the_plain_calls(scripted(), script_batches(scripts), 6, forward=run)
    assert sum("output head" in str(warning.message) for warning in told) == 1


def test_a_layer_that_is_always_called_after_the_head_is_no_news(recwarn):
    scripts = [LATER["called after the head"]] * 4
    assert_rows_are_the_plain_calls(scripted(), script_batches(scripts), 4, forward=run)
    assert not any("output head" in str(warning.message) for warning in recwarn)


STEPS = st.sampled_from(
    [
        "a", "b", "tied", "head", "a:aside", "b:aside", "tied:aside", "b:kwargs", "feed", "edit", "branch", "count",
        "noise", "keep", "recall", "look", "recount", "tally", "log",
    ]
)  # fmt: skip
SCRIPTS = st.lists(st.lists(STEPS, min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@example([["head", "recall", "keep", "a"]], False, 0, ("a", "b", "tied"))  # kept, but run again for the layer
@given(SCRIPTS, st.booleans(), st.sampled_from([0, 1, 2]), st.sampled_from([("a", "b", "tied"), ("a",), ("b", "head")]))
@pytest.mark.filterwarnings("ignore:batch .* every forward runs whole")
def test_any_module(scripts, labels, whole_at_first, targets):
    batches = script_batches([["a:aside", "b:aside", *script] for script in scripts], labels)
    compare = partial(
        assert_rows_are_the_plain_calls, scripted(targets), batches, len(batches), forward=run, uncalled="default"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "WHOLE_AT_FIRST", whole_at_first)
        try:
            compare()
        except RuntimeError as refused:
            # Said, never silent: an edit between two layers that have shared until then; logits that are kept and read.
            if "share_inputs=False" not in str(refused) and "early_stop=False" not in str(refused):
                raise
            compare(share_inputs=False, early_stop=False)


EDITED = r"^batch 4: layer a is called after .* has edited the batch, a parameter, a buffer or .* early_stop=False"


def test_a_batch_that_was_changed_in_place_is_not_run_again():
    class Editing(Scripted):
        def forward(self, x, steps, labels=None):
            x.mul_(0.5)
            return super().forward(x, steps, labels)

    def make():
        return peft.get_peft_model(Editing(), peft.LoraConfig(r=2, target_modules=["a", "b", "tied"]))

    assert_rows_are_the_plain_calls(make, script_batches([PLAIN] * 5), 5, forward=run)
    batches = script_batches([PLAIN] * 3 + [LATER["called after the head"]])
    with pytest.raises(RuntimeError, match=EDITED):
        assert_rows_are_the_plain_calls(make, batches, 4, forward=run)
    assert_rows_are_the_plain_calls(make, batches, 4, forward=run, early_stop=False)


@pytest.mark.filterwarnings("ignore:batch .* every forward runs whole")
@pytest.mark.parametrize("steps", [["tally"], ["log"], ["tally", "log"], ["recall"]], ids=" ".join)
@pytest.mark.parametrize("later", [[*PLAIN, "a"], [*PLAIN, "keep"], [*PLAIN, "branch", "tally", "log", "a"]], ids=str)
def test_a_forward_that_is_run_again_finds_the_attributes_that_the_first_one_found(steps, later):
    scripts = [[*steps, *PLAIN]] * 3 + [[*steps, *later]] + [[*steps, *PLAIN]] * 2
    assert_rows_are_the_plain_calls(scripted(), script_batches(scripts), 6, forward=run)


class Counting(Scripted):
    """What its forward computes depends on the number of forwards before."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x, steps, labels=None):
        return super().forward(x / self.count(), steps, labels)


def counting(place):
    def make():
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        return peft.get_peft_model(Counting(place()), peft.LoraConfig(r=2, target_modules=["a", "b", "tied"]))

    return make


AGAIN = [PLAIN] * 3 + [LATER["called after the head"]] + [PLAIN] * 2  # the fourth is run again


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_that_is_run_again_finds_whatever_the_model_holds_as_it_was(place):
    with pytest.warns(UserWarning, match=r"^batch 4: layer a is called after the output head"):
        assert_rows_are_the_plain_calls(counting(PLACES[place]), script_batches(AGAIN), 6, forward=run)


def test_a_tensor_that_a_model_holds_and_edits_is_not_put_back():
    with pytest.raises(RuntimeError, match=EDITED):
        assert_rows_are_the_plain_calls(counting(in_place), script_batches(AGAIN), 6, forward=run)
    assert_rows_are_the_plain_calls(counting(in_place), script_batches(AGAIN), 6, forward=run, early_stop=False)


@pytest.mark.parametrize("place", OPAQUE)
def test_a_model_that_holds_what_nobody_can_look_into_runs_whole(place, recwarn):
    assert_rows_are_the_plain_calls(counting(OPAQUE[place]), script_batches(AGAIN), 6, forward=run)
    assert not any("has to be run again" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("kind", [*(kind.parameter() for kind in KINDS), *OTHER_KINDS])
def test_every_kind_of_model_can_be_looked_into(kind):
    """Otherwise nothing would be spared."""
    state = ForwardState(kind.model().modules())
    assert state.note(tree_leaves(kind.batches())) == ""
    assert state.restore()


class Box:
    """A place for anything."""

    value = 0


class Keeping(Scripted):
    """Keeps its logits in ``box`` and adds them in the next forward."""

    def __init__(self, box):
        super().__init__()
        self.find = lambda: box

    def forward(self, x, steps, labels=None):
        hidden, logits, loss = super().forward(x + self.find().value, steps, labels)
        self.find().value = logits[..., :D]
        return hidden, logits, loss


GLOBALS = {}


def keeping(where):
    def make():
        GLOBALS["box"] = Box()
        model = Keeping(GLOBALS["box"])
        if where == "a global variable":
            model.find = a_global_box
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a", "b", "tied"]))

    return make


def a_global_box():
    return GLOBALS["box"]


def test_a_model_that_reads_what_it_kept_in_an_object_is_run_again():
    with pytest.warns(UserWarning, match=r"^batch 2: something keeps .*"):
        assert_rows_are_the_plain_calls(keeping("an object"), script_batches([PLAIN] * 4), 4, forward=run)


def test_a_model_that_reads_what_it_kept_in_a_global_variable_is_not_run_again():
    make, batches, says = keeping("a global variable"), script_batches([PLAIN] * 4), r"^batch 2: something keeps .*"
    with pytest.warns(UserWarning, match=says), pytest.raises(RuntimeError, match=says + "early_stop=False"):
        assert_rows_are_the_plain_calls(make, batches, 4, forward=run)
    assert_rows_are_the_plain_calls(make, batches, 4, forward=run, early_stop=False)


def test_a_batch_with_an_object_that_the_forward_changes_runs_whole(recwarn):
    class Counting(Scripted):
        def forward(self, x, steps, box, labels=None):
            box.value += 1
            return super().forward(x * box.value, steps, labels)

    def make():
        return peft.get_peft_model(Counting(), peft.LoraConfig(r=2, target_modules=["a", "b", "tied"]))

    scripts = [PLAIN] * 3 + [LATER["called after the head"], PLAIN]
    batches = [{**batch, "box": Box()} for batch in script_batches(scripts)]
    assert_rows_are_the_plain_calls(make, batches, 5, forward=run)
    assert not any("has to be run again" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("cut", [4, 5])
def test_a_pass_that_goes_on_after_the_saving_was_given_up_goes_on_whole(cut, tmp_path, recwarn):
    batches = script_batches([PLAIN] * 3 + [LATER["called after the head"]] + [PLAIN] * 3)

    def statistics(loader, **options):
        model, values = scripted()(), []
        model.base_model.model.head.register_forward_hook(lambda _, args, out: values.append(not out.is_meta))
        made = collect(model, loader, EvaConfig(max_batches=len(batches), tau=1.0), progress=False, **options)
        return fingerprint_of(made), values

    def cut_off():
        yield from batches[:cut]
        raise KeyboardInterrupt

    expected, values = statistics(batches)
    assert values == [True, False, False, False, True, True, True, True]  # the fourth is run again
    options = {"checkpoint": tmp_path / "pass.safetensors", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        statistics(cut_off(), **options)
    recwarn.clear()
    assert statistics(batches, **options) == (expected, [True] * (len(batches) - cut))
    assert not any("output head" in str(warning.message) for warning in recwarn)


def test_the_heads_product_is_spared():
    """Otherwise nothing above would be at stake."""
    values = []
    model = lora(tiny_llama())
    model.base_model.model.lm_head.register_forward_hook(lambda _, args, out: values.append(not out.is_meta))

    rows_taken(model, padded_batches(), 5)
    assert values == [True, False, False, False, False]


LOGITS = {
    "truth": lambda x: bool(x.sum() > 0),
    "number": lambda x: float(x.sum()),
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "array on the host": lambda x: x.cpu().numpy(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "close": lambda x: torch.allclose(x, x),
    "contains": lambda x: 1.0 in x,
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "rows by a mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "counts": lambda x: torch.bincount(x.argmax(-1).flatten()),
    "repeats": lambda x: torch.repeat_interleave(x.argmax(-1)),
    "an index": lambda x: list(range(100))[x.argmax()],
    "a slice": lambda x: torch.ones(99)[: x.argmax()],
    "written to another": lambda x: torch.zeros(x.shape).copy_(x),
    "added to another": lambda x: torch.zeros(x.shape).add_(x),
    "out": lambda x: torch.add(x, x, out=torch.zeros(x.shape)),
    "dropout": lambda x: functional.dropout(x, 0.5, True),
    "a draw": lambda x: torch.multinomial(x.softmax(-1), 1),
    "noise": lambda x: x + torch.randn_like(x),
    "address": lambda x: x.data_ptr(),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),
}


@pytest.mark.parametrize("asks", LOGITS)
def test_what_asks_for_values_that_are_not_there_raises(asks):
    head, hidden = nn.Linear(D, 8), torch.randn(6, D)
    with torch.no_grad(), ending.WithoutValues() as rest:
        (x,) = rest.emptied((hidden,))
        logits = head(x)
        assert (logits.shape, logits.dtype, logits.is_meta) == ((6, 8), torch.float32, True)
        with pytest.raises(Exception):  # noqa: B017, PT011 - each operation has an error of its own
            LOGITS[asks](logits)
    with torch.no_grad():
        LOGITS[asks](head(hidden))  # with values it goes through


class Catching(Scripted):
    """Calls a layer after the head where the logits say so, and takes any failure for a no."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, x, steps, labels=None):
        hidden, logits, loss = super().forward(x, steps, labels)
        try:
            self.ask(logits[0])
            if steps[-1] == "again":
                self.a(hidden)
        except Exception:
            pass
        return hidden, logits, loss


@pytest.mark.filterwarnings("ignore:batch .* every forward runs whole", "ignore:.*__array__")
@pytest.mark.parametrize("asks", sorted({*LOGITS} - {"dlpack"}))  # compiled code that PyTorch does not see called
def test_what_asks_for_values_and_catches_the_refusal_runs_whole(asks):
    """The layer is called in the third batch alone, after the refusal."""

    def make():
        return peft.get_peft_model(Catching(LOGITS[asks]), peft.LoraConfig(r=2, target_modules=["a", "b", "tied"]))

    scripts = [PLAIN, PLAIN, [*PLAIN, "again"], PLAIN]
    assert_rows_are_the_plain_calls(make, script_batches(scripts), 4, forward=run)


def test_a_head_that_changes_its_input_needs_values():
    with torch.no_grad(), ending.WithoutValues() as rest:
        (x,) = rest.emptied((torch.ones(6, D),))
        with pytest.raises(ending.NeedsValues):
            x[:2].mul_(2)


@contextmanager
def broken(saving):
    with pytest.MonkeyPatch.context() as patch:
        if saving == "the end, without a look at what follows":
            patch.setattr(ending.ForwardEnd, "called", lambda self, name: None)
            patch.setattr(ending.ForwardEnd, "run", ended_at_the_head)
        elif saving == "the forward again, with everything folded in twice":
            patch.setattr(Capture, "again", lambda self: None)
        elif saving == "the forward again, with attributes as the first one left them":
            patch.setattr(forwards.ForwardState, "restore", lambda self: True)
        elif saving == "sharing, by shape":
            patch.setattr(Call, "is_same", lambda self, x: self.tensor() is None or self.tensor().shape == x.shape)
        elif saving == "the logits of the last position":
            cut = lambda model, batch: call(model, {**batch, LOGITS_TO_KEEP: 1, "labels": None})  # noqa: E731
            patch.setattr(forwards, "default_forward", cut)
        yield


def ended_at_the_head(self, forward, number, *, whole=False):
    class Done(Exception):
        pass

    def end(*_):
        if number >= 2:
            raise Done

    with self.head.register_forward_pre_hook(end), suppress(Done):
        forward()


@pytest.mark.parametrize(
    ("saving", "make", "batches", "forward", "keep"),
    [
        (
            "the end, without a look at what follows", scripted(),
            script_batches([PLAIN] * 3 + [LATER["called after the head"]]), run, None,
        ),
        (
            "the forward again, with everything folded in twice", scripted(),
            script_batches([PLAIN] * 3 + [LATER["fed from the logits"]]), run, None,
        ),
        (
            "the forward again, with attributes as the first one left them", scripted(),
            script_batches([PLAIN] * 3 + [["tally", *LATER["fed from the logits"]]]), run, None,
        ),
        (
            "sharing, by shape", scripted(),
            script_batches([["a:aside", "b:aside", "tied"]] * 3 + [["a", "b", "tied"]]), run, None,
        ),
        (
            "the logits of the last position", lambda: lora(tiny_llama(), target_modules=["q_proj", "lm_head"]),
            padded_batches()[:4], call, "labels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:batch .* every forward runs whole")
def test_the_oracle_sees_a_saving_that_is_broken(saving, make, batches, forward, keep):
    look = (lambda batch: None) if keep is None else (lambda batch: batch[keep] != -100)
    assert_rows_are_the_plain_calls(make, batches, 4, forward=forward, keep=look)
    with broken(saving), pytest.raises(AssertionError):
        assert_rows_are_the_plain_calls(make, batches, 4, forward=forward, keep=look)
