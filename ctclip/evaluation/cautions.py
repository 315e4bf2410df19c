"""What a reader must know before he believes one model's numbers.

The same sentences stand on the page, on the card and in the terminal.
"""

import numpy as np

from ctclip.evaluation import metrics
from ctclip.evaluation.scores import NOTES, ScoreTable

SPREAD = 0.8
"""Mean |cosine| of the prompts' directions above which they are called one direction."""


def of(
    test: ScoreTable, development: ScoreTable | None, evaluation: metrics.Evaluation
) -> list[str]:
    """The sentences, without the model's name.

    Args:
        test: The evaluated cases.
        development: The cases that thresholds and calibration come from.
        evaluation: Of ``test``.
    """
    header = test.header
    found = [str(note) for note in header.get(NOTES, [])]
    splits = set(test.split.tolist())
    if "train" in splits:
        found.append(
            "training cases are among those evaluated: the numbers say how well the model fits, "
            "not how it does on new patients."
        )
    if header.get("label_informed"):
        found.append("saw labels of these findings in training: not a zero-shot number.")
    if header.get("prompt_direction_spread", 0) > SPREAD:
        found.append(
            "prompts of different findings point the same way (mean |cosine| "
            f"{header['prompt_direction_spread']:.2f}); they share one 'present' axis."
        )
    if is_optimistic(test, development):
        found.append(
            "thresholds are OPTIMISTIC: picked on the cases they are judged on, for comparison "
            "with published figures only."
        )
    if development is not None:
        shared = np.intersect1d(development.patient_id, test.patient_id)
        if len(shared):
            found.append(
                f"{len(shared)} of {evaluation.patients} patients are in the development split "
                "too: thresholds and calibration are optimistic."
            )
    unmeasured = [r.finding for r in evaluation.findings if np.isnan(r.auroc)]
    if unmeasured:
        found.append(f"not measured, not in the macro: {', '.join(unmeasured)}.")
    constant = [r.finding for r in evaluation.findings if r.note == metrics.CONSTANT]
    if constant:
        found.append(f"one score for all cases, so an AUROC of 0.5: {', '.join(constant)}.")
    unscored = sum(r.unscored for r in evaluation.findings)
    if unscored:
        labelled = int((~np.isnan(test.labels)).sum())
        found.append(
            f"{unscored} of {labelled} labels have no score beside them and are left out; cases "
            "that a model could not read are seldom the easy ones."
        )
    is_pooled = header.get("unit") == "patient"
    if not is_pooled and (test.patient_id == test.volume_id).all() and len(test) > 1:
        found.append(
            "every case is its own patient; if patients have several, the intervals are too narrow."
        )
    return found


def is_optimistic(test: ScoreTable, development: ScoreTable | None) -> bool:
    """Whether thresholds come from the evaluated cases: by protocol, or for want of others."""
    return development is None or test.header.get("thresholds") == "optimistic"
