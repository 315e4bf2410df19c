"""How far gross image statistics predict each finding of a phantom cohort.

python benchmarks/phantom_shortcuts.py --cohort runs/quickstart/phantoms
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ctclip.phantom.shortcuts import LOCAL_FINDINGS, shortcut_aucs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, required=True, help="folder of ctclip-phantom")
    parser.add_argument("--json", type=Path, default="benchmarks/results/phantom_shortcuts.json")
    args = parser.parse_args()
    found = shortcut_aucs(args.cohort)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = Table("Finding", "positives", "gross statistics", "acquisition")
    for name, aucs in found.items():
        mark = " (limit 0.65)" if name in LOCAL_FINDINGS else ""
        table.add_row(
            name + mark,
            f"{aucs['positives']:.0f}",
            f"{aucs['gross']:.3f}",
            f"{aucs['acquisition']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
