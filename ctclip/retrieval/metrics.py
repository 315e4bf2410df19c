"""How good the similar cases are: the papers' numbers under their own names, and proper ones.

Every number comes with its pool size, with what chance gives, and with an interval over patients.
A tie counts as half a loss, so a model that embeds everything alike scores like chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctclip.embeddings import EmbeddingError, EmbeddingTable
from ctclip.findings import FINDINGS

CT_CLIP_KS = (1, 5, 10, 50)
"""The cut-offs of CT-CLIP's volume-to-volume table, Hamamci et al. 2024."""

BLOCK = 1024
"""Queries handled at once, so that 50,000 volumes need no 10 GB matrix."""

REPLICATES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over queries with its patient-grouped 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    chance: float
    """What a random order of the same pool gives in expectation."""

    num_queries: int
    pool: int
    """How many candidates each query is ranked against (the mean, if it differs)."""


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``(N, M)`` label overlap |A∩B| / |A∪B| of two sets of 0/1 rows; 0 where both are empty."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    both = one @ other.T
    union = one.sum(axis=1)[:, None] + other.sum(axis=1)[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def ct_clip_map_at_k(
    vectors: np.ndarray, labels: np.ndarray, ks: Sequence[int] = CT_CLIP_KS
) -> dict[int, float]:
    """CT-CLIP's volume-to-volume "MAP@K", each K by itself.

    Not a mean average precision: the mean label overlap of the top K, with the query itself
    among the candidates, and volumes without a positive label never returned. Kept for
    comparison with published tables only.

    Args:
        vectors: ``(N, E)`` float32, L2-normalised.
        labels: ``(N, 18)`` of 0 and 1.
        ks: Cut-offs.

    Raises:
        ValueError: If fewer than ``max(ks)`` volumes have a positive label.
    """
    candidates = np.flatnonzero(labels.sum(axis=1) > 0)
    if len(candidates) < max(ks):
        raise ValueError(
            f"MAP@{max(ks)} needs {max(ks)} volumes with a positive label, got {len(candidates)}"
        )
    sums = dict.fromkeys(ks, 0.0)
    for start in range(0, len(vectors), BLOCK):
        similarity = vectors[start : start + BLOCK] @ vectors[candidates].T
        top = np.argsort(-similarity, axis=1, kind="stable")[:, : max(ks)]
        overlap = jaccard(labels[start : start + BLOCK], labels[candidates])
        ranked = np.take_along_axis(overlap, top, axis=1)
        for k in ks:
            sums[k] += float(ranked[:, :k].mean(axis=1).sum())
    return {k: total / len(vectors) for k, total in sums.items()}


def running_mean(values: dict[int, float]) -> dict[int, float]:
    """What CT-CLIP's script prints for the k-th K: the mean of the values of all K so far.

    Its accumulator is never cleared between cut-offs, so the published MAP@5, @10 and @50 are
    very probably these. To be labelled as such wherever it is shown.
    """
    seen = np.cumsum(list(values.values())) / np.arange(1, len(values) + 1)
    return {k: float(mean) for k, mean in zip(values, seen, strict=True)}


def volume_to_volume(
    table: EmbeddingTable,
    ks: Sequence[int] = (1, 5, 10),
    relevant_from: float = 0.5,
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Estimate]:
    """Do similar cases share findings? One query per study, against all other patients.

    Relevance is the label overlap (Jaccard); where a number needs yes or no, it is yes from
    ``relevant_from``. Two cases without any finding count as fully alike, as a reader would say.

    Args:
        table: Volumes with labels; unknown labels count as absent.
        ks: Cut-offs.
        relevant_from: Overlap from which a case counts as relevant.
        seed: Of the bootstrap.
        replicates: Of the bootstrap.

    Returns:
        ``overlap@K`` (mean Jaccard), ``precision@K``, ``MAP@K`` (true mean average precision,
        over queries with a relevant case) and ``nDCG@K`` (graded gains).
    """
    cases = one_row_per_study(table)
    present = (cases.labels == 1).astype(np.float32)
    vectors, patients = cases.vectors_for_reports, np.array(cases.patient_id)
    per_query: dict[str, list[float]] = {
        f"{name}@{k}": [] for k in ks for name in ("overlap", "precision", "MAP", "nDCG")
    }
    chance: dict[str, list[float]] = {name: [] for name in per_query}
    pools, queries = [], []
    rng = np.random.default_rng(seed)
    for row in range(len(cases)):
        others = np.flatnonzero(patients != patients[row])
        if not others.size:
            continue
        gain = jaccard(present[row : row + 1], present[others])[0]
        if not present[row].any():
            gain = (present[others].sum(axis=1) == 0).astype(np.float64)
        order = np.argsort(-(vectors[others] @ vectors[row]), kind="stable")
        shuffled = rng.permutation(len(others))
        for k in ks:
            for target, ranking in ((per_query, order), (chance, shuffled)):
                for name, value in _ranking_scores(gain[ranking], k, relevant_from).items():
                    target[f"{name}@{k}"].append(value)
        pools.append(len(others))
        queries.append(patients[row])
    if not queries:
        raise EmbeddingError("all cases are of one patient; nobody else can be found")
    return {
        name: _estimate(values, queries, chance[name], pools, seed, replicates)
        for name, values in per_query.items()
    }


def _ranking_scores(gain: np.ndarray, k: int, relevant_from: float) -> dict[str, float]:
    relevant = gain >= relevant_from
    top = relevant[:k]
    hits = np.cumsum(top) / np.arange(1, len(top) + 1)
    total = min(int(relevant.sum()), k)
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.sort(gain)[::-1][:k]
    best = float(ideal @ discount[: len(ideal)])
    return {
        "overlap": float(gain[:k].mean()),
        "precision": float(top.mean()),
        "MAP": float((hits * top).sum() / total) if total else np.nan,
        "nDCG": float(gain[:k] @ discount[: len(top)] / best) if best else np.nan,
    }


def pair_ranks(
    queries: np.ndarray, query_study: Sequence[str], pool: np.ndarray, pool_study: Sequence[str]
) -> np.ndarray:
    """The rank at which each query finds its own study; 1 is best.

    The volumes of a study count as one candidate, its most similar one. Ties with others cost
    half a rank each.

    Args:
        queries: ``(N, E)`` for example reports.
        query_study: ``N`` studies.
        pool: ``(M, E)`` for example volumes.
        pool_study: ``M`` studies.

    Returns:
        ``(N,)`` float.

    Raises:
        EmbeddingError: If a query's study isn't in the pool.
    """
    names, study_of = np.unique(np.array(pool_study), return_inverse=True)
    target = np.searchsorted(names, np.array(query_study)).clip(max=len(names) - 1)
    missing = [s for s, row in zip(query_study, target, strict=True) if names[row] != s]
    if missing:
        raise EmbeddingError(f"{len(missing)} queries have no study in the pool, e.g. {missing[0]}")
    by_study = np.argsort(study_of, kind="stable")
    starts = np.flatnonzero(np.diff(study_of[by_study], prepend=-1))
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), BLOCK):
        stop = start + BLOCK
        similarity = np.round((queries[start:stop] @ pool.T).astype(np.float64), 6)
        best = np.maximum.reduceat(similarity[:, by_study], starts, axis=1)
        own = np.take_along_axis(best, target[start:stop, None], axis=1)
        ahead = (best > own).sum(axis=1)
        level = (best == own).sum(axis=1) - 1
        ranks[start:stop] = 1 + ahead + level / 2
    return ranks


def report_to_volume(
    reports: EmbeddingTable,
    volumes: EmbeddingTable,
    ks: Sequence[int] = (1, 5, 10, 50, 100),
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Estimate]:
    """Does a report find its own scan, and a scan its own report?

    Args:
        reports: A table of kind ``"report"``.
        volumes: Their volumes; studies without a partner in the other table are left out.
        ks: Cut-offs; those that reach the pool's size say nothing and are left out.
        seed: Of the bootstrap.
        replicates: Of the bootstrap.

    Returns:
        ``report→volume recall@K``, ``report→volume median rank`` and the same for
        ``volume→report``, in both directions over studies.

    Raises:
        EmbeddingError: If the tables are of different models or share no study.
    """
    reports.require_same_space(volumes)
    shared = set(reports.study_id) & set(volumes.study_id)
    if not shared:
        raise EmbeddingError("no study has both a report and a volume in these tables")
    reports = reports.select([row for row, s in enumerate(reports.study_id) if s in shared])
    volumes = volumes.select([row for row, s in enumerate(volumes.study_id) if s in shared])
    cases = one_row_per_study(volumes)
    texts = reports.vectors_for_reports
    directions = {
        "report→volume": (
            pair_ranks(texts, reports.study_id, volumes.vectors_for_reports, volumes.study_id),
            reports.patient_id,
        ),
        "volume→report": (
            pair_ranks(cases.vectors_for_reports, cases.study_id, texts, reports.study_id),
            cases.patient_id,
        ),
    }
    pool = len(shared)
    result = {}
    for direction, (ranks, patients) in directions.items():
        for k in ks:
            if k < pool:
                result[f"{direction} recall@{k}"] = _estimate(
                    (ranks <= k).astype(np.float64), patients, [k / pool], [pool], seed, replicates
                )
        chance = [(pool + 1) / 2]
        result[f"{direction} median rank"] = _estimate(
            ranks, patients, chance, [pool], seed, replicates, use_median=True
        )
    return result


def per_finding(
    table: EmbeddingTable, k: int = 10, *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Estimate]:
    """Of the K most similar cases of a case with a finding, how many have it too?

    Args:
        table: Volumes with labels.
        k: Cut-off.
        seed: Of the bootstrap.
        replicates: Of the bootstrap.

    Returns:
        Precision@K per finding that at least two patients have; chance is the share of those
        with the finding among the other patients. Unlabelled cases are neither asked nor counted.
    """
    cases = one_row_per_study(table)
    vectors, patients = cases.vectors_for_reports, np.array(cases.patient_id)
    result = {}
    for index, finding in enumerate(FINDINGS):
        label = cases.labels[:, index]
        known = ~np.isnan(label)
        values, chances, pools, queries = [], [], [], []
        for row in np.flatnonzero(label == 1):
            others = np.flatnonzero(known & (patients != patients[row]))
            if not (label[others] == 1).any():
                continue
            order = np.argsort(-(vectors[others] @ vectors[row]), kind="stable")[:k]
            values.append(float(label[others][order].mean()))
            chances.append(float(label[others].mean()))
            pools.append(len(others))
            queries.append(patients[row])
        if queries:
            result[finding] = _estimate(values, queries, chances, pools, seed, replicates)
    return result


def per_finding_text(
    table: EmbeddingTable, texts: np.ndarray, *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Estimate]:
    """Who types a finding's name: does the list that comes back begin with cases that have it?

    Args:
        table: Volumes with labels.
        texts: ``(18, E)`` L2-normalised, one text per finding, in the order of ``FINDINGS``.
        seed: Of the bootstrap over the pool's patients.
        replicates: Of the bootstrap.

    Returns:
        Average precision per finding that some but not all labelled cases have; chance is their
        share, which a random order gives in expectation.
    """
    cases = one_row_per_study(table)
    similarity = cases.vectors_for_reports @ texts.T
    patients = np.unique(np.array(cases.patient_id), return_inverse=True)[1]
    result = {}
    for index, finding in enumerate(FINDINGS):
        known = np.flatnonzero(~np.isnan(cases.labels[:, index]))
        order = known[np.argsort(-similarity[known, index], kind="stable")]
        label, group = cases.labels[order, index] == 1, patients[order]
        if not label.any() or label.all():
            continue
        rng = np.random.default_rng(seed)
        num_patients = int(patients.max()) + 1
        draws = []
        for _ in range(replicates):
            drawn = rng.integers(num_patients, size=num_patients)
            draws.append(
                _average_precision(label, np.bincount(drawn, minlength=num_patients)[group])
            )
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        result[finding] = Estimate(
            value=_average_precision(label, np.ones(len(label), dtype=np.int64)),
            low=float(low),
            high=float(high),
            chance=float(label.mean()),
            num_queries=1,
            pool=len(label),
        )
    return result


def _average_precision(label: np.ndarray, times: np.ndarray) -> float:
    """Of cases in the order found, each counting ``times``; copies of a case share its place."""
    hits, seen = np.cumsum(label * times), np.cumsum(times)
    if not hits[-1]:
        return float("nan")
    precision = np.divide(hits, seen, out=np.zeros(len(seen)), where=seen > 0)
    return float((precision * label * times).sum() / hits[-1])


def one_row_per_study(table: EmbeddingTable) -> EmbeddingTable:
    """The first volume of each study: two reconstructions are not two independent cases."""
    first: dict[str, int] = {}
    for row, study in enumerate(table.study_id):
        first.setdefault(study, row)
    return table.select(list(first.values()))


def _estimate(
    values: Sequence[float] | np.ndarray,
    patients: Sequence[str],
    chance: Sequence[float],
    pools: Sequence[int],
    seed: int,
    replicates: int,
    use_median: bool = False,
) -> Estimate:
    """Mean (or median) over queries; whole patients are drawn with replacement.

    Args:
        values: One per query; nan leaves a query out.
        patients: One per query.
        chance: One per query, or one for all.
        pools: One per query, or one for all.
        seed: Of the draws.
        replicates: Number of draws.
        use_median: Instead of the mean.
    """
    asked = np.asarray(values, dtype=np.float64)
    valid = ~np.isnan(asked)
    if not valid.any():
        return Estimate(value=np.nan, low=np.nan, high=np.nan, chance=np.nan, num_queries=0, pool=0)
    group = np.unique(np.array(patients)[valid], return_inverse=True)[1]
    order = np.argsort(asked[valid], kind="stable")
    asked, group = asked[valid][order], group[order]
    statistic = _median if use_median else _mean
    num_patients = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(replicates):
        times = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
        draws.append(statistic(asked, times[group]))
    low, high = np.percentile(draws, [2.5, 97.5])
    pool = np.broadcast_to(np.asarray(pools), valid.shape)[valid]
    return Estimate(
        value=statistic(asked, np.ones(len(asked), dtype=np.int64)),
        low=float(low),
        high=float(high),
        chance=float(np.nanmean(chance)),
        num_queries=int(valid.sum()),
        pool=round(float(pool.mean())),
    )


def _mean(values: np.ndarray, times: np.ndarray) -> float:
    """Mean of values that count several times."""
    return float(values @ times / times.sum())


def _median(values: np.ndarray, times: np.ndarray) -> float:
    """Median of ascending values that count several times."""
    reached = np.cumsum(times)
    middle = np.array([(reached[-1] - 1) // 2, reached[-1] // 2])
    return float(values[np.searchsorted(reached, middle, side="right")].mean())
