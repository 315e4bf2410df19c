"""``python eval/train_fit.py --ckpt …``: how well does the model fit its own training set?

The same scoring on training, development and test data, disease by disease, with a verdict, its
evidence and what to do next. A disease that can't be fitted on the training set usually has wrong
labels, or a target that the model can't see.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ctclip.evaluation import (
    bootstrap,
    label_audit,
    metrics,
    plots,
    prompts,
    report,
    scoring,
    sensitivity,
    verdicts,
)
from ctclip.evaluation.label_audit import Audit, AuditConfig
from ctclip.evaluation.report import Picture, Section
from ctclip.evaluation.scores import ScoreTable
from ctclip.evaluation.scoring import ZeroShotConfig
from ctclip.evaluation.verdicts import Criteria, Evidence, Judgement, SplitFit
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from ctclip.data.manifest import VolumeRecord

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")

MIN_REPLICATES = 100
"""Fits behind an interval whose lower end decides: the 2.5 % point of twenty is their least."""


@dataclass(frozen=True, kw_only=True)
class TrainFitConfig:
    """How the training set is looked at."""

    sample: int = 3000
    """Training volumes, about; whole patients. Of a larger training set, half of them are drawn as
    equally many positives of each finding, so that rare ones can be judged, the rest at random."""

    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    criteria: Criteria = field(default_factory=Criteria)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.audit.replicates < MIN_REPLICATES:
            raise ValueError(
                f"audit.replicates is {self.audit.replicates}, but the end of an interval decides "
                f"about labels here: give at least {MIN_REPLICATES}"
            )


def run(
    ckpt: str | Path,
    cohort: str | Path,
    out: str | Path,
    config: TrainFitConfig | None = None,
    *,
    lesions: str | Path | None = None,
    earlier: Sequence[str | Path] = (),
) -> list[Judgement]:
    """The command. Writes ``verdicts.csv``, ``verdicts.json``, the figure and ``train_fit.html``.

    Args:
        ckpt: Checkpoint.
        cohort: Prepared cohort with its training split.
        out: Folder of the results.
        config: Sample size, prompts, criteria.
        lesions: CSV with ``volume_id, finding, size_mm`` where sizes are known, such as a phantom
            cohort's ``truth.csv``.
        earlier: Older checkpoints of the same run, oldest first, for the learning curve.
    """
    from ctclip import checkpoint as checkpoints
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.report import report_text
    from ctclip.embeddings import embed_volumes

    config = config or TrainFitConfig()
    folder = Path(out)
    prepared = PreparedCohort.open(Path(cohort))
    sizes = None if lesions is None else _known_sizes(lesions, prepared.records)
    records = []
    for split in SPLITS:
        chosen = [record for record in prepared.records if record.split == split]
        records.append(_sample(chosen, config) if split == "train" else chosen)
    if not records[0]:
        raise ValueError(f"{cohort}: no volume of split 'train'; there is no training set to fit")

    curve: dict[str, list[float]] = {finding: [] for finding in FINDINGS}
    tables: list[ScoreTable] = []
    for path in (*earlier, ckpt):
        checkpoint = checkpoints.load(path, device=config.zero_shot.device)
        is_last = path == ckpt
        splits = [part for part in (records if is_last else records[:1]) if part]
        embedded = [
            embed_volumes(
                checkpoint,
                prepared,
                part,
                out=folder / f"embeddings-{part[0].split}-{checkpoint.sha256[:12]}.parquet",
                batch_size=config.zero_shot.batch_size,
                workers=config.zero_shot.workers,
                device=config.zero_shot.device,
            )
            for part in splits
        ]
        tables = [
            scoring.score_embeddings(checkpoint, table, config.zero_shot, Path(path).stem)
            for table in embedded
        ]
        for k, finding in enumerate(FINDINGS):
            curve[finding].append(metrics.auroc(tables[0].labels[:, k], tables[0].scores[:, k]))
    texts = {r.volume_id: report_text(r.findings, r.impression) for r in records[0]}
    audited = label_audit.audit(embedded[0], texts, config.audit)
    prompt_set = prompts.of(checkpoint, config.zero_shot.prompts)
    prompt_vectors = prompts.encode_prompts(checkpoint, prompt_set)
    found = assess(
        tables,
        audited,
        config,
        sizes=sizes,
        curves=curve if earlier else {},
        token_mm=_token_mm(checkpoint),
    )
    facts = {
        "checkpoint": checkpoint.sha256[:12],
        "training volumes": str(len(embedded[0])),
        "prompts": str(tables[0].header["prompts"]),
        "prompt direction spread": f"{prompts.direction_spread(prompt_vectors):.2f}",
    }
    spread = sensitivity.measure(embedded[0], checkpoint.model, checkpoint.tokenizer, prompt_set)
    sensitivity.frame(spread).to_csv(folder / "prompts.csv", index=False)
    wording = Section(
        title="Wording of the prompts",
        paragraphs=["AUROC on the training sample of each pair of the ensemble on its own."],
        warnings=sensitivity.warnings(spread),
        frames=[sensitivity.frame(spread)],
    )
    write(found, folder, facts, [wording])
    return found


def assess(
    tables: Sequence[ScoreTable],
    audited: Audit,
    config: TrainFitConfig,
    *,
    sizes: Mapping[tuple[str, str], float] | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
    token_mm: float = float("nan"),
) -> list[Judgement]:
    """Judge every finding.

    Args:
        tables: Scores of the training, then the test split; or training, development, test.
        audited: The audit of the training split's labels, rows in the training table's order.
        config: Criteria and replicates.
        sizes: (volume, finding) to the largest lesion in mm.
        curves: Finding to training AUROC over checkpoints.
        token_mm: Smallest edge of what one token sees.

    Raises:
        ValueError: If there is no second split to set against the training set.
    """
    if len(tables) < 2:
        raise ValueError("train fit needs a development or test split beside the training set")
    replicates = [
        bootstrap.replicate(
            bootstrap.draw(table.patient_id, config.zero_shot.replicates, config.seed + index),
            table.labels,
            table.scores,
        )
        for index, table in enumerate(tables)
    ]
    found = []
    for k, finding in enumerate(tables[0].findings):
        fits = [_fit(table, k, spread) for table, spread in zip(tables, replicates, strict=True)]
        size = np.array([(sizes or {}).get((v, finding), np.nan) for v in tables[0].volume_id])
        size[tables[0].labels[:, k] != 1.0] = np.nan
        audit = audited.findings[FINDINGS.index(finding)]
        seen = audit.logits if len(audit.logits) else tables[0].scores[:, k]
        evidence = Evidence(
            finding=finding,
            train=fits[0],
            development=fits[1] if len(fits) > 2 else None,
            test=fits[-1],
            gap_low=bootstrap.interval(replicates[0][:, k] - replicates[-1][:, k])[0],
            probe=audit.auroc,
            noise=audit.estimate,
            size_mm=float(np.nanmedian(size)) if np.isfinite(size).any() else float("nan"),
            token_mm=token_mm,
            seen_larger_p=verdicts.larger_where_seen(size, seen),
            agreement=reconstruction_agreement(tables[0], k),
            curve=tuple((curves or {}).get(finding, ())),
        )
        found.append(verdicts.judge(evidence, config.criteria))
    return found


def reconstruction_agreement(table: ScoreTable, k: int) -> float:
    """Correlation between reconstructions of one study within cases of one label.

    Within one label, because any model that separates the classes makes reconstructions agree
    across them. nan with fewer than ten pairs.
    """
    order = np.argsort(table.study_id, kind="stable")
    study, score = table.study_id[order], table.scores[order, k]
    label = table.labels[order, k]
    residual = score.copy()
    for value in (0.0, 1.0):
        rows = label == value
        if rows.any():
            residual[rows] -= score[rows].mean()
    pair = (study[1:] == study[:-1]) & ~np.isnan(label[1:]) & ~np.isnan(score[1:] + score[:-1])
    first, second = residual[:-1][pair], residual[1:][pair]
    if len(first) < 10 or first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def read_sizes(path: str | Path) -> dict[tuple[str, str], float]:
    """Largest lesion per volume and finding from a table of lesions.

    Raises:
        ValueError: If a column is missing or a size isn't a number of mm.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = {"volume_id", "finding", "size_mm"} - set(frame.columns)
    if missing:
        raise ValueError(
            f"{path}: no column {sorted(missing)[0]!r}; expected volume_id, finding, size_mm"
        )
    size = pd.to_numeric(frame["size_mm"].replace("", "nan"), errors="coerce")
    wrong = frame[size.isna() & ~frame["size_mm"].isin(["", "nan"])]
    if len(wrong):
        raise ValueError(
            f"{path} line {int(wrong.index[0]) + 2}: size_mm is {wrong.iloc[0]['size_mm']!r}, "
            "expected a number of mm, or nothing where the size isn't known"
        )
    largest = frame.assign(size_mm=size).groupby(["volume_id", "finding"])["size_mm"].max()
    return {(str(key[0]), str(key[1])): float(value) for key, value in largest.items()}


def _known_sizes(
    path: str | Path, records: "Sequence[VolumeRecord]"
) -> dict[tuple[str, str], float]:
    """Sizes of a table that is about these volumes and findings."""
    sizes = read_sizes(path)
    volumes = {record.volume_id for record in records}
    if not any(volume in volumes and finding in FINDINGS for volume, finding in sizes):
        first = next(iter(sizes), ("no row", ""))
        raise ValueError(
            f"{path}: none of its {len(sizes)} lesions is of a volume and finding of the cohort; "
            f"it starts with {first[0]!r}, {first[1]!r}, the cohort with "
            f"{min(volumes, default='')!r}, {FINDINGS[0]!r}"
        )
    return sizes


def write(
    found: Sequence[Judgement],
    folder: Path,
    facts: Mapping[str, str],
    more: Sequence[Section] = (),
) -> None:
    """Write the table, the figure and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = as_frame(found)
    frame.to_csv(folder / "verdicts.csv", index=False)
    rows = json.loads(frame.to_json(orient="records"))
    (folder / "verdicts.json").write_text(json.dumps({"facts": facts, "findings": rows}, indent=1))
    figure = plots.fit_overview(found)
    plots.save(figure, folder / "train_fit")
    counts = frame["verdict"].value_counts()
    shown = frame[["finding", "verdict", "train", "test", "probe"]]
    sections = [
        Section(
            title="All diseases",
            paragraphs=[f"{n} of {len(found)}: {v}." for v, n in counts.items()],
            figures=[Picture(image=figure, caption="Training, development and test AUROC.")],
            frames=[shown],
        ),
        *(
            Section(title=f"{j.evidence.finding}: {j.verdict.value}", paragraphs=[j.paragraph])
            for j in found
        ),
        *more,
    ]
    report.Report(title="Fit to the training set", facts=facts, sections=sections).write(
        folder / "train_fit.html"
    )
    brief = shown["verdict"].str.replace(r"^not even fitted: | for this input$", "", regex=True)
    report.print_frame("Fit to the training set (AUROC)", shown.assign(verdict=brief))
    logger.info("verdicts: %s", folder / "train_fit.html")


def as_frame(found: Sequence[Judgement]) -> pd.DataFrame:
    """One row per finding."""
    rows: list[dict[str, Any]] = []
    for judgement in found:
        e = judgement.evidence
        noise = e.noise if e.noise is not None and e.noise.is_identified else None
        rows.append(
            {
                "finding": e.finding,
                "verdict": judgement.verdict.value,
                "train": e.train.auroc,
                "train_low": e.train.low,
                "train_high": e.train.high,
                "test": e.test.auroc,
                "test_low": e.test.low,
                "test_high": e.test.high,
                "gap_low": e.gap_low,
                "probe": e.probe,
                "noise": noise.wrong if noise else np.nan,
                "noise_low": noise.wrong_low if noise else np.nan,
                "noise_high": noise.wrong_high if noise else np.nan,
                "auroc_lost_to_noise": noise.auroc_lost if noise else np.nan,
                "size_mm": e.size_mm,
                "agreement": e.agreement,
                "positive_patients_train": e.train.positive_patients,
                "paragraph": judgement.paragraph,
            }
        )
    return pd.DataFrame(rows)


def _fit(table: ScoreTable, k: int, replicates: np.ndarray) -> SplitFit:
    labels, scores = table.labels[:, k], table.scores[:, k]
    mask = ~np.isnan(labels) & ~np.isnan(scores)
    low, high = metrics.auroc_interval(labels, scores, table.patient_id, replicates[:, k])
    return SplitFit(
        auroc=metrics.auroc(labels, scores),
        low=low,
        high=high,
        positive_patients=len(np.unique(table.patient_id[mask & (labels == 1.0)])),
        negative_patients=len(np.unique(table.patient_id[mask & (labels == 0.0)])),
    )


def _sample(records: "list[VolumeRecord]", config: TrainFitConfig) -> "list[VolumeRecord]":
    if len(records) <= config.sample:
        return records
    size: Counter[str] = Counter()
    positive: dict[str, set[str]] = {finding: set() for finding in FINDINGS}
    for record in records:
        size[record.patient_id] += 1
        for finding in FINDINGS:
            if record.labels.get(finding) == 1.0:
                positive[finding].add(record.patient_id)
    order = np.random.default_rng(config.seed).permutation(sorted(size)).tolist()
    # one patient of each finding in turn, as long as a finding has any, up to half of the sample
    queues = [iter([name for name in order if name in positive[f]]) for f in FINDINGS]
    turns = (name for row in zip_longest(*queues) for name in row if name is not None)
    total, kept = 0, set()
    for candidates, most in ((turns, config.sample / 2), (order, config.sample)):
        for name in candidates:
            if total >= most:
                break
            if name not in kept:
                kept.add(name)
                total += size[name]
    logger.info(
        "training set: %d of %d volumes drawn, whole patients, rare findings first",
        total,
        len(records),
    )
    return [record for record in records if record.patient_id in kept]


def _token_mm(checkpoint: Any) -> float:
    patch = getattr(checkpoint.model_config.vision, "patch", None)
    if patch is None:
        return float("nan")
    sides = zip(patch, checkpoint.volume_config.spacing_mm, strict=True)
    return float(min(voxels * mm for voxels, mm in sides))
