"""A cohort on disk: what is in it, that it can be rebuilt, continued and refused."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctclip.findings import FINDINGS
from ctclip.phantom.cohort import CohortError, PhantomConfig, build
from ctclip.phantom.reports import ReportConfig

TINY = {"num_patients": 4, "shape": (24, 32, 32), "workers": 1, "min_prevalence": 0.3}


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "cohort.yaml"
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    config = PhantomConfig(**TINY, second_reconstruction=0.5, second_study=0.5)
    assert build(config, out) == out / "manifest.csv"
    return out


def test_every_volume_of_the_manifest_is_an_upright_chest(cohort):
    for row in table(cohort, "manifest"):
        image = nib.load(cohort / row["path"])
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        hu = np.asanyarray(image.dataobj)
        assert hu.dtype == np.int16
        # Lung in the middle of each half, bone of the spine at the back.
        assert (hu[:16] < -600).any()
        assert (hu[16:] < -600).any()
        assert (hu[12:20, 16:] > 300).sum() > (hu[12:20, :8] > 300).sum()


def test_two_reconstructions_of_a_study_share_report_and_labels(cohort):
    rows = table(cohort, "manifest")
    by_study: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        same = tuple(row[key] for key in ("findings", "impression", "split", *FINDINGS))
        by_study.setdefault(row["study_id"], set()).add(same)
    assert len(rows) > len(by_study)
    assert all(len(reports) == 1 for reports in by_study.values())


def test_without_errors_the_reports_label_exactly_what_was_drawn(cohort):
    truth = {row["volume_id"]: row for row in table(cohort, "truth_labels")}
    drawn = {(row["volume_id"], row["finding"]) for row in table(cohort, "truth")}
    for row in table(cohort, "manifest"):
        for name in FINDINGS:
            assert row[name] == truth[row["volume_id"]][name]
            assert (row[name] == "1") == ((row["volume_id"], name) in drawn)


def test_an_interrupted_cohort_goes_on_and_ends_the_same(cohort, tmp_path):
    config = PhantomConfig(**TINY, second_reconstruction=0.5, second_study=0.5)
    part = PhantomConfig(**TINY | {"num_patients": 2}, second_reconstruction=0.5, second_study=0.5)
    build(part, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "volumes").iterdir()}
    build(config, tmp_path)
    assert files(tmp_path) == files(cohort)
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


@pytest.mark.slow
def test_worker_count_changes_no_byte(cohort, tmp_path):
    config = PhantomConfig(**TINY | {"workers": 2}, second_reconstruction=0.5, second_study=0.5)
    build(config, tmp_path)
    assert files(tmp_path) == files(cohort)


def test_a_folder_of_another_cohort_is_refused(cohort):
    with pytest.raises(CohortError, match=r"another cohort \(.*seed: \d+ there, 1 here"):
        build(PhantomConfig(**TINY, seed=1), cohort)


def test_errors_of_reports_do_not_change_a_voxel(cohort, tmp_path):
    noisy = ReportConfig(omission=0.5, false_mention=0.3, hedge=0.5)
    config = PhantomConfig(**TINY, second_reconstruction=0.5, second_study=0.5, report=noisy)
    build(config, tmp_path)
    assert files(tmp_path / "volumes") == files(cohort / "volumes")
    labels = [[row[n] for n in FINDINGS] for row in table(tmp_path, "manifest")]
    truth = [[row[n] for n in FINDINGS] for row in table(tmp_path, "truth_labels")]
    assert labels != truth
