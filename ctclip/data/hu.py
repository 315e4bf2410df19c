"""Whether stored numbers are Hounsfield units, and turning them into such exactly once."""

from pathlib import Path

import numpy as np

from ctclip.data.problems import Note, VolumeError

AIR_HU = -1000.0
"""Air by the definition of the Hounsfield scale."""

HU_RANGE = (-1024, 3071)
"""12-bit CT numbers. Padding lies below; above, only metal that the scanner could not resolve."""

PADDING_BELOW_HU = -1100
"""Out-of-field fill values (-2000, -2048, -3024, -8192) lie below, noise in air above."""

MIN_AIR_FRACTION = 1e-3
"""A chest has lungs and room air; less than this below -500 HU means that these are not HU."""

IMPLAUSIBLE_HU = 30_000
"""Signed values read as unsigned put air near 64,500."""

MAX_LABELS = 8
"""No more distinct integers than this is a segmentation; noise alone gives a CT dozens."""

SAMPLE_VOXELS = 500_000


def sample(voxels: np.ndarray, num: int = SAMPLE_VOXELS) -> np.ndarray:
    """About ``num`` voxels on a regular grid, flattened: enough for every test of values."""
    step = max(1, round((voxels.size / num) ** (1 / 3)))
    return voxels[::step, ::step, ::step].ravel()


def apply_scaling(voxels: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """``slope * voxels + intercept``, as int16 where that is exact and float32 otherwise.

    Args:
        voxels: Stored values of any integer or float type.
        slope: HU per stored unit.
        intercept: HU of a stored zero.

    Returns:
        int16 when every result is a whole number that fits, else float32. No copy is made of
        int16 voxels that need no scaling.
    """
    if voxels.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer():
        if voxels.dtype == np.int16 and slope == 1 and intercept == 0:
            return voxels
        low = slope * float(voxels.min()) + intercept
        high = slope * float(voxels.max()) + intercept
        limits = np.iinfo(np.int16)
        if limits.min <= min(low, high) and max(low, high) <= limits.max:
            wide = voxels.astype(np.int32)
            wide *= int(slope)
            wide += int(intercept)
            return wide.astype(np.int16)
    scaled = voxels.astype(np.float32)
    if slope != 1:
        scaled *= np.float32(slope)
    if intercept != 0:
        scaled += np.float32(intercept)
    return scaled


def replace_non_finite(path: Path, hu: np.ndarray) -> tuple[np.ndarray, list[Note]]:
    """Put air where a voxel is NaN or infinite; many readers silently put water (0) there.

    Raises:
        VolumeError: If no voxel is finite.
    """
    if hu.dtype.kind != "f":
        return hu, []
    finite = np.isfinite(hu)
    if finite.all():
        return hu, []
    if not finite.any():
        raise VolumeError(path, "no-finite-voxel", "every voxel is NaN or infinite")
    num = int(hu.size - finite.sum())
    text = f"{num} voxels ({100 * num / hu.size:.2g} %) are NaN or infinite; set to air"
    return np.where(finite, hu, np.float32(AIR_HU)), [Note("not-finite", text, "warn")]


def check_values(path: Path, hu: np.ndarray) -> list[Note]:
    """Judge from the values alone whether these can be Hounsfield units.

    Returns:
        Notes of level ``hold`` where the numbers are intact but are not HU: windowed to 8 bits,
        normalised, or stored with an offset. The scan is kept out of a cohort until the user says
        how to read it.

    Raises:
        VolumeError: If the volume is constant, a label mask, or far outside any CT number.
    """
    values = sample(hu)
    low, high = float(values.min()), float(values.max())
    if low == high and float(hu.min()) == float(hu.max()):
        raise VolumeError(path, "constant", f"every voxel is {low:g}; an empty acquisition")
    num_values = len(np.unique(values[::8]))
    if hu.dtype.kind in "iu" and num_values <= MAX_LABELS:
        raise VolumeError(path, "label-mask", f"{num_values} distinct values; a mask, not a CT")
    if (values > IMPLAUSIBLE_HU).mean() > 0.01:
        raise VolumeError(
            path,
            "hu-out-of-range",
            f"more than 1 % of the voxels exceed {IMPLAUSIBLE_HU}; signed data read as unsigned?",
        )
    return not_hu(values)


def describe_padding(hu: np.ndarray) -> list[Note]:
    """Say how much of a scan is out-of-field padding, which becomes air when it is resampled."""
    values = sample(hu)
    share = float((values < PADDING_BELOW_HU).mean())
    if share == 0:
        return []
    text = f"{100 * share:.1f} % is padding (down to {values.min():g}); becomes air"
    return [Note("padding", text)]


def is_hu(values: np.ndarray) -> bool:
    """Whether a sample of voxels looks like HU of a body: air near -1000, tissue near 0."""
    body = values[values > PADDING_BELOW_HU]
    if body.size == 0:
        return False
    return bool((body < -500).mean() > MIN_AIR_FRACTION and (body > -300).mean() > MIN_AIR_FRACTION)


def not_hu(values: np.ndarray) -> list[Note]:
    """What a sample of voxels is, if it is not HU; empty if it is."""
    if is_hu(values):
        return []
    low, high = float(values.min()), float(values.max())
    if high - low < 20:
        text = f"values from {low:g} to {high:g}: normalised, not HU"
        return [_held("normalised", text)]
    if low >= 0 and high <= 255:
        text = f"values from {low:g} to {high:g}: windowed to 8 bits, not HU"
        return [_held("8-bit", text)]
    offset = guess_offset(values)
    if offset is not None:
        text = f"values from {low:g} to {high:g}: HU stored with an offset of about {offset}"
        return [_held("hu-offset", text, f"1 {-offset}")]
    text = f"values from {low:g} to {high:g} hold no air below -500: not HU, or no lung and no air"
    return [_held("not-hu", text)]


def _held(code: str, text: str, rescale: str = "SLOPE INTERCEPT") -> Note:
    advice = f"read it with --rescale {rescale}, or take it as it is with --accept {code}"
    return Note(code, text, "hold", advice)


def guess_offset(values: np.ndarray) -> int | None:
    """The offset among those in use (1000, 1024, 8192) that would make the sample look like HU."""
    for offset in (8192, 1024, 1000):
        shifted = values - float(offset)
        if is_hu(shifted) and np.percentile(shifted, 5) > PADDING_BELOW_HU:
            return offset
    return None


def rescale_once(
    path: Path, stored: np.ndarray, rescale: tuple[float, float]
) -> tuple[np.ndarray, list[Note]]:
    """Apply a table's slope and intercept, unless the file holds HU already.

    CT-RATE's first release stores raw numbers that need the slope and intercept of its metadata
    table; its second release stores HU beside the same table. Applying it twice shifts everything
    by 1024 or 8192 HU, not applying it leaves air at 24, so the values decide.

    Args:
        path: Named in errors.
        stored: Voxels after the file's own scaling.
        rescale: Slope and intercept from the table.

    Raises:
        VolumeError: If the slope is not usable.
    """
    slope, intercept = rescale
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise VolumeError(path, "bad-scaling", f"slope {slope}, intercept {intercept} of the table")
    if (slope, intercept) == (1.0, 0.0):
        return stored, []
    values = sample(stored).astype(np.float64)
    if is_hu(values):
        text = f"already HU; the table's slope {slope:g}, intercept {intercept:g} was not applied"
        return stored, [Note("already-hu", text)]
    text = f"applied slope {slope:g}, intercept {intercept:g} from the table"
    return apply_scaling(stored, slope, intercept), [Note("rescaled", text)]
