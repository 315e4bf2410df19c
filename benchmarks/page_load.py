"""Fifty readers on the page for five minutes: errors, latency and the server's memory.

python benchmarks/page_load.py --minutes 5 --users 50

A server process with a phantom archive of 300 patients behind an untrained model of quickstart
size, and a client process; each user searches by study or text, looks at volumes, thumbnails and
heat-maps, uploads a scan now and then, and thinks for a while in between. Writes
benchmarks/results/page_load.json.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import numpy as np
import psutil

RESULTS = Path(__file__).with_name("results") / "page_load.json"
TESTS = Path(__file__).parents[1] / "tests"
PORT = 8797
TEXTS = ("pleural effusion", "cardiomegaly with pericardial effusion", "emphysema", "nodule")

SERVER = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
import page_service
from ctclip.retrieval.page import ServeConfig, serve
folder = Path(sys.argv[1])
config = page_service.write_archive(folder, num_patients=int(sys.argv[2]))
serve(page_service.open_service(folder, config), ServeConfig(port={PORT}))
"""


async def user(client: httpx.AsyncClient, until: float, seed: int, log: dict, scan: bytes) -> None:
    """One reader: ask, look, think, again."""
    rng = random.Random(seed)

    async def call(what: str, method: str, path: str, **options: object) -> httpx.Response:
        start = time.perf_counter()
        response = await client.request(method, path, **options)  # type: ignore[arg-type]
        log[what].append((time.perf_counter() - start, response.status_code))
        return response

    studies = (await client.post("/api/studies", content="{}")).json()
    while time.monotonic() < until:
        question: dict[str, object] = {"k": 8}
        if rng.random() < 0.6:
            question["study"] = rng.choice(studies)
        if rng.random() < 0.5 or "study" not in question:
            question["text"] = rng.choice(TEXTS)
        if rng.random() < 0.03:
            job = (await call("upload", "POST", "/api/scans", content=scan)).json()["job"]
            start = time.perf_counter()
            state = {"state": "waiting"}
            while state["state"] not in ("done", "failed"):
                await asyncio.sleep(1)
                state = (await call("poll", "GET", f"/api/scans/{job}")).json()
            ok = 200 if state["state"] == "done" else 500
            log["analysis"].append((time.perf_counter() - start, ok))
            question = {"scan": state["scan"], "k": 8}
        result = (await call("search", "POST", "/api/search", content=json.dumps(question))).json()
        base = f"/api/results/{result['id']}"
        for case in range(3):
            await call("thumbnail", "GET", f"{base}/{case}/thumbnail.png")
        await call("volume", "GET", f"{base}/{rng.randrange(3)}/volume.nii.gz")
        if rng.random() < 0.3:
            await call("heat-map", "GET", f"{base}/0/heat-{rng.randrange(18)}.nii.gz")
        await asyncio.sleep(rng.uniform(2, 6))


async def run(users: int, minutes: float, scan: bytes) -> dict[str, list]:
    """All users at once."""
    log: dict[str, list] = defaultdict(list)
    until = time.monotonic() + 60 * minutes
    limits = httpx.Limits(max_connections=users)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{PORT}", headers={"x-ctclip": "1"}, timeout=120, limits=limits
    ) as client:
        await asyncio.gather(*(user(client, until, seed, log, scan) for seed in range(users)))
    return log


def main() -> None:
    """Start the server, load it, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--patients", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, "-c", SERVER, folder, str(args.patients)])
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{PORT}/")
                    break
                except httpx.TransportError:
                    time.sleep(1)
            scan = next(Path(folder, "phantom").rglob("*.nii.gz")).read_bytes()
            load = os.getloadavg()[0]
            log = asyncio.run(run(args.users, args.minutes, scan))
            process = psutil.Process(server.pid)
            memory = process.memory_info().rss / 2**20
        finally:
            server.terminate()
            server.wait()
    requests = {
        what: {
            "count": len(calls),
            "errors": sum(status != 200 for _, status in calls),
            "p50_ms": round(float(np.percentile([s for s, _ in calls], 50)) * 1000),
            "p95_ms": round(float(np.percentile([s for s, _ in calls], 95)) * 1000),
        }
        for what, calls in log.items()
    }
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, client on the same machine",
        "load_before": round(load, 1),
        "users": args.users,
        "minutes": args.minutes,
        "server_memory_mb": round(memory),
        "requests": requests,
    }
    print(json.dumps(result, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
