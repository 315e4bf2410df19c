"""Everything that the page can do, without HTTP: analyse a scan, search, look at a case."""

import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from ctclip.config import from_dict
from ctclip.embeddings import EmbeddingError, embed_voxels, space_of
from ctclip.findings import FINDINGS
from ctclip.retrieval import pictures
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.intake import Intake
from ctclip.retrieval.phrase import findings_in, text_query
from ctclip.retrieval.question import (
    EXCERPT_FIELDS,
    Background,
    compare_findings,
    compose,
    excerpt,
)
from ctclip.retrieval.reference import (
    Reading,
    Reference,
    findings_of,
    read_without_reference,
)
from ctclip.retrieval.search import Archive, Hit, Query, from_rows

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.cache import PreparedCohort

logger = logging.getLogger(__name__)

KEPT_SCANS = 16
KEPT_RESULTS = 500
KEPT_VOLUMES = 24
SCAN_LIFE_S = 1800.0
"""An uploaded scan is forgotten after half an hour; its result, without voxels, may stay."""

MAX_TEXT = 2000
MAX_HITS = 50

T = TypeVar("T")


class Scorer(Protocol):
    """What zero-shot scoring offers; ``ctclip.evaluation.scanner.Scanner`` is one."""

    checkpoint: "Checkpoint"

    @property
    def prompt_vectors(self) -> np.ndarray:
        """``(18, 2, E)``: present and absent."""
        ...

    def score_vectors(self, vectors: np.ndarray) -> list[dict[str, float]]:
        """``(N, E)`` to one score per finding."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """An uploaded scan, as long as it is remembered."""

    vector: np.ndarray
    scores: np.ndarray
    volume: bytes
    """Reduced, ``.nii.gz``."""

    thumbnail: bytes
    maps: np.ndarray
    slice_hu: np.ndarray
    """Voxels for the picture of an exported result."""

    warnings: tuple[dict[str, str], ...]
    """As :class:`Intake` has them."""

    until: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a client may ask; unknown keys are refused."""

    scan: str | None = None
    """Handle of an uploaded scan."""

    study: str | None = None
    text: str | None = None
    text_weight: float = 0.5
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    where: Filter = field(default_factory=Filter)
    k: int = 8
    per_patient: int = 1

    def __post_init__(self) -> None:
        if not (self.scan or self.study or self.text or self.more):
            raise ValueError("nothing to search for: choose a scan or a study, or type a text")
        if self.text is not None and len(self.text) > MAX_TEXT:
            raise ValueError(f"the text has {len(self.text)} characters; at most {MAX_TEXT}")
        if not 1 <= self.k <= MAX_HITS or not 1 <= self.per_patient <= MAX_HITS:
            raise ValueError(f"k and per_patient must be between 1 and {MAX_HITS}")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must be between 0 and 1, got {self.text_weight}")
        if len(self.more) + len(self.less) > MAX_HITS:
            raise ValueError(f"at most {MAX_HITS} examples")


class NotFoundError(LookupError):
    """A handle that names nothing, or nothing any more."""


class Recent(Generic[T]):
    """The last few things under unguessable handles."""

    def __init__(self, limit: int) -> None:
        self._limit, self._items = limit, OrderedDict[str, T]()
        self._lock = threading.Lock()

    def put(self, key: str, value: T) -> None:
        """Remember, and forget the oldest beyond the limit."""
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._limit:
                self._items.popitem(last=False)

    def get(self, key: str) -> T | None:
        """What is remembered; it counts as used."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)


class CaseService:
    """Similar cases for people; thread-safe.

    Args:
        archive: What is searched.
        scorer: The model; it must be the archive's.
        cohort: Prepared volumes of the archive, to look at; None shows no pictures.
        background: What similarity is ordinary.
        reference: What scores have meant.
        state: Folder for permanent results; None keeps them until the process ends.
        device: Where the model runs.

    Raises:
        EmbeddingError: If the archive is of another model.
    """

    def __init__(
        self,
        archive: Archive,
        scorer: Scorer,
        *,
        cohort: "PreparedCohort | None" = None,
        background: Background | None = None,
        reference: Reference | None = None,
        state: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.archive, self.scorer, self.cohort = archive, scorer, cohort
        self.background, self.reference = background or Background(), reference
        self.state, self.device = state, device
        self.space = space_of(scorer.checkpoint)
        probe = scorer.prompt_vectors[0, 0]
        archive.project(probe / np.linalg.norm(probe), self.space)  # refuses another model now
        self._directions = scorer.prompt_vectors[:, 0] - scorer.prompt_vectors[:, 1]
        self._scans: Recent[Scan] = Recent(KEPT_SCANS)
        self._results: Recent[dict[str, Any]] = Recent(KEPT_RESULTS)
        self._volumes: Recent[bytes] = Recent(KEPT_VOLUMES)
        self._model = threading.Lock()
        config = scorer.checkpoint.volume_config
        (depth, height, width), (dz, dy, dx) = config.size, config.spacing_mm
        self.extent_mm = (depth * dz, height * dy, width * dx)
        if state is not None:
            state.mkdir(parents=True, exist_ok=True)

    @property
    def fields(self) -> dict[str, list[str]]:
        """Fields that may be filtered by, with their values where they are few."""
        return self.archive.values()

    @property
    def size(self) -> int:
        """Number of volumes in the archive."""
        return len(self.archive)

    def studies(self, beginning: str) -> list[str]:
        """Studies of the archive to choose from."""
        return self.archive.studies(beginning)

    def analyse(self, upload: Intake) -> str:
        """Embed and score an uploaded scan and remember it; returns a handle for ``Question``."""
        hu = upload.hu
        checkpoint = self.scorer.checkpoint
        with self._model:
            prompt, report = embed_voxels(checkpoint, hu, device=self.device)
            maps = pictures.heat_maps(checkpoint, hu, self._directions, self.device)
        scan = Scan(
            vector=self.archive.project(report, self.space),
            scores=self._scores(prompt),
            volume=pictures.nifti(pictures.reduced(hu), self.extent_mm),
            thumbnail=pictures.thumbnail(hu, checkpoint.volume_config.spacing_mm),
            maps=maps,
            slice_hu=pictures.reduced(hu),
            warnings=upload.warnings,
            until=time.monotonic() + SCAN_LIFE_S,
        )
        handle = secrets.token_urlsafe(16)
        self._scans.put(handle, scan)
        return handle

    def ask(self, question: Question) -> dict[str, Any]:
        """Search; the answer is plain JSON under an unguessable handle.

        Raises:
            NotFoundError: If the scan is no longer remembered.
            EmbeddingError: If a study isn't in the archive.
            ValueError: If the question makes no sense.
        """
        scan = self._scan(question.scan) if question.scan else None
        query, scores, labels = self._query(question, scan)
        hits = self.archive.search(query, question.k, question.per_patient, question.where)
        positive = findings_of(scores, labels, self.reference)
        result = {
            "id": secrets.token_urlsafe(16),
            "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
            "model": self.scorer.checkpoint.sha256[:12],
            "question": asdict(question),
            "warnings": [] if scan is None else list(scan.warnings),
            "readings": None if scores is None else [asdict(r) for r in self._read(scores)],
            "hits": [self._describe(hit, positive) for hit in hits],
        }
        self._keep(result)
        return result

    def result(self, handle: str) -> dict[str, Any]:
        """An earlier answer.

        Raises:
            NotFoundError: If there is none.
        """
        found = self._results.get(handle)
        if found is None and self.state is not None and _is_handle(handle):
            path = self.state / f"{handle}.json"
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
        if found is None:
            raise NotFoundError("no such result; it may have been made before the last restart")
        return found

    def volume(self, handle: str, case: int | None) -> bytes:
        """A case of a result for the viewer, ``.nii.gz``; ``None`` is the query."""
        scan = self._scan_of(handle, case)
        if scan is not None:
            return scan.volume
        volume_id = self._volume_id(handle, case)
        packed = self._volumes.get(volume_id)
        if packed is None:
            packed = pictures.nifti(pictures.reduced(self._voxels(volume_id)), self.extent_mm)
            self._volumes.put(volume_id, packed)
        return packed

    def thumbnail(self, handle: str, case: int | None) -> bytes:
        """The middle slice of a case as PNG."""
        scan = self._scan_of(handle, case)
        if scan is not None:
            return scan.thumbnail
        hu = self._voxels(self._volume_id(handle, case))
        return pictures.thumbnail(hu, self.scorer.checkpoint.volume_config.spacing_mm)

    def heat_map(self, handle: str, case: int | None, finding: int) -> bytes:
        """Patch-prompt similarity of one finding over a case, ``.nii.gz`` of uint8."""
        if not 0 <= finding < len(FINDINGS):
            raise NotFoundError("no such finding")
        scan = self._scan_of(handle, case)
        if scan is not None:
            return pictures.nifti(scan.maps[finding], self.extent_mm)
        key = f"map/{self._volume_id(handle, case)}/{finding}"
        packed = self._volumes.get(key)
        if packed is None:
            hu = np.asarray(self._voxels(self._volume_id(handle, case)))
            with self._model:
                maps = pictures.heat_maps(
                    self.scorer.checkpoint, hu, self._directions[finding][None], self.device
                )
            packed = pictures.nifti(maps[0], self.extent_mm)
            self._volumes.put(key, packed)
        return packed

    def slices(self, handle: str, case: int | None) -> np.ndarray | None:
        """Voxels of a case for a printed picture; None where nothing can be shown."""
        try:
            scan = self._scan_of(handle, case)
            return scan.slice_hu if scan else self._voxels(self._volume_id(handle, case))
        except NotFoundError:
            return None

    def _query(
        self, question: Question, scan: Scan | None
    ) -> tuple[Query, np.ndarray | None, np.ndarray | None]:
        """The point to search, and what is known of the scan or study behind it."""
        like, scores, labels = [], None, None
        if scan is not None:
            like.append(Query(vector=scan.vector, name="scan"))
            scores = scan.scores
        for study in (question.study, *question.more):
            if study:
                rows = self.archive.rows(study_id=study)
                like.append(from_rows(rows))
                if scores is None and labels is None:
                    labels = rows.labels[0]
                    scores = None if rows.scores is None else rows.scores[0]
        unlike = [from_rows(self.archive.rows(study_id=study)) for study in question.less]
        text = None
        if question.text:
            with self._model:
                text = text_query(
                    question.text, self.archive, self.scorer, self.background, self.device
                )
            if not like:
                labels = findings_in(question.text)
            text = replace(text, name="text")  # what was typed stays out of logs and addresses
        weight = question.text_weight
        query = compose(like, unlike, text, self.background, text_weight=weight)
        return query, scores, labels

    def _describe(self, hit: Hit, positive: np.ndarray | None) -> dict[str, Any]:
        theirs = findings_of(hit.scores, hit.labels, self.reference)
        assert theirs is not None
        return {
            "study": hit.study_id,
            "volume": hit.volume_id,
            "similarity": round(hit.similarity, 4),
            "is_ordinary": hit.is_ordinary,
            **asdict(compare_findings(positive, theirs)),
            "fields": {k: v for k, v in hit.fields.items() if v and k not in EXCERPT_FIELDS},
            "excerpt": excerpt(hit.fields),
        }

    def _read(self, scores: np.ndarray) -> Sequence[Reading]:
        if self.reference is None:
            return read_without_reference(scores)
        return self.reference.read(scores)

    def _scores(self, vector: np.ndarray) -> np.ndarray:
        found = self.scorer.score_vectors(vector[None])[0]
        return np.array([found[finding] for finding in FINDINGS], dtype=np.float32)

    def _scan(self, handle: str) -> Scan:
        scan = self._scans.get(handle)
        if scan is None or time.monotonic() > scan.until:
            raise NotFoundError("the uploaded scan is no longer kept; upload it again")
        return scan

    def _scan_of(self, handle: str, case: int | None) -> Scan | None:
        """The uploaded scan that a case of a result is, None if it is one of the archive."""
        uploaded = self.result(handle)["question"]["scan"] if case is None else None
        return self._scan(uploaded) if uploaded else None

    def _volume_id(self, handle: str, case: int | None) -> str:
        result = self.result(handle)
        if case is not None:
            if not 0 <= case < len(result["hits"]):
                raise NotFoundError("no such case")
            return str(result["hits"][case]["volume"])
        question = result["question"]
        study = question["study"] or next(iter(question["more"]), None)
        if study is None:
            raise NotFoundError("a text has no volume")
        try:
            return self.archive.rows(study_id=study).volume_id[0]
        except EmbeddingError:
            raise NotFoundError("the study is no longer in the archive") from None

    def _voxels(self, volume_id: str) -> np.ndarray:
        if self.cohort is None:
            raise NotFoundError("the archive's volumes are not on this machine")
        try:
            return self.cohort.read(volume_id)
        except (KeyError, FileNotFoundError):
            raise NotFoundError("this case's volume is not in the prepared cohort") from None

    def _keep(self, result: dict[str, Any]) -> None:
        self._results.put(result["id"], result)
        if self.state is None:
            return
        path = self.state / f"{result['id']}.json"
        temporary = path.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(result), encoding="utf-8")
        os.replace(temporary, path)


def forget(state: Path, studies: Collection[str]) -> int:
    """Delete the saved results that asked for or returned some studies; how many these were."""
    removed = 0
    for path in sorted(state.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        question = result["question"]
        named = {question["study"], *question["more"], *question["less"]}
        if not named.union(hit["study"] for hit in result["hits"]).isdisjoint(studies):
            path.unlink()
            removed += 1
    return removed


def parse(question: Mapping[str, Any]) -> Question:
    """Validate what a client sent.

    Raises:
        ValueError: If a key is unknown or a value of the wrong type; the text names it.
    """
    return from_dict(Question, question, source="the question")


def _is_handle(text: str) -> bool:
    return 16 <= len(text) <= 64 and text.replace("-", "").replace("_", "").isalnum()
