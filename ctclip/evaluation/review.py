"""The audit as a command: a review list to work through, and its decisions put into a manifest.

``python eval/label_audit.py --ckpt model.safetensors --cohort prepared/ab12`` writes the list;
after a reader filled its ``decision`` column, ``... --apply review.csv --manifest manifest.csv
--reviewer "A. Reader" --out corrected.csv`` writes a corrected manifest and what was changed.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctclip.evaluation import label_audit, prompts, regions, report
from ctclip.evaluation.label_audit import Audit, AuditConfig
from ctclip.evaluation.report import Picture, Section
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.cohort import PreparedCohort

logger = logging.getLogger(__name__)

DECISIONS = ("", "keep", "flip", "unknown")
WINDOW_HU = (-1000.0, 400.0)
"""Wide enough for lung and mediastinum at once."""

TILE = 160
"""Pixels from top to bottom of a slice on the page."""


Locate = Callable[[np.ndarray, str], tuple[int, int, int]]
"""Preprocessed HU ``(D, H, W)`` and a finding to the voxel that a reader should look at."""


@dataclass(frozen=True, kw_only=True)
class ReviewConfig(AuditConfig):
    """How a split is audited, and what the page shows."""

    split: str = "train"
    pictures: int = 40
    """Suspects shown with slices on the page."""

    prompts: str | None = None
    """Whose patch the slices go through; as in the zero-shot command."""

    batch_size: int = 4
    workers: int = 0
    device: str = "cpu"


def run(
    ckpt: str | Path, cohort: str | Path, out: str | Path, config: ReviewConfig | None = None
) -> Audit:
    """Embed a split, audit its labels and write ``review.csv``, ``noise.csv``, ``review.html``.

    Raises:
        ValueError: If the cohort lacks the split.
    """
    from ctclip import checkpoint as checkpoints
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.report import report_text
    from ctclip.embeddings import embed_volumes

    config = config or ReviewConfig()
    folder = Path(out)
    checkpoint = checkpoints.load(ckpt, device=config.device)
    prepared = PreparedCohort.open(Path(cohort))
    records = prepared.split(config.split)
    table = embed_volumes(
        checkpoint,
        prepared,
        records,
        out=folder / f"embeddings-{config.split}-{checkpoint.sha256[:12]}.parquet",
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
    )
    texts = {r.volume_id: report_text(r.findings, r.impression) for r in records}
    found = label_audit.audit(table, texts, config)
    write(found, folder, config, prepared, locator(checkpoint, config))
    return found


def locator(checkpoint: "Checkpoint", config: ReviewConfig) -> Locate:
    """Look where the model's patches resemble the finding's prompt most."""
    prompt_set = prompts.of(checkpoint, config.prompts)
    pairs = prompts.encode_prompts(checkpoint, prompt_set)

    def locate(hu: np.ndarray, finding: str) -> tuple[int, int, int]:
        present, absent = pairs[FINDINGS.index(finding)]
        return regions.peak(checkpoint, hu, present - absent, config.device)

    return locate


def write(
    found: Audit,
    folder: Path,
    config: ReviewConfig,
    cohort: "PreparedCohort | None" = None,
    locate: Locate | None = None,
) -> None:
    """Write the review list, the noise rates and the page.

    Args:
        found: The audit.
        folder: Where to.
        config: Number of pictures.
        cohort: Volumes for the pictures; without them the page has none.
        locate: Where the slices go through; the middle of the volume without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found.suspects.to_csv(folder / "review.csv", index=False)
    rates = found.rates()
    rates.to_csv(folder / "noise.csv", index=False)
    listed = found.suspects.head(config.pictures)
    rows = listed.to_dict("records")
    gallery = [] if cohort is None else [_picture(cohort, row, locate) for row in rows]
    total = len(found.suspects)
    wrong = int((found.suspects["p_wrong"] > config.suspicion).sum())
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
            title=f"The {min(total, config.pictures)} most suspicious of {total} listed labels",
            paragraphs=[
                f"{wrong} labels are probably wrong (p_wrong above {config.suspicion:g}); "
                f"{total - wrong} are listed after them only because the report says otherwise.",
                "Fill the column 'decision' of review.csv with keep, flip or unknown, then apply "
                "it. The slices go through the place that resembles the finding most (marked).",
            ],
            gallery=gallery,
            frames=[listed.drop(columns=["decision", "study_id", "patient_id"])],
        ),
    ]
    report.Report(title=f"Label audit of {config.split}", sections=sections).write(
        folder / "review.html"
    )
    shown = _rates_frame(found)[["finding", "probe AUROC", "wrong", "missed", "cleanlab flags"]]
    report.print_frame(f"Label audit of {config.split}", shown)
    logger.info(
        "review list: %s (%d labels probably wrong, %d more that differ from the report)",
        folder / "review.csv", wrong, total - wrong,
    )  # fmt: skip


def apply(review: str | Path, manifest: str | Path, out: str | Path, reviewer: str) -> pd.DataFrame:
    """Put a reader's decisions into a copy of the manifest.

    Only label cells named in the review list change, and the paths of scans where the new manifest
    lies in another folder: they are relative to the manifest's. Beside the manifest,
    ``<out>.changes.csv`` lists each change and ``<out>.provenance.json`` its origin.

    Args:
        review: The list with its ``decision`` column filled.
        manifest: The cohort's manifest (CSV).
        out: Path of the corrected manifest.
        reviewer: Who decided.

    Returns:
        The changes.

    Raises:
        ValueError: If a decision is unknown, a volume or finding isn't in the manifest, a label
            has changed since the audit, or ``out`` lies in a folder that doesn't hold the scans.
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
    for row in rows if "path" in columns else []:
        row["path"] = _moved(row["path"], Path(manifest).parent, target.parent)
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


def _moved(path: str, source: Path, target: Path) -> str:
    """A scan's path, relative to the folder of the new manifest where it was to the old one's."""
    scan = os.path.abspath(source / path)
    if not path or Path(path).is_absolute() or not os.path.exists(scan):
        return path  # below a --root of its own, which stays
    moved = os.path.relpath(scan, os.path.abspath(target))
    if moved.startswith(os.pardir):
        raise ValueError(
            f"{target} doesn't hold the scan {scan}, and a manifest names scans below its own "
            f"folder; write the corrected one into {source}, e.g. --out {source}/corrected.csv"
        )
    return moved


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


def _picture(cohort: "PreparedCohort", row: dict[str, str], locate: Locate | None) -> Picture:
    hu = cohort.read(row["volume_id"])
    spacing = cohort.volume_config.spacing_mm
    stands = "present" if row["label"] else "absent"
    caption = (
        f"{row['finding']}: labelled {stands}, wrong with {row['p_wrong']:.0%}. {row['reason']}"
    )
    if row["sentence"]:
        caption += f' "{row["sentence"]}"'
    place = None if locate is None else locate(hu, row["finding"])
    return Picture(image=three_planes(hu, spacing, place), caption=f"{row['volume_id']}. {caption}")


def three_planes(
    hu: np.ndarray,
    spacing_mm: tuple[float, float, float],
    place: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """Axial, coronal and sagittal slice side by side, head up.

    Args:
        hu: ``(D, H, W)``.
        spacing_mm: Of its voxels.
        place: Voxel (d, h, w) that the slices go through and a cross marks; without one, they go
            through the middle.

    Returns:
        ``(160, W')`` uint8.
    """
    from PIL import Image

    low, high = WINDOW_HU
    grey = (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    d, h, w = place or tuple(size // 2 for size in hu.shape)
    up = hu.shape[0] - 1 - d
    planes = [
        (grey[d], spacing_mm[1], spacing_mm[2], (h, w)),
        (grey[::-1, h], spacing_mm[0], spacing_mm[2], (up, w)),
        (grey[::-1, :, w], spacing_mm[0], spacing_mm[1], (up, h)),
    ]
    tiles = []
    for plane, row_mm, column_mm, centre in planes:
        height, width = plane.shape[0] * row_mm, plane.shape[1] * column_mm
        size = (max(round(width * TILE / height), 1), TILE)
        image = Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.BILINEAR)
        tile = np.array(image)
        if place is not None:
            row, column = (
                int((index + 0.5) * tile.shape[axis] / plane.shape[axis])
                for axis, index in enumerate(centre)
            )
            _mark(tile, row, column)
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def _mark(tile: np.ndarray, row: int, column: int) -> None:
    """Draw a cross with an open middle."""
    for start, stop in ((-14, -6), (7, 15)):
        tile[max(row + start, 0) : max(row + stop, 0), column] = 255
        tile[row, max(column + start, 0) : max(column + stop, 0)] = 255
