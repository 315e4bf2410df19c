"""Pictures of phantoms for their data card: beside real chests, and one for each finding.

python benchmarks/phantom_pictures.py --out data_cards/images --real a.nii.gz b.nii.gz
"""

import argparse
import dataclasses
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np

from ctclip.findings import FINDINGS
from ctclip.phantom import acquisition, anatomy, findings
from ctclip.phantom.grid import Grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SOFT, LUNG = (-160, 240), (-1200, 200)
VOXEL_MM = (2.5, 1.2, 1.2)


def real_chest(path):
    """Voxels (D, H, W) oriented SPL and their size."""
    image = nib.as_closest_canonical(nib.load(path))
    hu = np.asanyarray(image.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    x, y, z = (float(v) for v in image.header.get_zooms()[:3])
    return hu, (z, y, x)


def phantom_chest(seed, sex, voxel_mm, **facts):
    rng = np.random.default_rng(seed)
    patient = dataclasses.replace(anatomy.sample_patient(rng, 60, sex), **facts)
    low, high = acquisition.field_of_view(patient, rng)
    scanner = acquisition.scanners()[0][0]
    grid = acquisition.make_grid(low, high, scanner, None, voxel_mm)
    hu, _ = acquisition.render(patient, [], grid)
    return acquisition.scan(hu, grid, scanner, rng), grid.spacing_mm


def show(axis, slice_, window, aspect=1.0):
    axis.imshow(slice_, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
    axis.set_xticks([])
    axis.set_yticks([])


def beside_real(real, out):
    rows = []
    for k, path in enumerate(real):
        hu, voxel_mm = real_chest(path)
        rows.append((f"real: {path.name.split('.')[0]}", hu, voxel_mm))
        wanted = voxel_mm if voxel_mm[1] > 3 else VOXEL_MM
        blood = (185.0, 42.0, 170.0)[k % 3]
        phantom = phantom_chest(11 + k, "FMM"[k % 3], wanted, blood_hu=blood)
        rows.append(("phantom", *phantom))
    fig, axes = plt.subplots(len(rows), 6, figsize=(15, 2.35 * len(rows)), squeeze=False)
    for line, (name, hu, mm) in zip(axes, rows, strict=True):
        depth, height, width = hu.shape
        for axis, level in zip(line, (0.68, 0.55, 0.4), strict=False):
            show(axis, hu[int(level * depth)], SOFT)
        show(line[3], hu[int(0.5 * depth)], LUNG)
        show(line[4], hu[::-1, int(0.5 * height)], LUNG, mm[0] / mm[2])
        show(line[5], hu[::-1, :, int(0.5 * width)], (-300, 500), mm[0] / mm[1])
        line[0].set_ylabel(name, fontsize=9)
    fig.tight_layout(pad=0.3)
    fig.savefig(out / "phantom_beside_real.jpg", dpi=75, pil_kwargs={"quality": 72})


def one_of_each(out):
    fig, axes = plt.subplots(3, 6, figsize=(15, 7.6))
    for k, (axis, name) in enumerate(zip(axes.ravel(), FINDINGS, strict=True)):
        rng = np.random.default_rng(100 + k)
        patient = dataclasses.replace(anatomy.sample_patient(rng, 60, "MF"[k % 2]), blood_hu=42.0)
        present = {other: other == name for other in FINDINGS}
        sick, lesions = findings.sample_lesions(present, patient, rng)
        while not 0.4 < max(lesion.severity for lesion in lesions) < 0.85:
            sick, lesions = findings.sample_lesions(present, patient, rng)
        low, high = acquisition.field_of_view(sick, rng)
        scanner = acquisition.scanners()[0][0]
        coarse = acquisition.make_grid(low, high, scanner, (60, 64, 64), None)
        healthy, _ = acquisition.render(patient, [], coarse)
        drawn, _ = acquisition.render(sick, lesions, coarse)
        level = int((np.abs(drawn - healthy) > 25).sum(axis=(1, 2)).argmax())
        z = float(coarse.axes[0].ravel()[level])
        pixel = float(high[1] - low[1]) / 330
        grid = Grid((3, 330, 330), (2.0, pixel, pixel), (z - 2.0, float(low[1]), float(low[2])))
        hu, _ = acquisition.render(sick, lesions, grid)
        window = LUNG if k >= FINDINGS.index("Emphysema") else SOFT
        show(axis, acquisition.scan(hu, grid, scanner, rng)[1][40:300], window)
        axis.set_title(name, fontsize=9)
    fig.tight_layout(pad=0.3)
    fig.savefig(out / "phantom_findings.jpg", dpi=75, pil_kwargs={"quality": 75})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    one_of_each(args.out)
    if args.real:
        beside_real(args.real, args.out)


if __name__ == "__main__":
    main()
