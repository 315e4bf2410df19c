"""One report of a whole run: training curve, zero-shot scores, similar cases.

Expects what the other commands wrote below one folder::

    <run>/train/metrics.jsonl      ctclip-pretrain  out=<run>/train
    <run>/zero_shot/scores.parquet ctclip-zero-shot --out <run>/zero_shot
    <run>/similar/similar.{csv,png} ctclip-similar  --out <run>/similar --cohort …
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics, plots, report
from ctclip.evaluation.scores import ScoreTable

REPLICATES = 1000
"""Bootstrap replicates behind the intervals of the report."""

PROVENANCE = ("checkpoint", "step", "fingerprint", "prompts", "score")
"""What the report says of the score table's origin; the table itself keeps the rest."""


def run(folder: str | Path) -> Path:
    """Write ``<folder>/report.html`` and print the AUC table and the report's path.

    Raises:
        FileNotFoundError: If an earlier step of the run has not been done.
    """
    from rich.console import Console

    folder = Path(folder)
    table = ScoreTable.load(_existing(folder / "zero_shot" / "scores.parquet", "eval/zero_shot.py"))
    training = _lines(_existing(folder / "train" / "metrics.jsonl", "train/pretrain.py"))
    similar = _existing(folder / "similar" / "similar.csv", "eval/similar.py")
    evaluation = metrics.evaluate(table, replicates=REPLICATES)
    learnt = learnt_findings(training, table.findings)
    facts, lead = {"held-out patients": str(evaluation.patients)}, []
    if learnt:
        reported = metrics.evaluate(table.of_findings(learnt), replicates=REPLICATES).macro
        interval = report.with_interval(
            reported["auroc"], reported["auroc_low"], reported["auroc_high"]
        )
        facts["macro AUROC, learnt findings"] = interval
        lead = [
            f"Macro AUROC {interval} over the {len(learnt)} findings that the model has learnt: "
            "those with an AUROC of at least "
            f"{metrics.LEARNT_AUROC:.2f} on the development patients.",
            "Not learnt at this size: "
            + (", ".join(f for f in table.findings if f not in learnt) or "none")
            + ".",
        ]
    page = report.Report(
        title="ctclip: from CT volumes and reports to zero-shot scores and similar cases",
        subtitle="For research. Not a medical device.",
        facts=facts | {key: str(table.header[key]) for key in PROVENANCE if key in table.header},
        sections=[
            report.Section(title="What was learnt", paragraphs=lead),
            *report.zero_shot_sections(table, evaluation),
            _training(training),
            _similar_cases(similar),
        ],
    )
    path = page.write(folder / "report.html")
    console = Console(soft_wrap=True)
    report.print_evaluation(evaluation)
    for line in lead:
        console.print(line)
    console.print(f"report: {path.resolve()}")
    return path


def learnt_findings(training: list[dict[str, float]], findings: Sequence[str]) -> list[str]:
    """The findings that the run's last evaluation on the development split calls learnt.

    Args:
        training: The lines of ``metrics.jsonl``.
        findings: Which to choose from.

    Returns:
        In the order of ``findings``; empty where the run was never evaluated.
    """
    evaluations = [line for line in training if "zero_shot/macro" in line]
    last = evaluations[-1] if evaluations else {}
    return [f for f in findings if last.get(f"zero_shot/{f}", 0.0) >= metrics.LEARNT_AUROC]


def _lines(metrics_file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]


def _training(lines: list[dict[str, float]]) -> report.Section:
    curves = {}
    for name in ("loss", "zero_shot/macro"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = np.array(points, dtype=float).T
            curves[name] = (steps, values)
    cut = next((line for line in lines if "text/truncated_share" in line), None)
    return report.Section(
        title="Training",
        paragraphs=[]
        if cut is None
        else [
            f"{100 * cut['text/truncated_share']:.1f} % of the training reports were longer than "
            "the tokenizer's limit, which left out "
            f"{100 * cut['text/tokens_cut_share']:.1f} % of all tokens."
        ],
        figures=[
            report.Picture(
                image=plots.loss_curve({name: curve}),
                caption=f"{name} over training steps.",
            )
            for name, curve in curves.items()
        ],
    )


def _similar_cases(hits_file: Path) -> report.Section:
    from matplotlib.image import imread

    picture = hits_file.with_suffix(".png")
    pictures = []
    if picture.exists():
        pixels = (imread(picture)[..., :3] * 255).astype(np.uint8)
        pictures = [
            report.Picture(image=pixels, caption="The query (left) beside its most similar cases.")
        ]
    return report.Section(
        title="Similar cases",
        paragraphs=["Nearest held-out studies by cosine; never the query's own patient."],
        figures=pictures,
        frames=[_hits(hits_file)],
    )


def _hits(hits_file: Path) -> pd.DataFrame:
    """The table of ``similar.csv`` in words, without columns that say nothing."""
    hits = pd.read_csv(hits_file, keep_default_na=False)
    hits = hits.loc[:, [column == "rank" or (hits[column] != "").any() for column in hits]]
    return hits.rename(
        columns={
            "study_id": "study",
            "volume_id": "volume",
            "is_ordinary": "like many random pairs",
            "shared": "findings of both",
            "only_hit": "only this case",
            "only_query": "only the query",
        }
    )


def _existing(path: Path, maker: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {maker} writes it, run that first")
    return path
