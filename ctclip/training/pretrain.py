"""The pretraining loop: prepared cohort in, checkpoints out.

Read :func:`_train` from top to bottom. Every random choice is a function of (seed, step, study), so
that a run gives the same numbers on one process or eight, in one piece or after ten kills.
"""

import dataclasses
import functools
import itertools
import logging
import math
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctclip import checkpoint as model_file
from ctclip import config as configuration
from ctclip import distributed, losses
from ctclip.config import require_at_least, require_in
from ctclip.data.augment import AugmentConfig
from ctclip.data.cache import PreparedCohort
from ctclip.data.cohort import find_cohort
from ctclip.data.dataset import Batch, CohortDataset
from ctclip.data.manifest import VolumeRecord
from ctclip.data.volume import VolumeConfig
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.text import TextConfig, Tokenizer, build_tokenizer, freeze, set_trainable
from ctclip.training import flops, health, optim, reshard, resume
from ctclip.training.batches import StepBuilder
from ctclip.training.feed import StepVolumes
from ctclip.training.grad_cache import Features, accumulate
from ctclip.training.guard import (
    Guard,
    GuardConfig,
    explained_lost_process,
    explained_memory,
    leaves_on_sigterm,
)
from ctclip.training.lock import sole_job
from ctclip.training.monitor import Monitor, MonitorConfig, require_tracker
from ctclip.training.objective import LossConfig, Objective
from ctclip.training.optim import EngineConfig, OptimConfig
from ctclip.training.stream import StreamDataset, StudyStream, rows_per_rank, stream_loader
from ctclip.training.text_views import (
    SentenceBank,
    StudyText,
    TextViewConfig,
    read_sample,
    text_lengths,
)
from ctclip.training.text_warmup import TextWarmupConfig, prompt_spread, warm_up
from ctclip.training.towers import Towers

logger = logging.getLogger(__name__)

ENGINE_TAG = "engine"
"""Folder of DeepSpeed's own files inside a checkpoint."""

EMA_FILE = "ema.safetensors"

RESHARDED = "resharded"
"""Folder of a checkpoint that is converted to another number of processes, until it is loaded."""

BYTES_PER_WEIGHT = 4 * (1 + 3 + 2)
"""Of one checkpoint: the model file; weights and two moments; room for the average and slack."""

LOWER_IS_BETTER = (
    "health/alignment",
    "health/uniformity",
    "health/prompt_direction_spread",
    "zero_shot/prompt_direction_spread",
)

HARMLESS = ("out", "micro_batch_size", "workers", "guard", "checkpoint", "monitor")
"""What may change when a run goes on: it doesn't move the numbers beyond rounding."""

TRAINED = ("checkpoints", "model.safetensors", "best.safetensors")
"""Files of a run folder that hold what was computed."""

Evaluator = Callable[[CTCLIP, Tokenizer], dict[str, float]]
"""Measures a model during training, e.g. zero-shot AUROC. Called in eval mode on all ranks,
which hold the same model and may share the work; rank 0's answer counts."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and when to stop."""

    every: int = 200
    """Steps between checkpoints; the last step always saves one, and 0 saves no other."""

    keep: int = 2
    """Newest checkpoints that stay on disk."""

    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""

    best_metric: str = "zero_shot/macro"
    """Which of the evaluators' numbers picks ``best.safetensors``."""

    best_is: Literal["highest", "lowest"] = "highest"
    """Of that number: AUROC and recall want the highest, ``health/uniformity`` the lowest."""

    patience: int = 0
    """Stop after this many evaluations without a better one; 0 never stops early."""

    def __post_init__(self) -> None:
        if self.best_metric in LOWER_IS_BETTER and self.best_is == "highest":
            raise ValueError(
                f"checkpoint.best_metric={self.best_metric} is better the lower it is; set "
                f"checkpoint.best_is=lowest"
            )
        require_at_least(self, "checkpoint.", 0, "every", "evaluate_every", "patience")
        require_at_least(self, "checkpoint.", 1, "keep")
        if self.patience and not self.evaluate_every:
            raise ValueError(
                f"checkpoint.patience={self.patience} counts evaluations, and "
                f"checkpoint.evaluate_every=0 leaves one, at the end; set "
                f"checkpoint.evaluate_every to a number of steps"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides a pretraining run."""

    cohort: str
    """Prepared cohort: the folder named by its fingerprint that ``ctclip-prepare`` made."""

    out: str
    """Run folder: config, metrics, checkpoints, model."""

    steps: int = 1000
    batch_size: int = 32
    """Studies per step over all processes; each has ``batch_size - 1`` negatives."""

    micro_batch_size: int | None = None
    """Volumes that pass through the tower at once on one process; smaller fits smaller cards and
    changes nothing else (GradCache). None is the process's whole share."""

    seed: int = 0
    workers: int = 2
    """Processes that read volumes, per training process."""

    windows_hu: tuple[tuple[float, float], ...] | None = None
    """HU windows, one input channel each; None takes the cohort's."""

    start_from: str | None = None
    """A checkpoint to fine-tune, CT-CLIP's ``.pt`` files included. Its towers and
    tokenizer are taken; of ``model``, only how much of the text tower learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig | None = None
    text: TextViewConfig = field(default_factory=TextViewConfig)
    text_warmup: TextWarmupConfig = field(default_factory=TextWarmupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require_at_least(self, "", 1, "steps", "micro_batch_size")
        require_at_least(self, "", 0, "workers")
        require_in(self, "", 0, 2**63, "seed", ends="[)")  # what PyTorch and NumPy both take
        if self.windows_hu is not None:
            VolumeConfig(windows_hu=self.windows_hu)  # refuses what can't be a window
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (a negative), got {self.batch_size}")
        theirs = _changed(_without_text_training(self.model), ModelConfig())
        if self.start_from is not None and theirs:
            raise ValueError(
                f"start_from takes the model from its checkpoint: remove "
                f"{', '.join(f'model.{key}' for key in theirs)} from the config; of model, only "
                f"model.text.train, train_layers and lora_rank may stand beside it"
            )
        if self.model.logit_bias_init is not None and self.loss.contrastive != "siglip":
            raise ValueError(
                f"model.logit_bias_init={self.model.logit_bias_init} is for the sigmoid loss; "
                f"remove it or set loss.contrastive=siglip"
            )


def run(config: PretrainConfig, evaluators: Sequence[Evaluator] = ()) -> Path:
    """Pretrain the two towers; start the same command again to go on after an interruption.

    Args:
        config: The run.
        evaluators: Each measures the model every ``checkpoint.evaluate_every`` steps.

    Returns:
        The model file, ``OUT/model.safetensors``.

    Raises:
        ValueError: If the config can't work, or the run folder holds another run.
        Diverged: If the loss stays unusable.
        OSError: If the run folder can't be written to.
        ConnectionError: If another process of the job is gone.
    """
    settings = check(config, evaluators)
    optim.start_processes()
    with sole_job(Path(config.out)):
        return _train(_located(config), settings, evaluators)


def _train(
    config: PretrainConfig, settings: dict[str, Any], evaluators: Sequence[Evaluator]
) -> Path:
    _require_no_other_run(Path(config.out), config)  # none that came while this one waited
    model = Path(config.out) / "model.safetensors"
    checkpoint = resume.newest_intact(model.parent / "checkpoints")
    if checkpoint is not None and _is_finished(config, checkpoint):
        if distributed.is_main():  # a kill may have come between the last checkpoint and this
            _link(checkpoint / model.name, model)
            logger.info("%s is complete, nothing to train", config.out)
            _say_what_next(config, model)
        return model
    with leaves_on_sigterm():
        job = _Job.prepare(config, settings, checkpoint)
    with (
        resume.explained_disk_errors(job.out),
        explained_lost_process(),
        Guard(config.guard, job.out, job.progress.skipped) as guard,
        Monitor(
            job.out,
            config.monitor,
            configuration.to_dict(config),
            start_step=job.progress.step,
            total_steps=config.steps,
            flops_per_step=job.flops_per_step,
        ) as monitor,
    ):
        if job.progress.step == 0:
            warmup = {f"text_warmup/{name}": value for name, value in job.warmup.items()}
            monitor.write(0, warmup | job.cut_text)
        for pieces, studies, volumes, waited_s in job.batches():
            step = job.progress.step
            optim.set_lr(job.engine.optimizer, _lr(config, step))
            micro_batches, targets = job.builder(pieces, studies, volumes, step)
            with explained_memory(len(pieces[0].study)):
                done = accumulate(
                    job.engine,
                    micro_batches,
                    forward=job.engine,
                    objective=functools.partial(job.objective, targets=targets),
                    is_usable=guard.is_usable,
                )
                grad_norm = optim.take_step(job.engine) if done.usable else None
            if grad_norm is None:
                records = [record for piece in pieces for record in piece.records]
                guard.skipped_step(step, float(done.loss), records)
            else:
                guard.took_step()
                job.ema.update(job.model)
            job.progress.step = step = step + 1
            job.progress.skipped = (guard.in_a_row, guard.total)

            numbers = _global_mean({"loss": done.loss.item(), **done.scalars})
            numbers |= {
                "scale": float(done.features["logit_scale"]),
                "lr": _lr(config, step - 1),
                "grad_norm": math.nan if grad_norm is None else grad_norm,
                "negatives_per_step": config.batch_size - 1,
                "skipped_steps": guard.total,
            }
            monitor.step(step, volumes=config.batch_size, waited_s=waited_s, numbers=numbers)

            is_last = step == config.steps
            is_due = is_last or _every(step, config.checkpoint.evaluate_every)
            # When time is short, saving comes first; a diverging model is not worth measuring.
            if is_due and guard.is_sound and not guard.should_stop:
                with monitor.paused():
                    monitor.write(step, job.evaluate(evaluators, done.features))
            is_stale = job.progress.is_stale(config.checkpoint)
            stops = is_last or is_stale or guard.should_stop
            # Never in a row of skipped steps, after which the run may have to go back; but a run
            # that has come to its end has a model.
            if is_last or (guard.is_sound and (stops or _every(step, config.checkpoint.every))):
                with monitor.paused():
                    job.save()
            if distributed.is_main():
                _say_why(config, job.progress, guard, is_stale=is_stale, is_last=is_last)
            if stops:
                break
    distributed.barrier()
    if distributed.is_main() and not guard.should_stop:
        _say_what_next(config, model)
    return model


def check(config: PretrainConfig, evaluators: Sequence[Evaluator] = ()) -> dict[str, Any]:
    """Refuse what can't work, before anything is loaded, written or waited for.

    Args:
        config: The run.
        evaluators: As for :func:`run`.

    Returns:
        The settings of the DeepSpeed engine.

    Raises:
        ValueError: If settings contradict each other or the number of processes, or the run
            folder holds another run.
        FileNotFoundError: If ``engine.deepspeed`` doesn't exist.
    """
    world_size = distributed.launched_size()
    settings = optim.deepspeed_config(
        config.engine,
        config.optim,
        rows_per_rank=rows_per_rank(config.batch_size, world_size),
        world_size=world_size,
        micro_batch_size=config.micro_batch_size,
    )
    if evaluators and settings["zero_optimization"].get("stage") == 3:
        raise ValueError(
            "ZeRO 3 x evaluation during training is refused: no process holds a whole model; set "
            "checkpoint.evaluate_every=0 and evaluate model.safetensors of a checkpoint"
        )
    if distributed.is_main():
        require_tracker(config.monitor)
    _require_no_other_run(Path(config.out), _located(config))
    return settings


@dataclass
class Progress:
    """How far a run is; stored in every checkpoint."""

    step: int = 0
    skipped: tuple[int, int] = (0, 0)
    best: float | None = None
    best_of: str = ""
    """What ``best`` is a value of; another choice starts anew."""
    best_step: int = 0
    evaluations_since_best: int = 0

    def is_stale(self, config: CheckpointConfig) -> bool:
        """Whether early stopping says it is time."""
        return 0 < config.patience <= self.evaluations_since_best


@dataclass
class _Job:
    """The things a run is made of, all built from its config."""

    config: PretrainConfig
    out: Path
    cohort: PreparedCohort
    dataset: CohortDataset
    """The studies to learn from."""
    model: CTCLIP
    model_config: ModelConfig
    tokenizer: Tokenizer
    origin: dict[str, Any]
    """What was fine-tuned, for the model file's provenance."""
    engine: Any
    builder: StepBuilder
    objective: Objective
    ema: optim.WeightAverage
    progress: Progress
    device: torch.device
    warmup: dict[str, float]
    cut_text: dict[str, float]
    """How much of the training reports the tokenizer leaves out."""
    flops_per_step: float | None
    """Of the whole job; None on a CPU, whose peak isn't known."""
    evaluation: tuple[int, dict[str, float]] = (0, {})
    """The step that was measured last, and its numbers."""

    @classmethod
    def prepare(
        cls, config: PretrainConfig, settings: dict[str, Any], checkpoint: Path | None
    ) -> "_Job":
        """Build model, data and engine, and go on from the checkpoint where there is one."""
        out = Path(config.out)
        device = distributed.own_device()
        cohort = PreparedCohort.open(config.cohort)
        records = _with_reports(cohort.split("train"), config)
        dataset = CohortDataset(
            cohort,
            records,
            config.augment,
            config.windows_hu,
            seed=config.seed,
            finish_later=device.type == "cuda",
        )
        studies = read_sample(records, seed=config.seed)
        _warn_of_silence(studies)
        bank = SentenceBank(studies)
        finding_rate = _finding_rate(config, bank, records)

        torch.manual_seed(config.seed)
        model, model_config, tokenizer, origin = _model(config, cohort)
        model.to(device)
        _claim(out, config)
        warmup = {}
        if checkpoint is None:
            warmup = warm_up(
                model,
                tokenizer,
                studies,
                bank,
                config.text_warmup,
                config.text,
                silence=config.loss.silence,
                seed=config.seed,
                device=device,
            )
        if config.optim.text_lr_scale == 0.0:
            freeze(model.text)
        if config.optim.volume_lr_scale == 0.0:
            freeze(model.visual)
        # Before it compiles: blocks whose first call is being counted would never be compiled.
        flops_per_step = _flops_per_step(config, cohort, model) if device.type == "cuda" else None
        if config.engine.compile:
            model.visual.compile_blocks()

        source = _checkpoint_to_load(checkpoint, settings, out)
        engine = optim.start_engine(
            Towers(
                model,
                config.engine.precision,
                checkpointing=config.engine.activation_checkpointing,
            ),
            optim.param_groups(model, config.optim),
            config.optim,
            settings,
        )
        job = cls(
            config=config,
            out=out,
            cohort=cohort,
            dataset=dataset,
            model=model,
            model_config=model_config,
            tokenizer=tokenizer,
            origin=origin,
            engine=engine,
            builder=StepBuilder(
                tokenizer,
                bank,
                config.text,
                config.loss,
                seed=config.seed,
                device=device,
            ),
            objective=Objective(config.loss, finding_rate.to(device)),
            ema=optim.WeightAverage(model, config.optim.ema_decay),
            progress=Progress(),
            device=device,
            warmup=warmup,
            cut_text=_cut_text(records, tokenizer, config.text),
            flops_per_step=flops_per_step,
        )
        if checkpoint is not None and source is not None:
            job.restore(checkpoint, source)
        engine.train()
        return job

    def batches(self) -> Iterator[tuple[list[Batch], list[StudyText], StepVolumes, float]]:
        """This rank's part of every step still to do, and how long it was waited for."""
        config = self.config
        is_stale = self.progress.is_stale(config.checkpoint)
        dataset = self.dataset
        stream = StudyStream(
            dataset.records,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            start=self.progress.step,
            stop=self.progress.step if is_stale else config.steps,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        reader = iter(
            stream_loader(
                StreamDataset(dataset, self.out),
                stream,
                workers=config.workers,
                pin_memory=self.device.type == "cuda",
            )
        )
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        while True:
            since = time.perf_counter()
            read = list(itertools.islice(reader, stream.pieces))
            if not read:
                return
            waited_s = time.perf_counter() - since
            batches, texts = zip(*read, strict=True)
            volumes = StepVolumes(batches, dataset.finished, self.device, copies)
            # What goes on from here knows of the volumes, but only their feed holds them.
            pieces = [batch.with_volume(batch.volume[:0]) for batch in batches]
            del read, batches
            yield pieces, list(itertools.chain(*texts)), volumes, waited_s
            volumes.clear()

    def restore(self, checkpoint: Path, source: Path) -> None:
        """Go on from a checkpoint, whose engine state may have been converted elsewhere."""
        self.engine.load_checkpoint(str(source), tag=ENGINE_TAG)
        state = resume.read_state(checkpoint)
        self.progress = Progress(**state["progress"])
        self.warmup = state["warmup"]
        self.origin = state.get("origin", self.origin)  # whatever start_from's file holds today
        if self.ema.decay is not None:
            self.ema.weights = load_file(checkpoint / EMA_FILE, device=str(self.device))
        distributed.barrier()  # every rank has read what is removed now
        if distributed.is_main():
            shutil.rmtree(self.out / RESHARDED, ignore_errors=True)
            logger.info("going on from step %d (%s)", self.progress.step, checkpoint)

    def save(self) -> None:
        """Write a checkpoint, and make its model the run's ``model.safetensors``."""
        weights = sum(p.numel() for p in self.model.parameters())
        resume.require_space(self.out, weights * BYTES_PER_WEIGHT)
        folder = resume.save(
            self.out / "checkpoints",
            self.progress.step,
            self._write_checkpoint,
            {
                "progress": dataclasses.asdict(self.progress),
                "warmup": self.warmup,
                "origin": self.origin,
                "world_size": distributed.world_size(),
                "zero_stage": self.engine.zero_optimization_stage(),
            },
            keep=self.config.checkpoint.keep,
        )
        if distributed.is_main():
            _link(folder / "model.safetensors", self.out / "model.safetensors")

    def _write_checkpoint(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=ENGINE_TAG, save_latest=False)
        self.save_model(folder / "model.safetensors")
        if distributed.is_main() and self.ema.decay is not None:
            save_file(self.ema.weights, folder / EMA_FILE)

    def save_model(self, path: Path) -> None:
        """Write the model that evaluation reads (the average, where one is kept), on rank 0."""
        measured_step, measured = self.evaluation
        with optim.whole_weights(self.engine), self.ema.applied(self.model):
            if not distributed.is_main():
                return
            model_file.save(
                path,
                self.model,
                self.tokenizer,
                self.model_config,
                _volume_config(self.config, self.cohort),
                {
                    **self.origin,
                    "step": self.progress.step,
                    "git_commit": _git_commit(),
                    "cohort": self.cohort.fingerprint,
                    "label_informed": self.config.loss.label_informed
                    or self.origin.get("label_informed", False),
                    "config": configuration.to_dict(self.config),
                    "text_warmup": self.warmup,
                    "evaluation": measured if measured_step == self.progress.step else {},
                },
            )

    def evaluate(self, evaluators: Sequence[Evaluator], features: Features) -> dict[str, float]:
        """Measure the model, tell every rank, and keep the best one."""
        paired = features.get("report", features.get("sentence"))
        metrics: dict[str, float] = {}
        if paired is not None:
            image = distributed.gather(features["image_report"].detach())
            measured = health.embedding_health(image, distributed.gather(paired.detach()))
            metrics = {f"health/{name}": value for name, value in measured.items()}
        if self.engine.zero_optimization_stage() < 3:
            with self.ema.applied(self.model):
                self.model.eval()
                metrics["health/prompt_direction_spread"] = prompt_spread(
                    self.model, self.tokenizer, self.device
                )
                for evaluator in evaluators:
                    metrics.update(evaluator(self.model, self.tokenizer))
                self.model.train()
        metrics = distributed.gather_objects(metrics)[0]
        self.evaluation = (self.progress.step, metrics)
        self._note_best(metrics)
        return metrics

    def _note_best(self, metrics: dict[str, float]) -> None:
        wanted, progress = self.config.checkpoint, self.progress
        value = metrics.get(wanted.best_metric)
        choice = f"{wanted.best_is} {wanted.best_metric}"
        if progress.best_of != choice:
            progress.best, progress.best_of, progress.evaluations_since_best = None, choice, 0
        if value is None:
            if progress.best is None and progress.step < self.config.steps:
                self._require_best_metric(metrics)
            return
        if not self._is_better(value):
            progress.evaluations_since_best += 1
            return
        progress.best, progress.best_step = value, progress.step
        progress.evaluations_since_best = 0
        with resume.explained_disk_errors(self.out):
            self.save_model(self.out / "best.safetensors")

    def _is_better(self, value: float) -> bool:
        best = self.progress.best
        if best is None:
            return not math.isnan(value)
        return value > best if self.config.checkpoint.best_is == "highest" else value < best

    def _require_best_metric(self, metrics: dict[str, float]) -> None:
        """Say that no model will be called the best; refuse it where one was asked for.

        A cohort without labels or a split 'valid' has no zero-shot numbers, and trains all the
        same as long as the config leaves the choice of a best model alone.
        """
        wanted, step = self.config.checkpoint, self.progress.step
        problem = (
            f"checkpoint.best_metric: the evaluation gave no {wanted.best_metric!r}; it gave "
            f"{', '.join(sorted(metrics)) or 'nothing'}"
        )
        if wanted.patience or wanted.best_metric != CheckpointConfig().best_metric:
            self.save()
            raise ValueError(
                f"{problem}. Set checkpoint.best_metric to one of these and start the same "
                f"command again: it goes on from step {step}"
            )
        if distributed.is_main() and step == wanted.evaluate_every:
            logger.warning("%s. No best.safetensors will be written", problem)


def _is_finished(config: PretrainConfig, checkpoint: Path) -> bool:
    """Whether a run's newest checkpoint is its last."""
    progress = Progress(**resume.read_state(checkpoint)["progress"])
    return progress.step >= config.steps or progress.is_stale(config.checkpoint)


def _say_why(
    config: PretrainConfig, progress: Progress, guard: Guard, *, is_stale: bool, is_last: bool
) -> None:
    """What a run that stops here says of it."""
    if guard.should_stop:
        saved = "is saved" if guard.is_sound else "was skipped, the checkpoint before it stays"
        logger.warning("asked to terminate: step %d %s, stopping", progress.step, saved)
    elif is_stale and not is_last:
        found = "was never a number"
        if progress.best is not None:
            found = f"was best, {progress.best:.4g}, at step {progress.best_step}"
        logger.info(
            "stopping early at step %d: %s %s", progress.step, config.checkpoint.best_metric, found
        )
    elif is_last and not guard.is_sound:
        logger.warning(
            "the last %d steps were skipped, so that the model is of step %d and was not measured; "
            "the loss may have diverged",
            guard.in_a_row,
            progress.step - guard.in_a_row,
        )


def _say_what_next(config: PretrainConfig, model: Path) -> None:
    paths = (str(model), str(model), config.cohort, str(model.parent / "zero_shot"))
    logger.info(
        "model: %s; score it: python eval/zero_shot.py --ckpt %s --cohort %s --out %s",
        *map(shlex.quote, paths),
    )


def _checkpoint_to_load(
    checkpoint: Path | None, settings: dict[str, Any], out: Path
) -> Path | None:
    """Where the engine reads its state, converted if another number of processes wrote it."""
    if checkpoint is None:
        return None
    if not reshard.needs_resharding(
        resume.read_state(checkpoint),
        zero_stage=settings["zero_optimization"].get("stage", 0),
        world_size=distributed.world_size(),
    ):
        return checkpoint
    settings["checkpoint"] = {"load_universal": True}
    return reshard.to_universal(checkpoint, ENGINE_TAG, out / RESHARDED)


def _require_no_other_run(out: Path, config: PretrainConfig) -> None:
    """Refuse a folder with what another config has trained; a config alone is no run."""
    resolved = out / "config.yaml"
    if not resolved.exists() or not _has_trained(out):
        return
    difference = _difference(resolved, config)
    if difference:
        raise ValueError(
            f"{out} holds a run with another config ({difference}); choose another folder with "
            f"out=FOLDER, or delete this one to start afresh"
        )


def _has_trained(out: Path) -> bool:
    if any((out / name).exists() for name in TRAINED):
        return True
    metrics = out / "metrics.jsonl"  # before the first step it holds what the warm-up measured
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return any('"step": 0,' not in line for line in lines)


def _claim(out: Path, config: PretrainConfig) -> None:
    """Make the run folder this run's own, once its parts are there and before it trains."""
    if distributed.is_main():
        with resume.explained_disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            temporary = out / ".config.yaml.tmp"
            configuration.save(config, temporary)
            os.replace(temporary, out / "config.yaml")
    distributed.barrier()


def _difference(resolved: Path, config: PretrainConfig) -> str:
    before = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    now = configuration.to_dict(config)
    for values in (before, now):
        values["cohort"] = os.path.realpath(values["cohort"])
        for key in HARMLESS:
            values.pop(key, None)
    there, here = _flat(before), _flat(now)
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as they are typed."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= nested or {f"{prefix}{key}": value}
    return flat


def _flops_per_step(config: PretrainConfig, cohort: PreparedCohort, model: CTCLIP) -> float:
    volume = _volume_config(config, cohort)
    size = (config.augment.crop_voxels if config.augment else None) or volume.size
    return config.batch_size * flops.per_study(model, size, volume.channels)


def _with_reports(records: list[VolumeRecord], config: PretrainConfig) -> list[VolumeRecord]:
    usable = [record for record in records if record.findings or record.impression]
    if len(usable) < len(records) and distributed.is_main():
        logger.warning(
            "%d of %d training volumes have no report and are left out",
            len(records) - len(usable),
            len(records),
        )
    studies = len({record.study_id for record in usable})
    if studies < config.batch_size:
        raise ValueError(
            f"{config.cohort} has {studies} training studies with a report, fewer than batch_size "
            f"{config.batch_size}; lower batch_size or prepare more"
        )
    return usable


def _cut_text(
    records: Sequence[VolumeRecord], tokenizer: Tokenizer, config: TextViewConfig
) -> dict[str, float]:
    """Say how much of the training reports lies beyond the tokenizer's limit."""
    found = text_lengths(records, tokenizer, config)
    if distributed.is_main():
        logger.info(
            "%d of %d training reports are longer than %d tokens; truncation=%s leaves out "
            "%.1f %% of all tokens",
            found.num_truncated,
            found.num_texts,
            tokenizer.context_length,
            tokenizer.truncation,
            100 * found.cut_share,
        )
    return {
        "text/truncated_share": found.truncated_share,
        "text/tokens_cut_share": found.cut_share,
    }


def _located(config: PretrainConfig) -> PretrainConfig:
    """The config with whole paths: it is read again from other folders."""
    cohort, start, engine = config.cohort, config.start_from, config.engine
    if Path(cohort).is_dir():
        cohort = os.path.realpath(find_cohort(Path(cohort)))
    if start is not None and Path(start).exists():
        start = os.path.realpath(start)
    if engine.deepspeed is not None:
        engine = dataclasses.replace(engine, deepspeed=os.path.realpath(engine.deepspeed))
    return dataclasses.replace(config, cohort=cohort, start_from=start, engine=engine)


def _warn_of_silence(studies: Sequence[StudyText]) -> None:
    """Say so where reports aren't in a language or style whose findings are recognised."""
    telling = sum(any(value == value for value in study.polarity) for study in studies)
    if telling < 0.05 * len(studies) and distributed.is_main():
        logger.warning(
            "%d of %d training reports mention a finding that is recognised: the text warm-up and "
            "the opposite sentences have next to nothing to learn from (English reports only)",
            telling,
            len(studies),
        )


def _changed(config: Any, other: Any) -> list[str]:
    """Dotted names of the settings that differ."""
    ours, theirs = (_flat(configuration.to_dict(values)) for values in (config, other))
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def _without_text_training(model: ModelConfig) -> ModelConfig:
    plain = TextConfig()
    text = dataclasses.replace(
        model.text,
        train=plain.train,
        train_layers=plain.train_layers,
        lora_rank=plain.lora_rank,
    )
    return dataclasses.replace(model, text=text)


def _model(
    config: PretrainConfig, cohort: PreparedCohort
) -> tuple[CTCLIP, ModelConfig, Tokenizer, dict[str, Any]]:
    """The model to train, new or from a checkpoint, and what belongs to it."""
    if config.start_from is None:
        model_config = _model_config(config, cohort)
        return build_model(model_config), model_config, build_tokenizer(model_config.text), {}
    start = model_file.load(config.start_from)
    start.require_volumes(cohort.volume_config, config.cohort)
    windows = _volume_config(config, cohort).windows_hu
    if windows != start.volume_config.windows_hu:
        raise ValueError(
            f"{config.start_from} sees the HU windows {start.volume_config.windows_hu}, this run "
            f"has {windows}; set windows_hu to the former"
        )
    mine, theirs = config.model.text, start.model_config.text
    text = dataclasses.replace(
        theirs, train=mine.train, train_layers=mine.train_layers, lora_rank=mine.lora_rank
    )
    set_trainable(start.model.text, text)
    origin = {
        "started_from": {"sha256": start.sha256, **start.provenance},
        "label_informed": start.provenance.get("label_informed", False),
    }
    model_config = dataclasses.replace(start.model_config, text=text)
    if config.loss.contrastive == "siglip" and start.model.logit_bias is None:
        bias = losses.siglip_bias(config.batch_size)
        start.model.logit_bias = torch.nn.Parameter(torch.full((1,), bias))
        model_config = dataclasses.replace(model_config, logit_bias_init=bias)
    return start.model, model_config, start.tokenizer, origin


def _volume_config(config: PretrainConfig, cohort: PreparedCohort) -> VolumeConfig:
    if config.windows_hu is None:
        return cohort.volume_config
    return dataclasses.replace(cohort.volume_config, windows_hu=config.windows_hu)


def _model_config(config: PretrainConfig, cohort: PreparedCohort) -> ModelConfig:
    """The model's config with what follows from the rest of the run: channels, sigmoid bias."""
    volume = _volume_config(config, cohort)
    channels, model = volume.channels, config.model
    if model.ctvit is not None:
        return dataclasses.replace(model, ctvit=_ctvit(model.ctvit, volume), **_bias(config))
    if model.vision.channels not in (1, channels):
        raise ValueError(
            f"model.vision.channels is {model.vision.channels}, but there are {channels} HU windows"
        )
    vision = dataclasses.replace(model.vision, channels=channels)
    return dataclasses.replace(model, vision=vision, **_bias(config))


def _bias(config: PretrainConfig) -> dict[str, Any]:
    if config.loss.contrastive != "siglip" or config.model.logit_bias_init is not None:
        return {}
    return {"logit_bias_init": losses.siglip_bias(config.batch_size)}


def _ctvit(ctvit: CTViTConfig, volume: VolumeConfig) -> CTViTConfig:
    """CT-ViT for the run's windows, refused where the volumes' size isn't its own."""
    depth, *plane = volume.size
    if tuple(plane) != tuple(ctvit.image_size) or depth % ctvit.patch[0]:
        raise ValueError(
            f"the cohort's volumes are {volume.size}, model.ctvit takes {ctvit.image_size} in plane"
            f" and a depth in steps of {ctvit.patch[0]}: set model.ctvit.image_size and "
            f"model.ctvit.patch, or prepare the cohort for them"
        )
    if ctvit.channels not in (1, volume.channels):
        raise ValueError(
            f"model.ctvit.channels is {ctvit.channels}, but there are {volume.channels} HU windows"
        )
    return dataclasses.replace(ctvit, channels=volume.channels)


def _finding_rate(
    config: PretrainConfig, bank: SentenceBank, records: Sequence[VolumeRecord]
) -> Tensor:
    """How often each finding is stated among what the opposite-sentence term counts."""
    if config.loss.label_informed and not any(np.isfinite(r.label_row()).any() for r in records):
        raise ValueError(
            f"loss.label_informed=true, and no training study of {config.cohort} has a label; give "
            f"ctclip-prepare a table with the findings' columns, or remove it"
        )
    if not config.loss.label_informed:
        return torch.as_tensor(bank.rate(config.loss.silence), dtype=torch.float32)
    return torch.tensor([record.label_row() for record in records]).nanmean(dim=0).nan_to_num(0.5)


def _lr(config: PretrainConfig, step: int) -> float:
    return optim.lr_at(step, total_steps=config.steps, config=config.optim)


def _every(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _global_mean(numbers: dict[str, float]) -> dict[str, float]:
    """Average this rank's shares over ranks: the numbers of the global batch."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    world = distributed.world_size()
    if world > 1:
        values = torch.stack([torch.tensor(v) for v in distributed.gather_objects(values.tolist())])
        values = values.mean(dim=0)
    return dict(zip(numbers, values.tolist(), strict=True))


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, at once."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _git_commit() -> str | None:
    """The commit of the source tree that this runs from, if it is one."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
