"""The scripts in examples/ run as they are, and train what EVA initialised."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
NEEDS = {
    "plain_pytorch": "transformers",
    "accelerate_loop": "accelerate",
    "transformers_trainer": "accelerate",
    "trl_sft": "trl",
    "diffusers_unet": "diffusers",
    "torchtune_loop": "torchtune",
    "litgpt_loop": "litgpt",
}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_outside_of_the_repository")]


@pytest.fixture
def _outside_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_example_is_run_here():
    with_workers = {"ray_train"}  # in tests/distributed
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS) | with_workers


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.skipif(not find_spec(p), reason=f"no {p}")) for n, p in NEEDS.items()]
)
def test_the_example_trains_what_eva_initialised(name):
    made = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    ranks = made["report"].ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == sum(made["report"].configured_ranks.values())
    state = made["model"].state_dict()
    trained = {key: value for key, value in state.items() if "lora_b" in key.lower()}
    assert trained
    assert all(value.any() for value in trained.values())
