"""DICOM series of a known volume, written as a scanner would and then damaged on request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scans import SPACING_MM

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"


def _dataset(file: Path, sop_class: str, series: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality = "CT"
    dataset.PatientID = "p"
    dataset.StudyInstanceUID = "1.2"
    dataset.SeriesInstanceUID = series
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    return dataset


def write_series(
    path: Path,
    hu: np.ndarray,
    *,
    series: str = "1.2.3",
    prefix: str = "",
    first: int = 0,
    orientation: list[float] | None = None,
    height: Callable[[int], float] | None = None,
    instance: Callable[[int, int], int] | None = None,
    edit: Callable[[int, Any], None] | None = None,
) -> list[Path]:
    """Write ``hu`` (D, H, W; SPL) as one file per slice; ``edit`` may damage each dataset."""
    path.mkdir(parents=True, exist_ok=True)
    step, row_mm, column_mm = SPACING_MM
    files = []
    for k, plane in enumerate(hu):
        file = path / f"{prefix}{k + first:03d}.dcm"
        dataset = _dataset(file, CTImageStorage, series)
        z = height(k) if height else step * (k + first)
        dataset.ImagePositionPatient = [-90.0, -70.0, -120.0 + z]
        dataset.ImageOrientationPatient = orientation or [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [row_mm, column_mm]
        dataset.InstanceNumber = instance(k, len(hu)) if instance else k + 1
        dataset.Rows, dataset.Columns = plane.shape
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = np.ascontiguousarray(plane).tobytes()
        if edit is not None:
            edit(k, dataset)
        dataset.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def folder(path: Path, hu: np.ndarray, **kwargs: Any) -> Path:
    """As :func:`write_series`, returning the folder."""
    write_series(path, hu, **kwargs)
    return path


def write_multiframe(file: Path, hu: np.ndarray) -> Path:
    """Write ``hu`` as one enhanced CT file, geometry in functional groups only."""
    step, row_mm, column_mm = SPACING_MM
    dataset = _dataset(file, ENHANCED_CT, "1.2.3")
    shared = Dataset()
    measures, direction, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [row_mm, column_mm]
    direction.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    values.RescaleSlope, values.RescaleIntercept = 1, 0
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([direction])
    shared.PixelValueTransformationSequence = Sequence([values])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for k in range(len(hu)):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [-90.0, -70.0, -120.0 + step * k]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.NumberOfFrames = len(hu)
    dataset.Rows, dataset.Columns = hu.shape[1:]
    dataset.PixelData = np.ascontiguousarray(hu).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file
