"""Planting into a scan of which only voxels and spacing are known."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctclip.findings import FINDINGS
from ctclip.phantom import acquisition, anatomy, planting
from ctclip.phantom.grid import Grid
from ctclip.phantom.scene import Scene

SPACING_MM = (3.5, 2.8, 2.8)


@pytest.fixture(scope="module")
def phantom():
    patient = anatomy.sample_patient(np.random.default_rng(12), 60, "M")
    grid = Grid((84, 108, 140), SPACING_MM, (-182.0, -148.0, -195.0))
    hu, _ = acquisition.render(patient, [], grid)
    scanner = acquisition.scanners()[0][0]
    voxels = acquisition.scan(hu, grid, scanner, np.random.default_rng(0))
    return voxels, Scene(patient, grid).lung < 0


@pytest.fixture(scope="module")
def scene(phantom):
    return planting.scene_of_scan(phantom[0], SPACING_MM)


def test_the_lungs_of_a_scan_are_found(phantom, scene):
    _, truth = phantom
    found = scene.lung < 0
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.92


def test_a_planted_nodule_is_where_and_as_large_as_asked(phantom, scene):
    hu, _ = phantom
    deepest = np.unravel_index(np.argmin(scene.lung), scene.lung.shape)
    planted = planting.plant_nodule(hu, SPACING_MM, deepest, 18.0, seed=1, scene=scene)
    gain = (planted - hu).astype(float)
    gain[np.abs(gain) < 60] = 0
    where = np.argwhere(gain)
    centre = (where * gain[tuple(where.T)][:, None]).sum(0) / gain.sum()
    assert np.abs((centre - deepest) * SPACING_MM).max() < 3.0
    volume = (gain / 890.0).sum() * np.prod(SPACING_MM)
    assert volume == pytest.approx(np.pi / 6 * 18**3, rel=0.35)
    far = np.linalg.norm((np.indices(hu.shape).T - deepest) * SPACING_MM, axis=-1).T > 25
    assert np.array_equal(planted[far], hu[far].astype(np.float32))


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_finding_can_be_planted(scene, finding):
    before = scene.hu.copy()
    rng = np.random.default_rng(3)
    changed = np.zeros(before.shape, bool)
    for seed in range(3):
        lesions = planting.sample_finding(scene, finding, rng)
        planted = planting.plant(scene, lesions, seed)
        assert np.isfinite(planted).all()
        changed |= np.abs(planted - before) > 20
    assert changed.any()
    assert changed.mean() < 0.25
    assert np.array_equal(scene.hu, before)


def test_a_nodule_outside_the_lungs_is_refused(phantom, scene):
    with pytest.raises(planting.PlantingError, match="outside the lungs"):
        planting.plant_nodule(phantom[0], SPACING_MM, (2, 2, 2), 8.0, scene=scene)


def test_a_volume_without_lungs_is_refused():
    with pytest.raises(planting.PlantingError, match="no lungs"):
        planting.scene_of_scan(np.full((20, 30, 30), 40.0), (5.0, 5.0, 5.0))


@pytest.mark.skipif("CTCLIP_TEST_DATA" not in os.environ, reason="CTCLIP_TEST_DATA is not set")
def test_lungs_of_a_real_chest_agree_with_its_published_mask():
    real = Path(os.environ["CTCLIP_TEST_DATA"]) / "data/real"
    image, mask = (
        nib.as_closest_canonical(nib.load(real / name))
        for name in ("volumes/cip_ct64.nii.gz", "masks/cip_ct64_lungregions.nii.gz")
    )
    hu, truth = (
        np.asanyarray(volume.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1] for volume in (image, mask)
    )
    x, y, z = (float(v) for v in image.header.get_zooms()[:3])
    found = planting.scene_of_scan(hu, (z, y, x)).lung < 0
    assert 2 * (found & (truth > 0)).sum() / (found.sum() + (truth > 0).sum()) > 0.97
