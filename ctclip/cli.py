"""One function per command: parse, build one config, call one function.

``train/`` and ``eval/`` hold scripts around the same functions. Everything heavy is imported after
parsing, so that ``--help`` answers at once.
"""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Command = Callable[[Sequence[str] | None], None]


def _command(function: Command) -> Command:
    """Turn what a user's file or argument caused into one sentence and exit status 2."""

    @functools.wraps(function)
    def run(argv: Sequence[str] | None = None) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("ctclip").setLevel(logging.INFO)
        try:
            function(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("CTCLIP_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _parser(doc: str | None, config_folder: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if config_folder is not None:
        parser.add_argument("--config", help=f"YAML, see configs/{config_folder}/")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="config values, e.g. seed=1"
        )
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags and ``key=value`` pairs in any order, which plain ``parse_args`` does not allow."""
    args = parser.parse_intermixed_args(argv)
    for override in getattr(args, "overrides", []):
        if "=" not in override:
            parser.error(f"expected key=value, got {override!r}")
    return args


def _flags(args: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Flags that were given, by the config field they fill."""
    values = {field: getattr(args, flag) for flag, field in names.items()}
    return {field: value for field, value in values.items() if value is not None}


@_command
def phantom(argv: Sequence[str] | None = None) -> None:
    """Build a cohort of phantom chest CTs with reports, labels and the truth beside them.

    ctclip-phantom --config configs/phantom/quickstart.yaml --out phantoms
    """
    parser = _parser(phantom.__doc__, "phantom")
    parser.add_argument("--out", required=True, help="folder of the cohort")
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.phantom import cohort as job

    job.build(config.load(job.PhantomConfig, args.config, args.overrides), args.out)


@_command
def prepare(argv: Sequence[str] | None = None) -> None:
    """Check, resample and compress scans once; every refusal goes to a ledger.

    ctclip-prepare --source manifest.csv --out prepared
    ctclip-prepare --source CT-RATE/ --config configs/prepare/base.yaml --out prepared
    """
    parser = _parser(prepare.__doc__, "prepare")
    parser.add_argument(
        "--source",
        required=True,
        help="manifest CSV or Parquet, CT-RATE or RAD-ChestCT folder, DICOM folder, or scans",
    )
    parser.add_argument("--out", required=True, help="folder for prepared cohorts")
    parser.add_argument(
        "--kind",
        default="auto",
        choices=["auto", "manifest", "ct-rate", "rad-chestct", "dicom", "files"],
        help="what the source is, where it can't be told from its content",
    )
    parser.add_argument("--like", metavar="CKPT", help="preprocess as this checkpoint wants it")
    parser.add_argument("--root", help="folder that a manifest's paths are relative to")
    parser.add_argument(
        "--variant",
        default="located",
        choices=["located", "16", "15"],
        help="RAD-ChestCT: which mapping to the 18 findings",
    )
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    parser.add_argument("--strict", action="store_true", help="any ledger entry is an error")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CODE",
        help="use volumes held back for this reason, e.g. hu-offset (may be repeated)",
    )
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.data import cache as job
    from ctclip.data.sources import read_source
    from ctclip.data.volume import VolumeConfig

    if args.like and (args.config or args.overrides):
        parser.error("--like takes every setting from the checkpoint; leave out the others")
    if args.like:
        from ctclip import checkpoint

        settings = checkpoint.load(args.like).volume_config
    else:
        settings = config.load(VolumeConfig, args.config, args.overrides)
    records, problems = read_source(
        args.source, kind=args.kind, root=args.root, variant=args.variant
    )
    job.prepare(
        records,
        args.out,
        settings,
        workers=args.workers or os.cpu_count() or 1,
        strict=args.strict,
        problems=problems,
        accept=args.accept,
    )


@_command
def inspect(argv: Sequence[str] | None = None) -> None:
    """Show what ctclip sees in a scan: geometry, HU, what was applied, warnings, and a picture.

    ctclip-inspect scan.nii.gz
    ctclip-inspect dicom_folder --series 1.2.840… --out picture.png
    """
    parser = _parser(inspect.__doc__)
    parser.add_argument("scan", help="NIfTI, NRRD or MHA file, or a DICOM folder")
    parser.add_argument("--series", help="DICOM SeriesInstanceUID, where a folder holds several")
    parser.add_argument("--out", help="PNG file; <name>.png in the current folder by default")
    args = _parse(parser, argv)

    from pathlib import Path

    from rich.console import Console

    from ctclip.data import inspect as job

    result = job.inspect(args.scan, series=args.series)
    console = Console()
    console.print(job.render(result))
    if result.volume is not None:
        picture = Path(args.out or Path(args.scan).name.split(".")[0] + ".png")
        job.save_picture(result, picture)
        console.print(f"picture: {picture}", soft_wrap=True)
    if not result.is_usable:
        raise SystemExit(1)


@_command
def pretrain(argv: Sequence[str] | None = None) -> None:
    """Pretrain the two towers on volume-report pairs.

    deepspeed train/pretrain.py --config configs/pretrain/base.yaml cohort=prepared/ab12 out=run

    Started again, it goes on from the newest checkpoint.
    """
    parser = _parser(pretrain.__doc__, "pretrain")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed adds it
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.training import pretrain as job

    settings = config.load(job.PretrainConfig, args.config, args.overrides)
    job.run(settings, _evaluators(settings))


def _evaluators(settings: Any) -> list[Any]:
    """Zero-shot AUROC on the development split, where the run asks for evaluations."""
    if settings.checkpoint.evaluate_every == 0:
        return []
    from ctclip.data.cache import PreparedCohort
    from ctclip.evaluation import zero_shot as scoring

    cohort = PreparedCohort.open(settings.cohort)
    if not any(record.split == "valid" for record in cohort.records):
        logging.getLogger(__name__).warning("no split 'valid': no zero-shot AUROC while training")
        return []
    return [scoring.evaluator(cohort, "valid", windows_hu=settings.windows_hu)]


@_command
def zero_shot(argv: Sequence[str] | None = None) -> None:
    """Score volumes zero-shot; AUROC per finding with intervals where labels are known.

    python eval/zero_shot.py --ckpt model.safetensors --cohort prepared/ab12
    python eval/zero_shot.py --ckpt model.safetensors --volume scan.nii.gz
    """
    parser = _parser(zero_shot.__doc__, "zero_shot")
    parser.add_argument("--ckpt", required=True, help="model.safetensors, or a CT-CLIP .pt file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cohort", help="folder that ctclip-prepare wrote")
    source.add_argument("--volume", help="one scan: NIfTI file or DICOM folder")
    parser.add_argument("--split", help="which split of the cohort (test, else valid)")
    parser.add_argument("--manifest", help="labels to use instead of the cohort's own")
    parser.add_argument("--out", default="results/zero_shot", help="folder of the results")
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import zero_shot as job

    job.run(
        args.ckpt,
        args.out,
        config.load(job.ZeroShotConfig, args.config, args.overrides),
        cohort=args.cohort,
        split=args.split,
        volume=args.volume,
        manifest=args.manifest,
    )


@_command
def embed(argv: Sequence[str] | None = None) -> None:
    """Embed a prepared cohort's volumes and reports, for evaluation and similar cases.

    python eval/export_embeddings.py --ckpt model.safetensors --cohort prepared/ab12 --out archive
    """
    parser = _parser(embed.__doc__, "embed")
    parser.add_argument("--ckpt", help="model.safetensors")
    parser.add_argument("--cohort", help="folder that ctclip-prepare wrote")
    parser.add_argument("--out", help="folder of volumes.parquet and reports.parquet")
    parser.add_argument("--split", help="only this split")
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.embeddings import job

    flags = _flags(args, ckpt="checkpoint", cohort="cohort", out="out", split="split")
    job.run(config.load(job.EmbedConfig, args.config, args.overrides, flags))


@_command
def similar(argv: Sequence[str] | None = None) -> None:
    """Find the cases most similar to a study, a new scan or a text.

    python eval/similar.py --table archive/volumes.parquet --study p12_a --out similar
    python eval/similar.py --table archive/volumes.parquet --ckpt model.safetensors
        --text "Bilateral pleural effusion." where.sex=F "where.age=[40,60]"
    """
    parser = _parser(similar.__doc__, "similar")
    parser.add_argument("--table", help="volumes.parquet that ctclip-embed wrote")
    parser.add_argument("--ckpt", help="model.safetensors, to ask by scan or text")
    parser.add_argument("--reports", help="reports.parquet: what is an ordinary similarity")
    parser.add_argument("--study", help="a study of the archive")
    parser.add_argument("--volume", help="a volume of the archive")
    parser.add_argument("--scan", help="a new scan: NIfTI file or DICOM folder")
    parser.add_argument("--text", help="free text")
    parser.add_argument("--k", type=int, help="number of cases")
    parser.add_argument("--cohort", help="prepared cohort, for the picture")
    parser.add_argument("--out", help="folder of similar.csv and similar.png")
    args = _parse(parser, argv)

    from ctclip import config
    from ctclip.retrieval import similar as job

    names = ("table", "reports", "study", "volume", "scan", "text", "k", "cohort", "out")
    flags = _flags(args, ckpt="checkpoint", **{name: name for name in names})
    job.run(config.load(job.SimilarConfig, args.config, args.overrides, flags))


@_command
def summary(argv: Sequence[str] | None = None) -> None:
    """Gather one run's training curve, scores and similar cases in one HTML report.

    ctclip-summary --run runs/quickstart
    """
    parser = _parser(summary.__doc__)
    parser.add_argument("--run", required=True, help="folder with train/, zero_shot/, similar/")
    args = _parse(parser, argv)

    from ctclip import summary as job

    job.run(args.run)
