"""Prepared volumes and their records become batches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ctclip.data.cohort import CorruptVolumeError, PreparedCohort
from ctclip.data.manifest import VolumeRecord
from ctclip.data.sampler import EpochSampler
from ctclip.data.volume import window

if TYPE_CHECKING:
    from ctclip.data.augment import AugmentConfig

__all__ = ["Batch", "CohortDataset", "EpochSampler", "Sample", "collate", "loader"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One volume with its record."""

    volume: Tensor
    """``(C, D, H, W)`` float32 in [-1, 1], one channel per HU window."""

    record: VolumeRecord
    study: int
    """Unique per study in the cohort."""


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank."""

    volume: Tensor
    """``(B, C, D, H, W)`` float32 in [-1, 1]."""

    records: list[VolumeRecord]
    study: Tensor
    """``(B,)`` int64, unique per study in the cohort."""

    labels: Tensor
    """``(B, 18)`` float32: 1, 0, or nan where not annotated."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on a device."""
        return Batch(
            self.volume.to(device, non_blocking=True),
            self.records,
            self.study.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by the loader."""
        return Batch(self.volume.pin_memory(), self.records, self.study.pin_memory(), self.labels)


class CohortDataset(Dataset[Sample]):
    """Random access to a prepared cohort.

    A volume whose file was damaged after it was prepared is replaced by the next one, on every
    rank alike, and named in the log; the count is in ``num_replaced`` of the process that read it.
    """

    def __init__(
        self,
        cohort: PreparedCohort,
        records: Sequence[VolumeRecord],
        augment: "AugmentConfig | None" = None,
        windows_hu: tuple[tuple[float, float], ...] | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        """Choose what is read.

        Args:
            cohort: Where the voxels are.
            records: Which volumes, for example ``cohort.split("train")``.
            augment: Strengths, or None for none.
            windows_hu: HU windows, one channel each; by default the cohort's.
            seed: Of the augmentation.
            epoch: Every epoch draws its own augmentation of a volume.
        """
        self.cohort = cohort
        self.records = list(records)
        self.augment = augment
        self.windows_hu = windows_hu or cohort.volume_config.windows_hu
        self.seed = seed
        self.epoch = epoch
        self.num_replaced = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, voxels = self._read(index)
        volume = torch.from_numpy(voxels)
        if self.augment is not None:
            from ctclip.data.augment import augment

            volume = augment(volume, self.augment, (self.seed, self.epoch, index))
        study = self.cohort.study_index[record.study_id]
        return Sample(window(volume, self.windows_hu), record, study)

    def _read(self, index: int) -> tuple[VolumeRecord, np.ndarray]:
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:
                return record, self.cohort.read(record.volume_id)
            except CorruptVolumeError as error:
                logger.warning("%s; used the next volume instead", error)
                self.num_replaced += 1
        raise CorruptVolumeError(f"every volume in {self.cohort.path} is damaged")


def collate(samples: Iterable[Sample]) -> Batch:
    """Stack samples into a batch."""
    samples = list(samples)
    return Batch(
        torch.stack([sample.volume for sample in samples]),
        [sample.record for sample in samples],
        torch.tensor([sample.study for sample in samples], dtype=torch.int64),
        torch.tensor([sample.record.label_row() for sample in samples], dtype=torch.float32),
    )


def loader(
    dataset: CohortDataset, sampler: EpochSampler, *, workers: int = 0, pin_memory: bool = False
) -> "DataLoader[Batch]":
    """Iterate over one epoch's batches; the order is the sampler's, whatever ``workers`` is.

    Args:
        dataset: What is read.
        sampler: Which samples make up which batch.
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Page-locked batches, for a GPU.
    """
    # The dataset yields samples and collate makes batches of them, which DataLoader can't express.
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
    )
