import numpy as np
import pytest
from dicoms import folder, write_series
from scans import SPACING_MM, chest_hu

from ctclip.data import dicom, volume
from ctclip.data.problems import VolumeError

HU = chest_hu((20, 24, 32))


def codes(scan):
    return [note.code for note in scan.warnings()]


def refused(path, **kwargs):
    with pytest.raises(VolumeError) as error:
        volume.read(path, **kwargs)
    return error.value.code


def test_a_series_becomes_the_volume_it_was_written_from(tmp_path):
    scan = volume.read(folder(tmp_path, HU))
    assert np.array_equal(scan.hu, HU)
    assert scan.spacing_mm == pytest.approx(SPACING_MM)
    assert not codes(scan)


def test_names_numbers_and_nesting_do_not_matter(tmp_path):
    reference = volume.read(folder(tmp_path / "a", HU))
    rng = np.random.default_rng(0)
    files = write_series(tmp_path / "b", HU)
    for number, file in zip(rng.permutation(len(files)), files, strict=True):
        file.rename(tmp_path / "b" / f"x{number}")
    (tmp_path / "b/deep/er").mkdir(parents=True)
    (tmp_path / "b/x3").rename(tmp_path / "b/deep/er/x3")
    scan = volume.read(tmp_path / "b")
    assert np.array_equal(scan.hu, reference.hu)
    assert np.allclose(scan.affine, reference.affine)


def test_feet_first_numbering_and_a_flipped_stack_give_the_same_volume(tmp_path):
    scan = volume.read(folder(tmp_path, HU, instance=lambda k, n: n - k))
    assert np.array_equal(scan.hu, HU)


def test_scaling_is_per_slice_and_exactly_once(tmp_path):
    def scaled(k, dataset):
        slope = 1 + k % 3
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -1024
        stored = np.rint((HU[k].astype(float) + 1024) / slope).astype(np.int16)
        dataset.PixelData = stored.tobytes()

    scan = volume.read(folder(tmp_path, HU, edit=scaled))
    assert np.abs(scan.hu.astype(int) - HU).max() <= 1


def test_a_copy_of_a_file_is_ignored_and_a_doubled_position_is_dropped_with_a_warning(tmp_path):
    path = folder(tmp_path, HU)
    (path / "copy.dcm").write_bytes((path / "005.dcm").read_bytes())
    assert not codes(volume.read(path))
    write_series(path, HU[5:6], first=5, prefix="again")
    scan = volume.read(path)
    assert codes(scan) == ["doubled-slice"]
    assert np.array_equal(scan.hu, HU)


def test_a_missing_slice_and_uneven_steps_are_told_apart(tmp_path):
    path = folder(tmp_path / "gap", HU)
    (path / "012.dcm").unlink()
    assert refused(path) == "missing-slice"
    uneven = folder(
        tmp_path / "uneven", HU, height=lambda k: 8.0 * k if k < 10 else 80 + 4 * (k - 10)
    )
    assert refused(uneven) == "variable-spacing"
    jitter = folder(tmp_path / "jitter", HU, height=lambda k: 8.0 * k + 0.04 * (-1) ** k)
    assert np.array_equal(volume.read(jitter).hu, HU)


def test_two_series_are_never_interleaved_and_can_be_named(tmp_path):
    path = folder(tmp_path, HU, series="1.2.3")
    write_series(path, HU[:12], series="1.2.4", prefix="other")
    assert refused(path) == "several-series"
    assert volume.read(path, series="1.2.4").hu.shape[0] == 12
    assert refused(path, series="9.9") == "no-such-series"


def test_a_scout_in_the_series_is_dropped_with_a_warning(tmp_path):
    path = folder(tmp_path, HU)
    write_series(
        path,
        HU[:1],
        prefix="scout",
        edit=lambda _, dataset: dataset.__setattr__("ImageType", "ORIGINAL\\PRIMARY\\LOCALIZER"),
    )
    scan = volume.read(path)
    assert codes(scan) == ["scout"]
    assert np.array_equal(scan.hu, HU)


def test_a_tilted_gantry_is_straightened(tmp_path):
    # Slices tilted about the left-right axis while the table moves along the body.
    tilt = np.radians(15)
    path = folder(
        tmp_path,
        HU,
        orientation=[1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))],
    )
    scan = volume.read(path)
    assert codes(scan) == ["tilt"]
    assert scan.spacing_mm[0] == pytest.approx(8.0 * np.cos(tilt), rel=1e-3)
    unit = scan.affine[:3, :3] / scan.spacing_mm
    assert np.allclose(unit.T @ unit, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"Modality": "MR"}, "not-ct"),
        ({"RescaleSlope": 0}, "bad-scaling"),
        ({"PixelSpacing": [0, 0]}, "bad-spacing"),
        ({"ImagePositionPatient": None}, "no-geometry"),
        ({"PixelSpacing": None}, "no-geometry"),
        ({"ImageOrientationPatient": None}, "no-geometry"),
        ({"PixelRepresentation": 0}, "hu-out-of-range"),
        ({"PixelData": b"\0" * 100}, "bad-pixels"),
        ({"ImageOrientationPatient": [0, 0, 1, 0, 1, 0]}, "overlapping-stacks"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_its_reason(tmp_path, change, code):
    def apply(_, dataset):
        for name, value in change.items():
            setattr(dataset, name, value)

    assert refused(folder(tmp_path, HU, edit=apply)) == code


def test_a_series_of_two_patients_or_two_matrices_is_refused(tmp_path):
    def other_patient(k, dataset):
        dataset.PatientID = f"p{k > 10}"

    assert refused(folder(tmp_path / "patients", HU, edit=other_patient)) == "several-patients"
    path = folder(tmp_path / "matrix", HU[:-1])
    write_series(path, HU[19:, :12], first=19, prefix="small")
    assert refused(path) == "mixed-matrix"


def test_missing_rescale_is_assumed_with_a_warning(tmp_path):
    def forget(_, dataset):
        del dataset.RescaleSlope, dataset.RescaleIntercept

    scan = volume.read(folder(tmp_path, HU, edit=forget))
    assert codes(scan) == ["no-rescale"]
    assert np.array_equal(scan.hu, HU)


def test_junk_beside_the_slices_is_skipped(tmp_path):
    path = folder(tmp_path, HU)
    (path / "Thumbs.db").write_bytes(b"junk")
    (path / "notes.txt").write_text("hello")
    assert not codes(volume.read(path))
    (path / "empty.dcm").touch()
    (path / "broken.dcm").write_bytes(b"x" * 400)
    assert codes(volume.read(path)) == ["skipped-file", "skipped-file"]


def test_skipped_dicom_files_are_named(tmp_path):
    def foreign(_, dataset):
        dataset.Modality = "SR"

    def unnamed(_, dataset):
        del dataset.Modality

    hu = chest_hu((24, 24, 32))
    folder(tmp_path / "ct", hu, series="1.1", edit=unnamed)
    folder(tmp_path / "sr", hu[:5], series="1.2", edit=foreign)
    dicom.find_series(tmp_path, notes := [])
    details = {note.code: note.text for note in notes}
    assert details["skipped-file"] == (
        "5 file(s) skipped: modality SR: sr/000.dcm, sr/001.dcm, sr/002.dcm, … (5 in all)"
    )
    assert details["no-modality"].endswith(
        "taken for CT: ct/000.dcm, ct/001.dcm, ct/002.dcm, … (24 in all)"
    )


def test_a_missing_preamble_is_read_with_a_warning(tmp_path):
    path = folder(tmp_path, HU)
    for file in path.iterdir():
        data = file.read_bytes()[132:]
        file.write_bytes(data)
    scan = volume.read(path)
    assert codes(scan) == ["no-preamble"]
    assert np.array_equal(scan.hu, HU)


def test_too_few_slices_and_no_dicom_at_all_are_refused(tmp_path):
    assert refused(folder(tmp_path / "few", HU[:5])) == "too-few-slices"
    (tmp_path / "none").mkdir()
    assert refused(tmp_path / "none") == "no-dicom"


def test_an_enhanced_multi_frame_file_reads_like_single_slices(tmp_path):
    from dicoms import write_multiframe

    scan = volume.read(write_multiframe(tmp_path / "enhanced.dcm", HU))
    assert np.array_equal(scan.hu, HU)
    assert scan.spacing_mm == pytest.approx(SPACING_MM)


def test_of_several_series_the_longest_axial_one_near_1_5_mm_is_best(tmp_path):
    write_series(tmp_path, HU, series="1.1")
    write_series(tmp_path, HU[:12], series="1.2", prefix="short")
    write_series(tmp_path, HU, series="1.3", prefix="thin", height=lambda k: 7.9 * k)
    sagittal = [0, 1, 0, 0, 0, -1]
    write_series(tmp_path, HU, series="1.4", prefix="sag", orientation=sagittal)
    found = dicom.find_series(tmp_path)
    assert len(found) == 4
    best = dicom.best_series(found)
    assert best is not None
    assert best.uid == "1.3"
    assert dicom.best_series([one for one in found if not one.is_axial]) is None


def test_every_transfer_syntax_of_the_zoo_decodes(test_data):
    zoo = sorted((test_data / "data/real/dicom/transfer_syntax_zoo").glob("CTImage*.dcm"))
    assert len(zoo) == 16
    reference = None
    for file in zoo:
        (series,) = dicom.find_series(file)
        (one,) = series.slices
        pixels, syntax = dicom._decode(file, one)
        if reference is None:
            reference = pixels.astype(int)
        difference = np.abs(pixels.astype(int) - reference)
        if syntax not in dicom.LOSSY:
            assert difference.max() == 0, file.name
        assert pixels.shape == (512, 512)


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("cip_ct64_ivrle_tiny", (79, 64, 64)),
        ("lidc_0001_ge_evrle", (16, 512, 512)),
        ("totalseg_siemens_j2k", (20, 512, 512)),
        ("dcmqi_ct3slice_ge", "too-few-slices"),
        ("lungmask_2slices_minimal_header", "too-few-slices"),
        ("ge_head_tilt_variable_spacing", "variable-spacing"),
        ("philips_phantom_tilt", "too-few-slices"),
        ("enhanced_multiframe", "too-few-slices"),
        ("odd", "too-few-slices"),
    ],
)
def test_real_folders_load_or_are_refused_with_their_reason(test_data, name, outcome):
    path = test_data / "data/real/dicom" / name
    if isinstance(outcome, str):
        assert refused(path) == outcome
    else:
        assert volume.read(path).hu.shape == outcome


def test_the_same_scan_as_dicom_nifti_and_nrrd_is_the_same_volume(test_data):
    real = test_data / "data/real"
    nifti = volume.read(real / "volumes/cip_ct64.nii.gz")
    for other in ("dicom/cip_ct64_ivrle_tiny", "formats/cip_ct-64.nrrd"):
        scan = volume.read(real / other)
        assert np.array_equal(scan.hu, nifti.hu)
        assert scan.spacing_mm == pytest.approx(nifti.spacing_mm, abs=1e-3)
        # The converter stored the last slice's position rounded to a thousandth per slice.
        assert np.allclose(scan.affine, nifti.affine, atol=0.1)
