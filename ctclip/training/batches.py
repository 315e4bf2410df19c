"""Volumes and reports of one step become micro-batches and targets.

Every random choice is a function of (seed, step, study), so that it doesn't matter which process
holds a study, how the batch is cut, or whether the run was interrupted.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctclip.findings import FINDINGS
from ctclip.training.feed import StepVolumes
from ctclip.training.objective import LossConfig, Targets
from ctclip.training.text_views import (
    SentenceBank,
    StudyText,
    TextViewConfig,
    polarity_table,
    report_view,
    sentence_view,
    text_id,
)
from ctclip.training.towers import MicroBatch, row_keys

if TYPE_CHECKING:
    from ctclip.data.dataset import Batch
    from ctclip.models.text import Tokenizer

NORMAL = 0
"""Identity that normal studies share when they shall not be each other's negatives."""


class StepBuilder:
    """Builds what one step needs from this rank's part of the global batch.

    Args:
        tokenizer: Text to ids.
        bank: Where opposite-sentence pairs come from.
        views: How a report becomes texts.
        loss: Which views are needed, and where targets come from.
        seed: Of the run.
        device: Where the towers are.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        bank: SentenceBank,
        views: TextViewConfig,
        loss: LossConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._tokenizer = tokenizer
        self._bank = bank
        self._views = views
        self._loss = loss
        self._seed = seed
        self._device = device

    def __call__(
        self,
        pieces: "Sequence[Batch]",
        studies: Sequence[StudyText],
        volumes: StepVolumes,
        step: int,
    ) -> tuple[list[MicroBatch], Targets]:
        """Put together a step's micro-batches; its sentence pairs travel in the last one.

        Args:
            pieces: This rank's volumes, a batch for each micro-batch.
            studies: The reports of all of them.
            volumes: Brings the volumes to the device.
            step: Of the run.
        """
        rows = torch.cat([piece.study for piece in pieces]).to(torch.int64)
        texts = self._texts(studies, rows, step)
        draws = [
            float(np.random.default_rng([self._seed, step, int(row), 1]).random()) for row in rows
        ]
        micro_batches = []
        start = 0
        for index, piece in enumerate(pieces):
            cut = slice(start, start := start + len(piece.study))
            keys = {"volume": row_keys(self._seed, step, "volume", rows[cut])}
            tokens = {}
            for view, lines in texts.items():
                tokens[view] = self._tokenizer(lines[cut], draws=draws[cut]).to(self._device)
                keys[view] = row_keys(self._seed, step, view, rows[cut])
            if index == len(pieces) - 1:
                pairs = self._pairs(step)
                tokens["prompts"] = self._tokenizer(pairs).to(self._device)
                keys["prompts"] = row_keys(self._seed, step, "prompts", torch.arange(len(pairs)))
            micro_batches.append(
                MicroBatch(
                    volume=functools.partial(volumes.take, index),
                    seed=int(keys["volume"][0]) & (2**63 - 1),
                    texts=tokens,
                    keys={view: key.to(self._device) for view, key in keys.items()},
                )
            )
        labels = torch.cat([piece.labels for piece in pieces])
        return micro_batches, self._targets(labels, studies, texts, rows)

    def _texts(self, studies: Sequence[StudyText], rows: Tensor, step: int) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        rngs = [np.random.default_rng([self._seed, step, int(row)]) for row in rows]
        if self._loss.report:
            texts["report"] = [
                report_view(study, self._views, rng)
                for study, rng in zip(studies, rngs, strict=True)
            ]
        if self._loss.sentence:
            texts["sentence"] = [
                sentence_view(study, self._views, rng)
                for study, rng in zip(studies, rngs, strict=True)
            ]
        return texts

    def _pairs(self, step: int) -> list[str]:
        """``2F`` texts, present before absent, the same on every rank."""
        rng = np.random.default_rng([self._seed, step])
        present, absent = self._bank.pairs(rng, self._views.template_share)
        return [*present, *absent]

    def _targets(
        self,
        labels: Tensor,
        studies: Sequence[StudyText],
        texts: dict[str, list[str]],
        rows: Tensor,
    ) -> Targets:
        # A shuffled report is still the same report, and what is left of two may be the same too.
        whole = [text_id(f"{study.findings}\n{study.impression}") for study in studies]
        shown = [text_id(text) for text in texts.get("report", ())] or whole
        sentence = [text_id(text) for text in texts.get("sentence", ())] or whole
        forgiving = self._loss.ignore_normal_pairs
        normal = [NORMAL if study.normal and forgiving else -1 for study in studies]
        polarity = (
            labels[:, : len(FINDINGS)]
            if self._loss.label_informed
            else torch.from_numpy(polarity_table(studies))
        )
        return Targets(
            identity=_columns(rows, whole, shown, normal).to(self._device),
            sentence_identity=_columns(rows, whole, sentence, normal).to(self._device),
            polarity=polarity.to(self._device),
        )


def _columns(rows: Tensor, *ids: Sequence[int]) -> Tensor:
    return torch.stack([rows, *(torch.tensor(column) for column in ids)], dim=1)
