"""Prompt pairs as data: what stands for "present" and for "absent" of each finding.

A set is templates x names of a finding, read from YAML. It is encoded once; the embeddings of
all variants of one side are averaged and normalised again, so that scoring costs the same
whatever the size of the ensemble.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    import torch

    from ctclip.checkpoint import Checkpoint
    from ctclip.models.ctclip import CTCLIP

Pair = tuple[str, str]
BATCH = 64
DEFAULT = "default"
"""The set of checkpoints that ask for no other."""


class PromptError(ValueError):
    """A prompt file that can't be used."""


@dataclass(frozen=True)
class PromptSet:
    """For each finding, one or more pairs (present, absent)."""

    name: str
    pairs: dict[str, tuple[Pair, ...]]

    @property
    def hash(self) -> str:
        """12 hex digits over every sentence: equal hashes mean equal prompts."""
        text = json.dumps(self.pairs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Name and hash, as it stands in a score table's header."""
        return f"{self.name}@{self.hash}"

    def template(self, index: int) -> "PromptSet":
        """The set with only the ``index``-th pair of each finding (the last, where fewer)."""
        pairs: dict[str, tuple[Pair, ...]] = {
            finding: (pairs[min(index, len(pairs) - 1)],) for finding, pairs in self.pairs.items()
        }
        return PromptSet(f"{self.name}[{index}]", pairs)


def load(source: str | Path, findings: Sequence[str] = FINDINGS) -> PromptSet:
    """Read a prompt set by the name of one that ships with ctclip, or from a YAML file.

    The file has ``templates`` (each with ``present`` and ``absent``; ``{finding}`` is the name
    in the middle of a sentence, ``{Finding}`` at its start), optionally ``synonyms`` (other
    names of a finding) and ``pairs`` (``[present, absent]`` written out, added to the others).

    Raises:
        FileNotFoundError: If there is neither such a name nor such a file.
        PromptError: If the file is malformed or gives a finding no pair.
    """
    shipped = resources.files("ctclip.evaluation") / "data"
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {path}")
        text = path.read_text(encoding="utf-8")
    else:
        names = sorted(
            item.name.removeprefix("prompts-").removesuffix(".yaml")
            for item in shipped.iterdir()
            if item.name.startswith("prompts-")
        )
        if str(source) not in names:
            raise FileNotFoundError(
                f"no prompt set {str(source)!r}; ctclip ships {', '.join(names)}, "
                "or give the path of a .yaml file"
            )
        text = (shipped / f"prompts-{source}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PromptError(f"{source}: not readable YAML: {error}") from None
    return _build(data, findings, str(source))


def of(checkpoint: "Checkpoint", source: str | Path | None = None) -> PromptSet:
    """The named set, else the one that the checkpoint's model was trained to tell apart.

    That is CT-CLIP's pair for a checkpoint of CT-CLIP's kind and for what was fine-tuned from one,
    and ``default`` for any other.
    """
    origin = checkpoint.provenance
    while "started_from" in origin:
        origin = origin["started_from"]
    return load(source or ("ct-clip" if origin.get("kind") == "ct-clip" else DEFAULT))


def _build(data: Any, findings: Sequence[str], source: str) -> PromptSet:
    if not isinstance(data, dict):
        raise PromptError(f"{source}: expected a mapping with templates at the top level")
    unknown = set(data) - {"name", "templates", "synonyms", "pairs"}
    if unknown:
        raise PromptError(
            f"{source}: unknown key {sorted(unknown)[0]!r}; known: name, templates, synonyms, pairs"
        )
    strangers = (set(data.get("synonyms", {})) | set(data.get("pairs", {}))) - set(findings)
    if strangers and set(findings) >= set(FINDINGS):
        raise PromptError(f"{source}: {sorted(strangers)[0]!r} is not a finding that is scored")
    pairs: dict[str, tuple[Pair, ...]] = {}
    for finding in findings:
        made: list[Pair] = []
        for template in data.get("templates", []):
            if not isinstance(template, dict) or set(template) != {"present", "absent"}:
                raise PromptError(f"{source}: a template has present and absent, got {template!r}")
            for name in (finding, *data.get("synonyms", {}).get(finding, [])):
                words = {
                    "finding": name[0].lower() + name[1:],
                    "Finding": name[0].upper() + name[1:],
                }
                try:
                    made.append(
                        (template["present"].format(**words), template["absent"].format(**words))
                    )
                except (KeyError, IndexError):
                    raise PromptError(
                        f"{source}: only {{finding}} and {{Finding}} can be filled in {template!r}"
                    ) from None
        for pair in data.get("pairs", {}).get(finding, []):
            if not isinstance(pair, list) or len(pair) != 2:
                raise PromptError(f"{source}: a pair is [present, absent], got {pair!r}")
            made.append((str(pair[0]), str(pair[1])))
        if not made:
            raise PromptError(f"{source}: no prompts for {finding!r}")
        pairs[finding] = tuple(made)
    return PromptSet(str(data.get("name", Path(source).stem)), pairs)


def encode(
    model: "CTCLIP",
    tokenizer: "Callable[[list[str]], torch.Tensor]",
    prompts: PromptSet,
    findings: Sequence[str] | None = None,
) -> np.ndarray:
    """Encode a prompt set: every sentence once.

    Args:
        model: In eval mode; anything with ``encode_text(tokens, normalize=True)``.
        tokenizer: The model's tokenizer.
        prompts: The set.
        findings: Which findings, in which order; all of the set's if none are given.

    Returns:
        ``(K, 2, E)`` float32, L2-normalised; index 0 is "present", 1 is "absent".
    """
    chosen = tuple(prompts.pairs) if findings is None else tuple(findings)
    sentences = sorted({s for f in chosen for pair in prompts.pairs[f] for s in pair})
    vectors = dict(zip(sentences, encode_texts(model, tokenizer, sentences), strict=True))
    sides = [
        [np.mean([vectors[pair[side]] for pair in prompts.pairs[f]], axis=0) for side in (0, 1)]
        for f in chosen
    ]
    ensembles = np.asarray(sides, dtype=np.float32)
    norms = np.linalg.norm(ensembles, axis=-1, keepdims=True)
    return ensembles / np.maximum(norms, 1e-12)


def encode_texts(
    model: "CTCLIP", tokenizer: "Callable[[list[str]], torch.Tensor]", texts: Sequence[str]
) -> np.ndarray:
    """Texts as ``(N, E)`` float32, L2-normalised; at least one, by a model in eval mode."""
    import torch

    device = next(model.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(list(texts[start : start + BATCH])).to(device)
            parts.append(model.encode_text(tokens, normalize=True).float().cpu().numpy())
    return np.concatenate(parts)


def encode_prompts(checkpoint: "Checkpoint", prompts: PromptSet) -> np.ndarray:
    """:func:`encode` with a checkpoint's model and tokenizer: ``(K, 2, E)``."""
    return encode(checkpoint.model, checkpoint.tokenizer, prompts)


def direction_spread(prompts: np.ndarray) -> float:
    """Mean absolute cosine between the directions present - absent of different findings.

    Near 1, all findings share one "present" axis and a pair can hardly tell them apart; near 0,
    each finding has a direction of its own.

    Args:
        prompts: ``(K, 2, E)``.
    """
    directions = prompts[:, 0] - prompts[:, 1]
    directions = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(directions @ directions.T)
    others = ~np.eye(len(directions), dtype=bool)
    return float(cosines[others].mean()) if others.any() else float("nan")
