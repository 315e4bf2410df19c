"""Speed of reading prepared volumes: whole and cropped, cold and warm, local and sharded.

python benchmarks/loading.py --out benchmarks/results/loading.json

Writes a cohort of synthetic volumes in the cache's format, then reads it in random order. "Cold"
asks the kernel to forget a file's pages before each read (posix_fadvise), which a virtual disk may
undercut. MB are uncompressed int16. The share of a training step spent waiting is measured with
the real loader and a step that sleeps.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from ctclip import config as configs
from ctclip.data import storage
from ctclip.data.cohort import PreparedCohort, write_cohort_manifest
from ctclip.data.dataset import CohortDataset, EpochSampler, loader
from ctclip.data.manifest import VolumeRecord
from ctclip.data.shards import open_packed, pack
from ctclip.data.volume import VolumeConfig

CROP = (96, 192, 192)


def make_volume(size: tuple[int, ...], seed: int) -> np.ndarray:
    """Noisy body with lungs, air around it; compresses about as real HU do."""
    rng = np.random.default_rng(seed)
    h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in size[1:]), indexing="ij")
    plane = np.where((h / 0.8) ** 2 + (w / 0.95) ** 2 < 1, 40.0, -1000.0)
    for side in (-0.4, 0.4):
        plane[((w - side) / 0.3) ** 2 + (h / 0.55) ** 2 < 1] = -850
    volume = np.empty(size, np.int16)
    for index in range(size[0]):
        noise = rng.normal(0, 20, plane.shape) * (plane > -1000)
        volume[index] = (plane + noise).round()
    return volume


def make_cohort(folder: Path, num: int, size: tuple[int, int, int]) -> PreparedCohort:
    config = VolumeConfig(size=size)
    root = folder / config.fingerprint()
    for name in ("volumes", "tmp"):
        (root / name).mkdir(parents=True)
    recipe = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    storage.write_text(root, "recipe.yaml", recipe)
    records, outcomes = [], {}
    for i in range(num):
        name = f"v{i}"
        frame = storage.compress(make_volume(size, i))
        storage.write_bytes(root, f"volumes/{name}.b2nd", frame)
        outcomes[name] = {"crc32": storage.checksum(frame)}
        records.append(
            VolumeRecord(volume_id=name, study_id=name, patient_id=name, split="train", path=None)
        )
    write_cohort_manifest(root, records, outcomes)
    return PreparedCohort.open(root)


def forget(path: Path) -> None:
    """Drop the files' pages from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(read: Callable[[str], np.ndarray], names: list[str], cold: Path | None) -> dict:
    if cold is not None:
        forget(cold)
    start, cpu = time.perf_counter(), time.process_time()
    num_bytes = sum(read(name).nbytes for name in names)
    elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return {
        "volumes_per_s": round(len(names) / elapsed_s, 2),
        "mb_per_s": round(num_bytes / elapsed_s / 1e6, 1),
        "mb_per_cpu_s": round(num_bytes / cpu_s / 1e6, 1),
    }


def waiting(cohort: PreparedCohort, workers: int, step_s: float) -> float:
    """Share of the time that a loop with steps of ``step_s`` waits for its next batch."""
    dataset = CohortDataset(cohort, cohort.records)
    sampler = EpochSampler(len(dataset), seed=0, batch_size=1)
    waited, total_start, start = 0.0, time.perf_counter(), time.perf_counter()
    for _ in loader(dataset, sampler, workers=workers):
        waited += time.perf_counter() - start
        time.sleep(step_s)
        start = time.perf_counter()
    return waited / (time.perf_counter() - total_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    parser.add_argument("--num", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=3, default=(240, 480, 480))
    parser.add_argument("--step-s", type=float, default=1.0, help="a training step's length")
    args = parser.parse_args()
    size = tuple(args.size)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cohort = make_cohort(folder / "cache", args.num, size)
        packed = open_packed(pack(cohort, f"file://{folder}/packed"))
        names = [record.volume_id for record in cohort.records]
        rng.shuffle(names)
        crop = tuple(min(n, m) for n, m in zip(CROP, size, strict=True))

        def cropped(source: PreparedCohort) -> Callable[[str], np.ndarray]:
            def read(name: str) -> np.ndarray:
                start = [int(rng.integers(0, n - c + 1)) for n, c in zip(size, crop, strict=True)]
                return source.read_crop(name, start, crop)

            return read

        files = sum(file.stat().st_size for file in (cohort.path / "volumes").iterdir())
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": round(os.getloadavg()[0], 1),
            "volumes": args.num,
            "size": size,
            "crop": crop,
            "compression": round(args.num * int(np.prod(size)) * 2 / files, 2),
            "files_full_cold": rate(cohort.read, names, cohort.path),
            "files_full_warm": rate(cohort.read, names, None),
            "files_crop_cold": rate(cropped(cohort), names, cohort.path),
            "files_crop_warm": rate(cropped(cohort), names, None),
            "shards_full_cold": rate(packed.read, names, folder / "packed"),
            "shards_full_warm": rate(packed.read, names, None),
            "shards_crop_warm": rate(cropped(packed), names, None),
            "step_s": args.step_s,
            "share_waiting_without_workers": round(waiting(cohort, 0, args.step_s), 3),
            "share_waiting_with_1_worker": round(waiting(cohort, 1, args.step_s), 3),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(args.out.read_text())


if __name__ == "__main__":
    main()
