"""Commands around the model: pretrain it, convert CT-CLIP's, describe what one costs."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctclip.cli.command import command, new_parser, parse, require_cohort


@command
def pretrain(argv: Sequence[str] | None = None) -> None:
    """Pretrain the two towers on volume-report pairs.

    deepspeed train/pretrain.py --config configs/pretrain/base.yaml cohort=prepared/ab12 out=run

    Started again, it goes on from the newest checkpoint.
    """
    parser = new_parser(pretrain.__doc__, "pretrain")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed adds it
    args = parse(parser, argv)

    from ctclip import config

    asked = config.read(args.config, args.overrides)
    for key in ("cohort", "out"):
        if not asked.get(key):
            raise ValueError(f"{key}=FOLDER is missing; --help shows a whole command")
    require_cohort(str(asked["cohort"]))

    from ctclip.training import pretrain as job

    settings = config.load(job.PretrainConfig, args.config, args.overrides)
    job.check(settings)  # before the evaluators read the cohort
    job.run(settings, _evaluators(settings))


def _evaluators(settings: Any) -> list[Any]:
    """Zero-shot AUROC on the development split, where the run asks for evaluations."""
    if settings.checkpoint.evaluate_every == 0:
        return []
    from ctclip import distributed
    from ctclip.data.cache import PreparedCohort
    from ctclip.evaluation import zero_shot as scoring

    cohort = PreparedCohort.open(settings.cohort)
    if not any(record.split == "valid" for record in cohort.records):
        if settings.checkpoint.patience:
            raise ValueError(
                f"checkpoint.patience={settings.checkpoint.patience} waits for zero-shot AUROC on "
                f"the split 'valid', and {settings.cohort} has none; set checkpoint.patience=0"
            )
        if distributed.is_main():
            logging.getLogger(__name__).warning("no split 'valid': no zero-shot AUROC in training")
        return []
    return [scoring.evaluator(cohort, "valid", windows_hu=settings.windows_hu)]


@command
def convert(argv: Sequence[str] | None = None) -> None:
    """Turn a released checkpoint of CT-CLIP, VocabFine or ClassFine into a ctclip checkpoint.

    ctclip-convert --from ct-clip CT-CLIP_v2.pt --out ct_clip.safetensors

    The files don't hold their tokenizer: tokenizer.json or vocab.txt is taken from beside the
    source, else CXR-BERT's by name.
    """
    parser = new_parser(convert.__doc__)
    parser.add_argument("source", help=".pt file; it is read without running code from it")
    parser.add_argument("--from", dest="kind", choices=["ct-clip"], default="ct-clip")
    parser.add_argument("--out", help="the .safetensors to write; by default beside the source")
    parser.add_argument(
        "--tokenizer", help="Hugging Face name or folder; by default beside the source"
    )
    args = parse(parser, argv)

    out = Path(args.out or Path(args.source).with_suffix(".safetensors"))
    if args.out is None and out.exists():
        raise ValueError(f"{out} exists; name the file to write with --out")

    from rich.console import Console

    from ctclip import checkpoint
    from ctclip.models.convert import report

    conversion = checkpoint.convert_ct_clip(args.source, out, tokenizer=args.tokenizer)
    console = Console()
    console.print(report(conversion))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)


@command
def describe(argv: Sequence[str] | None = None) -> None:
    """Say what a model costs: parameters, tokens, FLOPs, activations, largest batch of a card.

    ctclip-describe configs/pretrain/base.yaml --size 240 480 480
    """
    parser = new_parser(describe.__doc__)
    parser.add_argument("config", help="YAML of a pretraining run or of a model")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(240, 480, 480), metavar=("D", "H", "W")
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--cards", type=float, nargs="+", default=(24, 40, 80), metavar="GIB")
    args = parse(parser, argv)

    from rich.console import Console

    from ctclip.models import describe as job

    config = job.read_model_config(args.config)
    size = (args.size[0], args.size[1], args.size[2])
    description = job.describe(config, size, precision=args.precision)
    Console().print(job.table(description, tuple(args.cards)))
