"""A prepared cohort of blobs: three findings that can be seen and read, written in a second."""

from pathlib import Path

import numpy as np

from ctclip import config
from ctclip.data import storage
from ctclip.data.cohort import PreparedCohort, write_cohort_manifest
from ctclip.data.manifest import VolumeRecord
from ctclip.data.volume import VolumeConfig

SIZE = (8, 16, 16)
VISIBLE = ("Pleural effusion", "Cardiomegaly", "Emphysema")


def build(
    out: Path,
    num_studies: int = 48,
    reconstructions: int = 1,
    seed: int = 0,
    labelled: bool = True,
) -> Path:
    """Write a cohort whose first three quarters are for training; returns its folder."""
    recipe = VolumeConfig(spacing_mm=(8.0, 8.0, 8.0), size=SIZE)
    folder = out / recipe.fingerprint()
    for name in ("volumes", "tmp"):
        (folder / name).mkdir(parents=True)
    config.save(recipe, folder / "recipe.yaml")
    rng = np.random.default_rng(seed)
    records, outcomes = [], {}
    for study in range(num_studies):
        has = dict(zip(VISIBLE, (rng.random(3) < 0.5).tolist(), strict=True))
        for reconstruction in range(reconstructions):
            volume = rng.normal(-800, 60, SIZE)
            if has["Pleural effusion"]:
                volume[:3, 10:, :] = 10
            if has["Cardiomegaly"]:
                volume[3:6, 3:9, 4:13] = 40
            if has["Emphysema"]:
                volume[6:, :6, :] = -990
            volume_id = f"s{study}_{reconstruction}"
            frame = storage.compress(volume.astype(np.int16))
            (folder / "volumes" / f"{volume_id}.b2nd").write_bytes(frame)
            outcomes[volume_id] = {"crc32": storage.checksum(frame), "affine": np.eye(4).tolist()}
            sentences = [
                f"{name} is seen." if present else f"There is no {name.lower()}."
                for name, present in has.items()
            ]
            records.append(
                VolumeRecord(
                    volume_id=volume_id,
                    study_id=f"s{study}",
                    patient_id=f"p{study}",
                    split="train" if study < num_studies * 3 // 4 else "valid",
                    path=None,
                    findings=f"Study {study}. " + " ".join(sentences),
                    labels={name: float(x) for name, x in has.items()} if labelled else {},
                )
            )
    write_cohort_manifest(folder, records, outcomes)
    PreparedCohort.open(folder)
    return folder
