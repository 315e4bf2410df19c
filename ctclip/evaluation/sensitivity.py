"""How much do scores hang on the wording? Prompt sensitivity, and prompts that point backwards."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics, prompts, scoring
from ctclip.evaluation.prompts import PromptSet

if TYPE_CHECKING:
    from ctclip.embeddings import EmbeddingTable


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One finding under every pair of a prompt set."""

    finding: str
    pairs: int
    ensemble: float
    """AUROC of the averaged prompts."""

    mean: float
    lowest: float
    highest: float
    """AUROC over single pairs."""

    lowest_pair: str
    """The worst pair's "present" sentence."""

    positives_called_absent: float
    """Share of positive cases in which "absent" outranks "present", for the ensemble."""

    @property
    def is_backwards(self) -> bool:
        """Whether the prompts deny the finding in most cases that have it."""
        return self.positives_called_absent > 0.5


def measure(
    table: "EmbeddingTable", model: Any, tokenizer: Any, prompt_set: PromptSet
) -> list[Sensitivity]:
    """Score a table with every pair of a set on its own.

    Args:
        table: Embeddings with labels, best of a training sample.
        model: The table's model.
        tokenizer: Its tokenizer.
        prompt_set: Ensembles of at least two pairs; one pair gives no spread.

    Returns:
        One entry per finding with both classes; others are left out.
    """
    findings = list(prompt_set.pairs)
    ensemble = prompts.encode(model, tokenizer, prompt_set)
    most = max(len(pairs) for pairs in prompt_set.pairs.values())
    single = [prompts.encode(model, tokenizer, prompt_set.template(i)) for i in range(most)]
    found = []
    for k, finding in enumerate(findings):
        labels = table.labels[:, k].astype(np.float64)
        difference = _difference(table.vectors, ensemble[k])
        area = metrics.auroc(labels, difference)
        if np.isnan(area):
            continue
        count = len(prompt_set.pairs[finding])
        areas = [
            metrics.auroc(labels, _difference(table.vectors, single[i][k])) for i in range(count)
        ]
        worst = int(np.argmin(areas))
        found.append(
            Sensitivity(
                finding=finding,
                pairs=count,
                ensemble=area,
                mean=float(np.mean(areas)),
                lowest=float(np.min(areas)),
                highest=float(np.max(areas)),
                lowest_pair=prompt_set.pairs[finding][worst][0],
                positives_called_absent=float((difference[labels == 1.0] < 0).mean()),
            )
        )
    return found


def warnings(found: Sequence[Sensitivity]) -> list[str]:
    """Sentences for a report: findings whose prompts point backwards, or hang on the wording."""
    lines = []
    backwards = [s.finding for s in found if s.is_backwards]
    if backwards:
        lines.append(
            "'Not present' outranks 'present' in most cases that have the finding, so its score "
            f"can't be read as a probability: {', '.join(backwards)}."
        )
    worse = [f"{s.finding} ({1 - s.ensemble:.2f} if turned round)" for s in found
             if s.ensemble < 0.4]  # fmt: skip
    if worse:
        lines.append(f"Prompts rank the wrong way: {', '.join(worse)}.")
    fickle = [s.finding for s in found if s.highest - s.lowest > 0.1]
    if fickle:
        lines.append(f"AUROC changes by more than 0.1 with the wording: {', '.join(fickle)}.")
    return lines


def frame(found: Sequence[Sensitivity]) -> pd.DataFrame:
    """One row per finding."""
    return pd.DataFrame([asdict(item) for item in found])


def _difference(vectors: np.ndarray, pair: np.ndarray) -> np.ndarray:
    return scoring.scores(vectors, pair[None], 1.0, "cosine-difference")[:, 0]
