"""Do gross statistics of a volume give its findings away? They should not.

A model can score well on phantoms without looking, if a finding leaves its mark on the mean, the
histogram or the way the scan was taken. A logistic regression on such numbers measures how well.
"""

import csv
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ctclip.findings import FINDINGS

BIN_EDGES_HU = (-1025.0, -950.0, -850.0, -650.0, -300.0, 0.0, 100.0, 300.0, 3100.0)
"""Eight bins from air to metal."""

LOCAL_FINDINGS = (
    "Lung nodule",
    "Lymphadenopathy",
    "Coronary artery wall calcification",
    "Bronchiectasis",
)
"""Findings too small to show in gross statistics; the regression must stay below 0.65 on them."""


def gross_statistics(hu: NDArray[Any]) -> NDArray[np.float64]:
    """Ten numbers of a volume: mean and variance in HU, and the share of voxels in eight bins."""
    counts, _ = np.histogram(hu, BIN_EDGES_HU)
    return np.array([hu.mean(), hu.var(), *(counts / hu.size)], np.float64)


def acquisition_statistics(hu: NDArray[Any], voxel_mm: NDArray[Any]) -> list[float]:
    """How a scan was taken: voxel size, noise, the body's place and size. ``hu`` is (W, H, D)."""
    body = hu[:, :, hu.shape[2] // 2] > -300
    where = np.argwhere(body) if body.any() else np.zeros((1, 2))
    corner = np.asarray(hu[:6, :6, :], np.float64)
    return [
        *map(float, voxel_mm),
        float(corner.std()),
        float(body.mean()),
        *where.mean(axis=0).tolist(),
    ]


def shortcut_aucs(cohort: Path, folds: int = 5) -> dict[str, dict[str, float]]:
    """Held-out AUC of a logistic regression from gross and from acquisition statistics.

    Args:
        cohort: Folder built by :func:`ctclip.phantom.cohort.build`.
        folds: Cross-validation folds, split by patient.

    Returns:
        Finding to ``{"gross": auc, "acquisition": auc, "positives": count}``; findings with fewer
        positives than folds are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with (cohort / "truth_labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    gross, taken = [], []
    for row in rows:
        file_name = cohort / "volumes" / f"{row['volume_id']}.nii.gz"
        image = cast(nib.Nifti1Image, nib.load(file_name))
        hu = np.asanyarray(image.dataobj)
        gross.append(gross_statistics(hu))
        taken.append(acquisition_statistics(hu, np.array(image.header.get_zooms()[:3])))
    groups = [row["patient_id"] for row in rows]
    result = {}
    for name in FINDINGS:
        truth = np.array([int(row[name]) for row in rows])
        if min(truth.sum(), len(truth) - truth.sum()) < folds:
            continue
        result[name] = {"positives": float(truth.sum())}
        for key, features in (("gross", gross), ("acquisition", taken)):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            scores = cross_val_predict(
                model,
                np.array(features),
                truth,
                groups=groups,
                cv=GroupKFold(folds),
                method="decision_function",
            )
            result[name][key] = float(roc_auc_score(truth, scores))
    return result
