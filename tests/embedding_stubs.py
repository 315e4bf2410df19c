"""A model and a cohort small enough to know every embedding in advance."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ctclip.data.cohort import CorruptVolumeError
from ctclip.data.volume import VolumeConfig


@dataclass
class StubRecord:
    volume_id: str
    study_id: str
    patient_id: str
    split: str = "valid"
    findings: str | None = None
    impression: str | None = None
    labels: dict[str, float] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


class StubModel(torch.nn.Module):
    """Embeds a volume as the direction of (mean, 1, first voxel); a text as its token counts."""

    def __init__(self, two_readouts=False):
        super().__init__()
        self.two_readouts = two_readouts
        self.volumes_seen = 0

    def encode_image_readouts(self, image, normalize=False):
        self.volumes_seen += len(image)
        mean, first = image.mean(dim=(1, 2, 3, 4)), image[:, 0, 0, 0, 0]
        prompt = torch.stack([mean, torch.ones_like(mean), first], dim=1)
        return {"prompt": prompt, "report": prompt.flip(1) if self.two_readouts else prompt}

    def encode_text(self, tokens, normalize=False):
        counts = torch.stack([(tokens == value).sum(1) for value in range(1, 4)], dim=1)
        return counts.float() + 0.1


@dataclass
class StubCheckpoint:
    model: StubModel = field(default_factory=StubModel)
    volume_config: VolumeConfig = field(default_factory=lambda: VolumeConfig(size=(2, 4, 4)))
    sha256: str = "a" * 64
    provenance: dict = field(default_factory=lambda: {"step": 7})

    def tokenizer(self, texts):
        width = max(len(text.split()) for text in texts)
        rows = [[len(word) % 3 + 1 for word in text.split()] for text in texts]
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


class StubCohort:
    def __init__(self, num_volumes, volumes_per_study=2, config=None, unreadable=()):
        self.unreadable = unreadable
        self.volume_config = config or VolumeConfig(size=(2, 4, 4))
        self.fingerprint = self.volume_config.fingerprint()
        self.records = [
            StubRecord(
                volume_id=f"p{row // volumes_per_study}_a_{row % volumes_per_study}",
                study_id=f"p{row // volumes_per_study}_a",
                patient_id=f"p{row // volumes_per_study}",
                findings=f"finding {row // volumes_per_study}",
                impression="none",
                labels={"Emphysema": float(row % 2)},
                meta={"sex": "F", "age": str(60 + row), "name": "Doe^Jane", "date": "2024-01-01"},
            )
            for row in range(num_volumes)
        ]
        self.checksums = {record.volume_id: row for row, record in enumerate(self.records)}

    def read(self, volume_id):
        if volume_id in self.unreadable:
            raise CorruptVolumeError(Path(volume_id), "damaged-cache", "its checksum differs")
        row = [record.volume_id for record in self.records].index(volume_id)
        hu = np.full((2, 4, 4), row * 10 - 500, dtype=np.int16)
        hu[0, 0, 0] = -row
        return hu
