import numpy as np
import pytest
import SimpleITK
from scans import SPACING_MM, chest_hu

from ctclip.data import volume
from ctclip.data.problems import VolumeError


def write(path, hu, compress=False):
    image = SimpleITK.GetImageFromArray(hu)
    image.SetSpacing(SPACING_MM[::-1])
    SimpleITK.WriteImage(image, str(path), useCompression=compress)
    return path


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [True, False])
def test_a_scan_comes_out_in_house_orientation(tmp_path, suffix, compress):
    scan = volume.read(write(tmp_path / f"scan{suffix}", chest_hu(), compress))
    assert np.array_equal(scan.hu, chest_hu())
    assert scan.spacing_mm == pytest.approx(SPACING_MM)
    assert not scan.warnings()


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [True, False])
def test_a_truncated_file_is_refused_where_itk_would_invent_voxels(tmp_path, suffix, compress):
    path = write(tmp_path / f"scan{suffix}", chest_hu(), compress)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(VolumeError) as error:
        volume.read(path)
    assert error.value.code in ("truncated", "corrupt-gzip")


def test_what_is_no_image_or_no_volume_is_refused(tmp_path):
    (tmp_path / "a.nrrd").write_text("hello")
    with pytest.raises(VolumeError, match="not-nrrd"):
        volume.read(tmp_path / "a.nrrd")
    SimpleITK.WriteImage(SimpleITK.Image([9, 9], SimpleITK.sitkInt16), str(tmp_path / "b.mha"))
    with pytest.raises(VolumeError, match="not-3d"):
        volume.read(tmp_path / "b.mha")


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    path = write(tmp_path / "a.nrrd", chest_hu())
    data = path.read_bytes().replace(b"sizes: 64 44 36", b"sizes: 64 44 36000000")
    path.write_bytes(data)
    with pytest.raises(VolumeError, match="too-large"):
        volume.read(path)


def test_real_files_agree_with_their_nifti_conversions(test_data):
    real = test_data / "data/real"
    pairs = {
        "cip_TestInput.nrrd": "cip_testinput64",
        "elastix_3DCT_lung_baseline_small.mha": "elastix_rightlung_small",
    }
    for name, other in pairs.items():
        scan = volume.read(real / "formats" / name)
        assert np.array_equal(scan.hu, volume.read(real / f"volumes/{other}.nii.gz").hu)
