"""Commands around an archive: export it, index it, search it, show it."""

import os
from collections.abc import Sequence
from pathlib import Path

from ctclip.cli.command import add_accept, add_rescale, command, given, new_parser, parse
from ctclip.cli.data import prepare


@command
def embed(argv: Sequence[str] | None = None) -> None:
    """Embed a prepared cohort's volumes and reports, for evaluation and similar cases.

    python eval/export_embeddings.py --ckpt model.safetensors --cohort prepared/ab12 --out archive
    python eval/export_embeddings.py --ckpt model.safetensors --manifest scans.csv --out archive
    """
    parser = new_parser(embed.__doc__, "embed")
    parser.add_argument("--ckpt", help="model.safetensors")
    parser.add_argument("--cohort", help="folder that ctclip-prepare wrote")
    parser.add_argument(
        "--manifest",
        help="scans that no cohort was prepared from yet: that is done first, as the checkpoint "
        "wants it, in OUT/prepared",
    )
    parser.add_argument("--out", help="folder of volumes.parquet and reports.parquet")
    parser.add_argument("--split", help="only this split")
    args = parse(parser, argv)
    if args.manifest:
        if args.cohort or not (args.ckpt and args.out):
            parser.error("--manifest takes the place of --cohort; it needs --ckpt and --out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.error("several processes share a cohort: run ctclip-prepare --like CKPT first")
        args.cohort = _prepared_for(args.ckpt, args.manifest, Path(args.out) / "prepared")

    from ctclip import config
    from ctclip.embeddings import job

    values = given(args, ckpt="checkpoint", cohort="cohort", out="out", split="split")
    job.run(config.load(job.EmbedConfig, args.config, args.overrides, values))


def _prepared_for(ckpt: str, manifest: str, folder: Path) -> str:
    """Prepare scans as a checkpoint wants them; the cohort's folder."""
    from ctclip import checkpoint

    prepare(["--source", manifest, "--like", ckpt, "--out", str(folder)])
    return str(folder / checkpoint.load(ckpt).volume_config.fingerprint())


@command
def similar(argv: Sequence[str] | None = None) -> None:
    """Find the cases most similar to a study, a new scan or a text.

    python eval/similar.py --table archive/volumes.parquet --study p12_a --out similar
    python eval/similar.py --table archive/volumes.parquet --ckpt model.safetensors
        --text "Bilateral pleural effusion." where.sex=F "where.age=[40,60]"
    """
    parser = new_parser(similar.__doc__, "similar")
    parser.add_argument("--table", help="volumes.parquet that ctclip-embed wrote")
    parser.add_argument("--index", help="index that ctclip-index built, instead of the table")
    parser.add_argument("--ckpt", help="model.safetensors, to ask by scan or text")
    parser.add_argument("--reports", help="reports.parquet: what is an ordinary similarity")
    parser.add_argument("--study", help="a study of the archive")
    parser.add_argument("--volume", help="a volume of the archive")
    parser.add_argument("--scan", help="a new scan: NIfTI file or DICOM folder")
    add_accept(parser)
    add_rescale(parser)
    parser.add_argument("--text", help="free text")
    parser.add_argument("--k", type=int, help="number of cases")
    parser.add_argument("--cohort", help="prepared cohort, for the picture")
    parser.add_argument("--out", help="folder of similar.csv and similar.png")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.retrieval import similar as job

    names = ("table", "index", "reports", "study", "volume", "scan", "text", "k", "cohort", "out")
    values = given(args, **{name: name for name in (*names, "accept", "rescale")})
    settings = config.load(job.SimilarConfig, args.config, args.overrides, values)
    scorer = None
    if args.ckpt:
        from ctclip.evaluation.scanner import load

        scorer = load(args.ckpt, device=settings.device)
    job.run(settings, scorer)


@command
def retrieval_quality(argv: Sequence[str] | None = None) -> None:
    """Measure how well an export finds cases: like cases, own reports, each finding.

    python eval/retrieval.py --table archive/volumes.parquet --reports archive/reports.parquet
    """
    parser = new_parser(retrieval_quality.__doc__, "retrieval")
    parser.add_argument("--table", help="volumes.parquet that ctclip-embed wrote")
    parser.add_argument("--reports", help="reports.parquet: adds report-to-volume recall")
    parser.add_argument("--ckpt", help="model.safetensors: adds searches by a finding's name")
    parser.add_argument("--truth", help="CSV of labels to judge by, e.g. what was planted")
    parser.add_argument("--split", help="only this split, as queries and as pool")
    parser.add_argument("--out", help="folder of retrieval.json and retrieval.md")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.retrieval import quality as job

    values = given(args, **{name: name for name in ("table", "reports", "truth", "split", "out")})
    settings = config.load(job.QualityConfig, args.config, args.overrides, values)
    scorer = None
    if args.ckpt:
        from ctclip.evaluation.scanner import load

        scorer = load(args.ckpt)
    job.run(settings, scorer)


@command
def index(argv: Sequence[str] | None = None) -> None:
    """Build or change a searchable index: a file, or a Milvus server.

    ctclip-index --action build uri=archive.db table=archive/volumes.parquet
    ctclip-index --action withdraw uri=archive.db "patients=[p12]"
    """
    parser = new_parser(index.__doc__, "index")
    parser.add_argument("--ckpt", help="model.safetensors: store zero-shot scores beside vectors")
    parser.add_argument(
        "--action",
        required=True,
        choices=["build", "insert", "withdraw", "backup", "info"],
    )
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.retrieval import jobs

    settings = config.load(jobs.IndexConfig, args.config, args.overrides, {"action": args.action})
    scorer = None
    if args.ckpt:
        from ctclip.evaluation.scanner import load

        scorer = load(args.ckpt)
    jobs.run_index(settings, scorer)


@command
def page(argv: Sequence[str] | None = None) -> None:
    """Serve a page: drop a scan, see its scores and similar cases. On this machine only.

    ctclip-page --ckpt model.safetensors --index archive.db --cohort prepared
    """
    parser = new_parser(page.__doc__, "page")
    parser.add_argument("--ckpt", required=True, help="model.safetensors")
    parser.add_argument("--index", help="index that ctclip-index built")
    parser.add_argument("--table", help="volumes.parquet, searched in memory")
    parser.add_argument("--cohort", help="prepared cohort, to look at the archive's scans")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation.scanner import load
    from ctclip.retrieval import jobs

    values = given(args, index="index", table="table", cohort="cohort")
    settings = config.load(jobs.PageConfig, args.config, args.overrides, values)
    jobs.run_page(settings, load(args.ckpt, device=settings.device))
