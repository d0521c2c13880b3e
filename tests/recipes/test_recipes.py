"""docs/recipes.md with the tools themselves; `make test-libraries` has the environments that they run in."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import transformers
from safetensors.torch import load_file

from support.pages import ROOT, blocks
from support.recipes import require_begun_with_eva, run, write_files

pytestmark = pytest.mark.filterwarnings("ignore")  # the tools' own

PAGE = "docs/recipes.md"
TOOLS = {  # module -> the package and its version, how it is run, the saved adapter, its environment
    "axolotl": ("axolotl==0.19.0", ["-m", "axolotl.cli.train", "axolotl.yaml"], ".", {}),
    "llamafactory": ("llamafactory==0.9.5", ["train.py"], ".", {"DISABLE_VERSION_CHECK": "1"}),
    "swift": ("ms-swift==4.6.0", ["-m", "swift.cli.main", "sft", "swift.yaml"], "last-checkpoint", {"USE_HF": "1"}),
    "unsloth": ("unsloth==2026.10.9", ["unsloth_lora.py"], ".", {}),
}


def needs(name):
    return pytest.mark.skipif(not find_spec(name), reason=f"no {name}")


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in TOOLS])
def test_the_tool_trains_what_eva_initialised(name, tmp_path):
    requirement, command, adapter, environment = TOOLS[name]
    package, _, expected = requirement.partition("==")
    assert version(package) == expected
    write_files(tmp_path, PAGE)
    if name == "llamafactory":
        # It imports this for recordings. What the registry has of it needs CUDA's libraries.
        (tmp_path / "torchaudio.py").touch()
    run(tmp_path, *command, **environment)
    require_begun_with_eva(tmp_path / "out", adapter)


def test_the_versions_are_those_that_are_installed_and_told():
    told = (ROOT / PAGE).read_text(encoding="utf-8")
    installed = {
        line.strip() for path in (ROOT / "tests" / "recipes").glob("*.txt") for line in path.read_text().splitlines()
    }
    for requirement, *_ in TOOLS.values():
        assert requirement in installed
        assert f"| {requirement.partition('==')[2]}" in told


@needs("axolotl")
def test_axolotl_goes_on_from_a_repaired_base_and_from_no_other(tmp_path):
    write_files(tmp_path, PAGE)
    run(tmp_path, "repair.py")
    run(tmp_path, "-m", "axolotl.cli.train", "qlora.yaml")
    start, end = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("repaired", "out"))
    assert set(start) == set(end)
    for name, weight in start.items():
        moved = float((end[name] - weight).abs().max())
        assert weight.any(), name  # B, too
        assert 0 < moved < 0.01, name  # one step of AdamW at a rate of 0.001
    other = (tmp_path / "qlora.yaml").read_text() + "bnb_config_kwargs:\n  bnb_4bit_use_double_quant: false\n"
    (tmp_path / "other.yaml").write_text(other)
    with pytest.raises(AssertionError, match="bnb_4bit_use_double_quant"):
        run(tmp_path, "-m", "axolotl.cli.train", "other.yaml")


@needs("trl")
def test_trls_command_line_begins_with_eva(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS])
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, PAGE)
    arguments = (
        "--model_name_or_path model --dataset_name text --output_dir out --use_peft --lora_r 4 --lora_target_modules "
        "all-linear --max_steps 1 --per_device_train_batch_size 2 --learning_rate 0.001 --report_to none "
        "--use_cpu --bf16 false"
    )
    monkeypatch.setattr("sys.argv", ["eva_sft.py", *arguments.split()])
    (code,) = (block.code for block in blocks(PAGE) if block.code.startswith("# eva_sft.py"))
    exec(compile(code, "eva_sft.py", "exec"), {})
    require_begun_with_eva(tmp_path / "out")
