"""The order in which studies are seen, as one stream over all epochs.

Epoch ``e`` is a permutation of the studies drawn from (seed, e); epochs follow each other without
a gap, and step ``s`` takes the ``batch_size`` entries from ``s * batch_size`` on. So every study
comes once per epoch whatever the batch size, the order is the same on any number of processes and
workers, and going on at step ``s`` means starting there.
"""

import logging
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ctclip.data.cohort import UNREADABLE, CorruptVolumeError, note_unreadable
from ctclip.data.dataset import Batch, CohortDataset, Sample, collate
from ctclip.data.manifest import VolumeRecord
from ctclip.training import resume
from ctclip.training.text_views import StudyText, read_study

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""Epoch, and index of the volume in the data set."""


class StudyStream:
    """Keys of each of this rank's micro-batches, from ``start`` to ``stop``. A batch sampler.

    A study with several reconstructions gives one of them per epoch, drawn anew each time.

    Args:
        records: One per volume, in the data set's order.
        batch_size: Studies per step over all ranks; must be a multiple of ``world_size``.
        micro_batch_size: Studies that are read as one; None is the rank's share of a step.
        seed: Of the run.
        start: Steps already done.
        stop: Where the run ends.
        rank: This process.
        world_size: Processes.
    """

    def __init__(
        self,
        records: Sequence[VolumeRecord],
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        by_study: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            by_study.setdefault(record.study_id, []).append(index)
        self._volumes = [by_study[study] for study in sorted(by_study)]
        self._batch_size = batch_size
        self._seed = seed
        self._start, self._stop = start, stop
        rows = batch_size // world_size
        first, end = rank * rows, (rank + 1) * rows
        size = micro_batch_size or rows
        self._cuts = [slice(i, min(i + size, end)) for i in range(first, end, size)]

    @property
    def pieces(self) -> int:
        """Micro-batches of a step."""
        return len(self._cuts)

    def __len__(self) -> int:
        return max(0, self._stop - self._start) * self.pieces

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self._start, self._stop):
            keys = []
            for position in range(step * self._batch_size, (step + 1) * self._batch_size):
                wanted, place = divmod(position, len(self._volumes))
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                keys.append((epoch, int(order[place])))
            for cut in self._cuts:
                yield keys[cut]

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's volumes, one per study."""
        rng = np.random.default_rng([self._seed, epoch])
        chosen = np.array([volumes[int(rng.integers(len(volumes)))] for volumes in self._volumes])
        return rng.permutation(chosen)


class StreamDataset(Dataset[Sample]):
    """A cohort read by (epoch, index), which never stops because of one file.

    A volume that can't be read any more is replaced by the next readable one of the cohort. Which
    one that is depends on the index alone, so it is the same wherever the volume was asked for. It
    is noted in ``unreadable_volumes.jsonl`` of the run folder, in the ledger's columns.

    Args:
        dataset: The cohort; its own epoch is set per sample.
        out: Run folder.
    """

    def __init__(self, dataset: CohortDataset, out: Path) -> None:
        self._dataset = dataset
        self._out = out
        self._noted: set[str] = set()

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        self._dataset.epoch = epoch
        for step in range(len(self._dataset)):
            candidate = (index + step) % len(self._dataset)
            try:
                return self._dataset[candidate]
            except CorruptVolumeError as error:
                last = error
                self._note(self._dataset.records[candidate], error)
        raise ValueError(f"no volume of the cohort can be read any more, the last: {last}")

    def _note(self, record: VolumeRecord, error: CorruptVolumeError) -> None:
        if record.volume_id in self._noted:  # in an earlier epoch
            return
        self._noted.add(record.volume_id)
        logger.warning("a volume can't be read and is replaced (%s): %s", UNREADABLE, error)
        with resume.explained_disk_errors(self._out):
            note_unreadable(self._out, record.volume_id, error)


def stream_loader(
    dataset: StreamDataset, stream: StudyStream, *, workers: int, pin_memory: bool
) -> "DataLoader[tuple[Batch, list[StudyText]]]":
    """Read volumes and reports ahead along a stream, in its order whatever ``workers`` is.

    While a step is computed, all of the next one is read: more would only fill the memory.
    """
    ahead = -(-stream.pieces // workers) if workers else None
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=stream,  # type: ignore[arg-type]
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=ahead,
        worker_init_fn=_outlive_sigterm,
    )


def _collate(samples: Sequence[Sample]) -> tuple[Batch, list[StudyText]]:
    return collate(samples), [read_study(sample.record) for sample in samples]


def rows_per_rank(batch_size: int, world_size: int) -> int:
    """Each process's share of the global batch.

    Raises:
        ValueError: If it can't be shared evenly.
    """
    rows, left = divmod(batch_size, world_size)
    if left or rows == 0:
        raise ValueError(
            f"batch_size {batch_size} can't be shared evenly by {world_size} processes; set it to "
            f"a multiple of {world_size}"
        )
    return rows


def _outlive_sigterm(worker: int) -> None:
    """A pre-emption reaches every process of the job; the trainer still needs its readers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
