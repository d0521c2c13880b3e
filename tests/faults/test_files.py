"""Files that were damaged or forged: a named error or a correct load, never a crash, a hang or a wrong result."""

import ast
import contextlib
import copy
import json
import math
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import eva_kernels
import eva_lora
from eva_lora import EvaConfig, EvaPlan, EvaStatistics, collect, plan
from eva_lora.adapters import find_adapter
from eva_lora.collecting.checkpoint import Checkpoint
from eva_lora.collecting.run import Run
from eva_lora.planning import storage
from support.tiny import fingerprint_of, tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)
KINDS = ["statistics", "plan", "checkpoint"]


class Files:
    """One good file of each kind, and how it is read to something that can be compared."""

    def __init__(self, folder):
        self.adapter = find_adapter(tiny_model())
        statistics = collect(tiny_model(), tiny_batches(4), CONFIG, progress=False, checkpoint=folder / "checkpoint")
        statistics.save(folder / "statistics")
        plan(statistics).save(folder / "plan")
        self.identity = storage.load(folder / "checkpoint", "checkpoint")[1]["identity"]
        self.good = {kind: (folder / kind).read_bytes() for kind in KINDS}
        self.folder = folder

    def read(self, kind, path):
        if kind == "checkpoint":
            run = Run(self.adapter, CONFIG)
            untouched = contents(run)
            try:
                position = Checkpoint(path, 1, self.identity).load_into(run)
            except ValueError:
                assert contents(run) == untouched  # never half-loaded
                raise
            return repr((contents(run), position))
        loaded = {"statistics": EvaStatistics, "plan": EvaPlan}[kind].load(path)
        return loaded

    def text(self, kind, path):
        loaded = self.read(kind, path)
        if kind == "plan":
            return repr((loaded.sites, loaded.config, loaded.budget, [a.tolist() for a in loaded.lora_a.values()]))
        return fingerprint_of(loaded) + repr(loaded.seconds) if kind == "statistics" else loaded


def contents(run):
    states = [
        {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in entry.statistic.state().items()}
        for entry in run.capture.inputs
    ]
    plain = {name: value for name, value in vars(run).items() if isinstance(value, (int, str, list, dict))}
    plain.pop("seconds")
    return repr((states, plain, run.convergence.state(), run.capture.wanted, run.capture.end.spares))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


def damaged(data, rng):
    """A copy of ``data`` with one to three accidents."""
    data = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 2, 3])):
        limit = len(data) if rng.random() < 0.5 else min(header, len(data))
        at, size = rng.randrange(max(limit, 1)), rng.choice([1, 1, 4, 64])
        accident = rng.randrange(7)
        if accident == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif accident == 1:
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif accident == 2:
            del data[at : at + size]
        elif accident == 3:
            data[at:at] = rng.randbytes(size)
        elif accident == 4:
            del data[at:]
        elif accident == 5:
            data[at : at + size] = bytes(len(data[at : at + size]))
        else:
            data[:8] = rng.choice([0, 1, header, 2**31, 2**63 - 1, 2**64 - 1, len(data)]).to_bytes(8, "little")
    return bytes(data)


VALUES = [None, -1, 0, 1, 3, 10**30, -0.5, 1e308, True, "", "x", "\udc80", [], {}, [[]], {"a": 1}, [None], math.pi]


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(entry, (*path, key))


def forged(kind, source, target, rng):
    """A file with another fact or tensor and a digest that fits."""
    with safe_open(source, framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    facts = json.loads(header["facts"])
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(tensors))
        x = tensors[name]
        change = rng.randrange(9)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = x.to(rng.choice([torch.float16, torch.float64, torch.int32, torch.bool]))
        elif change == 2:
            tensors[name] = rng.choice([x.reshape(-1), x.reshape(-1)[:0], x.reshape(1, *x.shape), torch.zeros(3, 3)])
        elif change == 3 and x.is_floating_point() and x.numel():
            x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -1.0])
        elif change == 4:
            tensors[rng.choice(["input.99.basis", "x", "0.components", "input.0.new", "input.x.y"])] = x.clone()
        else:
            *above, last = rng.choice(list(places(facts))[1:])
            holder = facts
            for key in above:
                holder = holder[key]
            if change == 5 and isinstance(holder, dict):
                del holder[last]
            elif change == 6 and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[last]))
            else:
                holder[last] = rng.choice(VALUES)
        if not tensors:
            break
    header["facts"] = json.dumps(facts)
    header["digest"] = storage.digest(kind, tensors, header["facts"])
    save_file(tensors, target, metadata={k: v.encode("utf-8", "replace").decode() for k, v in header.items()})


def names(path, error):
    assert str(path) in str(error)
    return True


def fuzz_damaged(files, kind, tmp_path, seeds):
    path, original = tmp_path / "file", files.good[kind]
    path.write_bytes(original)
    expected = files.text(kind, path)
    refused = 0
    for seed in seeds:
        path.write_bytes(damaged(original, random.Random(seed)))
        try:
            found = files.text(kind, path)
        except ValueError as error:
            refused += names(path, error)
        else:
            assert found == expected, seed
    assert refused > 0.8 * len(seeds)


def fuzz_forged(files, kind, tmp_path, seeds):
    source, path = tmp_path / "source", tmp_path / "file"
    source.write_bytes(files.good[kind])
    refused = 0
    for seed in seeds:
        forged(kind, source, path, random.Random(seed))
        try:
            found = files.read(kind, path)
        except ValueError as error:
            refused += names(path, error)
            continue
        with contextlib.suppress(ValueError):
            if kind == "statistics":
                plan(found)
            elif kind == "checkpoint":
                collect(tiny_model(), tiny_batches(4), CONFIG, progress=False, checkpoint=path)
    assert refused > 0.3 * len(seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_loads_as_it_was(files, kind, tmp_path):
    fuzz_damaged(files, kind, tmp_path, range(100))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_file_is_refused_or_makes_sense(files, kind, tmp_path):
    fuzz_forged(files, kind, tmp_path, range(100))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_files(files, kind, tmp_path):
    fuzz_damaged(files, kind, tmp_path, range(1000, 3000))
    fuzz_forged(files, kind, tmp_path, range(1000, 2500))


def test_a_file_of_another_format_is_refused(files, tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(storage, "FORMAT_VERSION", 99)
    storage.save(path, "plan", {}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format version 99, this version reads \d+"):
        EvaPlan.load(path)


def test_a_file_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "file"
    for content in (pickle.dumps(Evil()), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        for load in (EvaPlan.load, EvaStatistics.load):
            with pytest.raises(ValueError, match="damaged or no"):
                load(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(ValueError, match="damaged or no"):
        EvaPlan.load(path)
    assert not (tmp_path / "ran").exists()


def sources():
    for package in (eva_lora, eva_kernels):
        for path in Path(package.__file__).parent.rglob("*.py"):
            yield path, path.read_text(encoding="utf-8")


def test_nothing_of_ours_unpickles_evaluates_or_trusts_remote_code():
    for path, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib", "marshal", "shelve"}, (
                    path
                )
            if isinstance(node, ast.ImportFrom):
                assert node.module not in {"pickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"eval", "exec", "torch.load", "np.load", "numpy.load"}, path
        assert not re.search(r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True", text), path


# --- saving


@pytest.mark.parametrize("step", ["save_file", "_push_to_disk", "os.replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_fails_leaves_what_was_there(files, kind, tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(files.good[kind])
    tensors, facts = storage.load(path, kind)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"eva_lora.planning.storage.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        storage.save(path, kind, tensors, {**facts, "new": 1})
    monkeypatch.undo()
    assert path.read_bytes() == files.good[kind]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_tensors_that_share_memory_are_saved(tmp_path):
    x = torch.arange(6.0)
    tensors = {"all": x, "same": x, "part": x[2:], "turned": x.view(2, 3).T, "none": x[:0]}
    loaded, _ = storage.load(storage.save(tmp_path / "file", "plan", tensors, {}), "plan")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (steps.append(name), original(*a))[1])
    storage.save(tmp_path / "file", "plan", {}, {})
    assert steps == ["fsync", "replace", "fsync"]
