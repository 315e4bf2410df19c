"""How far gross image statistics predict each finding of a phantom cohort.

python benchmarks/phantom_shortcuts.py --patients 800 --out cohort
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ctclip.phantom.cohort import PhantomConfig, build
from ctclip.phantom.shortcuts import LOCAL_FINDINGS, shortcut_aucs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=800)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 96, 96))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cohort")
    args = parser.parse_args()
    depth, height, width = args.shape
    config = PhantomConfig(
        num_patients=args.patients,
        shape=(depth, height, width),
        seed=args.seed,
        workers=args.workers,
    )
    build(config, args.out)
    table = Table("Finding", "positives", "gross statistics", "acquisition")
    for name, aucs in shortcut_aucs(args.out).items():
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
