"""Lesions against physics: size, place, density; and the truth table against the voxels."""

import numpy as np
import pytest

from ctclip.findings import FINDINGS
from ctclip.phantom import anatomy, findings
from ctclip.phantom.acquisition import render
from ctclip.phantom.grid import Grid
from ctclip.phantom.lesions import Lesion, draw, voronoi_gap
from ctclip.phantom.scene import Scene

GRID = Grid((60, 76, 92), (4.8, 4.2, 4.2), (-185.0, -150.0, -193.0))


@pytest.fixture(scope="module")
def patient():
    return anatomy.sample_patient(np.random.default_rng(9), 64, "F")


@pytest.fixture(scope="module")
def healthy(patient):
    return render(patient, [], GRID)[0]


@pytest.mark.parametrize("spacing_mm", [(0.7, 0.7, 0.7), (1.0, 0.8, 0.8), (3.0, 1.0, 1.0)])
@pytest.mark.parametrize("diameter_mm", [6.0, 14.0])
def test_a_nodule_has_its_volume_whatever_the_voxels(patient, spacing_mm, diameter_mm):
    shape = tuple(int(34 / step) for step in spacing_mm)
    middle = np.array([0.3, 0.1, -0.2])
    origin = middle - np.array(shape) * spacing_mm / 2
    grid = Grid(shape, spacing_mm, tuple(origin))
    hu = np.full(shape, -870.0, np.float32)
    scene = Scene(patient, grid, hu=hu, lung=np.full(shape, -30.0, np.float32))
    lesion = Lesion(
        finding="Lung nodule",
        kind="solid",
        side="left",
        lobe="-",
        size_mm=diameter_mm,
        severity=0.1,
        points_mm=(tuple(middle),),
        seed=3,
    )
    draw(scene, lesion)
    volume = ((scene.hu + 870.0) / 902.0).sum() * np.prod(spacing_mm)
    assert volume == pytest.approx(np.pi / 6 * diameter_mm**3, rel=0.3)


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_changes_the_scan_where_the_truth_says(patient, healthy, finding):
    rng = np.random.default_rng(2)
    present = {name: name == finding for name in FINDINGS}
    sick, lesions = findings.sample_lesions(present, patient, rng)
    assert {lesion.finding for lesion in lesions} == {finding}
    hu, boxes = render(sick, lesions, GRID)
    assert any(box is not None for box in boxes)
    inside = np.zeros(GRID.shape, bool)
    for box in boxes:
        if box is not None:
            (d0, h0, w0), (d1, h1, w1) = box
            inside[d0 : d1 + 1, h0 : h1 + 1, w0 : w1 + 1] = True
    changed = np.abs(hu - healthy) > 25
    assert changed.any()
    if finding != "Cardiomegaly":  # a larger heart moves its neighbours as well
        assert not changed[~inside].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("finding", ["Pleural effusion", "Lung nodule", "Consolidation"])
def test_the_patients_left_is_at_high_w(patient, finding, side):
    rng = np.random.default_rng(0)
    present = {name: name == finding for name in FINDINGS}
    for _ in range(40):
        _, lesions = findings.sample_lesions(present, patient, rng)
        chosen = [lesion for lesion in lesions if lesion.side == side and lesion.size_mm > 12]
        if chosen:
            break
    _, boxes = render(patient, chosen[:1], GRID)
    assert boxes[0] is not None
    middle = GRID.index_of(patient.to_world(np.array([-40.0, 0.0, 0.0])))[2]
    centre = (boxes[0][0][2] + boxes[0][1][2]) / 2
    assert (centre > middle) == (side == "left")


def test_effusion_collects_in_the_back_of_a_supine_patient(patient, healthy):
    lesion = Lesion(
        finding="Pleural effusion",
        kind="free",
        side="both",
        lobe="pleural space",
        size_mm=25.0,
        severity=0.4,
    )
    hu, _ = render(patient, [lesion], GRID)
    fluid = (np.abs(hu - 12.0) < 15) & (healthy < -500)
    _, y, _ = np.nonzero(fluid)
    _, lung_y, _ = np.nonzero(healthy < -700)
    assert len(y) > 50
    assert np.median(y) > np.median(lung_y) + 3


def test_ground_glass_leaves_vessels_visible(patient):
    rng = np.random.default_rng(5)
    present = {name: name == "Lung opacity" for name in FINDINGS}
    _, lesions = findings.sample_lesions(present, patient, rng)
    before, _ = render(patient, [], GRID)
    after, _ = render(patient, lesions, GRID)
    assert (after >= before - 1e-2).all()
    assert after[(after - before) > 20].max() < -100


def test_walls_of_a_voronoi_pattern_are_where_two_seeds_are_equally_near():
    rng = np.random.default_rng(0)
    gap = voronoi_gap(rng.uniform(0, 200, (4000, 3)), 13.0, seed=1)
    assert gap.min() >= 0
    # Cells of 13 mm: no point is farther than half a cell's width from a wall by much.
    assert 1.0 < np.median(gap) < 5.0
