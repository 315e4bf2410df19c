"""``python eval/lesion_size.py --ckpt … --volumes …``: how small can this model see?

Plants nodules of known diameter into the user's own negative scans, real or phantom, away from
vessels and pleura, scores each scan with and without, and draws detection AUROC and score shift
against diameter: the sensitivity curve of *this* model on *this* scanner.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctclip.evaluation import bootstrap, metrics, plots, prompts, report, scoring
from ctclip.evaluation.report import Picture, Section
from ctclip.progress import Progress

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.volume import Volume
    from ctclip.phantom.scene import Scene

logger = logging.getLogger(__name__)

Kind = Literal["solid", "ground-glass"]
FINDING = "Lung nodule"
LUNG_HU = -700.0
"""Mean of a place that is lung and nothing else; vessels raise it."""

PLEURA_MM = 3.0
DETECTED = 0.75
"""AUROC from which a diameter counts as seen."""

Scorer = Callable[[np.ndarray], float]
"""Preprocessed HU ``(D, H, W)`` int16 to a score, higher = nodule more likely."""


@dataclass(frozen=True, kw_only=True)
class LesionSizeConfig:
    """What is planted."""

    diameters_mm: tuple[float, ...] = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 20.0)
    kinds: tuple[Kind, ...] = ("solid", "ground-glass")
    repeats: int = 4
    """Places per scan, diameter and kind; the same places for every diameter."""

    prompts: str | None = None
    """As in the zero-shot command; so are accept and rescale."""

    accept: tuple[str, ...] = ()
    rescale: tuple[float, float] | None = None
    replicates: int = 2000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(self.diameters_mm) <= 0 or self.repeats < 1:
            raise ValueError("diameters_mm must be positive and repeats at least 1")


def run(
    ckpt: str | Path,
    volumes: Sequence[str | Path],
    out: str | Path,
    config: LesionSizeConfig | None = None,
) -> pd.DataFrame:
    """The command.

    Writes ``planted.csv`` (one row per planted nodule), ``curve.csv``, ``curve.json``, the figure
    and ``lesion_size.html``. Scans that can't be read, or hold no lungs, are named and left out.

    Args:
        ckpt: Checkpoint.
        volumes: Scans without nodules (NIfTI files or DICOM folders).
        out: Folder of the results.
        config: Diameters, kinds, repeats.

    Returns:
        The curve; see :func:`curve`.

    Raises:
        ValueError: If no scan could be used.
    """
    from ctclip import checkpoint as checkpoints

    config = config or LesionSizeConfig()
    checkpoint = checkpoints.load(ckpt, device=config.device)
    scorer = scorer_of(checkpoint, config)
    frames, refused = [], []
    jobs = len(volumes) * len(config.kinds) * len(config.diameters_mm) * config.repeats
    with Progress(jobs, "plant", "nodule") as shown:
        for path in volumes:
            try:
                frames.append(plant_scan(Path(path), checkpoint, scorer, config, shown))
            except ValueError as error:  # unreadable, or no lungs: say so and go on
                refused.append(f"{Path(path).name}: {error}")
                logger.warning("left out %s: %s", path, error)
    if not frames:
        raise ValueError("none of the scans could be used: " + "; ".join(refused))
    planted = pd.concat(frames, ignore_index=True)
    found = curve(planted, config)
    write(planted, found, refused, Path(out), checkpoint.sha256, config)
    return found


def scorer_of(checkpoint: "Checkpoint", config: LesionSizeConfig) -> Scorer:
    """The model's zero-shot score of a lung nodule: cosine to "present" minus to "absent"."""
    from ctclip.embeddings.encode import embed_voxels

    prompt_set = prompts.of(checkpoint, config.prompts)
    pair = prompts.encode(checkpoint.model, checkpoint.tokenizer, prompt_set, (FINDING,))

    def score(hu: np.ndarray) -> float:
        vector, _ = embed_voxels(checkpoint, hu, device=config.device)
        return float(scoring.scores(vector[None], pair, 1.0, "cosine-difference")[0, 0])

    return score


def plant_scan(
    path: Path,
    checkpoint: "Checkpoint",
    scorer: Scorer,
    config: LesionSizeConfig,
    shown: Progress | None = None,
) -> pd.DataFrame:
    """Plant every nodule of the config into one scan, one at a time.

    Returns:
        Columns ``volume, kind, diameter_mm, place, d, h, w, score, without``.

    Raises:
        ValueError: If the scan can't be read, holds no lungs, or no free place in them.
    """
    from ctclip.data import checked
    from ctclip.data import volume as volumes
    from ctclip.phantom.planting import plant_nodule, scene_of_scan

    scan = checked.read(path, accept=config.accept, rescale=config.rescale)
    scene = scene_of_scan(scan.hu, scan.spacing_mm, config.seed)
    without = scorer(volumes.preprocess(scan, checkpoint.volume_config))
    rng = np.random.default_rng([config.seed, len(path.name)])
    places = list(free_places(scan, scene, max(config.diameters_mm), config.repeats, rng))
    rows = []
    for kind in config.kinds:
        for place, centre in enumerate(places):
            for diameter in config.diameters_mm:
                hu = plant_nodule(
                    scan.hu,
                    scan.spacing_mm,
                    centre,
                    diameter,
                    kind,
                    seed=config.seed + place,
                    scene=scene,
                )
                planted = dataclasses.replace(scan, hu=hu)
                score = scorer(volumes.preprocess(planted, checkpoint.volume_config))
                position = dict(zip("dhw", centre, strict=True))
                row = {"volume": path.name, "kind": kind, "diameter_mm": diameter, "place": place}
                rows.append(row | position | {"score": score, "without": without})
                if shown is not None:
                    shown.update()
    return pd.DataFrame(rows)


def free_places(
    scan: "Volume", scene: "Scene", diameter_mm: float, wanted: int, rng: np.random.Generator
) -> Iterator[tuple[int, int, int]]:
    """Random voxels in lung tissue, away from vessels and pleura.

    Where the lung has no room for the largest nodule, its place may touch a vessel.

    Raises:
        ValueError: If the lungs are too small for any place.
    """
    room = scene.lung < -(PLEURA_MM + diameter_mm / 4)
    inside = np.flatnonzero(room)
    if not len(inside):
        raise ValueError(f"no place {PLEURA_MM:g} mm away from the pleura")
    found = 0
    half = [max(round(diameter_mm / 4 / step), 1) for step in scan.spacing_mm]
    for limit in (LUNG_HU, LUNG_HU + 150, np.inf):
        for flat in rng.permutation(inside)[: 200 * wanted]:
            if found == wanted:
                return
            centre = np.unravel_index(flat, room.shape)
            box = tuple(
                slice(max(int(c) - n, 0), int(c) + n + 1) for c, n in zip(centre, half, strict=True)
            )
            if scan.hu[box].mean() < limit:
                found += 1
                yield int(centre[0]), int(centre[1]), int(centre[2])


def curve(planted: pd.DataFrame, config: LesionSizeConfig) -> pd.DataFrame:
    """Detection AUROC and score shift against diameter.

    The AUROC sets scans with a nodule against the same scans without; scans are resampled with
    all their nodules. The shift is in units of the spread of the scores without nodules.

    Returns:
        Columns ``kind, diameter_mm, nodules, scans, auroc, auroc_low, auroc_high, shift,
        shift_low, shift_high``.
    """
    baseline = planted.groupby("volume", sort=True)["without"].first()
    spread = float(baseline.std(ddof=1)) if len(baseline) > 1 else float("nan")
    unit = spread if spread > 0 else 1.0
    rows = []
    for (kind, diameter), group in planted.groupby(["kind", "diameter_mm"], sort=True):
        names = np.concatenate([group["volume"].to_numpy(str), baseline.index.to_numpy(str)])
        scores = np.concatenate([group["score"], baseline])[:, None]
        labels = np.r_[np.ones(len(group)), np.zeros(len(baseline))][:, None]
        draws = bootstrap.draw(names, config.replicates, config.seed)
        low, high = bootstrap.interval(bootstrap.replicate(draws, labels, scores)[:, 0])
        shift = ((group["score"] - group["without"]) / unit).groupby(group["volume"]).mean()
        rng = np.random.default_rng(config.seed)
        drawn = rng.integers(len(shift), size=(config.replicates, len(shift)))
        ends = bootstrap.interval(shift.to_numpy()[drawn].mean(axis=1))
        is_alone = len(shift) < 2
        rows.append(
            {
                "kind": kind,
                "diameter_mm": diameter,
                "nodules": len(group),
                "scans": len(shift),
                "auroc": metrics.auroc(labels[:, 0], scores[:, 0]),
                "auroc_low": np.nan if is_alone else low,
                "auroc_high": np.nan if is_alone else high,
                "shift": float(shift.mean()),
                "shift_low": np.nan if is_alone else ends[0],
                "shift_high": np.nan if is_alone else ends[1],
            }
        )
    return pd.DataFrame(rows)


def smallest_seen_mm(found: pd.DataFrame, kind: str) -> float:
    """Diameter from which on every AUROC is at least :data:`DETECTED`; nan if none is."""
    rows = found[found["kind"] == kind].sort_values("diameter_mm")
    seen = (rows["auroc"] >= DETECTED).to_numpy()
    if not len(seen) or not seen[-1]:
        return float("nan")
    first = len(seen) - int(np.argmin(seen[::-1])) if not seen.all() else 0
    return float(rows["diameter_mm"].to_numpy()[first])


def write(
    planted: pd.DataFrame,
    found: pd.DataFrame,
    refused: Sequence[str],
    folder: Path,
    checkpoint: str,
    config: LesionSizeConfig,
) -> None:
    """Write tables, figure and page."""
    folder.mkdir(parents=True, exist_ok=True)
    planted.to_csv(folder / "planted.csv", index=False)
    found.to_csv(folder / "curve.csv", index=False)
    smallest = {kind: smallest_seen_mm(found, kind) for kind in config.kinds}
    payload = {
        "checkpoint": checkpoint,
        "smallest_seen_mm": {k: None if np.isnan(v) else v for k, v in smallest.items()},
        "refused": list(refused),
        "curve": json.loads(found.to_json(orient="records")),
    }
    (folder / "curve.json").write_text(json.dumps(payload, indent=1), encoding="utf-8")
    chart = figure(found)
    plots.save(chart, folder / "lesion_size")
    scans = planted["volume"].nunique()
    lines = [
        f"{kind.capitalize()} nodules are told from none (AUROC of {DETECTED} or more) "
        + (f"from {size:g} mm." if not np.isnan(size) else "at no diameter that was tried.")
        for kind, size in smallest.items()
    ]
    warnings = [f"Left out: {reason}" for reason in refused]
    if scans < 10:
        warnings.insert(0, f"Only {scans} scans: the intervals are a rough guide.")
    section = Section(
        title="Detection against diameter",
        paragraphs=[*lines, f"{len(planted)} nodules planted into {scans} scans."],
        warnings=warnings,
        figures=[Picture(image=chart, caption="Bands: 95 % intervals, scans resampled.")],
        frames=[found],
    )
    report.Report(
        title="How small can it see", facts={"checkpoint": checkpoint[:12]}, sections=[section]
    ).write(folder / "lesion_size.html")
    report.print_frame(
        "Detection against diameter",
        found[["kind", "diameter_mm", "nodules", "auroc", "auroc_low", "auroc_high", "shift"]],
    )
    logger.info("curve: %s", folder / "lesion_size.html")


def figure(found: pd.DataFrame) -> Figure:
    """Two panels: AUROC and score shift against diameter, one line per kind."""
    chart = Figure(figsize=(9.2, 3.6), layout="constrained")
    panels = chart.subplots(1, 2)
    for axis, name, label in zip(
        panels, ("auroc", "shift"), ("AUROC, with against without", "score shift (SD)"), strict=True
    ):
        for m, (kind, rows) in enumerate(found.groupby("kind", sort=False)):
            colour = plots.COLOURS[m]
            axis.plot(rows["diameter_mm"], rows[name], color=colour, marker="o", ms=4, label=kind)
            axis.fill_between(
                rows["diameter_mm"], rows[f"{name}_low"], rows[f"{name}_high"],
                color=colour, alpha=0.18, lw=0,
            )  # fmt: skip
        axis.axhline(0.5 if name == "auroc" else 0.0, color=plots.INK, lw=0.8)
        axis.set_xlabel("diameter (mm)", fontsize=9, color=plots.INK)
        axis.set_ylabel(label, fontsize=9, color=plots.INK)
        plots.frame(axis)
    panels[0].set_ylim(0.3, 1.02)
    panels[0].legend(frameon=False, fontsize=9)
    return chart
