"""Fifty readers on the page for five minutes: errors, latency and the server's memory.

make quickstart
python benchmarks/page_load.py --users 50 --minutes 5

Serves the quickstart's model and archive with ``ctclip-page`` from an index file, as a user would,
and drives it from a client process on the same machine. Each reader searches by study, by text or
both, looks at thumbnails, volumes and heat-maps, uploads a scan now and then, and thinks for two
to six seconds in between. The baseline is one reader alone, before. Writes
benchmarks/results/page_load.json.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "page_load.json"
TEXTS = ("pleural effusion", "cardiomegaly with pericardial effusion", "emphysema", "nodule")
UPLOAD_SHARE = 0.03
BASELINE_MINUTES = 1.0

Log = dict[str, list[tuple[float, str]]]
"""Per kind of request: seconds, and what went wrong ("" if nothing)."""


class Reader:
    """Ask, look, think, again."""

    def __init__(self, client: httpx.AsyncClient, seed: int, log: Log, scan: bytes) -> None:
        self.client, self.log, self.scan = client, log, scan
        self.rng = random.Random(seed)

    async def call(self, what: str, method: str, path: str, **options: object) -> httpx.Response:
        """One request; anything but 200 is an error, and ends this round."""
        start = time.perf_counter()
        try:
            response = await self.client.request(method, path, **options)  # type: ignore[arg-type]
            reason = "" if response.status_code == 200 else f"HTTP {response.status_code}"
        except httpx.TransportError as error:
            reason = type(error).__name__
        self.log[what].append((time.perf_counter() - start, reason))
        if reason:
            raise ConnectionError(what)
        return response

    async def read(self, until: float) -> None:
        """Until the time is up."""
        studies = (await self.call("studies", "POST", "/api/studies", content="{}")).json()
        while time.monotonic() < until:
            try:
                await self.round(studies)
            except ConnectionError:
                await asyncio.sleep(1)
            await asyncio.sleep(self.rng.uniform(2, 6))

    async def round(self, studies: list[str]) -> None:
        """One question and a look at its answer."""
        rng = self.rng
        question: dict[str, object] = {"k": 8}
        if rng.random() < UPLOAD_SHARE:
            question["scan"] = await self.upload()
        elif rng.random() < 0.6:
            question["study"] = rng.choice(studies)
        if rng.random() < 0.5 or len(question) == 1:
            question["text"] = rng.choice(TEXTS)
        answer = await self.call("search", "POST", "/api/search", content=json.dumps(question))
        base = f"/api/results/{answer.json()['id']}"
        for case in range(3):
            await self.call("thumbnail", "GET", f"{base}/{case}/thumbnail.png")
        await self.call("volume", "GET", f"{base}/{rng.randrange(3)}/volume.nii.gz")
        if rng.random() < 0.3:
            await self.call("heat-map", "GET", f"{base}/0/heat-{rng.randrange(18)}.nii.gz")

    async def upload(self) -> str:
        """Send a scan and wait for its analysis."""
        job = (await self.call("upload", "POST", "/api/scans", content=self.scan)).json()["job"]
        start = time.perf_counter()
        state = {"state": "waiting"}
        while state["state"] not in ("done", "failed"):
            await asyncio.sleep(1)
            state = (await self.call("poll", "GET", f"/api/scans/{job}")).json()
        reason = "" if state["state"] == "done" else str(state.get("code"))
        self.log["analysis"].append((time.perf_counter() - start, reason))
        return state["scan"]


async def load(address: str, users: int, minutes: float, scan: bytes) -> Log:
    """All readers at once."""
    log: Log = defaultdict(list)
    until = time.monotonic() + 60 * minutes
    async with httpx.AsyncClient(
        base_url=address,
        headers={"x-ctclip": "1"},
        timeout=120,
        limits=httpx.Limits(max_connections=users),
    ) as client:
        await asyncio.gather(*(Reader(client, n, log, scan).read(until) for n in range(users)))
    return log


def summary(log: Log, baseline: Log) -> dict[str, dict[str, float]]:
    """Counts, errors and latencies per kind of request, and beside one reader alone."""
    found = {}
    for what, calls in sorted(log.items()):
        p50, p95 = np.percentile([seconds for seconds, _ in calls], [50, 95]) * 1000
        found[what] = {
            "count": len(calls),
            "errors": sum(bool(reason) for _, reason in calls),
            "p50_ms": round(float(p50)),
            "p95_ms": round(float(p95)),
        }
        if baseline.get(what):
            alone = float(np.percentile([seconds for seconds, _ in baseline[what]], 50)) * 1000
            found[what]["p50_ms_one_reader"] = round(alone)
            found[what]["p50_times_one_reader"] = round(float(p50) / alone, 1)
    return found


def memory_mb(server: psutil.Process) -> float:
    """The server with the processes that read uploads."""
    total = 0
    for process in (server, *server.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


async def measured(
    server: psutil.Process, address: str, args: argparse.Namespace, scan: bytes
) -> dict[str, object]:
    """One reader alone, then all of them."""
    before = memory_mb(server)
    baseline = await load(address, 1, BASELINE_MINUTES, scan)
    samples: list[float] = []

    async def watch() -> None:
        while True:
            samples.append(memory_mb(server))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    log = await load(address, args.users, args.minutes, scan)
    watching.cancel()
    requests = summary(log, baseline)
    return {
        "users": args.users,
        "minutes": args.minutes,
        "errors": sum(row["errors"] for row in requests.values()),
        "reasons": Counter(reason for calls in log.values() for _, reason in calls if reason),
        "requests_per_s": round(sum(map(len, log.values())) / (60 * args.minutes), 1),
        "server_memory_mb": {
            "before": round(before),
            "peak": round(max(samples)),
            "end": round(memory_mb(server)),
        },
        "requests": requests,
    }


def main() -> None:
    """Start the server, load it, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    model, cohort = args.run / "train" / "model.safetensors", args.run / "cohort"
    table = args.run / "archive" / "volumes.parquet"
    scan = next((args.run / "phantoms").rglob("*.nii.gz")).read_bytes()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from ctclip.cli import index; index()"]
        command += ["--action", "build", f"uri={folder}/a.db", f"table={table}", "--ckpt", model]
        subprocess.run(command, check=True)
        command = [sys.executable, ROOT / "eval" / "page.py", "--ckpt", model]
        command += ["--index", f"{folder}/a.db", "--cohort", cohort]
        command += [f"state={folder}/results", f"serve.port={port}"]
        command += [f"serve.audit_log={folder}/audit.jsonl"]
        server = subprocess.Popen(command)
        try:
            while True:
                try:
                    httpx.get(address)
                    break
                except httpx.TransportError:
                    if server.poll() is not None:
                        raise SystemExit("the server ended; see above") from None
                    time.sleep(1)
            found = asyncio.run(measured(psutil.Process(server.pid), address, args, scan))
            audited = len(Path(folder, "audit.jsonl").read_text().splitlines())
        finally:
            server.terminate()
            server.wait()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, client on the same machine",
        "load_before": round(load_before, 1),
        **found,
        "audit_log_lines": audited,
    }
    print(json.dumps(result, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
