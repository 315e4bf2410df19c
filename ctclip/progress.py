"""How far a finite job is: a bar in a terminal, a line every few seconds in a log file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVERY_S = 5.0
"""Least time between two lines in a log file."""


class Progress:
    """Counts what is done and shows it on stderr, whether or not that is a terminal.

    Args:
        total: Items of the whole job.
        what: What happens to them, for example ``"prepare"``.
        unit: What they are, for example ``"volume"``.
        done: Items that an earlier run did.
        hidden: Show nothing, as on all but the first process of a job.
    """

    def __init__(
        self, total: int, what: str, unit: str, *, done: int = 0, hidden: bool = False
    ) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done, self._before = done, done
        self._hidden = hidden
        self._bar: Any = None
        self._shown = done
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = self._said = time.monotonic()
        if not self._hidden and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=self._done, desc=self._what, unit=self._unit
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._said > self._start and self._shown < self._done:
            self._say()

    def update(self) -> None:
        """One more item is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif not self._hidden and time.monotonic() - self._said >= EVERY_S:
            self._say()

    def _say(self) -> None:
        self._said, self._shown = time.monotonic(), self._done
        elapsed_s = self._said - self._start
        left_s = (self._total - self._done) * elapsed_s / max(1, self._done - self._before)
        ahead = f", about {_duration(left_s)} to go" if self._done < self._total else ""
        logger.info(
            "%s: %d of %d %ss after %s%s",
            self._what,
            self._done,
            self._total,
            self._unit,
            _duration(elapsed_s),
            ahead,
        )


def track(
    items: Iterable[T], total: int, what: str, unit: str, *, hidden: bool = False
) -> Iterator[T]:
    """Iterate and show how far that is; arguments as of :class:`Progress`."""
    with Progress(total, what, unit, hidden=hidden) as progress:
        for item in items:
            yield item
            progress.update()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
