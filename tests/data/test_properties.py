"""Whatever is changed in a header or a row, the outcome is a correct volume or a stated refusal."""

import io
import tempfile
from pathlib import Path

import numpy as np
from bad_scans import GOOD, HU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scans import AXIS_ORDERS, image

from ctclip.data import volume
from ctclip.data.ct_rate import read_labels, read_metadata, read_reports
from ctclip.data.manifest import read_manifest
from ctclip.data.problems import ManifestError, VolumeError
from ctclip.data.report import clean, split_sentences

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
SMALL = volume.VolumeConfig(spacing_mm=(20.0, 16.0, 16.0), size=(14, 16, 20))


def check_reason(error, name):
    assert name in str(error)
    assert len(str(error)) > len(name) + 10


def outcome(data: bytes, name: str = "a.nii"):
    """The volume in these bytes, or None where it was refused with a reason."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            scan = volume.read(path, max_voxels=10**7)
        except VolumeError as error:
            return check_reason(error, str(path))
        voxels = volume.preprocess(scan, SMALL)
        assert voxels.shape == SMALL.size
        assert voxels.dtype == np.int16
        assert voxels.min() >= -1024
        assert voxels.max() <= 3071
        assert np.isfinite(scan.affine).all()
        assert min(scan.spacing_mm) > 0
        return scan


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_changed_in_a_header_give_a_volume_or_a_reason(changes):
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    outcome(bytes(data))


@SETTINGS
@given(st.integers(0, len(GOOD)))
def test_a_file_cut_anywhere_is_refused_unless_it_is_whole(length):
    assert (outcome(GOOD[:length]) is not None) == (length == len(GOOD))


@SETTINGS
@given(st.binary(max_size=600), st.sampled_from(["a.nii", "a.nii.gz", "a.npz", "a.mha", "a.nrrd"]))
def test_arbitrary_bytes_are_refused(data, name):
    assert outcome(data, name) is None


@SETTINGS
@given(
    st.sampled_from(AXIS_ORDERS),
    st.tuples(*(st.floats(4.0, 9.0) for _ in range(3))),
)
def test_any_axis_order_and_spacing_keep_voxels_and_millimetres(axes, spacing_mm):
    scan = outcome(image(HU, axes, spacing_mm).to_bytes())
    assert scan is not None
    assert np.array_equal(scan.hu, HU)
    assert np.allclose(scan.spacing_mm, spacing_mm, rtol=1e-5)


@SETTINGS
@given(st.text(max_size=300))
def test_cleaning_is_idempotent_and_sentences_only_drop_separators(text):
    once = clean(text)
    assert clean(once) == once
    for sentence in split_sentences(once or ""):
        assert sentence.strip() == sentence
        assert sentence in (once or "").replace("\n", " ") or "\n" not in sentence


@SETTINGS
@given(
    st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=6), max_size=5),
    st.sampled_from(
        ["VolumeName,Findings_EN,Impressions_EN", "patient_id,study_id,path,Emphysema"]
    ),
)
def test_any_table_is_read_or_refused_with_its_name(rows, header):
    import csv

    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_text(f"{header}\n{buffer.getvalue()}", encoding="utf-8", errors="ignore")
        for read in (
            read_manifest,
            lambda p: read_reports(p, []),
            lambda p: read_labels(p, []),
            lambda p: read_metadata(p, []),
        ):
            try:
                read(path)
            except ManifestError as error:
                check_reason(error, "t.csv")
