"""Which volumes make up which batch: decided by seed and epoch alone."""

from collections.abc import Iterator

import numpy as np


class EpochSampler:
    """Indices of each of this rank's batches in one epoch.

    The whole epoch is one permutation drawn from ``(seed, epoch)``. A global batch is the next
    ``batch_size * world_size`` of it and every rank takes its contiguous share, so the order does
    not depend on workers, and two processes see together what one process with twice the batch
    would see. The tail that does not fill a global batch is left out, so no rank starves.

    Use as a ``batch_sampler``. To resume, construct it with ``start`` = batches already done.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        start: int = 0,
    ) -> None:
        """Lay out one epoch.

        Args:
            num_samples: Length of the data set.
            seed: Of the run.
            epoch: Counted from 0; every epoch has its own order.
            rank: This process.
            world_size: Processes.
            batch_size: Samples per batch **on this rank**.
            start: Batches of this epoch that were already consumed.

        Raises:
            ValueError: If the data set can't fill one global batch.
        """
        if num_samples < batch_size * world_size:
            raise ValueError(
                f"{num_samples} volumes can't fill one global batch of {batch_size} x "
                f"{world_size}; lower the batch size"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.start = start

    @property
    def num_batches(self) -> int:
        """Batches per rank in a whole epoch, whatever ``start`` is."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return max(0, self.num_batches - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        global_batch = self.batch_size * self.world_size
        for batch in range(self.start, self.num_batches):
            first = batch * global_batch + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()
