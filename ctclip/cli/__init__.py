"""One function per command: parse, build one config, call one function.

``train/`` and ``eval/`` hold scripts around the same functions. Everything heavy is imported after
parsing, so that ``--help`` answers at once.
"""

from ctclip.cli.data import inspect, phantom, prepare
from ctclip.cli.evaluation import (
    evaluate,
    label_audit,
    lesion_size,
    probe,
    styles,
    summary,
    train_fit,
    zero_shot,
)
from ctclip.cli.retrieval import embed, index, page, retrieval_quality, similar
from ctclip.cli.training import convert, describe, pretrain

__all__ = [
    "convert",
    "describe",
    "embed",
    "evaluate",
    "index",
    "inspect",
    "label_audit",
    "lesion_size",
    "page",
    "phantom",
    "prepare",
    "pretrain",
    "probe",
    "retrieval_quality",
    "similar",
    "styles",
    "summary",
    "train_fit",
    "zero_shot",
]
