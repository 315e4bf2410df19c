import numpy as np
import pytest
from scans import SPACING_MM, chest_hu, save

from ctclip.data import chest, volume


def check(tmp_path, hu, spacing_mm=SPACING_MM):
    return chest.check(volume.read(save(tmp_path / "scan.nii.gz", hu, spacing_mm=spacing_mm)))


def test_a_chest_passes(tmp_path):
    found = check(tmp_path, chest_hu())
    assert found.is_chest
    assert not found.notes
    assert 1 < found.lung_litres < 8


def test_a_body_without_lungs_is_not_a_chest(tmp_path):
    hu = chest_hu()
    hu[(hu < -500) & (np.indices(hu.shape)[2] > 10) & (np.indices(hu.shape)[2] < 54)] = 30
    assert [note.code for note in check(tmp_path, hu).notes] == ["not-chest"]


def test_a_slab_is_partial(tmp_path):
    assert [note.code for note in check(tmp_path, chest_hu()[14:24]).notes] == ["partial-chest"]


def test_a_spacing_that_shrinks_the_patient_is_noticed(tmp_path):
    found = check(tmp_path, chest_hu(), spacing_mm=(8.0, 2.0, 2.0))
    assert [note.code for note in found.notes] == ["body-size"]


def test_real_chests_pass_and_everything_else_is_caught(test_data):
    full = {
        "4dlung_113_native",
        "cip_ct64",
        "cip_testinput64",
        "innereye_scan_small_wrongspacing",
        "lung1_001",
        "lung1_002",
        "lung1_003",
        "nsclcrg_R01-001",
    }
    found = {}
    for path in sorted((test_data / "data/real/volumes").glob("*.nii.gz")):
        found[path.name.split(".")[0]] = chest.check(volume.read(path))
    assert {name for name, result in found.items() if result.is_chest} >= full
    for name in ("totalseg_abdomen_3mm", "niivue_CT_pitch_oblique_uint8"):
        assert found[name].notes[0].code == "not-chest"
    for name in ("lidc_0002_part", "lidc_0003_part"):
        assert found[name].notes[0].code == "partial-chest"
    assert found["innereye_scan_small_wrongspacing"].notes[0].code == "body-size"


@pytest.mark.parametrize("shape", [(100, 8, 8), (8, 100, 8)])
def test_any_shape_is_judged_without_a_crash(tmp_path, shape):
    hu = np.full(shape, -1000, np.int16)
    hu[2:6, 2:6, 2:6] = 40
    hu += np.random.default_rng(0).integers(-20, 20, shape, dtype=np.int16)
    assert not check(tmp_path, hu).is_chest
