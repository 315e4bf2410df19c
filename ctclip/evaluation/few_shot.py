"""``python eval/probe.py --train a.parquet --test b.parquet``: what a few labels would buy.

Linear probes on exported embeddings from 1, 4, 16, 64 and all cases of each class, beside
CT-CLIP's ClassFine head; all with the spread over draws of the few.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctclip.embeddings import EmbeddingTable
from ctclip.evaluation import plots, probes, report
from ctclip.evaluation.report import Picture, Section
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Which probes are trained."""

    kind: probes.Kind = "linear"
    repeats: int = 20
    seed: int = 0


def run(
    train: str | Path, test: str | Path, out: str | Path, config: FewShotConfig | None = None
) -> pd.DataFrame:
    """The command.

    Writes ``few_shot.csv``, the figure, ``few_shot.html``, and ``scores.parquet``: the scores of
    the probe trained on all cases, ready for ``eval/report.py`` beside zero-shot.

    Args:
        train: EmbeddingTable of training volumes.
        test: EmbeddingTable of other patients' volumes.
        out: Folder of the results.
        config: Kind of probe, number of draws.

    Raises:
        EmbeddingError: If the tables are of different models.
        ValueError: If a patient is in both.
    """
    config = config or FewShotConfig()
    folder = Path(out)
    left, right = EmbeddingTable.load(train), EmbeddingTable.load(test)
    left.require_same_space(right)
    shared = set(left.patient_id) & set(right.patient_id)
    if shared:
        raise ValueError(f"patient {min(shared)!r} is in {train} and in {test}")
    found = probes.few_shot(
        left.vectors, left.labels, right.vectors, right.labels, FINDINGS,
        test_patient_id=np.asarray(right.patient_id), repeats=config.repeats, seed=config.seed,
        kind=config.kind,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    found.to_csv(folder / "few_shot.csv", index=False)
    probe_scores(left, right, config).save(folder / "scores.parquet")
    chart = figure(found)
    plots.save(chart, folder / "few_shot")
    wide = found.pivot_table(index="finding", columns="shots", values="auroc", sort=False)
    section = Section(
        title="AUROC against cases of each class",
        figures=[
            Picture(
                image=chart,
                caption="Mean over draws of the few cases; band: 95 % interval of one probe, "
                "over draws and test patients.",
            )
        ],
        frames=[wide.reset_index()],
    )
    report.Report(
        title=f"Few-shot probes ({config.kind})", facts=left.provenance, sections=[section]
    ).write(folder / "few_shot.html")
    report.print_frame("AUROC against cases of each class", wide.reset_index())
    logger.info("few-shot curves: %s", folder / "few_shot.html")
    return found


def probe_scores(train: EmbeddingTable, test: EmbeddingTable, config: FewShotConfig) -> ScoreTable:
    """Scores of probes trained on every known training label, as a score table."""
    from scipy.special import expit

    scores = np.full((len(test), len(FINDINGS)), np.nan)
    for k in range(len(FINDINGS)):
        known = ~np.isnan(train.labels[:, k])
        present = train.labels[known, k] == 1.0
        if present.any() and not present.all():
            probe = probes.fit(train.vectors[known], present, 1e-2, config.kind)
            scores[:, k] = expit(probe.logits(test.vectors))
    return ScoreTable(
        volume_id=np.asarray(test.volume_id, dtype=str),
        study_id=np.asarray(test.study_id, dtype=str),
        patient_id=np.asarray(test.patient_id, dtype=str),
        split=np.asarray(test.split, dtype=str),
        findings=FINDINGS,
        labels=test.labels.astype(np.float64),
        scores=scores,
        header={
            "model": f"{config.kind} probe of {test.provenance.get('model', 'a model')}",
            "checkpoint": test.provenance.get("checkpoint"),
            "fingerprint": test.provenance.get("fingerprint"),
            "prompts": "none: trained on labels",
            "label_informed": True,
        },
        meta={name: np.asarray(column, dtype=str) for name, column in test.fields.items()},
    )


def figure(found: pd.DataFrame) -> Figure:
    """One small curve per finding."""
    names = list(dict.fromkeys(found["finding"]))
    columns = min(6, max(len(names), 1))
    rows = max(-(-len(names) // columns), 1)
    chart = Figure(figsize=(2.35 * columns, 2.0 * rows), layout="constrained")
    axes = chart.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        part = found[found["finding"] == name]
        place = np.arange(len(part))
        axis.plot(place, part["auroc"], color=plots.COLOURS[0], marker="o", ms=3.5)
        axis.fill_between(place, part["low"].fillna(part["auroc"]),
                          part["high"].fillna(part["auroc"]), color=plots.COLOURS[0],
                          alpha=0.18, lw=0)  # fmt: skip
        axis.axhline(0.5, color=plots.CHANCE, lw=0.8)
        axis.set_xticks(place, part["shots"].astype(str))
        axis.set_ylim(0.3, 1.02)
        plots.frame(axis, name)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    return chart
