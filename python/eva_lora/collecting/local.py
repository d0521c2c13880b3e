"""The statistics of a pass that one process makes: what several would have to agree on, done at once."""

from collections.abc import Sequence

from eva_kernels.streaming_svd import Refreshed, finish_, refresh_

from .inputs import DistinctInput

__all__ = ["LocalStatistics"]


class LocalStatistics:
    """One rank of one. :class:`~eva_lora.collecting.pooling.PooledStatistics` is the same for several."""

    rank, size = 0, 1

    @property
    def is_speaker(self) -> bool:
        """Whether this rank says what all have found: warns, writes."""
        return self.rank == 0

    def refresh_(self, inputs: Sequence[DistinctInput]) -> list[Refreshed]:
        """Refresh the statistics of some inputs from all rows."""
        return refresh_([entry.statistic for entry in inputs])

    def finish_(self, inputs: Sequence[DistinctInput]) -> None:
        """Bring bases and totals into their final form."""
        finish_([entry.statistic for entry in inputs])

    def gather_facts(self, *, final: bool) -> None:
        """Bring together what each rank found out about its layers' rows."""

    def share_out(self) -> None:
        """After a checkpoint was loaded: leave each sum on one rank."""
