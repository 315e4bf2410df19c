"""DICOM folders to stored voxels: slices sorted by where they lie, never by name or number.

Headers are read first and judged as a whole (one patient, one matrix, even spacing); pixels are
decoded afterwards, each with its own slope and intercept. What toolkits repair in silence (a
missing slice stretches the patient, a duplicate squeezes it) is refused or warned about here.
"""

import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.data.geometry import MIN_SLICES
from ctclip.data.nifti import StoredVolume
from ctclip.data.problems import Level, Note, VolumeError, some_of
from ctclip.data.report import ABSENT
from ctclip.progress import track

SPACING_TOLERANCE = 0.05
"""Relative jitter between slice positions; tables move by less, a missing slice by 1.0."""

MAX_DUPLICATES = 0.1
"""A larger share of doubled positions means two stacks in one series, not a resent slice."""

AXIAL_COSINE = 0.7
"""Cosine between slice normal and body axis; below, the series is coronal or sagittal."""

PREFERRED_STEP_MM = 1.5
"""Between series of one study that cover the same length, the step closest to this is taken."""

LOSSY = {
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.53",
    "1.2.840.10008.1.2.4.55",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.91",
}
"""Transfer syntaxes that may have changed values (JPEG 2000 .91 and JPEG-LS .81 can be exact)."""

_TAGS = [
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "InstitutionName",
    "SeriesDescription",
    "PatientID",
    "PatientSex",
    "PatientAge",
    "ConvolutionKernel",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]

_DECODING_ERRORS = (
    ValueError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    KeyError,
    IndexError,
    TypeError,
    OSError,
    EOFError,
    struct.error,
)
"""pydicom's decoders raise all of these on damaged or unsupported pixel data."""


@dataclass(frozen=True)
class Slice:
    """One image of a series, before its pixels are decoded."""

    file: Path
    frame: int | None
    """Frame number in a multi-frame file, else None."""

    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    image_type: tuple[str, ...]
    matrix: tuple[int, int]
    """(rows, columns)."""

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    """(between rows, between columns) in mm."""

    slope: float | None
    intercept: float | None
    meta: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def normal(self) -> np.ndarray:
        """Unit vector perpendicular to the slice, in DICOM's LPS axes."""
        cosines = self.orientation or (1, 0, 0, 0, 1, 0)
        return np.cross(cosines[:3], cosines[3:])


@dataclass(frozen=True)
class Series:
    """The usable slices of one SeriesInstanceUID."""

    uid: str
    slices: tuple[Slice, ...]

    @property
    def is_axial(self) -> bool:
        """Whether the slices are cut across the body axis."""
        return bool(abs(self.slices[0].normal[2]) >= AXIAL_COSINE)

    def describe(self) -> str:
        """UID, number of slices and description, for a message."""
        text = self.slices[0].meta.get("description", "")
        return f"{self.uid} ({len(self.slices)} slices{', ' + text if text else ''})"


def read(path: Path, series: str | None = None) -> StoredVolume:
    """Read the one axial CT series in a folder.

    Args:
        path: Folder, searched at any depth, or one multi-frame file.
        series: SeriesInstanceUID to take; needed only if several are axial CT volumes.

    Returns:
        Voxels ``(slice, row, column)`` in HU with their affine; scaling is already applied.

    Raises:
        VolumeError: If there is no such series, or it can't be stacked to an even grid.
    """
    notes: list[Note] = []
    chosen = _choose(path, find_series(path, notes), series)
    slices = _one_orientation(chosen.slices, notes)
    _check_identity(path, slices)
    slices = _sorted_by_position(path, slices, notes)
    affine = _affine(path, slices)
    voxels = _decode_all(path, slices, notes)
    return StoredVolume(voxels, affine, notes=notes)


def find_series(
    path: Path, notes: list[Note] | None = None, *, show_progress: bool = False
) -> list[Series]:
    """List every CT series below a folder, localizers and repeated files left out.

    Args:
        path: Folder, searched at any depth, or one file.
        notes: Where what was left out is noted.
        show_progress: Say how many headers were read; an archive has a million.

    Raises:
        VolumeError: If there is no DICOM file, or none of them is a CT image.
    """
    notes = [] if notes is None else notes
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    slices: list[Slice] = []
    dropped: dict[str, list[Path]] = defaultdict(list)
    bare: list[Path] = []
    for file in track(files, len(files), "read headers", "file", hidden=not show_progress):
        slices += _read_header(file, dropped, bare)
    if not slices and set(dropped) <= {"not DICOM"}:
        raise VolumeError(path, "no-dicom", f"no DICOM file among {len(files)} files")
    unique = {(one.sop_uid or str(one.file), one.frame): one for one in slices}
    if len(unique) < len(slices):
        text = f"{len(slices) - len(unique)} files are copies of another (same SOP UID); ignored"
        notes.append(Note("repeated-file", text, "note"))
    folder = path if path.is_dir() else path.parent
    if bare:
        text = "the DICOM preamble is missing; read as implicit little endian"
        notes.append(Note("no-preamble", f"{text}: {some_of(bare, folder)}", "warn"))
    for reason, skipped in sorted(dropped.items()):
        level: Level = "info" if reason == "not DICOM" else "warn"
        text = f"{len(skipped)} file(s) skipped: {reason}: {some_of(skipped, folder)}"
        notes.append(Note("skipped-file", text, level))
    if not unique:
        reasons = ", ".join(sorted(dropped))
        raise VolumeError(path, "not-ct", f"no CT image among {len(files)} files ({reasons})")
    unnamed = sorted({one.file for one in unique.values() if not one.modality})
    if unnamed:
        text = f"no Modality in the header; taken for CT: {some_of(unnamed, folder)}"
        notes.append(Note("no-modality", text, "warn"))
    grouped: dict[str, list[Slice]] = defaultdict(list)
    for one in unique.values():
        grouped[one.series_uid].append(one)
    series = []
    for uid, members in sorted(grouped.items()):
        images = [one for one in members if "LOCALIZER" not in one.image_type]
        if images and len(images) < len(members):
            text = f"{len(members) - len(images)} scout(s) inside series {uid} dropped"
            notes.append(Note("scout", text, "warn"))
        if images:
            series.append(Series(uid, tuple(images)))
        else:
            text = f"series {uid} holds only {len(members)} localizer(s); left out"
            notes.append(Note("localizer", text, "note"))
    if not series:
        raise VolumeError(path, "not-ct", "only localizers, no CT volume")
    return series


def best_series(candidates: Iterable[Series]) -> Series | None:
    """Choose the series of a study to use when nobody named one.

    Rules, in order: axial with at least 8 slices; covers the greatest length (within 5 %);
    original before derived; slice step closest to 1.5 mm; smallest UID.
    """
    usable = [one for one in candidates if one.is_axial and len(one.slices) >= MIN_SLICES]
    if not usable:
        return None
    longest = max(_length_mm(one) for one in usable)
    usable = [one for one in usable if _length_mm(one) >= 0.95 * longest]

    def rank(one: Series) -> tuple[bool, float, str]:
        step = _length_mm(one) / max(1, len(one.slices) - 1)
        return "DERIVED" in one.slices[0].image_type, abs(step - PREFERRED_STEP_MM), one.uid

    return min(usable, key=rank)


def _length_mm(series: Series) -> float:
    heights = [one.position[2] for one in series.slices if one.position]
    return max(heights) - min(heights) if heights else 0.0


def _read_header(file: Path, dropped: dict[str, list[Path]], bare: list[Path]) -> list[Slice]:
    """The slices in one file; a file without any goes to ``dropped`` under the reason."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    looks_dicom = file.suffix.lower() in (".dcm", ".dicom", ".ima")
    if file.stat().st_size == 0:
        dropped["empty file" if looks_dicom else "not DICOM"].append(file)
        return []
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    except InvalidDicomError:
        if not _starts_with_a_tag(file):
            dropped["unreadable .dcm file" if looks_dicom else "not DICOM"].append(file)
            return []
        header = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
        bare.append(file)
    except _DECODING_ERRORS:
        dropped["unreadable .dcm file" if looks_dicom else "not DICOM"].append(file)
        return []
    try:
        return _slices(file, header, dropped)
    except _DECODING_ERRORS:
        dropped["malformed header"].append(file)
        return []


def _starts_with_a_tag(file: Path) -> bool:
    """Whether a file without preamble opens with an element of group 0002 or 0008."""
    with file.open("rb") as stream:
        return stream.read(2) in (b"\x02\x00", b"\x08\x00")


def _slices(file: Path, header: Any, dropped: dict[str, list[Path]]) -> list[Slice]:
    modality = str(header.get("Modality") or "")
    if modality not in ("", "CT"):
        dropped[f"modality {modality}"].append(file)
        return []
    image_type = tuple(str(part).upper() for part in header.get("ImageType") or ())
    if not header.get("Rows") or not header.get("Columns"):
        dropped["no image"].append(file)
        return []
    if int(header.get("SamplesPerPixel") or 1) != 1:
        dropped["colour image"].append(file)
        return []
    single = Slice(
        file=file,
        frame=None,
        sop_uid=str(header.get("SOPInstanceUID") or ""),
        series_uid=str(header.get("SeriesInstanceUID") or _name_of_folder(file)),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        patient_id=str(header.get("PatientID") or ""),
        modality=modality,
        image_type=image_type,
        matrix=(int(header.Rows), int(header.Columns)),
        position=_numbers(header.get("ImagePositionPatient")),
        orientation=_numbers(header.get("ImageOrientationPatient")),
        spacing=_numbers(header.get("PixelSpacing")),  # type: ignore[arg-type]
        slope=_number(header.get("RescaleSlope")),
        intercept=_number(header.get("RescaleIntercept")),
        meta=_meta(header),
    )
    return _frames(single, header) if "PerFrameFunctionalGroupsSequence" in header else [single]


def _name_of_folder(file: Path) -> str:
    """What stands in for a missing UID: files of one folder belong together, others do not."""
    return f"{file.parent.name}-{zlib.crc32(str(file.parent.absolute()).encode()):08x}"


def _frames(single: Slice, header: Any) -> list[Slice]:
    """The frames of an enhanced CT file, each with its own or the shared geometry."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = []
    for number, own in enumerate(header.get("PerFrameFunctionalGroupsSequence") or ()):

        def value(macro: str, name: str, own: Any = own) -> Any:
            for group in (own, shared):
                if group is not None and macro in group:
                    return group[macro][0].get(name)
            return None

        frames.append(
            replace(
                single,
                frame=number,
                position=_numbers(value("PlanePositionSequence", "ImagePositionPatient")),
                orientation=_numbers(value("PlaneOrientationSequence", "ImageOrientationPatient")),
                spacing=_numbers(value("PixelMeasuresSequence", "PixelSpacing")),  # type: ignore[arg-type]
                slope=_number(value("PixelValueTransformationSequence", "RescaleSlope")),
                intercept=_number(value("PixelValueTransformationSequence", "RescaleIntercept")),
            )
        )
    return frames


def _numbers(value: Any) -> tuple[float, ...] | None:
    return tuple(float(part) for part in value) if value else None


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _meta(header: Any) -> dict[str, str]:
    kernel = header.get("ConvolutionKernel")
    if kernel is not None and not isinstance(kernel, str):
        kernel = "/".join(str(part) for part in kernel)
    values = {
        "sex": header.get("PatientSex"),
        "age": str(header.get("PatientAge") or "").strip("0YyMmWwDd") or None,
        "manufacturer": header.get("Manufacturer"),
        "scanner": header.get("ManufacturerModelName"),
        "hospital": header.get("InstitutionName"),
        "kernel": kernel,
        "description": header.get("SeriesDescription"),
    }
    texts = {key: str(value or "").strip() for key, value in values.items()}
    return {key: text for key, text in texts.items() if text.lower() not in ABSENT}


def _choose(path: Path, found: Sequence[Series], wanted: str | None) -> Series:
    if wanted is not None:
        for one in found:
            if one.uid == wanted:
                return one
        known = "; ".join(one.describe() for one in found)
        raise VolumeError(path, "no-such-series", f"no series {wanted}; there is {known}")
    stacks = [one for one in found if len(one.slices) >= MIN_SLICES]
    axial = [one for one in stacks if one.is_axial] or stacks
    if not axial:
        most = max(len(one.slices) for one in found)
        raise VolumeError(
            path, "too-few-slices", f"{most} slice(s); at least {MIN_SLICES} make a volume"
        )
    if len(axial) > 1:
        known = "; ".join(one.describe() for one in axial)
        raise VolumeError(
            path, "several-series", f"{len(axial)} series; name one with series=: {known}"
        )
    return axial[0]


def _one_orientation(slices: Sequence[Slice], notes: list[Note]) -> list[Slice]:
    """Drop the odd slice cut in another direction: a scout that shares the series' UID."""
    oriented = Counter(
        tuple(round(cosine, 2) for cosine in one.orientation or ()) for one in slices
    )
    main = oriented.most_common(1)[0][0]
    kept = [one for one in slices if tuple(round(c, 2) for c in one.orientation or ()) == main]
    if len(kept) < len(slices):
        text = f"{len(slices) - len(kept)} slice(s) of another orientation (a scout?) dropped"
        notes.append(Note("other-orientation", text, "warn"))
    return kept


def _check_identity(path: Path, slices: Sequence[Slice]) -> None:
    """One patient, one matrix, one pixel spacing, usable geometry and scaling."""
    patients = {one.patient_id for one in slices}
    if len(patients) > 1:
        raise VolumeError(path, "several-patients", f"{len(patients)} patients in one series")
    matrices = sorted({one.matrix for one in slices})
    if len(matrices) > 1:
        raise VolumeError(path, "mixed-matrix", f"slices of different size: {matrices}")
    for what, values in (
        ("ImagePositionPatient", [one.position for one in slices]),
        ("ImageOrientationPatient", [one.orientation for one in slices]),
        ("PixelSpacing", [one.spacing for one in slices]),
    ):
        if any(value is None for value in values):
            raise VolumeError(
                path, "no-geometry", f"{what} is missing; can't order slices or size voxels"
            )
    spacings = {tuple(round(step, 4) for step in one.spacing or ()) for one in slices}
    if len(spacings) > 1 or not all(step > 0 for step in min(spacings)):
        shown = sorted(spacings)[:3]
        raise VolumeError(path, "bad-spacing", f"PixelSpacing {shown}: zero, or not the same")
    if any(one.slope == 0 for one in slices):
        raise VolumeError(path, "bad-scaling", "RescaleSlope is 0")


def _sorted_by_position(path: Path, slices: Sequence[Slice], notes: list[Note]) -> list[Slice]:
    """Order slices along their normal; judge gaps, duplicates and jitter."""
    normal = slices[0].normal
    height = {id(one): float(np.dot(one.position or (), normal)) for one in slices}
    ordered = sorted(slices, key=lambda one: (height[id(one)], one.sop_uid))
    kept = [ordered[0]]
    for one in ordered[1:]:
        if height[id(one)] - height[id(kept[-1])] > 1e-3:
            kept.append(one)
    num_doubled = len(ordered) - len(kept)
    if num_doubled > MAX_DUPLICATES * len(ordered):
        raise VolumeError(
            path, "overlapping-stacks", f"{num_doubled} of {len(ordered)} positions are doubled"
        )
    if num_doubled:
        text = f"{num_doubled} slice(s) at the position of another; kept the first of each"
        notes.append(Note("doubled-slice", text, "warn"))
    if len(kept) < MIN_SLICES:
        raise VolumeError(
            path, "too-few-slices", f"{len(kept)} slice(s); at least {MIN_SLICES} make a volume"
        )
    heights = np.array([height[id(one)] for one in kept])
    steps = np.diff(heights)
    step = float(np.median(steps))
    off = np.abs(steps - step) > SPACING_TOLERANCE * step + 0.01
    if not off.any():
        return kept
    where = int(np.argmax(np.abs(steps - step)))
    if (
        (np.abs(steps[off] / step - np.rint(steps[off] / step)) < 0.1).all()
        and (steps[off] > step).all()
        and off.mean() < 0.2
    ):
        raise VolumeError(
            path,
            "missing-slice",
            f"gap of {steps[where]:.2f} mm at {heights[where]:.1f} mm where slices are "
            f"{step:.2f} mm apart",
        )
    raise VolumeError(
        path,
        "variable-spacing",
        f"slices are {steps.min():.2f} to {steps.max():.2f} mm apart; resample them first",
    )


def _affine(path: Path, slices: Sequence[Slice]) -> np.ndarray:
    """(slice, row, column) to RAS mm, from positions alone: thickness says nothing about steps."""
    first, last = slices[0], slices[-1]
    assert first.position is not None
    assert last.position is not None
    assert first.orientation is not None
    assert first.spacing is not None
    along_row = np.array(first.orientation[:3])
    along_column = np.array(first.orientation[3:])
    lps = np.eye(4)
    lps[:3, 0] = (np.array(last.position) - np.array(first.position)) / (len(slices) - 1)
    lps[:3, 1] = along_column * first.spacing[0]
    lps[:3, 2] = along_row * first.spacing[1]
    lps[:3, 3] = first.position
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    if (lengths == 0).any() or abs(np.linalg.det(lps[:3, :3] / lengths)) < 1e-3:
        raise VolumeError(path, "bad-affine", "orientation and positions don't span a volume")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _decode_all(path: Path, slices: Sequence[Slice], notes: list[Note]) -> np.ndarray:
    """Stack HU slices as int16 if every value allows it, else as float32."""
    if any(one.slope is None or one.intercept is None for one in slices):
        text = "RescaleSlope or RescaleIntercept is missing; assumed 1 and 0"
        notes.append(Note("no-rescale", text, "warn"))
    rows, columns = slices[0].matrix
    volume = np.empty((len(slices), rows, columns), dtype=np.int16)
    lossy = False
    frames: dict[Path, tuple[np.ndarray, str]] = {}
    for index, one in enumerate(slices):
        if one.file not in frames:
            frames = {one.file: _decode(path, one)}
        pixels, syntax = frames[one.file]
        lossy = lossy or syntax in LOSSY
        if one.frame is not None:
            pixels = pixels[one.frame]
        if pixels.shape != (rows, columns):
            raise VolumeError(
                path, "bad-pixels", f"{one.file.name}: {pixels.shape} pixels, not {rows, columns}"
            )
        values = to_hu(pixels, one)
        limits = np.iinfo(np.int16)
        if volume.dtype == np.int16 and (
            values.dtype.kind == "f" or values.min() < limits.min or values.max() > limits.max
        ):
            volume = volume.astype(np.float32)
        volume[index] = values
    if lossy:
        text = "lossy compression; fine detail and HU may be off"
        notes.append(Note("lossy", text, "warn"))
    return volume


def to_hu(pixels: np.ndarray, one: Slice) -> np.ndarray:
    """Apply a slice's own slope and intercept: int32 where they are whole, else float32."""
    slope = 1.0 if one.slope is None else one.slope
    intercept = 0.0 if one.intercept is None else one.intercept
    if pixels.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        return pixels.astype(np.int32) * int(slope) + int(intercept)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _decode(path: Path, one: Slice) -> tuple[np.ndarray, str]:
    """Stored pixels of one file and its transfer syntax."""
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    dataset = dcmread(one.file, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        )
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    try:
        return dataset.pixel_array, syntax
    except _DECODING_ERRORS as error:
        pixels = _decode_with_itk(one) if syntax in LOSSY else None
        if pixels is not None:
            return pixels, syntax
        raise VolumeError(
            path, "bad-pixels", f"{one.file.name} can't be decoded ({syntax}): {error}"
        ) from None


def _decode_with_itk(one: Slice) -> np.ndarray | None:
    """The progressive JPEGs that pydicom's plugins lack; ITK's values are turned back to stored."""
    import SimpleITK

    try:
        hu = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(one.file)))
    except RuntimeError:
        return None
    stored = (hu[0] - (one.intercept or 0.0)) / (one.slope or 1.0)
    return np.rint(stored).astype(np.int32)
