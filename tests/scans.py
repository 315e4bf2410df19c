"""Chests of known, asymmetric anatomy, and files of them in every axis order."""

import csv
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from ctclip.findings import FINDINGS

AXIS_ORDERS = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "IS"))
    for codes in itertools.product(*axes)
]
"""All 48 ways to store a volume."""

SPACING_MM = (8.0, 6.0, 5.0)


def chest_hu(shape: tuple[int, int, int] = (36, 44, 64), seed: int = 0) -> np.ndarray:
    """(D, H, W) SPL int16: lungs, a heart on the left, a liver below on the right, a spine behind.

    No two of its 48 flips and permutations are alike.
    """
    rng = np.random.default_rng(seed)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(h / 0.85) ** 2 + (w / 0.9) ** 2 < 1] = 40
    for side in (-1, 1):
        lung = ((w - side * 0.42) / 0.33) ** 2 + (h / 0.6) ** 2 + (d / 0.85) ** 2 < 1
        hu[lung] = -850
    hu[((w - 0.2) / 0.25) ** 2 + ((h + 0.3) / 0.3) ** 2 + ((d + 0.2) / 0.4) ** 2 < 1] = 45
    hu[((w + 0.4) / 0.4) ** 2 + (h / 0.6) ** 2 + ((d + 0.9) / 0.3) ** 2 < 1] = 110
    hu[(w / 0.1) ** 2 + ((h - 0.65) / 0.12) ** 2 < 1] = 400
    hu += rng.normal(0, 8, shape)
    return np.clip(hu, -1024, 3071).round().astype(np.int16)


def affine_spl(spacing_mm: tuple[float, float, float] = SPACING_MM) -> np.ndarray:
    """Index (d, h, w) to RAS mm of an SPL volume."""
    d, h, w = spacing_mm
    return np.array([[0, 0, -w, 90.0], [0, -h, 0, 70.0], [d, 0, 0, -120.0], [0, 0, 0, 1.0]])


def image(
    hu: np.ndarray, axes: str = "LPS", spacing_mm: tuple[float, float, float] = SPACING_MM
) -> nib.Nifti1Image:
    """The SPL array ``hu`` as a NIfTI image stored in another axis order."""
    transform = ornt_transform(axcodes2ornt("SPL"), axcodes2ornt(axes))
    stored = nib.orientations.apply_orientation(hu, transform)
    affine = affine_spl(spacing_mm) @ inv_ornt_aff(transform, hu.shape)
    made = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
    made.header.set_xyzt_units("mm")
    made.set_sform(affine, 1)
    made.set_qform(affine, 1)
    return made


def save(path: Path, hu: np.ndarray | None = None, axes: str = "LPS", **kwargs: object) -> Path:
    """Write a chest as NIfTI and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image(chest_hu() if hu is None else hu, axes, **kwargs), path)  # type: ignore[arg-type]
    return path


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    """Write a table and return its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def cohort(folder: Path, num: int = 6, **shape: object) -> Path:
    """A manifest of ``num`` patients with one scan each; returns the manifest's path."""
    rows = []
    for i in range(num):
        save(folder / f"scans/v{i}.nii.gz", chest_hu(seed=i, **shape))  # type: ignore[arg-type]
        split = ("train", "train", "valid", "test")[i % 4]
        report = f"Findings: nodule number {i}. Impression: case {i}."
        labels = [(i >> bit) & 1 for bit in range(18)]
        rows.append([f"p{i}", f"s{i}", f"scans/v{i}.nii.gz", split, report, "F", *labels])
    header = ["patient_id", "study_id", "path", "split", "report", "sex", *FINDINGS]
    return write_csv(folder / "manifest.csv", header, rows)
