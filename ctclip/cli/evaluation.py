"""Commands that say what a model can do, and what its labels are worth."""

from collections.abc import Sequence

from ctclip.cli.command import add_accept, add_rescale, command, given, new_parser, parse


@command
def zero_shot(argv: Sequence[str] | None = None) -> None:
    """Score volumes zero-shot; AUROC per finding with intervals where labels are known.

    python eval/zero_shot.py --ckpt model.safetensors --cohort prepared/ab12
    python eval/zero_shot.py --ckpt model.safetensors --volume scan.nii.gz
    """
    parser = new_parser(zero_shot.__doc__, "zero_shot")
    parser.add_argument(
        "--ckpt",
        required=True,
        help="model.safetensors, a folder of ctclip.hub, or a CT-CLIP .pt file",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cohort", help="folder that ctclip-prepare wrote")
    source.add_argument("--volume", help="one scan: NIfTI file or DICOM folder")
    parser.add_argument("--split", help="which split of the cohort (test, else valid)")
    parser.add_argument("--manifest", help="labels to use instead of the cohort's own")
    add_accept(parser)
    add_rescale(parser)
    parser.add_argument("--out", default="results/zero_shot", help="folder of the results")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation.scoring import ZeroShotConfig

    values = given(args, accept="accept", rescale="rescale")
    settings = config.load(ZeroShotConfig, args.config, args.overrides, values)

    from ctclip.evaluation import zero_shot as job  # slow: torch and the figures

    job.run(
        args.ckpt,
        args.out,
        settings,
        cohort=args.cohort,
        split=args.split,
        volume=args.volume,
        manifest=args.manifest,
    )


@command
def evaluate(argv: Sequence[str] | None = None) -> None:
    """Evaluate and compare any number of models by their score tables, under one protocol.

    python eval/report.py a/scores.parquet b/scores.parquet --out results/report
    """
    parser = new_parser(evaluate.__doc__)
    parser.add_argument("scores", nargs="+", help="score tables, wide CSVs or CT-CLIP folders")
    parser.add_argument("--out", default="results/report", help="folder of the results")
    parser.add_argument("--names", nargs="+", help="what to call each model, in their order")
    parser.add_argument("--labels", help="wide CSV of labels, for tables that lack them")
    parser.add_argument("--reports", help="manifest with reports: how suspected findings score")
    parser.add_argument("--protocol", help="name or YAML; see docs/evaluation.md")
    parser.add_argument("--split", help="which split is evaluated")
    parser.add_argument("--development", help="split that picks thresholds and calibration")
    parser.add_argument("--rule", choices=["youden", "corner", "specificity-90", "f1"])
    parser.add_argument("--replicates", type=int, help="bootstrap replicates")
    parser.add_argument("--seed", type=int)
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import model_report as job

    names = ("protocol", "split", "development", "rule", "replicates", "seed")
    values = given(args, **{name: name for name in names})
    settings = config.load(job.ReportConfig, values=values)
    job.run(
        args.scores,
        args.out,
        settings,
        labels=args.labels,
        reports=args.reports,
        names=args.names,
    )


@command
def train_fit(argv: Sequence[str] | None = None) -> None:
    """Score the training set beside development and test: a verdict for each finding.

    python eval/train_fit.py --ckpt model.safetensors --cohort prepared --out results/train_fit
    """
    parser = new_parser(train_fit.__doc__, "train_fit")
    parser.add_argument("--ckpt", required=True, help="model.safetensors")
    parser.add_argument("--cohort", required=True, help="folder that ctclip-prepare wrote")
    parser.add_argument("--out", default="results/train_fit", help="folder of the results")
    parser.add_argument("--lesions", help="CSV of lesion sizes, where they are known")
    parser.add_argument("--earlier", nargs="+", default=[], help="earlier checkpoints, in order")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import train_fit as job

    settings = config.load(job.TrainFitConfig, args.config, args.overrides)
    job.run(args.ckpt, args.cohort, args.out, settings, lesions=args.lesions, earlier=args.earlier)


@command
def label_audit(argv: Sequence[str] | None = None) -> None:
    """List the labels that are probably wrong, or apply a reviewed list to a label table.

    python eval/label_audit.py --ckpt model.safetensors --cohort prepared --out results/audit
    python eval/label_audit.py --apply review.csv --manifest m.csv --reviewer "Name" --out new.csv
    """
    parser = new_parser(label_audit.__doc__, "label_audit")
    parser.add_argument("--ckpt", help="model.safetensors")
    parser.add_argument("--cohort", help="folder that ctclip-prepare wrote")
    parser.add_argument("--apply", metavar="REVIEW", help="a review list with its decisions")
    parser.add_argument("--manifest", help="with --apply: the manifest to correct")
    parser.add_argument("--reviewer", help="with --apply: who decided")
    parser.add_argument("--out", required=True, help="folder, or with --apply the corrected CSV")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import review as job

    if args.apply:
        if not (args.manifest and args.reviewer):
            parser.error("--apply needs --manifest and --reviewer")
        job.apply(args.apply, args.manifest, args.out, args.reviewer)
        return
    if not (args.ckpt and args.cohort):
        parser.error("give --ckpt and --cohort, or --apply")
    settings = config.load(job.ReviewConfig, args.config, args.overrides)
    job.run(args.ckpt, args.cohort, args.out, settings)


@command
def lesion_size(argv: Sequence[str] | None = None) -> None:
    """Plant nodules of known diameter in scans: from what size on does this model see them?

    python eval/lesion_size.py --ckpt model.safetensors --volumes a.nii.gz b.nii.gz
    """
    parser = new_parser(lesion_size.__doc__, "lesion_size")
    parser.add_argument("--ckpt", required=True, help="model.safetensors")
    parser.add_argument("--volumes", nargs="+", required=True, help="scans without nodules")
    add_accept(parser)
    add_rescale(parser)
    parser.add_argument("--out", default="results/lesion_size", help="folder of the results")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import lesion_size as job

    values = given(args, accept="accept", rescale="rescale")
    settings = config.load(job.LesionSizeConfig, args.config, args.overrides, values)
    job.run(args.ckpt, args.volumes, args.out, settings)


@command
def styles(argv: Sequence[str] | None = None) -> None:
    """Compare styles of report: the same studies, worded by several hospitals.

    python eval/styles.py --ckpt model.safetensors --cohort prepared --reports ours.csv theirs.csv
    """
    parser = new_parser(styles.__doc__)
    parser.add_argument("--ckpt", required=True, help="model.safetensors")
    parser.add_argument("--cohort", required=True, help="folder that ctclip-prepare wrote")
    parser.add_argument("--split", default="test", help="which studies")
    parser.add_argument("--reports", nargs="+", default=[], help="manifests, one per style")
    parser.add_argument("--truth", help="truth.csv of a phantom cohort: rewrite its reports")
    parser.add_argument("--out", default="results/styles", help="folder of the results")
    parser.add_argument("--device", default="cpu")
    args = parse(parser, argv)

    from ctclip.evaluation import styles as job

    found = job.run(
        args.ckpt,
        args.cohort,
        args.out,
        split=args.split,
        reports=args.reports,
        truth=args.truth,
        device=args.device,
    )
    print(found.round(3).to_string(index=False))


@command
def probe(argv: Sequence[str] | None = None) -> None:
    """Train probes on frozen embeddings: with 1, 4, 16, 64 and all cases of each finding.

    python eval/probe.py --train archive/train.parquet --test archive/test.parquet
    """
    parser = new_parser(probe.__doc__, "probe")
    parser.add_argument("--train", required=True, help="volumes.parquet of training patients")
    parser.add_argument("--test", required=True, help="volumes.parquet of held-out patients")
    parser.add_argument("--out", default="results/probe", help="folder of the results")
    args = parse(parser, argv)

    from ctclip import config
    from ctclip.evaluation import few_shot as job

    settings = config.load(job.FewShotConfig, args.config, args.overrides)
    job.run(args.train, args.test, args.out, settings)


@command
def summary(argv: Sequence[str] | None = None) -> None:
    """Gather one run's training curve, scores and similar cases in one HTML report.

    ctclip-summary --run runs/quickstart
    """
    parser = new_parser(summary.__doc__)
    parser.add_argument("--run", required=True, help="folder with train/, zero_shot/, similar/")
    args = parse(parser, argv)

    from ctclip import summary as job

    job.run(args.run)
