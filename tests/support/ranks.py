"""Real process groups: gloo, one forked process a rank, with an end whatever happens."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

GROUP_TIMEOUT = 20.0  # seconds that a collective waits
TIMEOUT = 30.0  # seconds after which a rank is ended


class Raised:
    """What a rank raised, as far as it can be sent."""

    def __init__(self, error):
        self.kind, self.message = type(error).__name__, str(error)
        self.traceback = "".join(traceback.format_exception(error))

    def __repr__(self):
        return f"Raised({self.kind}: {self.message})"


def on_ranks(size, function, *, group_timeout=GROUP_TIMEOUT, may_raise=False):
    """What ``function(rank)`` returns on each of ``size`` ranks of a new default group; what it raises, as Raised.

    A rank that ends without a word leaves None.
    """
    context = multiprocessing.get_context("fork")  # everything is imported already
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(rank, size, f"{folder}/store", function, group_timeout, pipes[rank][1]))
            for rank in range(size)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        end = time.monotonic() + TIMEOUT
        try:
            results = [_received(receiver, end) for receiver, _ in pipes]
        finally:
            for process in processes:
                process.join(max(0.0, min(10.0, end - time.monotonic())))
                if process.is_alive():
                    process.kill()
                    process.join()
    if not may_raise:
        for rank, result in enumerate(results):
            assert not isinstance(result, Raised), f"rank {rank}: {result.traceback}"
    return results


def _received(receiver, end):
    if not receiver.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError(f"a rank said nothing for {TIMEOUT} seconds")
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return None


def _run(rank, size, store, function, group_timeout, sender):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=group_timeout)
    )
    try:
        result = function(rank)
    except BaseException as error:
        result = Raised(error)
    sender.send_bytes(pickle.dumps(result))
    sender.close()
    os._exit(0)  # no teardown: what a group that was cut off still waits for is of no interest
