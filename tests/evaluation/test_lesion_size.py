from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from ctclip.data import volume
from ctclip.data.volume import VolumeConfig
from ctclip.evaluation import lesion_size
from ctclip.evaluation.lesion_size import LesionSizeConfig

CONFIG = LesionSizeConfig(
    diameters_mm=(5.0, 10.0, 20.0), kinds=("solid",), repeats=2, replicates=250
)
CHECKPOINT = SimpleNamespace(volume_config=VolumeConfig(spacing_mm=(3.0,) * 3, size=(80, 80, 80)))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Chests of 24 cm: a soft-tissue body with two lungs of noisy parenchyma."""
    folder = tmp_path_factory.mktemp("scans")
    paths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        axes = np.meshgrid(*[np.arange(80) * 3.0 - 120] * 3, indexing="ij")
        hu = np.full((80, 80, 80), -1000.0)
        hu[(axes[0] / 125) ** 2 + (axes[1] / 108) ** 2 < 1] = 40
        for side in (-45, 45):
            lung = ((axes[0] - side) / 34) ** 2 + (axes[1] / 62) ** 2 + (axes[2] / 90) ** 2 < 1
            hu[lung] = -860
        hu += rng.normal(0, 8, hu.shape)
        path = folder / f"scan{seed}.nii.gz"
        affine = np.diag([-3.0, -3.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def brightest_spot(scans):
    """A detector that sees a nodule of about 9 mm or more: the densest spot deep in the lungs."""
    empty = volume.preprocess(volume.read(scans[0]), CHECKPOINT.volume_config)
    air, _ = ndimage.label(ndimage.uniform_filter(empty.astype(float), 3) < -600)
    deep = ndimage.binary_erosion((air > 0) & (air != air[0, 0, 0]), iterations=2)

    def score(hu: np.ndarray) -> float:
        return float(ndimage.uniform_filter(hu.astype(float), 3)[deep].max())

    return score


def test_larger_nodules_are_seen_better(scans, brightest_spot):
    frames = [lesion_size.plant_scan(p, CHECKPOINT, brightest_spot, CONFIG) for p in scans]
    planted = pd.concat(frames)
    found = lesion_size.curve(planted, CONFIG)
    assert found["diameter_mm"].tolist() == [5, 10, 20]
    assert found["nodules"].tolist() == [6, 6, 6]
    assert found["shift"].is_monotonic_increasing
    assert found["auroc"].iloc[-1] == 1.0
    assert (found["auroc_low"] <= found["auroc"]).all()
    places = planted.groupby(["volume", "place"])[["d", "h", "w"]].nunique()
    assert (places == 1).all().all()


def test_places_lie_in_free_lung(scans):
    from ctclip.phantom.planting import scene_of_scan

    scan = volume.read(scans[0])
    scene = scene_of_scan(scan.hu, scan.spacing_mm)
    rng = np.random.default_rng(0)
    places = list(lesion_size.free_places(scan, scene, 10.0, 20, rng))
    assert len(places) == 20
    for place in places:
        assert scene.lung[place] < -lesion_size.PLEURA_MM
        assert scan.hu[place] < -700


@pytest.mark.parametrize(
    ("areas", "smallest"),
    [((0.5, 0.8, 0.9), 6), ((0.9, 0.6, 0.9), 10), ((0.9, 0.9, 0.9), 3), ((0.9, 0.9, 0.6), None)],
)
def test_the_smallest_seen_diameter_has_no_miss_above_it(areas, smallest):
    frame = pd.DataFrame({"kind": "solid", "diameter_mm": [3.0, 6.0, 10.0], "auroc": areas})
    found = lesion_size.smallest_seen_mm(frame, "solid")
    assert np.isnan(found) if smallest is None else found == smallest


def test_results_are_written_and_few_scans_are_called_few(tmp_path, capsys):
    planted = pd.DataFrame(
        {
            "volume": ["a", "b"] * 2, "kind": "solid", "diameter_mm": [5.0, 5.0, 9.0, 9.0],
            "place": 0, "score": [0.1, 0.2, 0.8, 0.9], "without": [0.1, 0.25, 0.1, 0.25],
        }
    )  # fmt: skip
    config = LesionSizeConfig(diameters_mm=(5.0, 9.0), kinds=("solid",), replicates=250)
    found = lesion_size.curve(planted, config)
    lesion_size.write(planted, found, ["c: no lungs found"], tmp_path, "f" * 64, config)
    assert "auroc_low" in capsys.readouterr().out
    text = (tmp_path / "lesion_size.html").read_text()
    assert "Only 2 scans" in text
    assert "Left out: c: no lungs found" in text
    assert "from 9 mm" in text
    assert (tmp_path / "lesion_size.png").is_file()
