"""The drawn body against facts about chests."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from ctclip.phantom import anatomy, body, trees
from ctclip.phantom.acquisition import render
from ctclip.phantom.grid import Grid
from ctclip.phantom.scene import Scene

GRID = Grid((64, 76, 92), (4.6, 4.2, 4.2), (-182.0, -150.0, -193.0))


@pytest.fixture(scope="module")
def patient():
    return anatomy.sample_patient(np.random.default_rng(4), 60, "M")


@pytest.fixture(scope="module")
def scene(patient):
    scene = Scene(patient, GRID)
    body.paint_body(scene)
    return scene


def at(scene, name, position):
    """HU at a point of a centreline, ``position`` from 0 (first point) to 1."""
    points, _ = anatomy.centrelines(scene.patient)[name]
    t = position * (len(points) - 1)
    i = min(int(t), len(points) - 2)
    world = scene.patient.to_world(points[i] + (t - i) * (points[i + 1] - points[i]))
    return scene.hu[tuple(np.round(GRID.index_of(world)).astype(int))]


def test_the_affine_says_what_the_axes_mean():
    assert nib.aff2axcodes(GRID.affine) == ("S", "P", "L")
    world = GRID.affine @ [10, 20, 30, 1]
    z, y, x = (axis.ravel()[i] for axis, i in zip(GRID.axes, (10, 20, 30), strict=True))
    assert world[:3].tolist() == pytest.approx([-x, -y, z])


def test_lungs_have_the_volume_and_the_density_of_real_ones(scene):
    inside = scene.lung < 0
    litres = inside.sum() * np.prod(GRID.spacing_mm) / 1e6
    assert 2.0 < litres < 7.0
    assert -900 < np.median(scene.hu[scene.lung < -4]) < -780


def test_the_right_lung_is_the_larger(scene):
    _, _, x = scene.template
    inside = scene.lung < 0
    assert (inside & (x < 0)).sum() > (inside & (x > 0)).sum()


def test_organs_have_their_measured_grey_values(scene):
    patient = scene.patient
    assert at(scene, "trachea", 0.7) < -850
    assert at(scene, "aorta", 0.85) == pytest.approx(patient.blood_hu, abs=15)
    liver = patient.to_world(np.array([-150.0 - patient.breath_mm, 0.0, -70.0]))
    index = tuple(np.round(GRID.index_of(liver)).astype(int))
    assert scene.hu[index] == pytest.approx(patient.liver_hu, abs=15)
    vertebra = patient.to_world(
        np.array([76.0 - 3 * body.VERTEBRA_MM, anatomy.spine_y(patient, np.float32(2.5)), 0.0])
    )
    assert scene.hu[tuple(np.round(GRID.index_of(vertebra)).astype(int))] > 100


def test_the_heart_lies_left_of_the_midline_and_under_half_of_the_chest(patient):
    grid = Grid((1, 300, 360), (1.0, 1.0, 1.0), (-75.0, -150.0, -180.0))
    scene = Scene(patient, grid)
    heart = scene.sac[0] < 0
    chest = scene.cage[0] < 0
    assert heart[:, 180:].sum() > heart[:, :180].sum()
    ratio = np.ptp(np.flatnonzero(heart.any(0))) / np.ptp(np.flatnonzero(chest.any(0)))
    assert 0.35 < ratio < 0.5
    large = Scene(dataclasses.replace(patient, heart=1.3), grid).sac[0] < 0
    assert np.ptp(np.flatnonzero(large.any(0))) / np.ptp(np.flatnonzero(chest.any(0))) > 0.5


def test_vessels_reach_the_edge_of_the_lung_and_thin_out(patient):
    grown = trees.grow_trees(patient, 256)
    ends = grown.arteries.stop[grown.arteries.radius < 1.0]
    z, y, x = patient.point_to_template(*np.moveaxis(ends, -1, 0))
    depth = trees.lung_depth(patient, np.stack([z, y, x], axis=1))
    assert (depth > -1.0).mean() > 0.95
    assert np.percentile(depth, 10) < 10
    assert set(grown.arteries.lobe) == set(range(6))
    assert grown.bronchi.radius.min() < 1.0 < grown.bronchi.radius.max()


def test_a_body_is_the_same_body_whatever_the_slabs(patient, monkeypatch):
    from ctclip.phantom import acquisition

    grid = Grid((30, 48, 56), (10.0, 6.6, 6.6), (-182.0, -150.0, -185.0))
    whole, _ = render(patient, [], grid)
    monkeypatch.setattr(acquisition, "SLAB_VOXELS", 48 * 56 * 7)
    slabs, _ = render(patient, [], grid)
    assert np.abs(whole - slabs).max() < 0.5


def test_world_and_template_are_inverse(patient):
    points = np.random.default_rng(0).normal(0, 80, (50, 3)).astype(np.float32)
    back = patient.point_to_template(*np.moveaxis(patient.to_world(points), -1, 0))
    assert np.allclose(np.stack(back, axis=1), points, atol=1e-3)
