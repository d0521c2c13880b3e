"""A pass that was cut off goes on from its checkpoint as if it had not been, or is refused by name."""

import pytest
import torch

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting.checkpoint import Checkpoint
from eva_lora.planning import storage
from support.models import load_minilm, lora, minilm_text_batches
from support.tiny import fingerprint_of, state_of, tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = 9


class Cut(Exception):
    """Stands for whatever ends a pass half-way."""


class Cutting:
    """A loader that fails after a number of batches, over all its rounds."""

    def __init__(self, loader, after):
        self.loader, self.left = loader, after

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise Cut
            self.left -= 1
            yield batch


class Positioned:
    """A loader with torchdata's protocol, which counts what it reads."""

    def __init__(self, batches):
        self.batches, self.next, self.read, self.cut = batches, 0, 0, None

    def __iter__(self):
        while self.next < len(self.batches):
            if self.read == self.cut:
                raise Cut
            self.next, self.read = self.next + 1, self.read + 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"next": self.next, "seen": [torch.arange(self.next)], "raw": b"\x00\xff", "pair": (1, None)}

    def load_state_dict(self, state):
        assert state["seen"][0].tolist() == list(range(state["next"]))
        assert state["raw"] == b"\x00\xff"
        assert state["pair"] == (1, None)
        self.next = state["next"]


def run(loader, path=None, every=1, model=None, **options):
    options = {"max_batches": BATCHES, "tau": 1.0, **options}
    model = model or tiny_model()
    return collect(model, loader, EvaConfig(**options), progress=False, checkpoint=path, checkpoint_every=every)


def run_plain(loader, **options):
    return run(loader, every=None, **options)


def cut_and_resume(tmp_path, after, every=1, **options):
    path = tmp_path / "pass.safetensors"
    with pytest.raises(Cut):
        run(Cutting(tiny_batches(BATCHES), after), path, every, **options)
    return run(tiny_batches(BATCHES), path, every, **options)


@pytest.mark.parametrize("after", range(1, BATCHES))
def test_a_resumed_pass_is_bit_equal_wherever_it_was_cut(tmp_path, after):
    expected = fingerprint_of(run_plain(tiny_batches(BATCHES)))
    assert fingerprint_of(cut_and_resume(tmp_path, after)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"statistic": "gram"},
        {"statistic": "subspace"},
        {"statistic": "subspace", "convergence": "component"},
        {"equal_data": False, "tau": 0.9},
        {"share_inputs": False},
        {"early_stop": False},
        {"rho": 3.0, "rank_multiple": 2},
        {"nonfinite": "skip"},
        {"max_rows": 70},
        {"max_batches": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [1, 3])
def test_every_option_resumes_bit_equal(tmp_path, options, every):
    loader = tiny_batches(BATCHES)
    loader[4]["x"] = loader[4]["x"].clone()
    expected = fingerprint_of(run_plain(tiny_batches(BATCHES), **options))
    assert fingerprint_of(cut_and_resume(tmp_path, 4, every, **options)) == expected


def test_saving_changes_nothing(tmp_path):
    expected = run_plain(tiny_batches(BATCHES))
    for every in (1, 2, None):
        saved = run(tiny_batches(BATCHES), tmp_path / f"{every}.safetensors", every)
        assert fingerprint_of(saved) == fingerprint_of(expected)


def test_a_pass_over_several_rounds_of_the_loader_resumes(tmp_path):
    path = tmp_path / "pass.safetensors"
    short = tiny_batches(3)
    expected = fingerprint_of(run_plain(short))
    rounds = 0

    class Rounds:
        def __iter__(self):
            nonlocal rounds
            rounds += 1
            if rounds == 3:
                raise Cut
            return iter(short)

    with pytest.raises(Cut):
        run(Rounds(), path)
    assert fingerprint_of(run(short, path)) == expected


@pytest.mark.parametrize("cut", [2, 5, 6, 7])
def test_a_loader_with_a_position_is_set_there_and_not_read_again(tmp_path, cut):
    path = tmp_path / "pass.safetensors"
    expected = fingerprint_of(run_plain(tiny_batches(6)))
    loader = Positioned(tiny_batches(6))
    loader.cut = cut
    with pytest.raises(Cut):
        run(loader, path)
    loader = Positioned(tiny_batches(6))
    assert fingerprint_of(run(loader, path)) == expected
    assert loader.read == BATCHES - cut


def test_a_shuffling_dataloader_resumes_when_it_is_seeded(tmp_path):
    rows = [{name: value[i] for name, value in batch.items()} for batch in tiny_batches(4) for i in range(2)]

    def loader():
        generator = torch.Generator().manual_seed(5)
        return torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, generator=generator)

    path = tmp_path / "pass.safetensors"
    expected = fingerprint_of(run_plain(loader()))
    with pytest.raises(Cut):
        run(Cutting(loader(), 3), path)
    assert fingerprint_of(run(loader(), path)) == expected


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_torchdatas_stateful_loader_resumes_within_a_round_and_at_its_end(tmp_path, cut):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    rows = [{name: value[i] for name, value in batch.items()} for batch in tiny_batches(4) for i in range(2)]

    class CuttingStateful(Cutting):
        def state_dict(self):
            return self.loader.state_dict()

        def load_state_dict(self, state):
            self.loader.load_state_dict(state)

    def loader():
        torch.manual_seed(5)
        return stateful(rows, batch_size=2, shuffle=True)

    path = tmp_path / "pass.safetensors"
    expected = fingerprint_of(run_plain(loader()))
    with pytest.raises(Cut):
        run(CuttingStateful(loader(), cut), path)
    assert fingerprint_of(run(loader(), path)) == expected


@pytest.mark.parametrize("stateful", [False, True])
def test_a_loader_that_accelerate_has_prepared_resumes(tmp_path, stateful):
    """Its wrapper has ``state_dict()`` whether or not there is a state."""
    accelerate = pytest.importorskip("accelerate")
    rows = [{name: value[i] for name, value in batch.items()} for batch in tiny_batches(4) for i in range(2)]
    options = accelerate.DataLoaderConfiguration(use_stateful_dataloader=stateful)

    def loader():
        plain = torch.utils.data.DataLoader(rows, batch_size=2)
        return accelerate.Accelerator(cpu=True, dataloader_config=options).prepare(plain)

    path, forwards = tmp_path / "pass.safetensors", 0

    def cut(model, batch):
        nonlocal forwards
        forwards += 1
        if forwards == 7:
            raise Cut
        model(**batch)

    def collected(forward_fn, **where):
        config = EvaConfig(max_batches=BATCHES, tau=1.0)
        return collect(tiny_model(), loader(), config, progress=False, forward_fn=forward_fn, **where)

    expected = fingerprint_of(collected(lambda model, batch: model(**batch)))
    with pytest.raises(Cut):
        collected(cut, checkpoint=path, checkpoint_every=1)
    assert fingerprint_of(collected(lambda model, batch: model(**batch), checkpoint=path)) == expected


def test_a_real_model_resumes_bit_equal(tmp_path):
    """MiniLM on real text, cut by Ctrl-C in the middle of a forward."""
    batches = [{name: value[:3, :32] for name, value in batch.items()} for batch in minilm_text_batches()[:3]]
    config = EvaConfig(max_batches=5)
    path, forwards = tmp_path / "pass.safetensors", 0

    def interrupted(model, batch):
        nonlocal forwards
        forwards += 1
        if forwards == 4:
            model(**batch, output_hidden_states=True)
            raise KeyboardInterrupt
        model(**batch)

    def collected(forward_fn, **options):
        model = lora(load_minilm(), target_modules=["query", "key", "value", "dense"])
        return collect(model, batches, config, progress=False, forward_fn=forward_fn, **options)

    expected = fingerprint_of(collected(lambda model, batch: model(**batch)))
    with pytest.raises(KeyboardInterrupt):
        collected(interrupted, checkpoint=path, checkpoint_every=1)
    resumed = collected(lambda model, batch: model(**batch), checkpoint=path)
    assert fingerprint_of(resumed) == expected


def test_layers_that_part_ways_resume(tmp_path):
    """The layers share in some batches and not in others, before and after the cut."""

    def parting(model, batch):
        x, block = batch["x"], model.get_base_model().blocks[0]
        number = int(batch["number"])
        block["q"](x)
        block["k"](x if number < 2 else x + 1)
        block["v"](x if number < 6 else x * 2)
        for name in ("up", "down"):
            block[name](x.clone())
        for name in ("q", "k", "v", "up", "down"):
            model.get_base_model().blocks[1][name](x)

    batches = [{**batch, "number": torch.tensor(i)} for i, batch in enumerate(tiny_batches(BATCHES))]
    config = EvaConfig(max_batches=BATCHES, tau=1.0)
    options = {"forward_fn": parting, "row_mask_fn": lambda batch: None, "progress": False}
    expected = fingerprint_of(collect(tiny_model(), batches, config, **options))
    for after in (1, 3, 7):
        path = tmp_path / f"{after}.safetensors"
        options |= {"checkpoint": path, "checkpoint_every": 1}
        with pytest.raises(Cut):
            collect(tiny_model(), Cutting(batches, after), config, **options)
        assert fingerprint_of(collect(tiny_model(), batches, config, **options)) == expected


def test_a_finished_pass_is_not_run_again(tmp_path):
    path = tmp_path / "pass.safetensors"
    first = run(tiny_batches(BATCHES), path, every=100)
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    assert fingerprint_of(run(tiny_batches(BATCHES), path, model=model)) == fingerprint_of(first)


def test_the_one_call_resumes_and_applies(tmp_path):
    path = tmp_path / "pass.safetensors"
    config = EvaConfig(max_batches=BATCHES)
    models = [tiny_model(), tiny_model(seed=7)]  # adapters that start differently: they are switched off
    expected = eva_initialize(models[0], tiny_batches(BATCHES), config, progress=False)
    loader = Cutting(tiny_batches(BATCHES), 5)
    with pytest.raises(Cut):
        eva_initialize(models[1], loader, config, progress=False, checkpoint=path, checkpoint_every=2)
    report = eva_initialize(models[1], tiny_batches(BATCHES), config, progress=False, checkpoint=path)
    assert report.ranks == expected.ranks
    assert all(torch.equal(a, models[1].state_dict()[name]) for name, a in models[0].state_dict().items())


# --- what is refused


@pytest.fixture
def cut_pass(tmp_path):
    path = tmp_path / "pass.safetensors"
    with pytest.raises(Cut):
        run(Cutting(tiny_batches(BATCHES), 5), path)
    return path


def refuses(path, message, loader=None, model=None, **options):
    model = model or tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    before, content = state_of(model), path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tiny_batches(BATCHES) if loader is None else loader, path, model=model, **options)
    assert state_of(model) == before
    assert path.read_bytes() == content


def test_another_config_is_named(cut_pass):
    refuses(cut_pass, r"^checkpoint: .* is of another run: config\.seed was 0, is 1\. Run as", seed=1)


def test_another_model_is_named(cut_pass):
    refuses(
        cut_pass, r"weights\.base_model\.model\.blocks\.0\.q\.base_layer\.weight was", model=tiny_model(base_seed=1)
    )


def test_one_changed_weight_is_named(cut_pass):
    model = tiny_model()
    with torch.no_grad():
        model.get_base_model().blocks[1]["up"].base_layer.weight[3, 3] += 1e-3
    refuses(
        cut_pass,
        r"another run: weights\.base_model\.model\.blocks\.1\.up\.base_layer\.weight was [^;]*Run",
        model=model,
    )


def test_other_sites_are_named(cut_pass):
    refuses(cut_pass, r"sites\.blocks\.0\.q was rank 2, width 12, is rank 3, width 12", model=tiny_model(rank=3))


def test_another_version_is_named(cut_pass, monkeypatch):
    monkeypatch.setattr("eva_lora.collecting.checkpoint.versions", lambda: {"python": "3", "torch": "9.9"})
    refuses(cut_pass, r"version\.torch was [^;]*, is 9\.9")


def test_other_threads_are_named(cut_pass):
    torch.set_num_threads(2)
    refuses(cut_pass, r"threads was 1, is 2")


def test_another_way_to_call_the_model_is_named(cut_pass):
    with pytest.raises(ValueError, match=r"row_mask_fn was not given, is given"):
        collect(
            tiny_model(), tiny_batches(BATCHES), EvaConfig(max_batches=BATCHES, tau=1.0), progress=False,
            checkpoint=cut_pass, row_mask_fn=lambda batch: None,
        )  # fmt: skip


def test_a_loader_that_does_not_replay_is_refused(cut_pass):
    refuses(cut_pass, r"^loader: batch 1 of 5 differs", loader=tiny_batches(BATCHES, seed=2))
    swapped = tiny_batches(BATCHES)
    swapped[2], swapped[3] = swapped[3], swapped[2]
    refuses(cut_pass, r"^loader: batch 3 of 5 differs .*seed what shuffles", loader=swapped)
    other_mask = tiny_batches(BATCHES)
    other_mask[4]["attention_mask"][0, 0] ^= True
    refuses(cut_pass, r"^loader: batch 5 of 5 differs", loader=other_mask)
    refuses(cut_pass, r"^loader: expected the 5 batches .* ended after 3", loader=iter(tiny_batches(3)))
    refuses(cut_pass, r"^loader: expected the 5 batches .* ended after 0", loader=[])


def test_files_that_are_no_checkpoint_are_refused(cut_pass, tmp_path):
    whole = cut_pass.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        cut_pass.write_bytes(whole[:size])
        refuses(cut_pass, "damaged")
    storage.save(cut_pass, "plan", {}, {})
    refuses(cut_pass, r"^path: expected a checkpoint file, .* holds 'plan'")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": 3}, TypeError, r"^checkpoint: expected a path, got int"),
        (
            {"checkpoint": "x", "checkpoint_every": 0},
            ValueError,
            r"^checkpoint_every: expected an integer of at least 1",
        ),
        ({"checkpoint": "x", "checkpoint_every": 1.0}, TypeError, r"^checkpoint_every: expected an integer, got 1\.0"),
        ({"checkpoint_every": 2}, ValueError, r"^checkpoint_every: expected None without a checkpoint"),
        ({"checkpoint": "."}, IsADirectoryError, r"^checkpoint: expected a file name, got the folder"),
    ],
)
def test_arguments_are_checked_before_any_forward(options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    with pytest.raises(error, match=message):
        collect(model, tiny_batches(), progress=False, **options)


def test_a_loader_state_that_would_need_code_is_refused(tmp_path):
    loader = Positioned(tiny_batches())
    loader.state_dict = lambda: {"dataset": object()}
    with pytest.raises(TypeError, match=r"^loader: its state_dict\(\) holds a object, which cannot be saved"):
        run(loader, tmp_path / "pass.safetensors")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "pass.safetensors"
    left = tmp_path / ".pass.safetensors-abc"
    left.write_bytes(b"half")
    Checkpoint(path, None, {})
    assert list(tmp_path.iterdir()) == []
