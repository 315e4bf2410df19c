"""One report of a whole run: training curve, zero-shot scores, similar cases.

Expects what the other commands wrote below one folder::

    <run>/train/metrics.jsonl      ctclip-pretrain  out=<run>/train
    <run>/zero_shot/scores.parquet ctclip-zero-shot --out <run>/zero_shot
    <run>/similar/similar.{csv,png} ctclip-similar  --out <run>/similar --cohort …
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics, plots, report
from ctclip.evaluation.scores import ScoreTable

REPLICATES = 1000
"""Bootstrap replicates behind the intervals of the report."""


def run(folder: str | Path) -> Path:
    """Write ``<folder>/report.html`` and print the AUC table and the report's path.

    Raises:
        FileNotFoundError: If an earlier step of the run has not been done.
    """
    from rich.console import Console

    folder = Path(folder)
    table = ScoreTable.load(_existing(folder / "zero_shot" / "scores.parquet", "eval/zero_shot.py"))
    evaluation = metrics.evaluate(table, replicates=REPLICATES)
    macro = evaluation.macro
    page = report.Report(
        title="ctclip: from CT volumes and reports to zero-shot scores and similar cases",
        subtitle="For research. Not a medical device.",
        facts={
            "macro AUROC": report.with_interval(
                macro["auroc"], macro["auroc_low"], macro["auroc_high"]
            ),
            "held-out patients": str(evaluation.patients),
            **{key: str(value) for key, value in table.header.items()},
        },
        sections=[
            *report.zero_shot_sections(table, evaluation),
            _training(_existing(folder / "train" / "metrics.jsonl", "train/pretrain.py")),
            _similar_cases(_existing(folder / "similar" / "similar.csv", "eval/similar.py")),
        ],
    )
    path = page.write(folder / "report.html")
    report.print_evaluation(evaluation)
    Console().print(f"report: {path.resolve()}", soft_wrap=True)
    return path


def _training(metrics_file: Path) -> report.Section:
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    curves = {}
    for name in ("loss", "zero_shot/macro"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = np.array(points, dtype=float).T
            curves[name] = (steps, values)
    return report.Section(
        title="Training",
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
        frames=[pd.read_csv(hits_file).fillna("")],
    )


def _existing(path: Path, maker: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {maker} writes it, run that first")
    return path
