"""Commands that make data: phantoms and prepared cohorts, and a look at one scan."""

import logging
import os
from collections.abc import Sequence

from ctclip.cli.command import add_accept, add_rescale, command, new_parser, parse

logger = logging.getLogger(__name__)


@command
def phantom(argv: Sequence[str] | None = None) -> None:
    """Build a cohort of phantom chest CTs with reports, labels and the truth beside them.

    ctclip-phantom --config configs/phantom/quickstart.yaml --out phantoms
    """
    parser = new_parser(phantom.__doc__, "phantom")
    parser.add_argument("--out", required=True, help="folder of the cohort")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.phantom import cohort as job

    job.build(config.load(job.PhantomConfig, args.config, args.overrides), args.out)


@command
def prepare(argv: Sequence[str] | None = None) -> None:
    """Check, resample and compress scans once; every refusal goes to a ledger.

    ctclip-prepare --source manifest.csv --out prepared
    ctclip-prepare --source CT-RATE/ --config configs/prepare/base.yaml --out prepared
    """
    parser = new_parser(prepare.__doc__, "prepare")
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
    parser.add_argument(
        "--strict", action="store_true", help="any ledger entry but noted ones is an error"
    )
    add_accept(parser)
    parser.add_argument(
        "--rescale",
        type=float,
        nargs=2,
        metavar=("SLOPE", "INTERCEPT"),
        help="of scans that do not hold HU and for which no table says it, e.g. 1 -1024",
    )
    parser.add_argument("--pack", metavar="URL", help="also write shards there (s3://, file:///…)")
    args = parse(parser, argv)

    from dataclasses import replace

    from ctclip import config
    from ctclip.data import cache as job
    from ctclip.data import shards
    from ctclip.data.report import report_text
    from ctclip.data.sources import read_source
    from ctclip.data.volume import VolumeConfig

    if args.like and (args.config or args.overrides):
        parser.error("--like takes every setting from the checkpoint; leave out the others")
    tokenizer = None
    if args.like:
        from ctclip import checkpoint

        like = checkpoint.load(args.like)
        settings, tokenizer = like.volume_config, like.tokenizer
    else:
        settings = config.load(VolumeConfig, args.config, args.overrides)
    records, problems = read_source(
        args.source, kind=args.kind, root=args.root, variant=args.variant
    )
    if args.rescale:
        rescale = (args.rescale[0], args.rescale[1])
        records = [replace(record, rescale=record.rescale or rescale) for record in records]
    prepared = job.prepare(
        records,
        args.out,
        settings,
        workers=args.workers or os.cpu_count() or 1,
        strict=args.strict,
        problems=problems,
        accept=args.accept or (),
    )
    if tokenizer is not None:
        found = tokenizer.lengths([report_text(r.findings, r.impression) for r in prepared.records])
        logger.info(
            "%d of %d volumes' reports are longer than the checkpoint's %d tokens",
            found.num_truncated,
            found.num_texts,
            tokenizer.context_length,
        )
    if args.pack:
        logger.info("packed cohort: %s", shards.pack(prepared, args.pack))


@command
def inspect(argv: Sequence[str] | None = None) -> None:
    """Show what ctclip sees in a scan: geometry, HU, what was applied, warnings, and a picture.

    ctclip-inspect scan.nii.gz
    ctclip-inspect dicom_folder --series 1.2.840… --out picture.png
    """
    parser = new_parser(inspect.__doc__)
    parser.add_argument("scan", help="NIfTI, NRRD or MHA file, or a DICOM folder")
    parser.add_argument("--series", help="DICOM SeriesInstanceUID, where a folder holds several")
    add_rescale(parser)
    parser.add_argument("--out", help="PNG file; <name>.png in the current folder by default")
    args = parse(parser, argv)

    from pathlib import Path

    from rich.console import Console

    from ctclip.data import inspect as job

    rescale = (args.rescale[0], args.rescale[1]) if args.rescale else None
    result = job.inspect(args.scan, series=args.series, rescale=rescale)
    console = Console()
    console.print(job.render(result))
    if result.volume is not None:
        picture = Path(args.out or Path(args.scan).name.split(".")[0] + ".png")
        job.save_picture(result, picture)
        console.print(f"picture: {picture}", soft_wrap=True)
    if not result.is_usable:
        raise SystemExit(1)
