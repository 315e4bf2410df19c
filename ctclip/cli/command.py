"""What every command shares: a parser with config and overrides, and errors in one sentence."""

import argparse
import errno
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Command = Callable[[Sequence[str] | None], None]

PATIENCE_S = 20.0
"""How long the other processes of a launcher leave it to the first one to report an error."""

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")

logger = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    """Plain lines for what happens; a level only where something is the matter."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno <= logging.INFO:
            return line
        return f"{record.levelname.lower()}: {line} ({record.name})"


def command(function: Command) -> Command:
    """Turn what a user's file or argument caused into one sentence and exit status 2."""

    @functools.wraps(function)
    def run(argv: Sequence[str] | None = None) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("ctclip").setLevel(logging.INFO)
        try:
            function(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("CTCLIP_TRACEBACK"):
                raise
            if not _speaks_first():
                time.sleep(PATIENCE_S)  # a launcher ends this process if the first one fails too
            print(f"error: {_in_words(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if _speaks_first():
                print("interrupted; the same command goes on from what is saved", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _speaks_first() -> bool:
    """Whether this is the only process, or of a launcher's on this machine the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _in_words(error: Exception) -> str:
    """The error's own sentence, or one for what the operating system says in a code and a path."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    if error.strerror != os.strerror(error.errno):
        return where + error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free space there or write elsewhere, then start the same command again"
    else:
        advice = "name a path that exists, or that you may make and write to"
    return f"{where}{error.strerror.lower()}; {advice}"


def new_parser(doc: str | None, config_folder: str | None = None) -> argparse.ArgumentParser:
    """Start a parser; with ``config_folder`` it takes ``--config`` and ``key=value`` overrides."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if config_folder is not None:
        parser.add_argument("--config", help=f"YAML, see configs/{config_folder}/")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="config values, e.g. seed=1"
        )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags and ``key=value`` pairs in any order, which plain ``parse_args`` does not allow.

    What follows is slow to import, so what can be seen to be missing is refused here, and the user
    hears that the command has understood.

    Raises:
        FileNotFoundError: If ``--config``, ``--ckpt`` or ``--cohort`` isn't there.
    """
    args = parser.parse_intermixed_args(argv)
    _leave_overrides(args)
    for override in getattr(args, "overrides", []):
        if "=" not in override:
            parser.error(f"expected key=value, got {override!r}")
    _require_files(args)
    if os.environ.get("RANK", "0") == "0":  # of a launcher's processes, one speaks
        logger.info("%s: starting, loading libraries", parser.prog)
    return args


def _leave_overrides(args: argparse.Namespace) -> None:
    """``--volumes a.nii.gz seed=1``: a flag of many values leaves key=value to the overrides."""
    for name, values in vars(args).items():
        if name == "overrides" or not (hasattr(args, "overrides") and isinstance(values, list)):
            continue
        pairs = [v for v in values if _OVERRIDE.match(str(v)) and not Path(v).exists()]
        setattr(args, name, [v for v in values if v not in pairs])
        args.overrides = [*args.overrides, *pairs]


def _require_files(args: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "config" in given and not Path(given["config"]).exists():
        raise FileNotFoundError(
            f"config file {given['config']} does not exist; see the folder configs/"
        )
    if "ckpt" in given and not Path(given["ckpt"]).exists():
        raise FileNotFoundError(f"no checkpoint {given['ckpt']}; train one with ctclip-pretrain")
    if "cohort" in given:
        require_cohort(given["cohort"])


def require_cohort(path: str) -> None:
    """Refuse the folder of a cohort that isn't there; what it holds is seen when it is opened."""
    is_url = ":/" in path
    if not is_url and not Path(path).is_dir():
        raise FileNotFoundError(f"no prepared cohort in {path}; run ctclip-prepare")


def add_rescale(parser: argparse.ArgumentParser) -> None:
    """How a scan is read whose numbers are not HU."""
    parser.add_argument(
        "--rescale",
        type=float,
        nargs=2,
        metavar=("SLOPE", "INTERCEPT"),
        help="how stored numbers become HU, where they are not HU, e.g. 1 -1024",
    )


def add_accept(parser: argparse.ArgumentParser) -> None:
    """Which reasons to hold a scan back are waved through."""
    parser.add_argument(
        "--accept",
        action="append",
        metavar="CODE",
        help="use scans held back for this reason as they are, e.g. not-hu (may be repeated)",
    )


def given(args: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Flags that were given, by the config field they fill."""
    values = {field: getattr(args, flag) for flag, field in names.items()}
    return {field: value for field, value in values.items() if value is not None}
