import csv
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from scans import chest_hu, save

from ctclip.data import ct_clip, nifti, storage, volume
from ctclip.data.hu import apply_scaling
from ctclip.data.volume import VolumeConfig


@pytest.mark.parametrize("name", ["fix_1_a_1", "fix_2_a_1"])
@pytest.mark.parametrize(("clip", "loader"), [("last", "train"), ("first", "infer")])
def test_matches_the_original_loaders_to_1e_6(test_data, name, clip, loader):
    folder = test_data / "ct-clip/fixtures/preprocess"
    with (folder / "metadata.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r["VolumeName"].startswith(name))
    in_plane = json.loads(row["XYSpacing"])[0]
    stored = nifti.read(folder / f"{name}.nii.gz")
    hu = apply_scaling(stored.voxels, float(row["RescaleSlope"]), float(row["RescaleIntercept"]))
    out = ct_clip.preprocess(
        hu.transpose(2, 0, 1), (float(row["ZSpacing"]), in_plane, in_plane), clip=clip
    )

    truth = load_file(folder / "expected.safetensors")
    points = truth[f"{name}.{loader}.points"].astype(int)
    assert np.abs(out[tuple(points.T)] - truth[f"{name}.{loader}.values"]).max() < 1e-6
    summary = json.loads((folder / "expected.json").read_text())[f"{name}.nii.gz"][loader]
    assert out.sum(dtype=np.float64) == pytest.approx(summary["sum"], abs=1)
    inside = np.argwhere(out != -1)
    assert inside.min(axis=0).tolist() == summary["bbox_of_values_not_minus1"][0]
    assert (inside.max(axis=0) + 1).tolist() == summary["bbox_of_values_not_minus1"][1]


def test_the_two_clip_orders_differ_only_where_values_leave_the_window():
    def both(hu):
        return [
            ct_clip.preprocess(hu, (8.0, 6.0, 5.0), clip=clip, size=(60, 80, 80))
            for clip in ("last", "first")
        ]

    inside = np.clip(chest_hu(), -1000, 1000)
    last, first = both(inside)
    assert np.array_equal(last, first)
    inside[16:20, 20:24, 30:34] = 3000
    last, first = both(inside)
    assert np.abs(last - first).max() > 0.1


def test_as_a_recipe_it_fixes_the_axes_and_costs_nothing(tmp_path):
    scan = volume.read(save(tmp_path / "scan.nii.gz", axes="RAS"))
    config = VolumeConfig(recipe="ct-clip", spacing_mm=(8.0, 5.0, 6.0), size=(40, 70, 48))
    cached = volume.preprocess(scan, config)
    exact = ct_clip.preprocess(
        scan.hu.transpose(0, 2, 1), (8.0, 5.0, 6.0), target_mm=(8.0, 5.0, 6.0), size=(40, 70, 48)
    )
    assert cached.shape == (40, 70, 48)
    assert np.abs(cached / 1000 - exact).max() <= 1e-6
    frame = storage.compress(cached)
    kept = storage.decompress(frame)
    assert np.abs(kept - cached).max() <= 1 / 64 + 1e-4
    assert np.array_equal(storage.read_box(frame, (3, 4, 5), (2, 2, 2)), kept[3:5, 4:6, 5:7])
    clipped = np.clip(scan.hu, -1000, 1000).transpose(0, 2, 1)
    assert np.allclose(cached[2:38, 3:67, 2:46], clipped, rtol=0, atol=2e-4)
    mm = volume.preprocessed_affine(scan, config) @ [7, 20, 12, 1]
    assert np.allclose(mm, scan.affine @ [5, 10, 17, 1], atol=1e-4)
