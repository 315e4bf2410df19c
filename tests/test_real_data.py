"""Real scans in CT-RATE's layout, with CT-RATE's report table, through the whole path.

Volumes and reports are not of the same patients, so mechanics are judged, not AUROC.
"""

import csv
from pathlib import Path

import pandas as pd
import pytest

from ctclip import cli
from ctclip.data.cache import PreparedCohort

FULL_CHESTS = (
    "lung1_001",
    "lung1_002",
    "lung1_003",
    "nsclcrg_R01-001",
    "4dlung_113_native",
    "cip_ct64",
    "cip_testinput64",
)
"""Of :file:`real/volumes`; the eighth has a wrong spacing in its header."""

NOT_CHESTS = ("niivue_CT_pitch_oblique_uint8", "totalseg_abdomen_3mm")


@pytest.fixture(scope="module")
def ct_rate(test_data, tmp_path_factory) -> Path:
    """CT-RATE's folders and tables, holding the real scans under CT-RATE's kind of names."""
    root = tmp_path_factory.mktemp("ct_rate")
    scans = sorted((test_data / "data" / "real" / "volumes").glob("*.nii.gz"))
    with (test_data / "data" / "real" / "reports" / "ctrate_valid_reports.csv").open(
        newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    names = {}
    for index, scan in enumerate(scans):
        split = "valid" if index % 4 == 0 else "train"
        name = f"{split}_{index}_a_1.nii.gz"
        folder = root / "dataset" / split / f"{split}_{index}" / f"{split}_{index}_a"
        folder.mkdir(parents=True)
        (folder / name).symlink_to(scan)
        names[name] = rows[2 * index]
    with (root / "reports.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "VolumeName": name} for name, row in names.items())
    return root


@pytest.fixture(scope="module")
def run(ct_rate, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    cli.prepare(
        [
            f"--source={ct_rate}",
            f"--out={folder / 'cohort'}",
            "--workers=2",
            "spacing_mm=[8,6,6]",
            "size=[40,64,64]",
        ]
    )
    cli.pretrain(
        [
            "--config=configs/pretrain/real.yaml",
            f"cohort={folder / 'cohort'}",
            f"out={folder / 'train'}",
            "steps=2",
            "batch_size=4",
            "text_warmup.steps=2",
            "optim.warmup_steps=1",
            "monitor.log_every=1",
        ]
    )
    return folder


def _prepared(ct_rate: Path, run: Path) -> dict[str, bool]:
    """Which scan, by its real name, can be used."""
    usable = {record.volume_id for record in PreparedCohort.open(run / "cohort").records}
    scans = ct_rate.rglob("*.nii.gz")
    return {
        scan.readlink().name.removesuffix(".nii.gz"): scan.name.removesuffix(".nii.gz") in usable
        for scan in scans
    }


def test_every_scan_is_prepared_or_in_the_ledger(ct_rate, run):
    prepared = _prepared(ct_rate, run)
    ledger = pd.read_csv(next((run / "cohort").glob("*/ledger.csv")))

    assert len(prepared) == 16
    refused = set(ledger.loc[ledger["status"] == "refused", "volume_id"])
    cohort = {record.volume_id for record in PreparedCohort.open(run / "cohort").records}
    assert len(refused | cohort) == 16
    assert not refused & cohort


@pytest.mark.parametrize("name", FULL_CHESTS)
def test_a_full_chest_is_prepared_without_a_doubt(ct_rate, run, name):
    ledger = pd.read_csv(next((run / "cohort").glob("*/ledger.csv")))
    doubts = ledger[ledger["path"].str.contains(name) & (ledger["code"] == "not-chest")]

    assert _prepared(ct_rate, run)[name]
    assert doubts.empty


@pytest.mark.parametrize("name", NOT_CHESTS)
def test_what_is_no_chest_is_never_taken_in_silence(ct_rate, run, name):
    ledger = pd.read_csv(next((run / "cohort").glob("*/ledger.csv")))
    volume_id = next(
        scan.name.removesuffix(".nii.gz")
        for scan in ct_rate.rglob("*.nii.gz")
        if scan.readlink().name.startswith(name)
    )

    assert volume_id in set(ledger["volume_id"])


def test_pretraining_scoring_export_and_search_run_on_real_scans(run):
    ckpt = f"--ckpt={run / 'train' / 'model.safetensors'}"
    cohort = f"--cohort={run / 'cohort'}"
    cli.embed([ckpt, cohort, f"--out={run / 'archive'}"])
    table = run / "archive" / "volumes.parquet"
    study = pd.read_parquet(table)["study_id"].iloc[0]
    cli.similar([f"--table={table}", f"--study={study}", cohort, f"--out={run / 'similar'}"])

    hits = pd.read_csv(run / "similar" / "similar.csv")
    assert study not in set(hits["study_id"])
    assert (run / "similar" / "similar.png").stat().st_size > 10_000


def test_a_real_scan_is_scored_from_its_file_alone(test_data, run, tmp_path):
    cli.zero_shot(
        [
            f"--ckpt={run / 'train' / 'model.safetensors'}",
            f"--volume={test_data / 'data' / 'real' / 'volumes' / 'lung1_003.nii.gz'}",
            f"--out={tmp_path}",
        ]
    )

    assert (tmp_path / "scores.json").exists()
