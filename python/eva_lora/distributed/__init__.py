"""Processes that work together: what they agree on, how one's failure reaches all, what it costs. Nothing of a run.

The engine is ``torch.distributed``, whoever started it. docs/distributed.md is for users.
"""

from .costs import BUCKET_BYTES, EVIDENCE
from .ranks import ProcessGroup, Ranks, joined, together

__all__ = ["BUCKET_BYTES", "EVIDENCE", "ProcessGroup", "Ranks", "joined", "together"]
