"""Child processes that are forked from a clean process, fast and without inherited threads.

A test process has used thread pools by the time it wants children, and what is forked from it can
hang in them; a process started from nothing pays ten seconds of imports. So one helper process
imports everything once, computes nothing, and forks a child for each request.
"""

import base64
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Child:
    """A process of the nursery; waited for and killed like ``multiprocessing.Process``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` in a child; the function is found again by file and name."""
        where = [sys.modules[function.__module__].__file__, function.__name__]
        call = base64.b64encode(pickle.dumps((*where, args))).decode()
        self.pid: int = _nursery().ask({"start": call})
        self.exitcode: int | None = None

    def join(self, timeout_s: float) -> None:
        """Wait for the end; ``exitcode`` stays None where it does not come in time."""
        if self.exitcode is None:
            self.exitcode = _nursery().ask({"wait": self.pid, "timeout_s": timeout_s})

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None

    def send(self, number: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)


class _Nursery:
    def __init__(self) -> None:
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import nursery; nursery.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@cache
def _nursery() -> _Nursery:
    return _Nursery()


def serve() -> None:
    """Fork a child per request until the tests end and close the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import deepspeed
    import deepspeed.ops  # noqa: F401
    import torch

    import ctclip.training.pretrain  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if answer == 0:
                _call(request["start"])
        else:
            answer = _wait(request["wait"], request["timeout_s"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _call(encoded: str) -> None:
    file, name, args = pickle.loads(base64.b64decode(encoded))
    try:
        load_function(file, name)(*args)
    finally:
        os._exit(1)


def load_function(file: str, name: str) -> Callable[..., Any]:
    """A function of a test module, which no import path leads to."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _wait(pid: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.01)
