"""The audit as a command: a review list to work through, and its decisions put into a manifest.

``python eval/label_audit.py --ckpt model.safetensors --cohort prepared/ab12`` writes the list;
after a reader filled its ``decision`` column, ``... apply --review review.csv --manifest
manifest.csv --out corrected.csv`` writes a corrected manifest and what was changed, by whom.
"""

import csv
import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctclip.evaluation import label_audit, report
from ctclip.evaluation.label_audit import Audit, AuditConfig
from ctclip.evaluation.report import Picture, Section

if TYPE_CHECKING:
    from ctclip.data.cache import PreparedCohort

logger = logging.getLogger(__name__)

DECISIONS = ("", "keep", "flip", "unknown")
WINDOW_HU = (-1000.0, 400.0)
"""Wide enough for lung and mediastinum at once."""


def run(
    ckpt: str | Path,
    cohort: str | Path,
    out: str | Path,
    config: AuditConfig | None = None,
    *,
    device: str = "cpu",
    batch_size: int = 4,
) -> Audit:
    """Embed a split, audit its labels and write ``review.csv``, ``noise.csv``, ``review.html``.

    Raises:
        ValueError: If the cohort lacks the split.
    """
    from ctclip import checkpoint as checkpoints
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.report import report_text
    from ctclip.embeddings import embed_volumes

    config = config or AuditConfig()
    folder = Path(out)
    checkpoint = checkpoints.load(ckpt, device=device)
    prepared = PreparedCohort.open(Path(cohort))
    records = prepared.split(config.split)
    table = embed_volumes(
        checkpoint,
        prepared,
        records,
        out=folder / f"embeddings-{config.split}-{checkpoint.sha256[:12]}.parquet",
        batch_size=batch_size,
        device=device,
    )
    texts = {r.volume_id: report_text(r.findings, r.impression) for r in records}
    found = label_audit.audit(table, texts, config)
    write(found, folder, config, prepared)
    return found


def write(
    found: Audit, folder: Path, config: AuditConfig, cohort: "PreparedCohort | None" = None
) -> None:
    """Write the review list, the noise rates and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    found.suspects.to_csv(folder / "review.csv", index=False)
    rates = found.rates()
    rates.to_csv(folder / "noise.csv", index=False)
    listed = found.suspects.head(config.pictures)
    gallery = [] if cohort is None else [_picture(cohort, row) for row in listed.to_dict("records")]
    total = len(found.suspects)
    sections = [
        Section(
            title="Noise per finding",
            paragraphs=[
                "Shares of wrong labels with 95 % intervals. 'Missed': of the cases that have the "
                "finding, how many are labelled absent. 'False': of those without it, how many are "
                "labelled present; lesions that the model can't see count there too.",
            ],
            frames=[_rates_frame(found)],
        ),
        Section(
            title=f"The {min(total, config.pictures)} most suspicious of {total} labels",
            paragraphs=[
                "Fill the column 'decision' of review.csv with keep, flip or unknown, then apply "
                "it. The pictures are slices through the middle of the volume.",
            ],
            gallery=gallery,
            frames=[listed.drop(columns=["decision", "study_id", "patient_id"])],
        ),
    ]
    report.Report(title=f"Label audit of {config.split}", sections=sections).write(
        folder / "review.html"
    )
    logger.info("review list: %s (%d labels)", folder / "review.csv", total)


def apply(review: str | Path, manifest: str | Path, out: str | Path, reviewer: str) -> pd.DataFrame:
    """Put a reader's decisions into a copy of the manifest.

    Only label cells named in the review list change; every other byte of text stays. Beside the
    manifest, ``<out>.changes.csv`` lists each change and ``<out>.provenance.json`` its origin.

    Args:
        review: The list with its ``decision`` column filled.
        manifest: The cohort's manifest (CSV).
        out: Path of the corrected manifest.
        reviewer: Who decided.

    Returns:
        The changes.

    Raises:
        ValueError: If a decision is unknown, a volume or finding isn't in the manifest, or a
            label has changed since the audit.
    """
    decisions = pd.read_csv(review, dtype=str, keep_default_na=False)
    wrong = decisions[~decisions["decision"].isin(DECISIONS)]
    if len(wrong):
        raise ValueError(
            f"{review} line {int(wrong.index[0]) + 2}: decision is {wrong.iloc[0]['decision']!r}, "
            "expected keep, flip, unknown or empty"
        )
    with Path(manifest).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    index = {_volume_id(row): row for row in rows}
    changes = []
    for decision in decisions.to_dict("records"):
        if decision["decision"] in ("", "keep"):
            continue
        volume, finding = decision["volume_id"], decision["finding"]
        if volume not in index or finding not in columns:
            raise ValueError(f"{manifest} has no {finding!r} of volume {volume!r}")
        row = index[volume]
        if row[finding] not in (decision["label"], f"{decision['label']}.0"):
            raise ValueError(
                f"{manifest}: {finding!r} of {volume!r} is {row[finding]!r}, the audit saw "
                f"{decision['label']!r}; audit the present labels again"
            )
        new = "" if decision["decision"] == "unknown" else str(1 - int(decision["label"]))
        changes.append(
            {"volume_id": volume, "finding": finding, "old": row[finding], "new": new}
            | {key: decision[key] for key in ("p_wrong", "reason")}
        )
        row[finding] = new
    frame = pd.DataFrame(
        changes, columns=["volume_id", "finding", "old", "new", "p_wrong", "reason"]
    )
    target = Path(out)
    _write_csv(target, columns, rows)
    frame.to_csv(target.with_suffix(".changes.csv"), index=False)
    provenance = {
        "manifest": str(manifest),
        "review": str(review),
        "reviewer": reviewer,
        "changed": len(frame),
        "reviewed": int((decisions["decision"] != "").sum()),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    target.with_suffix(".provenance.json").write_text(json.dumps(provenance, indent=1))
    return frame


def _volume_id(row: dict[str, str]) -> str:
    from ctclip.data.manifest import volume_stem

    return row.get("volume_id") or volume_stem(row["path"])


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _rates_frame(found: Audit) -> pd.DataFrame:
    rows = []
    for item in found.findings:
        estimate = item.estimate if item.is_identified else None
        rows.append(
            {
                "finding": item.finding,
                "positive": item.positives,
                "known": item.known,
                "probe AUROC": report.with_interval(item.auroc),
                "wrong": _share(estimate, "wrong"),
                "missed": _share(estimate, "missed"),
                "false": _share(estimate, "false"),
                "AUROC lost": report.with_interval(estimate.auroc_lost) if estimate else "–",
                "cleanlab flags": int(item.is_flagged.sum()),
                "note": item.note,
            }
        )
    return pd.DataFrame(rows)


def _share(estimate: object, name: str) -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * getattr(estimate, name + end) for end in ("", "_low", "_high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _picture(cohort: "PreparedCohort", row: dict[str, str]) -> Picture:
    hu = cohort.read(row["volume_id"]).astype(np.float32)
    spacing = cohort.volume_config.spacing_mm
    stands = "present" if row["label"] else "absent"
    caption = (
        f"{row['finding']}: labelled {stands}, wrong with {row['p_wrong']:.0%}. {row['reason']}"
    )
    if row["sentence"]:
        caption += f' "{row["sentence"]}"'
    return Picture(image=_three_planes(hu, spacing), caption=f"{row['volume_id']}. {caption}")


def _three_planes(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Axial, coronal and sagittal slice through the middle, side by side, uint8."""
    from PIL import Image

    low, high = WINDOW_HU
    grey = (np.clip((hu - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    d, h, w = (size // 2 for size in hu.shape)
    planes = [
        (grey[d], spacing_mm[1], spacing_mm[2]),
        (grey[::-1, h], spacing_mm[0], spacing_mm[2]),
        (grey[::-1, :, w], spacing_mm[0], spacing_mm[1]),
    ]
    side = 160
    tiles = []
    for plane, row_mm, column_mm in planes:
        height, width = plane.shape[0] * row_mm, plane.shape[1] * column_mm
        scale = side / height
        size = (max(round(width * scale), 1), side)
        image = Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.BILINEAR)
        tiles.append(np.asarray(image))
    return np.concatenate(tiles, axis=1)
