"""What an archive costs: building, opening, searching, memory, disk, and how each grows.

python benchmarks/retrieval.py                              # 10,000 and 50,000 x 512
python benchmarks/retrieval.py --sizes 1000000 --queries 20 --no-withdrawal
python benchmarks/retrieval.py --store server --uri http://127.0.0.1:19530

Writes benchmarks/results/retrieval.json, one row per store and size; rows of other sizes stay.
Each row is measured in processes of its own, beside a baseline on the same vectors in the same
run: NumPy brute force (one float32 matrix product, mask, ``argpartition``) for searching, the
Parquet file for building and opening, the vectors' bytes for memory and disk. CPU time per search
(of all the process's threads) stands beside the wall time, which others' work on the machine
lengthens. Every tenth answer is compared with the exact one.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.search import Archive, MemoryArchive, Query

RESULTS = Path(__file__).with_name("results") / "retrieval.json"
WIDTH, K = 512, 10
STORES = ("memory", "file", "file, HNSW", "server")
FILTERS = {
    "none": Filter(),
    "half (sex)": Filter(sex="F"),
    "15 %": Filter(present=(FINDINGS[0],)),
    "1 %": Filter(present=(FINDINGS[1],)),
}


def archive_table(num_rows: int) -> EmbeddingTable:
    """Random unit vectors, two volumes a study, two studies a patient; sex and age as fields."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num_rows, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.zeros((num_rows, len(FINDINGS)), dtype=np.float32)
    labels[:, 0] = rng.random(num_rows) < 0.15
    labels[:, 1] = rng.random(num_rows) < 0.01
    return EmbeddingTable(
        volume_id=[f"p{row // 4}_{row // 2 % 2}_{row % 2}" for row in range(num_rows)],
        study_id=[f"p{row // 4}_{row // 2 % 2}" for row in range(num_rows)],
        patient_id=[f"p{row // 4}" for row in range(num_rows)],
        split=["train"] * num_rows,
        vectors=vectors,
        labels=labels,
        provenance={"checkpoint": "random", "fingerprint": "none"},
        fields={
            "sex": [str(sex) for sex in rng.choice(["F", "M"], num_rows)],
            "age": [str(age) for age in rng.integers(18, 90, num_rows)],
        },
    )


def memory_mb() -> float:
    """What this process holds now."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def build(store: str, num_rows: int, uri: str, folder: Path) -> dict[str, object]:
    """Rows per second, and on disk."""
    table = archive_table(num_rows)
    start = time.perf_counter()
    table.save(folder / "table.parquet")
    baseline = time.perf_counter() - start
    if store == "memory":
        return {}
    from ctclip.retrieval.index import MilvusArchive

    start = time.perf_counter()
    MilvusArchive.build(uri, table, index="HNSW" if store == "file, HNSW" else None).close()
    elapsed = time.perf_counter() - start
    found: dict[str, object] = {
        "rows_per_s": round(num_rows / elapsed),
        "build_s": round(elapsed, 1),
        "build_times_baseline": round(elapsed / baseline, 1),
    }
    if store != "server":
        disk = sum(path.stat().st_size for path in Path(uri).rglob("*") if path.is_file())
        found["disk_mb"] = round(disk / 1e6)
        found["disk_times_vectors"] = round(disk / table.vectors.nbytes, 2)
    return found


def brute_force(vectors: np.ndarray, mask: np.ndarray | None, query: np.ndarray) -> np.ndarray:
    """The baseline: rows of the ``4 K`` most similar vectors, in no order."""
    cosine = vectors @ query
    if mask is not None:
        cosine = np.where(mask, cosine, -2)
    return np.argpartition(cosine, -4 * K)[-4 * K :]


def exact_studies(table: EmbeddingTable, query: Query, mask: np.ndarray) -> set[str]:
    """The K best studies of other patients, one a patient, by sorting everything."""
    patients: dict[str, str] = {}
    for row in np.argsort(-np.where(mask, table.vectors @ query.vector, -2), kind="stable"):
        if len(patients) == K or not mask[row]:
            break
        if table.patient_id[row] not in query.exclude_patients:
            patients.setdefault(table.patient_id[row], table.study_id[row])
    return set(patients.values())


def latencies(
    archive: Archive, table: EmbeddingTable, num_queries: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of archive and baseline in turn, per filter, and agreement."""
    rows = np.random.default_rng(1).integers(len(table), size=num_queries)
    found = {}
    for name, where in FILTERS.items():
        mask = where.mask(table)
        times: dict[str, list[float]] = {"archive": [], "cpu": [], "baseline": []}
        recalls = []
        for number, row in enumerate(rows):
            query = Query(
                vector=table.vectors[row], exclude_patients=frozenset([table.patient_id[row]])
            )
            start, used = time.perf_counter(), time.process_time()
            hits = archive.search(query, k=K, where=where)
            times["archive"].append(time.perf_counter() - start)
            times["cpu"].append(time.process_time() - used)
            start = time.perf_counter()
            brute_force(table.vectors, None if name == "none" else mask, query.vector)
            times["baseline"].append(time.perf_counter() - start)
            if number % 10 == 0:
                expected = exact_studies(table, query, mask)
                recalls.append(len(expected & {hit.study_id for hit in hits}) / len(expected))
        p50, p95 = np.percentile(np.array(times["archive"]) * 1000, [50, 95])
        cpu50, cpu95 = np.percentile(np.array(times["cpu"]) * 1000, [50, 95])
        base50, base95 = np.percentile(np.array(times["baseline"]) * 1000, [50, 95])
        found[name] = {
            "p50_ms": round(float(p50), 1),
            "p95_ms": round(float(p95), 1),
            "cpu_p50_ms": round(float(cpu50), 1),
            "cpu_p95_ms": round(float(cpu95), 1),
            "baseline_p50_ms": round(float(base50), 1),
            "baseline_p95_ms": round(float(base95), 1),
            "p50_times_baseline": round(float(p50 / base50), 2),
            "recall_at_10": float(np.mean(recalls)),
        }
    return found


def serve(
    store: str, uri: str, folder: Path, num_queries: int, withdraw: bool
) -> dict[str, object]:
    """Open, search, and let a patient withdraw."""
    from ctclip.retrieval.index import MilvusArchive

    empty = memory_mb()
    start = time.perf_counter()
    archive: MemoryArchive | MilvusArchive
    if store == "memory":
        archive = MemoryArchive(EmbeddingTable.load(folder / "table.parquet"))
    else:
        archive = MilvusArchive(uri)
    first = np.zeros(WIDTH, dtype=np.float32)
    first[0] = 1.0
    archive.search(Query(vector=first), k=K)
    opened = time.perf_counter() - start
    memory = memory_mb() - empty
    start = time.perf_counter()
    table = EmbeddingTable.load(folder / "table.parquet")
    baseline = time.perf_counter() - start
    found: dict[str, object] = {
        "open_and_first_answer_s": round(opened, 2),
        "open_times_baseline": round(opened / baseline, 1),
        "memory_mb": round(memory),
        "memory_times_vectors": round(memory * 2**20 / table.vectors.nbytes, 2),
        "latency": latencies(archive, table, num_queries),
    }
    if isinstance(archive, MilvusArchive):
        if withdraw:
            start = time.perf_counter()
            archive.withdraw([table.patient_id[0]])
            found["withdraw_s"] = round(time.perf_counter() - start, 1)
        archive.close()
    return found


def growth(rows: list[dict]) -> list[dict[str, object]]:
    """Exponents between the sizes of one store: 1 is in proportion to the rows."""
    found: list[dict[str, object]] = []
    for store in sorted({row["store"] for row in rows}):
        sizes = [row for row in rows if row["store"] == store]
        for small, large in itertools.pairwise(sizes):
            ratio = np.log(large["rows"] / small["rows"])

            def exponent(one: float, other: float, ratio: float = ratio) -> float:
                return round(float(np.log(other / one) / ratio), 2)

            entry: dict[str, object] = {"store": store, "from": small["rows"], "to": large["rows"]}
            for name in ("build_s", "open_and_first_answer_s", "memory_mb", "disk_mb"):
                if small.get(name) and large.get(name):
                    entry[name] = exponent(small[name], large[name])
            entry["p50_ms"] = exponent(
                small["latency"]["none"]["p50_ms"], large["latency"]["none"]["p50_ms"]
            )
            found.append(entry)
    return found


def in_child(*arguments: str) -> dict[str, object]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure each store and size, and keep the table up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--store", choices=STORES, nargs="+", default=["memory", "file"])
    parser.add_argument("--uri", help="of a Milvus server, for --store server")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--no-withdrawal", action="store_true", help="it rewrites a file")
    parser.add_argument("--part", choices=["build", "serve"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    store, uri = args.store[0], args.uri or ""
    if args.part == "build":
        print(json.dumps(build(store, args.sizes[0], uri, args.folder)))
        return
    if args.part == "serve":
        print(json.dumps(serve(store, uri, args.folder, args.queries, not args.no_withdrawal)))
        return
    if "server" in args.store and not args.uri:
        parser.error("--store server needs --uri")
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for num_rows in args.sizes:
        for store in args.store:
            with tempfile.TemporaryDirectory() as folder:
                uri = args.uri if store == "server" else str(Path(folder) / "archive.db")
                shared = ["--sizes", str(num_rows), "--store", store, "--folder", folder]
                shared += ["--uri", uri, "--queries", str(args.queries)]
                shared += ["--no-withdrawal"] if args.no_withdrawal else []
                load = os.getloadavg()[0]
                row: dict[str, object] = {"store": store, "rows": num_rows, "width": WIDTH}
                row |= in_child("--part", "build", *shared)
                row |= in_child("--part", "serve", *shared)
            row |= {"queries_per_filter": args.queries, "load_before": round(load, 1)}
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["store"], r["rows"]) != (store, num_rows)] + [row]
            rows.sort(key=lambda r: (r["store"], r["rows"]))
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            RESULTS.parent.mkdir(exist_ok=True)
            result = {"machine": machine, "rows": rows, "growth_exponents": growth(rows)}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
