"""Prepared volumes and their records become batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ctclip.data.cohort import PreparedCohort
from ctclip.data.manifest import VolumeRecord
from ctclip.data.sampler import EpochSampler
from ctclip.data.volume import window

if TYPE_CHECKING:
    from ctclip.data.augment import AugmentConfig

__all__ = ["Batch", "CohortDataset", "EpochSampler", "Sample", "collate", "loader"]


CROP_STREAM = 1
"""Keeps the draw of a box apart from the draws of the other augmentation."""


@dataclass(frozen=True)
class Sample:
    """One volume with its record."""

    volume: Tensor
    """``(C, D, H, W)`` float32 in [-1, 1], one channel per HU window; ``(D, H, W)`` HU where
    the data set finishes later."""

    record: VolumeRecord
    study: int
    """Unique per study in the cohort."""

    draw: tuple[int, int, int] = (0, 0, 0)
    """Of the augmentation: seed, epoch, index."""


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank."""

    volume: Tensor
    """``(B, C, D, H, W)`` float32 in [-1, 1]; ``(B, D, H, W)`` HU until it is finished."""

    records: list[VolumeRecord]
    study: Tensor
    """``(B,)`` int64, unique per study in the cohort."""

    labels: Tensor
    """``(B, 18)`` float32: 1, 0, or nan where not annotated."""

    draws: list[tuple[int, int, int]]
    """Of each volume's augmentation."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by the loader."""
        return replace(self, volume=self.volume.pin_memory())

    def with_volume(self, volume: Tensor) -> "Batch":
        """The same batch with its volumes elsewhere."""
        return replace(self, volume=volume)


class CohortDataset(Dataset[Sample]):
    """Random access to a prepared cohort.

    Indexing raises ``CorruptVolumeError`` for a volume whose file was damaged or
    lost after it was prepared; training replaces it, see :mod:`ctclip.training.stream`.
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
        finish_later: bool = False,
    ) -> None:
        """Choose what is read.

        Args:
            cohort: Where the voxels are.
            records: Which volumes, for example ``cohort.split("train")``.
            augment: Strengths, or None for none.
            windows_hu: HU windows, one channel each; by default the cohort's.
            seed: Of the augmentation.
            epoch: Every epoch draws its own augmentation of a volume.
            finish_later: Give HU as kept, to be augmented and windowed by :meth:`finished`: on a
                GPU in a fraction of a worker's time, and after a transfer of half the bytes.
        """
        self.cohort = cohort
        self.records = list(records)
        self.augment = augment
        self.windows_hu = windows_hu or cohort.volume_config.windows_hu
        self.seed = seed
        self.epoch = epoch
        self.finish_later = finish_later
        crop, size = augment.crop_voxels if augment else None, cohort.volume_config.size
        if crop is not None and not all(0 < c <= n for c, n in zip(crop, size, strict=True)):
            raise ValueError(f"augment.crop_voxels {crop} does not fit into volumes of {size}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        draw = (self.seed, self.epoch, index)
        volume = torch.from_numpy(self._read(record.volume_id, draw))
        if not self.finish_later:
            volume = self._finish(volume, draw)
        return Sample(volume, record, self.cohort.study_index[record.study_id], draw)

    def _read(self, volume_id: str, draw: tuple[int, int, int]) -> np.ndarray:
        """The volume, or the box of it that this draw gives."""
        crop = self.augment.crop_voxels if self.augment else None
        if crop is None:
            return self.cohort.read(volume_id)
        spare = np.subtract(self.cohort.volume_config.size, crop)
        start = np.random.default_rng([*draw, CROP_STREAM]).integers(0, spare, endpoint=True)
        return self.cohort.read_crop(volume_id, start.tolist(), crop)

    def _finish(self, volume_hu: Tensor, draw: tuple[int, int, int]) -> Tensor:
        """Augment and window one volume, where it is."""
        if self.augment is not None:
            from ctclip.data.augment import augment

            volume_hu = augment(volume_hu, self.augment, draw)
        return window(volume_hu, self.windows_hu)

    def finished(self, batch: Batch) -> Batch:
        """A batch ready for the model: augmented and windowed, where it is, if it isn't yet."""
        if not self.finish_later:
            return batch
        volumes = [
            self._finish(hu, draw) for hu, draw in zip(batch.volume, batch.draws, strict=True)
        ]
        return batch.with_volume(torch.stack(volumes))


def collate(samples: Iterable[Sample]) -> Batch:
    """Stack samples into a batch."""
    samples = list(samples)
    return Batch(
        torch.stack([sample.volume for sample in samples]),
        [sample.record for sample in samples],
        torch.tensor([sample.study for sample in samples], dtype=torch.int64),
        torch.tensor([sample.record.label_row() for sample in samples], dtype=torch.float32),
        [sample.draw for sample in samples],
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
