"""kill -9 at random moments, again and again: what is left goes on to the same bits."""

import os
import subprocess
import sys

import pytest

# The parent only forks: a process that has already computed may hold a lock that its children would wait for.
KILLED = """
import os, random, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import peft, transformers.pytorch_utils, eva_lora
from support.models import load_minilm, lora, minilm_text_batches
from support.tiny import fingerprint_of, tiny_batches, tiny_model

path, seed, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)

def started(checkpoint):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        config = eva_lora.EvaConfig(max_batches=40, tau=1.0)
        options = {"progress": False, "checkpoint": checkpoint, "checkpoint_every": 1}
        begun = time.perf_counter()
        result = eva_lora.collect(tiny_model(), tiny_batches(7), config, **options)
        os.write(writer, f"{fingerprint_of(result)} {time.perf_counter() - begun}".encode())
        os._exit(0)
    os.close(writer)
    return child, reader

def finished(checkpoint):
    child, reader = started(checkpoint)
    os.waitpid(child, 0)
    return os.read(reader, 200).decode().split()

expected, seconds = finished(path + ".whole")
died, left = 0, 0
while died < kills:
    child, reader = started(path)
    time.sleep(random.uniform(0.2, 1.2) * float(seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        died += 1
        left += os.path.exists(path)
    elif os.path.exists(path):
        os.remove(path)  # it was quicker: begin another pass
    os.close(reader)
print("same" if finished(path)[0] == expected else "different", died, left)
"""


def killed(tmp_path, seed, kills):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "pass.safetensors"), str(seed), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment, timeout=120)
    verdict, died, left = done.stdout.split()
    assert int(died) == kills
    assert int(left) > 0  # at least one of them had something to go on from
    assert verdict == "same"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_three_times_the_result_is_bit_equal(tmp_path):
    killed(tmp_path, 0, 3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_random_moments_the_result_is_bit_equal(tmp_path, seed):
    killed(tmp_path, seed, 6)
