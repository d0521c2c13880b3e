"""One pass over several processes: each streams its own shard, and all of them end with one answer.

The engine is ``torch.distributed``, whoever started it. :mod:`.ranks` agrees and passes errors on, :mod:`.pooling` adds
statistics up, :mod:`.tensor_parallel` knows layers that are split over ranks, :mod:`.passing` is the pass.
docs/distributed.md is for users, and says what it costs.
"""

from .passing import run_together
from .pooling import Pool
from .ranks import ProcessGroup, Ranks, joined, together
from .tensor_parallel import TensorParallel

__all__ = ["Pool", "ProcessGroup", "Ranks", "TensorParallel", "joined", "run_together", "together"]
