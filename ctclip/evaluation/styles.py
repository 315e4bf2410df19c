"""``python eval/styles.py --ckpt …``: does it matter which hospital wrote the report?

The same studies described in several styles: by tables of one's own, or for a phantom cohort by
rewriting each report from what was drawn. For each style: how well its reports find their own
volume, and how well they rank a finding against volumes (the zero-shot direction, with the
report's words in place of a prompt).
"""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics, report, uncertain
from ctclip.evaluation.report import Section
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from ctclip.data.manifest import VolumeRecord

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10)


def run(
    ckpt: str | Path,
    cohort: str | Path,
    out: str | Path,
    *,
    split: str = "test",
    reports: Sequence[str | Path] = (),
    truth: str | Path | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """The command. Writes ``styles.csv``, ``styles.json`` and ``styles.html``.

    Args:
        ckpt: Checkpoint.
        cohort: Prepared cohort.
        out: Folder of the results.
        split: Which of its studies; the first volume of each counts.
        reports: Manifests in which the same studies are described, one per style.
        truth: ``truth.csv`` of a phantom cohort, instead of ``reports``.
        device: For example ``"cuda:0"``.

    Returns:
        See :func:`measure`.

    Raises:
        ValueError: If not exactly one of ``reports`` and ``truth`` is given, or no study is
            described in every style.
    """
    from ctclip import checkpoint as checkpoints
    from ctclip.data.cohort import PreparedCohort
    from ctclip.embeddings import embed_texts, embed_volumes

    if bool(reports) == (truth is not None):
        raise ValueError("give either --reports, one table per style, or --truth of a phantom")
    checkpoint = checkpoints.load(ckpt, device=device)
    prepared = PreparedCohort.open(Path(cohort))
    first = {record.study_id: record for record in reversed(prepared.split(split))}
    records = list(first.values())
    if truth is not None:
        texts = rewritten(records, truth)
    else:
        found = {Path(path).stem: uncertain.read_reports(path) for path in reports}
        records = [r for r in records if all(_key(r, table) for table in found.values())]
        if not records:
            raise ValueError(f"no study of split {split!r} is described in every style")
        texts = {n: [t[_key(r, t) or ""] for r in records] for n, t in found.items()}
    volumes = embed_volumes(checkpoint, prepared, records, device=device)
    vectors = {style: embed_texts(checkpoint, lines) for style, lines in texts.items()}
    frame = measure(volumes.vectors_for_reports, vectors, volumes.labels)
    frame["mean_characters"] = [round(np.mean([len(t) for t in texts[s]])) for s in frame["style"]]
    write(frame, Path(out), checkpoint.sha256)
    return frame


def rewritten(records: "Sequence[VolumeRecord]", truth: str | Path) -> dict[str, list[str]]:
    """Each phantom study's report in every hospital style, without errors, from what was drawn."""
    from ctclip.data.report import report_text
    from ctclip.phantom.lesions import Lesion
    from ctclip.phantom.reports import STYLES, ReportConfig, write_report

    table = pd.read_csv(truth, dtype={"volume_id": str})
    drawn = {str(volume): rows for volume, rows in table.groupby("volume_id")}
    names = ("finding", "kind", "side", "lobe", "size_mm", "severity")
    texts: dict[str, list[str]] = {style: [] for style in STYLES}
    for record in records:
        rows = drawn.get(record.volume_id, table.iloc[:0]).to_dict("records")
        lesions = [Lesion(**{name: row[name] for name in names}) for row in rows]
        images = [1 if pd.isna(row["d_first"]) else int(row["d_first"]) for row in rows]
        for style in STYLES:
            rng = np.random.default_rng(zlib.crc32(f"{record.volume_id}/{style}".encode()))
            made = write_report(lesions, images, ReportConfig(), rng, style)
            texts[style].append(report_text(made.findings, made.impression))
    return texts


def write(found: pd.DataFrame, folder: Path, checkpoint: str) -> None:
    """Write the table and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    found.to_csv(folder / "styles.csv", index=False)
    rows = json.loads(found.to_json(orient="records"))
    payload = {"checkpoint": checkpoint, "styles": rows}
    (folder / "styles.json").write_text(json.dumps(payload, indent=1), encoding="utf-8")
    section = Section(
        title="The same studies in each style",
        paragraphs=[
            f"{int(found['studies'].iloc[0])} studies. recall@k: share of reports that find their "
            f"own volume among the first k. lost@{RANKS[-1]}: recall lost against the best style, "
            "paired, with its 95 % interval. macro AUROC: volumes ranked along reports with the "
            "finding minus reports without it."
        ],
        frames=[found],
    )
    page = report.Report(
        title="Styles of report", facts={"checkpoint": checkpoint[:12]}, sections=[section]
    )
    page.write(folder / "styles.html")
    logger.info("styles: %s", folder / "styles.html")


def _key(record: "VolumeRecord", texts: Mapping[str, str]) -> str | None:
    return next((name for name in (record.volume_id, record.study_id) if name in texts), None)


def measure(
    volumes: np.ndarray,
    reports: Mapping[str, np.ndarray],
    labels: np.ndarray,
    findings: Sequence[str] = FINDINGS,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Retrieval and zero-shot quality of each style of report.

    Args:
        volumes: ``(N, E)`` one volume per study, L2-normalised.
        reports: Style to ``(N, E)`` embeddings of the same studies' reports in that style.
        labels: ``(N, K)``, nan = unknown.
        findings: ``K`` names.
        replicates: Bootstrap replicates over studies, paired over styles.
        seed: Of the draws.

    Returns:
        One row per style: recall at 1, 5 and 10, the median rank, the macro AUROC of directions
        (mean report with the finding minus mean report without, of the other studies), each
        recall with its 95 % interval, and the difference to the best style.
    """
    count = len(volumes)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(count, size=(replicates, count))
    ranks = {}
    for style, vectors in reports.items():
        similarity = vectors @ volumes.T
        ranks[style] = (similarity > np.diag(similarity)[:, None]).sum(axis=1) + 1
    best = max(ranks, key=lambda style: float((ranks[style] <= RANKS[-1]).mean()))
    rows = []
    for style, vectors in reports.items():
        row: dict[str, object] = {"style": style, "studies": count}
        for limit in RANKS:
            hit = (ranks[style] <= limit).astype(float)
            low, high = np.quantile(hit[drawn].mean(axis=1), (0.025, 0.975))
            row |= {f"recall@{limit}": hit.mean(), f"recall@{limit}_low": low,
                    f"recall@{limit}_high": high}  # fmt: skip
        lost = (ranks[best] <= RANKS[-1]).astype(float) - (ranks[style] <= RANKS[-1])
        low, high = np.quantile(lost[drawn].mean(axis=1), (0.025, 0.975))
        row |= {"median_rank": float(np.median(ranks[style])), f"lost@{RANKS[-1]}": lost.mean(),
                "lost_low": low, "lost_high": high}  # fmt: skip
        areas = [_direction_auroc(volumes, vectors, labels[:, k]) for k in range(len(findings))]
        row["macro_auroc"] = float(np.nanmean(areas)) if not np.isnan(areas).all() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _direction_auroc(volumes: np.ndarray, reports: np.ndarray, labels: np.ndarray) -> float:
    """AUROC of volumes along "reports with it minus reports without", two-fold crossed."""
    half = np.arange(len(labels)) % 2 == 0
    scores = np.full(len(labels), np.nan)
    for side in (half, ~half):
        with_it, without = side & (labels == 1.0), side & (labels == 0.0)
        if not with_it.any() or not without.any():
            return float("nan")
        direction = reports[with_it].mean(axis=0) - reports[without].mean(axis=0)
        scores[~side] = volumes[~side] @ direction
    # the two halves have directions of their own: compare within each
    areas = [metrics.auroc(labels[side], scores[side]) for side in (half, ~half)]
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")
