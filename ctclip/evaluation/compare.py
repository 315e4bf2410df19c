"""Two models on the same cases: paired differences, Holm's correction, what could be seen.

Both models are evaluated on the same bootstrap draws, so the spread of the difference is free of
the spread of the cases, which is usually several times larger.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from ctclip.evaluation import bootstrap, metrics, protocols
from ctclip.evaluation.delong import delong
from ctclip.evaluation.scores import ScoreTable

POWER = 0.8
LEVEL = 0.95


class ComparisonError(ValueError):
    """Two tables that can't be compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """AUROC of model ``b`` minus that of model ``a`` for one finding, or for the macro."""

    finding: str
    auroc_a: float
    auroc_b: float
    difference: float
    low: float = float("nan")
    high: float = float("nan")
    """95 % interval from the paired bootstrap."""

    p: float = float("nan")
    """Two-sided; DeLong with patients as clusters, for the macro from the bootstrap's spread."""

    p_holm: float = float("nan")
    """Corrected for all findings of this pair of models; the macro is one test and needs none."""

    detectable: float = float("nan")
    """Smallest true difference that this sample would show in 80 % of repetitions."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Model ``b`` against model ``a``."""

    a: str
    b: str
    cases: int
    patients: int
    findings: list[Difference]
    macro: Difference

    def frame(self) -> pd.DataFrame:
        """One row per finding, the macro last."""
        return pd.DataFrame([asdict(row) for row in (*self.findings, self.macro)])


def same_findings(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Bring the columns of all tables into the first one's order, by name.

    Raises:
        ComparisonError: If a finding is not in all of them.
    """
    first = tables[0]
    for table in tables[1:]:
        for one, other in ((first, table), (table, first)):
            lacking = [finding for finding in one.findings if finding not in other.findings]
            if lacking:
                raise ComparisonError(
                    f"{first.name} and {table.name} have different findings: {other.name} lacks "
                    f"{', '.join(map(repr, lacking))}; apply one protocol to both, shipped or a "
                    "YAML file that lists the findings they share"
                )
    return [table.of_findings(first.findings) for table in tables]


def align(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Bring tables to the cases that all of them have, in one order.

    Raises:
        ComparisonError: If protocols, findings or labels differ, or no case is in all of them.
    """
    names = {table.header.get("protocol", protocols.NONE) for table in tables}
    if len(names) > 1:
        raise ComparisonError(f"different protocols can't be compared: {', '.join(sorted(names))}")
    tables = same_findings(tables)
    first = tables[0]
    common = set(first.volume_id.tolist())
    for table in tables[1:]:
        common &= set(table.volume_id.tolist())
    if not common:
        raise ComparisonError(
            f"{' and '.join(table.name for table in tables)} have no case in common; "
            f"{first.name} starts with {str(first.volume_id[0])!r}, "
            f"{tables[1].name} with {str(tables[1].volume_id[0])!r}"
        )
    order = [name for name in first.volume_id.tolist() if name in common]
    aligned: list[ScoreTable] = []
    for table in tables:
        row = {name: index for index, name in enumerate(table.volume_id.tolist())}
        chosen = table.rows(np.array([row[name] for name in order]))
        if aligned:
            both = ~np.isnan(chosen.labels) & ~np.isnan(aligned[0].labels)
            clash = both & (chosen.labels != aligned[0].labels)
            if clash.any():
                n, k = np.argwhere(clash)[0]
                raise ComparisonError(
                    f"{first.name} and {table.name} have different labels for "
                    f"{int(clash.sum())} cells, first {order[n]!r} {first.findings[k]!r}; "
                    "score both against one label table"
                )
        aligned.append(chosen)
    return aligned


def compare(a: ScoreTable, b: ScoreTable, replicates: int = 2000, seed: int = 0) -> Comparison:
    """Compare two models case by case.

    A case counts for a finding where both models scored it and its label is known.

    Raises:
        ComparisonError: See :func:`align`.
    """
    a, b = align([a, b])
    usable = ~(np.isnan(a.labels) | np.isnan(b.labels) | np.isnan(a.scores) | np.isnan(b.scores))
    labels = np.where(usable, a.labels, np.nan)
    if len(np.unique(a.patient_id)) < 2:
        replicates = 0
    draws = bootstrap.draw(a.patient_id, replicates, seed)
    areas_a = bootstrap.replicate(draws, labels, a.scores)
    areas_b = bootstrap.replicate(draws, labels, b.scores)
    rows = []
    for k, finding in enumerate(a.findings):
        area_a = metrics.auroc(labels[:, k], a.scores[:, k])
        area_b = metrics.auroc(labels[:, k], b.scores[:, k])
        low, high = bootstrap.interval(areas_b[:, k] - areas_a[:, k], LEVEL)
        p, error = float("nan"), float("nan")
        mask = usable[:, k]
        label = labels[mask, k] == 1.0
        patients = a.patient_id[mask]
        if min(len(np.unique(patients[label])), len(np.unique(patients[~label]))) >= 2:
            scores = np.stack([b.scores[mask, k], a.scores[mask, k]])
            _, error, p = delong(label, scores, patients).difference()
        rows.append(
            Difference(
                finding=finding,
                auroc_a=area_a,
                auroc_b=area_b,
                difference=area_b - area_a,
                low=low,
                high=high,
                p=p,
                detectable=detectable(error),
            )
        )
    corrected = holm(np.array([row.p for row in rows]))
    rows = [
        Difference(**(asdict(row) | {"p_holm": float(value)}))
        for row, value in zip(rows, corrected, strict=True)
    ]
    return Comparison(
        a=a.name,
        b=b.name,
        cases=len(a),
        patients=len(np.unique(a.patient_id)),
        findings=rows,
        macro=_macro(rows, areas_a, areas_b),
    )


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction; nan stays nan and doesn't count as a test."""
    out = np.full(len(p), np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        out[index] = running
    return out


def detectable(error: float) -> float:
    """True difference that a two-sided 5 % test with this standard error finds 80 % of times."""
    return float((norm.ppf(0.5 + LEVEL / 2) + norm.ppf(POWER)) * error)


def _macro(rows: list[Difference], areas_a: np.ndarray, areas_b: np.ndarray) -> Difference:
    measured = [row for row in rows if not np.isnan(row.difference)]
    nan = float("nan")
    if not measured:
        return Difference(finding="macro", auroc_a=nan, auroc_b=nan, difference=nan)
    difference = float(np.mean([row.difference for row in measured]))
    spread = bootstrap.defined(
        metrics.mean_over_findings(areas_b) - metrics.mean_over_findings(areas_a)
    )
    low, high = bootstrap.interval(spread, LEVEL) if len(spread) else (nan, nan)
    error = float(np.std(spread, ddof=1)) if len(spread) > 1 else nan
    return Difference(
        finding="macro",
        auroc_a=float(np.mean([row.auroc_a for row in measured])),
        auroc_b=float(np.mean([row.auroc_b for row in measured])),
        difference=difference,
        low=low,
        high=high,
        p=1.0 if error == 0 else float(2 * norm.sf(abs(difference) / error)),
        detectable=detectable(error),
    )
