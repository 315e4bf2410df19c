import logging

import numpy as np
import pytest
from scans import chest_hu, save

from ctclip.data import checked
from ctclip.data.cache import prepare
from ctclip.data.inspect import inspect
from ctclip.data.manifest import VolumeRecord
from ctclip.data.problems import ManifestError, VolumeError
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))

NOT_HU = {
    "8-bit": lambda hu: np.clip((hu + 1000) / 8, 0, 255).astype(np.uint8),
    "hu-offset": lambda hu: hu + np.int16(1024),
    "normalised": lambda hu: ((hu + 1000.0) / 2000).astype(np.float32),
    "not-hu": lambda hu: (hu // 4 + 4000).astype(np.int16),
}


def no_chest():
    """A body of soft tissue in room air, without lungs."""
    hu = chest_hu()
    hu[(hu < -500) & (chest_hu(seed=1) < -500)] = 30
    hu[:, :4] = hu[:, -4:] = -1000
    hu[:, :, :4] = hu[:, :, -4:] = -1000
    return hu + np.random.default_rng(0).integers(-8, 8, hu.shape).astype(np.int16)


@pytest.mark.parametrize("code", NOT_HU)
def test_one_scan_is_held_back_for_what_holds_it_back_from_a_cohort(tmp_path, code):
    path = save(tmp_path / "scan.nii.gz", NOT_HU[code](chest_hu()))
    record = VolumeRecord(volume_id="v", study_id="s", patient_id="p", split="test", path=path)
    with pytest.raises(ManifestError, match=f"refused: {code} x 1"):
        prepare([record], tmp_path / "out", SMALL)
    assert not inspect(path).is_usable
    with pytest.raises(VolumeError) as error:
        checked.read(path)
    assert error.value.code == code
    assert f"--accept {code}" in str(error.value)
    assert "--rescale" in str(error.value)


def test_a_held_scan_can_be_accepted_or_rescaled(tmp_path):
    path = save(tmp_path / "scan.nii.gz", chest_hu() + np.int16(1024))
    assert checked.read(path, accept=["hu-offset"]).hu.min() >= 0
    assert checked.read(path, accept="hu-offset").hu.min() >= 0
    assert np.array_equal(checked.read(path, rescale=(1.0, -1024.0)).hu, chest_hu())
    with pytest.raises(VolumeError, match="rescale 1 -1024"):
        checked.read(path, accept=["8-bit"])


def test_what_is_odd_about_a_used_scan_is_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "ctclip")
    checked.read(save(tmp_path / "chest.nii.gz"))
    assert caplog.messages == []
    path = save(tmp_path / "abdomen.nii.gz", no_chest())
    assert checked.read(path).hu.shape == chest_hu().shape
    (message,) = caplog.messages
    assert message.startswith(f"{path}: lungs fill")
    assert message.endswith("[not-chest]")
    offset = save(tmp_path / "offset.nii.gz", chest_hu() + np.int16(1024))
    checked.read(offset, accept=["hu-offset"])
    assert any(message.endswith("[hu-offset]") for message in caplog.messages[1:])


def test_real_scans_are_held_back_or_warned_about(test_data, caplog):
    caplog.set_level(logging.WARNING, "ctclip")
    folder = test_data / "data"
    for name, code in {
        "real/volumes/niivue_CT_pitch_oblique_uint8.nii.gz": "8-bit",
        "bad/nifti/56_hu_offset_1024.nii.gz": "hu-offset",
        "bad/nifti/61_normalised_0_1.nii.gz": "normalised",
    }.items():
        with pytest.raises(VolumeError) as error:
            checked.read(folder / name)
        assert error.value.code == code
    caplog.clear()
    checked.read(folder / "real/volumes/totalseg_abdomen_3mm.nii.gz")
    assert any(message.endswith("[not-chest]") for message in caplog.messages)
