"""An append-only record of who asked what and what was returned."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


class AuditLog:
    """One JSON line per query, and per saved result opened or exported.

    Lines are only ever added; nobody but the owner can read the file.

    The text of a query is left out, because people type names; how it was asked is kept.

    Args:
        path: The file; None records nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def record(self, user: str, asked: Mapping[str, Any], returned: Sequence[str]) -> None:
        """Write down one query, or one look at a saved result.

        Args:
            user: Who asked, as far as the service knows.
            asked: Kind of query, studies it named, filters, the result's handle.
            returned: Studies that were shown.
        """
        if self.path is None:
            return
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "user": user,
            "asked": dict(asked),
            "returned": list(returned),
        }
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, data)  # one write, so that lines of several processes don't mix
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
