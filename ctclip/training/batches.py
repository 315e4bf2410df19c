"""Volumes and reports of one step become micro-batches and targets on the device.

Every random choice is a function of (seed, step, study), so that it doesn't matter which process
holds a study, how the batch is cut, or whether the run was interrupted.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctclip.findings import FINDINGS
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
        micro_batch_size: Volumes that pass through the tower at once.
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
        micro_batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._tokenizer = tokenizer
        self._bank = bank
        self._views = views
        self._loss = loss
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._device = device

    def __call__(
        self, batch: "Batch", studies: Sequence[StudyText], step: int
    ) -> tuple[list[MicroBatch], Targets]:
        """Cut a batch into micro-batches; the step's sentence pairs travel in the last one.

        Args:
            batch: This rank's volumes.
            studies: Their reports.
            step: Of the run.
        """
        rows = batch.study.to(torch.int64)
        texts = self._texts(studies, rows, step)
        draws = [
            float(np.random.default_rng([self._seed, step, int(row), 1]).random()) for row in rows
        ]
        size = self._micro_batch_size
        micro_batches = []
        for start in range(0, len(rows), size):
            cut = slice(start, start + size)
            keys = {"volume": row_keys(self._seed, step, "volume", rows[cut])}
            tokens = {}
            for view, lines in texts.items():
                tokens[view] = self._tokenizer(lines[cut], draws=draws[cut]).to(self._device)
                keys[view] = row_keys(self._seed, step, view, rows[cut])
            if start + size >= len(rows):
                pairs = self._pairs(step)
                tokens["prompts"] = self._tokenizer(pairs).to(self._device)
                keys["prompts"] = row_keys(self._seed, step, "prompts", torch.arange(len(pairs)))
            micro_batches.append(
                MicroBatch(
                    volume=batch.volume[cut].to(self._device, non_blocking=True),
                    texts=tokens,
                    keys={view: key.to(self._device) for view, key in keys.items()},
                )
            )
        return micro_batches, self._targets(batch, studies, texts, rows)

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
        batch: "Batch",
        studies: Sequence[StudyText],
        texts: dict[str, list[str]],
        rows: Tensor,
    ) -> Targets:
        # A shuffled report is still the same report: identity is that of the text as written.
        whole = [text_id(f"{study.findings}\n{study.impression}") for study in studies]
        sentence = [text_id(text) for text in texts.get("sentence", [""] * len(studies))]
        forgiving = self._loss.ignore_normal_pairs
        normal = [NORMAL if study.normal and forgiving else -1 for study in studies]
        polarity = (
            batch.labels[:, : len(FINDINGS)]
            if self._loss.label_informed
            else torch.from_numpy(polarity_table(studies))
        )
        return Targets(
            identity=_columns(rows, whole, normal).to(self._device),
            sentence_identity=_columns(rows, sentence, normal).to(self._device),
            polarity=polarity.to(self._device),
        )


def _columns(rows: Tensor, text: Sequence[int], normal: Sequence[int]) -> Tensor:
    return torch.stack([rows, torch.tensor(text), torch.tensor(normal)], dim=1)
