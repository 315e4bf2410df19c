"""Time and memory of preparing one scan, against the routes that others take.

python benchmarks/prepare.py --out benchmarks/results/prepare.json [--large]

Every route runs in a process of its own on one thread and on the same file. CPU seconds (user and
system) are those after the imports; peak resident memory is the whole process's, with what the
imports alone take beside it. Routes:

    ctclip            checked reading, one-pass resampling to int16 (antialias off, for comparison)
    ctclip-antialias  the same with the default antialiasing, which is another output
    nibabel-float64   float64 array, scaling, clip, torch trilinear, crop and pad, as CT-CLIP does
    monai             LoadImaged + Orientationd + Spacingd + ResizeWithPadOrCropd

What is equal: the first, third and fourth route interpolate trilinearly onto one grid that covers
the same box as the scan (the fields of view are whole numbers of target voxels, MONAI is told
``scale_extent=True``; by default it lets the first voxels' centres coincide instead, half a voxel
off). Their results, clipped to [-1000, 1000] HU and divided by 1000, must agree to 1e-3; ours is
rounded to whole HU, which is 0.0005 of it.
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

import nibabel as nib
import numpy as np

SIZE = (240, 480, 480)
SPACING_MM = (1.5, 0.75, 0.75)
SCANS = {"512x512x300": ((300, 512, 512), (1.0, 360 / 512, 360 / 512))}
LARGE = {"1024x1024x400": ((400, 1024, 1024), (0.9, 360 / 1024, 360 / 1024))}
ROUTES = ("ctclip", "ctclip-antialias", "nibabel-float64", "monai")
SAME_OUTPUT = ("ctclip", "nibabel-float64", "monai")
TOLERANCE = 1e-3
"""Of the network's range of [-1, 1]."""


def make_scan(path: Path, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    """A noisy ellipse with lungs, gzipped at level 1: compresses about as a real scan does."""
    from isal import igzip

    rng = np.random.default_rng(0)
    depth, height, width = shape
    h, w = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    plane = np.where((h / 0.8) ** 2 + (w / 0.9) ** 2 < 1, 40, -1000)
    for side in (-0.4, 0.4):
        plane[((w - side) / 0.3) ** 2 + (h / 0.55) ** 2 < 1] = -850
    affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
    affine[:3, 3] = [180.0, 150.0, -200.0]
    header = nib.Nifti1Header()
    header.set_data_shape((width, height, depth))
    header.set_data_dtype(np.int16)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with igzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0" * 4)
        for _ in range(depth):
            noisy = plane + rng.normal(0, 20, plane.shape) * (plane > -1000)
            file.write(noisy.round().astype("<i2").tobytes())


def run_ctclip(path: Path, antialias: bool) -> np.ndarray:
    from ctclip.data import volume

    config = volume.VolumeConfig(spacing_mm=SPACING_MM, size=SIZE, antialias=antialias)
    return volume.preprocess(volume.read(path), config)


def run_nibabel(path: Path) -> np.ndarray:
    import torch

    torch.set_num_threads(1)
    image = nib.load(path)
    hu = 1.0 * image.get_fdata() + 0.0
    spacing = np.array(image.header.get_zooms())[[2, 1, 0]]
    hu = torch.from_numpy(hu).permute(2, 1, 0)[None, None]
    # Rounded, not cut: the header's float32 holds a little less than 0.9 mm, and 239 slices instead
    # of 400 x 0.9 / 1.5 = 240 would put every voxel elsewhere.
    size = [round(n * s / t) for n, s, t in zip(hu.shape[2:], spacing, SPACING_MM, strict=True)]
    hu = torch.nn.functional.interpolate(hu, size=size, mode="trilinear", align_corners=False)
    hu = hu[0, 0].clip(-1000, 1000).numpy()
    out = np.full(SIZE, -1000.0)
    source, target = [], []
    for n, size_out in zip(hu.shape, SIZE, strict=True):
        kept = min(n, size_out)
        start, before = max((n - size_out) // 2, 0), (size_out - kept) // 2
        source.append(slice(start, start + kept))
        target.append(slice(before, before + kept))
    out[tuple(target)] = hu[tuple(source)]
    return out


def run_monai(path: Path) -> np.ndarray:
    import torch
    from monai.transforms import Compose, LoadImaged, Orientationd, ResizeWithPadOrCropd, Spacingd

    torch.set_num_threads(1)
    steps = Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", axcodes="SPL"),
            Spacingd(
                "image",
                pixdim=SPACING_MM,
                mode="bilinear",
                scale_extent=True,
                align_corners=True,
            ),
            ResizeWithPadOrCropd("image", SIZE, constant_values=-1000),
        ]
    )
    return np.asarray(steps({"image": str(path)})["image"][0])


def run_route(route: str, path: Path | None, out: Path) -> None:
    """In the child: run once, write the result and the cost."""
    if route.startswith("ctclip"):
        from ctclip.data import volume  # noqa: F401
    elif route == "monai":
        import monai.transforms  # noqa: F401
    else:
        import torch  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    if path is not None:
        match route:
            case "nibabel-float64":
                result = run_nibabel(path)
            case "monai":
                result = run_monai(path)
            case _:
                result = run_ctclip(path, antialias=route.endswith("antialias"))
    elapsed_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = {"cpu_s": cpu_s, "wall_s": elapsed_s, "peak_gib": after.ru_maxrss / 2**20}
    if path is not None:
        np.save(out, np.clip(result, -1000, 1000).astype(np.float32))
    out.with_suffix(".json").write_text(json.dumps(cost))


def measure(route: str, path: Path | None, folder: Path) -> dict[str, float]:
    out = folder / f"{route}.npy"
    command = [sys.executable, __file__, "--route", route, "--file", str(path or ""), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(out.with_suffix(".json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepare.json"))
    parser.add_argument("--large", action="store_true", help="also 1024 x 1024 x 400 (10 GB)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("result", nargs="?", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.route:
        run_route(args.route, Path(args.file) if args.file else None, args.result)
        return

    report: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
        "repeats": args.repeats,
        "target": {"spacing_mm": SPACING_MM, "size": SIZE},
        "scans": {},
    }
    for name, (shape, spacing) in (SCANS | (LARGE if args.large else {})).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            scan = folder / "scan.nii.gz"
            make_scan(scan, shape, spacing)
            routes = {}
            for route in ROUTES:
                imports = measure(route, None, folder)
                runs = [measure(route, scan, folder) for _ in range(args.repeats)]
                best = min(runs, key=lambda run: run["cpu_s"])
                routes[route] = {
                    **{key: round(value, 3) for key, value in best.items()},
                    "imports_gib": round(imports["peak_gib"], 3),
                    "volumes_per_minute_per_core": round(60 / best["cpu_s"], 1),
                }
            reference = np.load(folder / "nibabel-float64.npy")
            for route in ROUTES:
                off = np.abs(np.load(folder / f"{route}.npy") - reference) / 1000
                routes[route]["max_difference_of_unit_range"] = round(float(off.max()), 6)
                if route in SAME_OUTPUT and off.max() > TOLERANCE:
                    raise SystemExit(f"{name}: {route} gives another output, by {off.max():.4f}")
            ours, theirs = routes["ctclip"], routes["nibabel-float64"]
            report["scans"][name] = {
                "file_mb": round(scan.stat().st_size / 1e6, 1),
                "routes": routes,
                "speedup_over_nibabel": round(theirs["cpu_s"] / ours["cpu_s"], 2),
                "speedup_over_monai": round(routes["monai"]["cpu_s"] / ours["cpu_s"], 2),
                "memory_of_nibabel": round(ours["peak_gib"] / theirs["peak_gib"], 3),
            }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(args.out.read_text())


if __name__ == "__main__":
    main()
