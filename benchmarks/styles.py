"""Does it matter which hospital wrote? The same phantom studies described in three styles.

python benchmarks/styles.py --ckpt model.safetensors --cohort prepared --truth cohort/truth.csv

Rewrites every held-out study's report from its drawn lesions, once per hospital style, and
measures how well each finds its own volume and ranks findings. Writes
benchmarks/results/styles.json.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip import checkpoint as checkpoints
from ctclip.data.cohort import PreparedCohort
from ctclip.data.report import report_text
from ctclip.embeddings import embed_texts, embed_volumes
from ctclip.evaluation import styles
from ctclip.phantom.lesions import Lesion
from ctclip.phantom.reports import STYLES, ReportConfig, write_report


def main() -> None:
    """Embed, rewrite, measure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--truth", required=True, help="truth.csv of the phantom cohort")
    parser.add_argument("--split", default="test")
    args = parser.parse_args()

    checkpoint = checkpoints.load(args.ckpt)
    cohort = PreparedCohort.open(args.cohort)
    first = {record.study_id: record for record in reversed(cohort.split(args.split))}
    records = list(first.values())
    volumes = embed_volumes(checkpoint, cohort, records)
    truth = pd.read_csv(args.truth, dtype={"volume_id": str}).groupby("volume_id")
    texts = {
        style: [rewrite(truth, record.volume_id, style) for record in records] for style in STYLES
    }
    reports = {style: embed_texts(checkpoint, lines) for style, lines in texts.items()}
    found = styles.measure(volumes.vectors_for_reports, reports, volumes.labels)
    result = {
        "command": "python benchmarks/styles.py --ckpt <quickstart> --cohort <its cohort> "
        "--truth <its truth.csv>",
        "step": checkpoint.provenance.get("step"),
        "studies": len(records),
        "mean_characters": {s: round(float(np.mean([len(t) for t in texts[s]]))) for s in STYLES},
        "styles": json.loads(found.round(4).to_json(orient="records")),
    }
    path = Path(__file__).parent / "results" / "styles.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(found.round(3).to_string(index=False))


def rewrite(truth: "pd.api.typing.DataFrameGroupBy", volume: str, style: str) -> str:
    """One study's report in one style, without errors, from what was drawn."""
    rows = truth.get_group(volume) if volume in truth.groups else pd.DataFrame()
    names = ("finding", "kind", "side", "lobe", "size_mm", "severity")
    lesions = [Lesion(**{name: getattr(row, name) for name in names}) for row in rows.itertuples()]
    numbers = [int(row.d_first) if row.d_first == row.d_first else 1 for row in rows.itertuples()]
    rng = np.random.default_rng(zlib.crc32(f"{volume}/{style}".encode()))
    report = write_report(lesions, numbers, ReportConfig(), rng, style)
    return report_text(report.findings, report.impression)


if __name__ == "__main__":
    main()
