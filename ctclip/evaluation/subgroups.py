"""Does the model work as well for women, old patients, another kernel, another hospital?

Each subgroup is set against all the others: the AUROC inside, outside, and the gap with its
interval from the same draws of patients.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.evaluation import bootstrap, metrics
from ctclip.evaluation.scores import ScoreTable

BINS: dict[str, tuple[float, ...]] = {
    "age": (50.0, 65.0, 80.0),
    "slice_thickness_mm": (1.01, 2.01, 3.01),
}
"""Upper edges for numeric columns; years and millimetres."""

MIN_PATIENTS = 5
"""Positive and negative patients that a finding needs inside and outside of a subgroup."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One finding (or the macro) in one subgroup against the rest."""

    column: str
    group: str
    finding: str
    cases: int
    auroc: float
    rest: float
    gap: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the gap leaves zero out."""
        return bool(self.low > 0 or self.high < 0)


def gaps(table: ScoreTable, replicates: int = 1000, seed: int = 0) -> list[Gap]:
    """Gaps of every subgroup of every metadata column with at least two groups.

    Cases of unknown value are in no group and not in the rest. A finding with fewer than
    :data:`MIN_PATIENTS` patients of a class on either side is left out; the macro of a subgroup
    is over the findings that remain.
    """
    draws = bootstrap.draw(table.patient_id, replicates, seed)
    found = []
    for column, values in table.meta.items():
        groups = binned(column, values)
        names = sorted(set(groups.tolist()) - {""})
        if len(names) < 2:
            continue
        for name in names:
            inside, outside = groups == name, (groups != name) & (groups != "")
            found += _against_the_rest(table, draws, column, name, inside, outside)
    return found


def left_out(table: ScoreTable, found: list[Gap]) -> list[str]:
    """Which columns and groups have no gap, and why: one sentence per column.

    Args:
        table: As given to :func:`gaps`.
        found: What came back.
    """
    measured = {(gap.column, gap.group) for gap in found}
    sentences = []
    for column, values in table.meta.items():
        names = sorted(set(binned(column, values).tolist()) - {""})
        few = [name for name in names if (column, name) not in measured]
        if not names:
            sentences.append(f"{column} left out: not known of any case.")
        elif len(names) == 1:
            sentences.append(f"{column} left out: all known cases are in one group, {names[0]}.")
        elif few:
            sentences.append(
                f"{column} left out for {', '.join(few)}: no finding has {MIN_PATIENTS} positive "
                f"and {MIN_PATIENTS} negative patients both inside and outside."
            )
    return sentences


def binned(column: str, values: np.ndarray) -> np.ndarray:
    """Group names: numeric columns of :data:`BINS` in ranges, others as they are."""
    if column not in BINS:
        return values.astype(str)
    numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64)
    edges = BINS[column]
    names = [f"< {edges[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    names.append(f">= {edges[-1]:g}")
    groups = np.asarray(names)[np.digitize(np.nan_to_num(numbers), edges)]
    return np.where(np.isnan(numbers), "", groups)


def frame(found: list[Gap]) -> pd.DataFrame:
    """One row per gap."""
    return pd.DataFrame([vars(gap) for gap in found])


def _against_the_rest(
    table: ScoreTable,
    draws: bootstrap.Draws,
    column: str,
    name: str,
    inside: np.ndarray,
    outside: np.ndarray,
) -> list[Gap]:
    kept = [
        k
        for k in range(len(table.findings))
        if _enough(table, k, inside) and _enough(table, k, outside)
    ]
    if not kept:
        return []
    chosen = table.of_findings([table.findings[k] for k in kept])
    sides = []
    for side in (inside, outside):
        labels = np.where(side[:, None], chosen.labels, np.nan)
        points = [metrics.auroc(labels[:, k], chosen.scores[:, k]) for k in range(len(kept))]
        sides.append((points, bootstrap.replicate(draws, labels, chosen.scores)))
    (here, spread_here), (there, spread_there) = sides
    rows = []
    for k, finding in enumerate(chosen.findings):
        low, high = bootstrap.interval(spread_here[:, k] - spread_there[:, k])
        rows.append((finding, here[k], there[k], low, high))
    macro_here, macro_there = float(np.mean(here)), float(np.mean(there))
    spread = metrics.mean_over_findings(spread_here) - metrics.mean_over_findings(spread_there)
    rows.append((f"macro ({len(kept)})", macro_here, macro_there, *bootstrap.interval(spread)))
    return [
        Gap(
            column=column,
            group=name,
            finding=finding,
            cases=int(inside.sum()),
            auroc=a,
            rest=b,
            gap=a - b,
            low=low,
            high=high,
        )
        for finding, a, b, low, high in rows
    ]


def _enough(table: ScoreTable, k: int, side: np.ndarray) -> bool:
    usable = side & ~np.isnan(table.labels[:, k]) & ~np.isnan(table.scores[:, k])
    return all(
        len(np.unique(table.patient_id[usable & (table.labels[:, k] == value)])) >= MIN_PATIENTS
        for value in (0.0, 1.0)
    )
