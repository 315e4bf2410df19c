"""Does it matter which hospital wrote? A phantom cohort's held-out studies in each hospital style.

python benchmarks/styles.py --ckpt runs/quickstart/train/model.safetensors \
    --cohort runs/quickstart/cohort --truth runs/quickstart/phantoms/truth.csv

Runs ``eval/styles.py`` and writes its figures to benchmarks/results/styles.json.
"""

import argparse
import json
import sys
from pathlib import Path

from ctclip.evaluation import styles


def main() -> None:
    """Measure and keep the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--truth", required=True, help="truth.csv of the phantom cohort")
    parser.add_argument("--out", default="runs/styles")
    args = parser.parse_args()

    found = styles.run(args.ckpt, args.cohort, args.out, truth=args.truth)
    result = {
        "command": "python " + " ".join(sys.argv),
        "styles": json.loads(found.round(4).to_json(orient="records")),
    }
    path = Path(__file__).parent / "results" / "styles.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(found.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
