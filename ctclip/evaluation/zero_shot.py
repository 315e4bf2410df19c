"""Zero-shot scores: every volume encoded once, every prompt once, one matrix product.

``python eval/zero_shot.py --ckpt model.safetensors --cohort prepared/ab12cd`` scores a prepared
cohort; ``--volume scan.nii.gz`` scores one file and needs nothing else, because the checkpoint
carries its model and its preprocessing.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ctclip import distributed
from ctclip.evaluation import metrics, plots, prompts, regions, report
from ctclip.evaluation.scores import ScoreTable
from ctclip.evaluation.scoring import (
    ZeroShotConfig,
    header,
    kind_of,
    score_embeddings,
    scores,
    scores_of,
)
from ctclip.findings import FINDINGS
from ctclip.models.pooling import READOUTS

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.cache import PreparedCohort
    from ctclip.data.manifest import VolumeRecord
    from ctclip.embeddings import EmbeddingTable
    from ctclip.models.ctclip import CTCLIP

logger = logging.getLogger(__name__)

SUBGROUP_FIELDS = ("sex", "age", "hospital", "manufacturer", "kernel", "slice_thickness_mm")
"""Metadata that travels into the score table, for subgroup analysis."""


def score_volume(
    checkpoint: "Checkpoint",
    path: str | Path,
    config: ZeroShotConfig | None = None,
    prompt_vectors: np.ndarray | None = None,
) -> dict[str, float]:
    """Score one scan file: finding to probability, in the order of ``FINDINGS``.

    Args:
        checkpoint: Model and preprocessing.
        path: NIfTI file or DICOM folder.
        config: How to score.
        prompt_vectors: Prompts that :func:`ctclip.evaluation.prompts.encode_prompts` encoded
            before, ``(findings, 2, E)``; the text tower isn't used then.

    Raises:
        VolumeError: If the scan can't be read, or its values are not HU and nobody accepted it.
    """
    from ctclip.embeddings import embed_file

    config = config or ZeroShotConfig()
    if config.patches or config.window or config.space != "raw":
        raise ValueError("patches, window and space need a prepared cohort: --cohort")
    vector, _ = embed_file(
        checkpoint, path, device=config.device, accept=config.accept, rescale=config.rescale
    )
    if prompt_vectors is None:
        prompt_vectors = prompts.encode_prompts(checkpoint, prompts.of(checkpoint, config.prompts))
    row = scores_of(checkpoint, vector[None], prompt_vectors, kind_of(checkpoint, config))[0]
    return dict(zip(FINDINGS, row.tolist(), strict=True))


def run(
    ckpt: str | Path,
    out: str | Path,
    config: ZeroShotConfig | None = None,
    *,
    cohort: str | Path | None = None,
    split: str | None = None,
    volume: str | Path | None = None,
    manifest: str | Path | None = None,
) -> metrics.Evaluation | dict[str, float]:
    """The command: score a prepared cohort, or one scan.

    Writes ``scores.parquet``, ``auc.csv``, ``auc.json``, ``report.html`` and the figures as PNG
    and SVG into ``out``, and prints the table. The embeddings are kept beside them, so that
    scoring again with other prompts costs nothing.

    Args:
        ckpt: Checkpoint.
        out: Folder of the results.
        config: How to score.
        cohort: Folder that ``ctclip-prepare`` wrote.
        split: Which split; ``None`` takes "test" where there is one, else "valid".
        volume: One scan instead of a cohort.
        manifest: Labels to use instead of the cohort's own, such as another reader's or an
            audit's corrected table; volumes that it doesn't list are left out.

    Raises:
        ValueError: If neither or both of ``cohort`` and ``volume`` are given.
        VolumeError: If the volume can't be used; the message says why and what to do.
    """
    if (cohort is None) == (volume is None):
        raise ValueError("give either --cohort <prepared folder> or --volume <scan>")
    config = config or ZeroShotConfig()
    if cohort is not None and (config.accept or config.rescale):
        raise ValueError("accept and rescale are for one scan (--volume); a cohort was prepared")
    from ctclip import checkpoint as checkpoints

    checkpoint = checkpoints.load(ckpt, device=config.device)
    name = Path(ckpt).stem
    folder = Path(out)
    if volume is not None:
        vectors = prompts.encode_prompts(checkpoint, prompts.of(checkpoint, config.prompts))
        del checkpoint.model.text  # a third of CT-CLIP, and never needed again
        found = score_volume(checkpoint, volume, config, vectors)
        development = development_auroc(checkpoint, config)
        folder.mkdir(parents=True, exist_ok=True)
        said = header(checkpoint, prompts.of(checkpoint, config.prompts), config, name)
        payload = {
            "volume": str(volume),
            **{key: said[key] for key in ("model", "checkpoint", "prompts", "score")},
            "scores": found,
            "development_auroc": development,
        }
        (folder / "scores.json").write_text(json.dumps(payload, indent=1), encoding="utf-8")
        report.print_scores(found, development)
        return found

    from ctclip.data.cache import PreparedCohort
    from ctclip.embeddings import embed_volumes

    assert cohort is not None
    prepared = PreparedCohort.open(Path(cohort))
    chosen = split or next((s for s in ("test", "valid") if _has_split(prepared, s)), "test")

    def embedded(split: str) -> "EmbeddingTable":
        return embed_volumes(
            checkpoint,
            prepared,
            prepared.split(split),
            out=folder / f"embeddings-{split}-{checkpoint.sha256[:12]}.parquet",
            batch_size=config.batch_size,
            workers=config.workers,
            device=config.device,
            fields=SUBGROUP_FIELDS,
        )

    whole = embedded(chosen)
    parts = None
    if config.patches or config.window:
        readable = set(whole.volume_id)
        parts = regions.score_records(
            checkpoint,
            prepared,
            [record for record in prepared.split(chosen) if record.volume_id in readable],
            prompts.encode_prompts(checkpoint, prompts.of(checkpoint, config.prompts)),
            patches=config.patches,
            window=config.window,
            device=config.device,
        )
    table = score_embeddings(
        checkpoint,
        whole,
        config,
        name,
        train=embedded("train") if config.space != "raw" else None,
        parts=parts,
    )
    if manifest is not None:
        table = with_labels_of(table, manifest)
    return write_results(table, folder, config)


def development_auroc(checkpoint: "Checkpoint", config: ZeroShotConfig) -> dict[str, float]:
    """AUROC by finding of exactly these weights on the development split, measured in training.

    Empty where the training wasn't evaluated at the checkpoint's step, or other prompts are asked.
    """
    if prompts.of(checkpoint, config.prompts).hash != prompts.load(prompts.DEFAULT).hash:
        return {}
    measured = checkpoint.provenance.get("evaluation", {})
    areas = {finding: measured.get(f"zero_shot/{finding}") for finding in FINDINGS}
    return {finding: area for finding, area in areas.items() if area is not None}


def write_results(table: ScoreTable, folder: Path, config: ZeroShotConfig) -> metrics.Evaluation:
    """Evaluate a score table and write every result file of the zero-shot command."""
    evaluation = metrics.evaluate(table, replicates=config.replicates, seed=config.seed)
    table.save(folder / "scores.parquet")
    evaluation.frame().to_csv(folder / "auc.csv", index=False)
    (folder / "auc.json").write_text(json.dumps(evaluation.to_json(), indent=1), encoding="utf-8")
    plots.save(plots.roc_grid([table], [evaluation]), folder / "roc")
    plots.save(plots.auc_bars([evaluation]), folder / "auc")
    page = report.Report(
        title=f"Zero-shot scores of {evaluation.model}",
        facts={key: str(value) for key, value in table.header.items()},
        sections=report.zero_shot_sections(table, evaluation),
    )
    page.write(folder / "report.html")
    report.print_evaluation(evaluation)
    logger.info("report: %s", folder / "report.html")
    return evaluation


def with_labels_of(table: ScoreTable, manifest: str | Path) -> ScoreTable:
    """The same scores beside the labels of a manifest, matched by volume.

    Raises:
        ValueError: If the two have no volume in common.
    """
    from dataclasses import replace

    from ctclip.data.manifest import read_manifest

    records, _ = read_manifest(Path(manifest))
    labels = {record.volume_id: record.labels for record in records}
    rows = np.array([v in labels for v in table.volume_id.tolist()])
    if not rows.any():
        raise ValueError(f"{manifest} lists none of the {len(table)} scored volumes")
    if not rows.all():
        logger.warning("%s lacks %d of %d volumes: left out", manifest, (~rows).sum(), len(rows))
    kept = table.rows(rows)
    matrix = [
        [labels[v].get(finding, np.nan) for finding in kept.findings]
        for v in kept.volume_id.tolist()
    ]
    return replace(kept, labels=np.asarray(matrix), header=kept.header | {"labels": str(manifest)})


def evaluator(
    cohort: "PreparedCohort",
    split: str,
    config: ZeroShotConfig | None = None,
    limit: int | None = None,
    windows_hu: Sequence[tuple[float, float]] | None = None,
) -> Callable[["CTCLIP", Any], dict[str, float]]:
    """Zero-shot AUROC during training, as the training loop's ``evaluators`` expect it.

    The processes of a job share the volumes; the first one does the rest and has the answer.

    Args:
        cohort: Prepared volumes.
        split: Which of them.
        config: Prompts and batch size.
        limit: At most so many volumes, evenly spread over the split.
        windows_hu: HU windows of the run, where they are not the cohort's.

    Returns:
        A function of (model, tokenizer) to values such as ``zero_shot/macro``, and how often a
        volume's own report is among the 1, 5 and 10 nearest of the split's
        (``retrieval/report_recall_10``). Findings that can't be measured are absent; on other
        processes than the first all of them are.
    """
    from ctclip.data.report import report_text

    config = config or ZeroShotConfig()
    records = cohort.split(split)
    if limit is not None and len(records) > limit:
        records = [records[i] for i in np.linspace(0, len(records) - 1, limit).astype(int)]
    prompt_set = prompts.load(config.prompts or prompts.DEFAULT)
    windows = tuple(windows_hu or cohort.volume_config.windows_hu)
    labels = np.array([[record.labels.get(f, np.nan) for f in FINDINGS] for record in records])
    texts = [report_text(record.findings, record.impression) for record in records]

    def evaluate(model: "CTCLIP", tokenizer: Any) -> dict[str, float]:
        was_training = model.training
        model.eval()
        try:
            encoded = _encode(model, cohort, records, config.batch_size, windows)
            parts = distributed.gather_objects(encoded)
            if not distributed.is_main():
                return {}
            seen = [row for _, rows in parts for row in rows]
            readouts = {
                name: np.concatenate([array for part, _ in parts for array in part[name]])
                for name in READOUTS
            }
            prompt_vectors = prompts.encode(model, tokenizer, prompt_set, FINDINGS)
            told = [i for i, row in enumerate(seen) if texts[row]]
            said = [texts[seen[i]] for i in told]
            reports = prompts.encode_texts(model, tokenizer, said) if said else np.empty((0, 0))
        finally:
            model.train(was_training)
        values = scores(readouts["prompt"], prompt_vectors, 1.0, "cosine-difference")
        retrieved = _report_recall(readouts["report"][told], reports)
        areas = {f: metrics.auroc(labels[seen, k], values[:, k]) for k, f in enumerate(FINDINGS)}
        measured = {f"zero_shot/{f}": area for f, area in areas.items() if not np.isnan(area)}
        if not measured:
            return retrieved
        spread = prompts.direction_spread(prompt_vectors)
        return {
            "zero_shot/macro": float(np.mean(list(measured.values()))),
            "zero_shot/prompt_direction_spread": spread,
            **measured,
            **retrieved,
        }

    return evaluate


def _encode(
    model: "CTCLIP",
    cohort: "PreparedCohort",
    records: "Sequence[VolumeRecord]",
    batch_size: int,
    windows_hu: tuple[tuple[float, float], ...],
) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """Both read-outs of this process's share of the volumes, and which of the records these are.

    Those that can't be read are left out.
    """
    from ctclip.data.cohort import CorruptVolumeError
    from ctclip.data.volume import window

    device = next(model.parameters()).device
    parts: dict[str, list[np.ndarray]] = {name: [] for name in READOUTS}
    seen = []
    share = range(distributed.rank(), len(records), distributed.world_size())
    with torch.inference_mode():
        for start in range(0, len(share), batch_size):
            arrays = []
            for index in share[start : start + batch_size]:
                try:
                    arrays.append(cohort.read(records[index].volume_id))
                    seen.append(index)
                except CorruptVolumeError as error:
                    logger.warning("a volume can't be read and is left out: %s", error)
            if not arrays:
                continue
            hu = torch.from_numpy(np.stack(arrays)).to(device).float()
            image = window(hu, windows_hu)
            for name, vectors in model.encode_image_readouts(image, normalize=True).items():
                parts[name].append(vectors.float().cpu().numpy())
    return parts, seen


def _report_recall(volumes: np.ndarray, reports: np.ndarray) -> dict[str, float]:
    """How often a volume's own report is among the nearest; an equal report counts as its own."""
    if len(reports) < 2:
        return {}
    cosine = volumes @ reports.T
    rank = (~(cosine <= cosine.diagonal()[:, None] + 1e-6)).sum(axis=1)
    recall = {f"retrieval/report_recall_{k}": float((rank < k).mean()) for k in (1, 5, 10)}
    return {**recall, "retrieval/pool": float(len(reports))}


def _has_split(cohort: "PreparedCohort", split: str) -> bool:
    return any(record.split == split for record in cohort.records)
