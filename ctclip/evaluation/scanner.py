"""The ten-line API: a checkpoint becomes an object that scores and embeds scan files.

>>> scanner = ctclip.load("model.safetensors")                      # doctest: +SKIP
>>> scanner.score("scan.nii.gz")["Pleural effusion"]                # doctest: +SKIP
0.93
>>> scanner.embed("scan.nii.gz").shape                              # doctest: +SKIP
(512,)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.evaluation import prompts as prompt_sets
from ctclip.evaluation import scoring

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint


class Scanner:
    """A loaded model with its preprocessing and encoded prompts.

    Args:
        checkpoint: The model.
        prompts: Prompt set by name or YAML path; by default the one of the checkpoint's kind.
        device: For example ``"cuda:0"``.
    """

    def __init__(
        self, checkpoint: "Checkpoint", prompts: str | Path | None = None, device: str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.prompts = prompt_sets.of(checkpoint, prompts)
        self._vectors = prompt_sets.encode_prompts(checkpoint, self.prompts)

    @property
    def prompt_vectors(self) -> np.ndarray:
        """``(18, 2, E)`` L2-normalised: each finding's present and absent prompt."""
        return self._vectors

    def embed(
        self,
        path: str | Path,
        *,
        accept: Iterable[str] = (),
        rescale: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Embed a scan (NIfTI file or DICOM folder): ``(E,)`` float32, L2-normalised.

        What is odd about the scan, such as that it shows no chest, is logged as a warning.

        Args:
            path: The scan.
            accept: Codes of reasons to hold a scan back, such as ``"8-bit"``, that are accepted.
            rescale: Slope and intercept, applied only if the file does not hold HU.

        Raises:
            VolumeError: If the file is no CT that can be read, or its values are not HU; the
                message says why, and ``code`` is what ``accept`` takes.
        """
        from ctclip.embeddings import embed_file

        return embed_file(
            self.checkpoint, path, device=self.device, accept=accept, rescale=rescale
        )[0]

    def score(
        self,
        path: str | Path,
        *,
        accept: Iterable[str] = (),
        rescale: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Probability of each finding on a scan, in the order of ``ctclip.findings.FINDINGS``.

        From the pair of prompts, or from the linear head of a checkpoint that has one (ClassFine).
        The probabilities rank scans; they are calibrated only after fitting on data of your
        own (see ``ctclip.evaluation.calibration``). Arguments and errors are those of
        :meth:`embed`.
        """
        return self.score_vectors(self.embed(path, accept=accept, rescale=rescale)[None])[0]

    def score_vectors(self, vectors: np.ndarray) -> list[dict[str, float]]:
        """Score embeddings ``(N, E)`` made by :meth:`embed`."""
        values = scoring.scores_of(self.checkpoint, vectors, self._vectors)
        return [dict(zip(self.prompts.pairs, row.tolist(), strict=True)) for row in values]


def load(path: str | Path, prompts: str | Path | None = None, device: str = "cpu") -> Scanner:
    """Load a checkpoint for use.

    Args:
        path: ``.safetensors`` file written by training or by the converter.
        prompts: Name of a shipped prompt set, or path of a YAML file; by default the one of the
            checkpoint's kind.
        device: For example ``"cuda:0"``.

    Returns:
        A :class:`Scanner`.
    """
    from ctclip import checkpoint as checkpoints

    return Scanner(checkpoints.load(path, device=device), prompts, device)
