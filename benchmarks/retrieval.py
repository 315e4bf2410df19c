"""Insert rate, open time, latency, memory and disk of an archive, in memory and in a file.

python benchmarks/retrieval.py                                  # 10,000 and 50,000 x 512
python benchmarks/retrieval.py --sizes 1000000 --store memory   # 8 GB of memory, minutes

Writes benchmarks/results/retrieval.json, one row per store and size; rows of other sizes stay.
Each row is measured in a process of its own. Every answer is compared with brute force.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.search import Archive, MemoryArchive, Query, similarities

RESULTS = Path(__file__).with_name("results") / "retrieval.json"
WIDTH, K = 512, 10
FILTERS = {
    "none": Filter(),
    "15 %": Filter(present=(FINDINGS[0],)),
    "1 %": Filter(present=(FINDINGS[1],)),
}


def archive_table(num_rows: int) -> EmbeddingTable:
    """Random unit vectors, two volumes a patient; two findings of 15 % and 1 %."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num_rows, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.zeros((num_rows, len(FINDINGS)), dtype=np.float32)
    labels[:, 0] = rng.random(num_rows) < 0.15
    labels[:, 1] = rng.random(num_rows) < 0.01
    return EmbeddingTable(
        volume_id=[f"p{row // 2}_a_{row % 2}" for row in range(num_rows)],
        study_id=[f"p{row // 2}_a" for row in range(num_rows)],
        patient_id=[f"p{row // 2}" for row in range(num_rows)],
        split=["train"] * num_rows,
        vectors=vectors,
        labels=labels,
        provenance={"checkpoint": "random", "fingerprint": "none"},
    )


def latencies(archive: Archive, table: EmbeddingTable, num_queries: int) -> dict[str, object]:
    """Milliseconds at the median and the 95th percentile, per filter, and agreement."""
    rows = np.random.default_rng(1).integers(len(table), size=num_queries)
    found: dict[str, object] = {}
    for name, where in FILTERS.items():
        mask = where.mask(table)
        times, recalls = [], []
        for number, row in enumerate(rows):
            query = Query(
                vector=table.vectors[row], exclude_patients=frozenset([table.patient_id[row]])
            )
            start = time.perf_counter()
            hits = archive.search(query, k=K, where=where)
            times.append(time.perf_counter() - start)
            if number < 5:
                cosine = np.where(mask, table.vectors @ table.vectors[row], -2)
                near = np.flatnonzero(cosine >= np.partition(cosine, -8 * K)[-8 * K])
                exact = similarities(table.vectors[near], query.vector)
                best: dict[str, float] = {}
                for value, candidate in zip(exact, near, strict=True):
                    patient = table.patient_id[candidate]
                    if patient not in query.exclude_patients and mask[candidate]:
                        best[patient] = max(best.get(patient, -2.0), value)
                expected = sorted(best, key=lambda p: -best[p])[:K]
                recalls.append(len(set(expected) & {hit.patient_id for hit in hits}) / K)
        p50, p95 = np.percentile(np.array(times) * 1000, [50, 95])
        found[name] = {
            "p50_ms": round(float(p50), 1),
            "p95_ms": round(float(p95), 1),
            "recall_at_10": float(np.mean(recalls)),
        }
    return found


def measure(store: str, num_rows: int, num_queries: int) -> dict[str, object]:
    """One row of the table."""
    table = archive_table(num_rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: dict[str, object] = {"store": store, "rows": num_rows, "width": WIDTH}
    if store == "memory":
        start = time.perf_counter()
        archive: Archive = MemoryArchive(table)
        result["open_s"] = round(time.perf_counter() - start, 2)
        result["latency"] = latencies(archive, table, num_queries)
    else:
        from ctclip.retrieval.index import MilvusArchive

        with tempfile.TemporaryDirectory() as folder:
            uri = Path(folder) / "archive.db"
            start = time.perf_counter()
            index = "HNSW" if store == "file, HNSW" else "FLAT"
            MilvusArchive.build(uri, table, index=index).close()
            result["rows_per_s"] = round(num_rows / (time.perf_counter() - start))
            files = [path for path in uri.rglob("*") if path.is_file()]
            result["disk_mb"] = round(sum(path.stat().st_size for path in files) / 1e6)
            start = time.perf_counter()
            opened = MilvusArchive(uri)
            result["open_s"] = round(time.perf_counter() - start, 2)
            result["latency"] = latencies(opened, table, num_queries)
            start = time.perf_counter()
            opened.withdraw([table.patient_id[0]])
            result["withdraw_s"] = round(time.perf_counter() - start, 1)
            opened.close()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["memory_mb_beside_the_table"] = round((after - before) / 1024)
    return result


def main() -> None:
    """Measure each store and size in a process of its own, and keep the table up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--store", choices=["memory", "file", "file, HNSW"], nargs="+")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    stores = args.store or ["memory", "file"]
    if args.one:
        print(json.dumps(measure(stores[0], args.sizes[0], args.queries)))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for num_rows in args.sizes:
        for store in stores:
            command = [sys.executable, __file__, "--one", "--sizes", str(num_rows)]
            command += ["--store", store, "--queries", str(args.queries)]
            load = os.getloadavg()[0]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1]) | {"load_before": round(load, 1)}
            print(row)
            rows = [r for r in rows if (r["store"], r["rows"]) != (store, num_rows)] + [row]
            rows.sort(key=lambda r: (r["store"], r["rows"]))
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
