"""Models in the Hugging Face Hub's layout: a folder that ctclip, open_clip and a reader understand.

``open_clip_model.safetensors`` and ``open_clip_config.json`` are open_clip's own, so its
``create_model("local-dir:...")`` builds the model too (after ``import ctclip.models.open_clip``);
ctclip's description stands in the same JSON. BERT's ``config.json`` and the tokenizer lie beside
them, and a model card that is written from what is known about the run.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ctclip import checkpoint
from ctclip.checkpoint import FOLDER_CONFIG, FOLDER_HEAD, FOLDER_WEIGHTS, Checkpoint
from ctclip.models.text import merged_state_dict

CT_CLIP_LICENCE = "cc-by-nc-sa-4.0"
"""Of CT-CLIP's released weights, and so of what is made from them."""


def save_pretrained(
    loaded: Checkpoint,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write a model as a folder that can be uploaded as it is.

    Args:
        loaded: From :func:`ctclip.checkpoint.load`.
        folder: Made if need be; files of the same names are replaced.
        repo_id: Name on the Hub, for open_clip to find BERT's config there. Without it open_clip
            reads the folder where it lies now, since it can't look for BERT beside its own file;
            saved again, a moved folder opens there. ctclip itself reads it anywhere.
        licence: For the card: a Hub identifier such as ``apache-2.0``. By default CT-CLIP's for its
            weights and for what was trained from them, otherwise ``unknown``.

    Returns:
        The folder.
    """
    from ctclip.models import open_clip as adapter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = checkpoint.describe(
        loaded.model,
        loaded.tokenizer,
        loaded.model_config,
        loaded.volume_config,
        loaded.provenance,
    )
    tokenizer = header.pop("tokenizer")
    content: dict[str, Any] = {"ctclip": header}
    if loaded.head is not None:
        header["head"] = {"findings": list(loaded.head.findings), "relu": loaded.head.relu}
        _write_weights(folder / FOLDER_HEAD, loaded.head.state_dict())
    source = repo_id or str(folder.resolve())
    content["model_cfg"] = adapter.to_open_clip(loaded.model_config, source)
    content["preprocess_cfg"] = {}
    _write_weights(folder / FOLDER_WEIGHTS, adapter.from_ctclip(merged_state_dict(loaded.model)))
    _write(folder / "config.json", json.dumps(header["text_hf_config"], indent=2))
    _write(folder / "tokenizer.json", tokenizer)
    _write(
        folder / "tokenizer_config.json",
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": loaded.tokenizer.context_length,
                "pad_token": loaded.tokenizer.pad_token,
            }
        ),
    )
    _write(folder / "README.md", model_card(loaded, repo_id or "path/to/this/folder", licence))
    _write(folder / FOLDER_CONFIG, json.dumps(content, indent=2))
    return folder


def from_pretrained(name_or_path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load a model from a folder of :func:`save_pretrained` or from the Hub.

    Args:
        name_or_path: A local directory, else a name on the Hub.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If it is neither.
        CheckpointError: If the folder isn't ctclip's or is damaged.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _download(str(name_or_path))
    return checkpoint.load(folder, device)


def _licence(provenance: dict[str, Any]) -> str:
    if provenance.get("kind") == "ct-clip":
        return CT_CLIP_LICENCE
    earlier = provenance.get("started_from")
    return _licence(earlier) if isinstance(earlier, dict) else "unknown"


def model_card(loaded: Checkpoint, name: str, licence: str | None = None) -> str:
    """The README of a saved model: what it is, how it was made, what it is not for."""
    config, volumes, known = loaded.model_config, loaded.volume_config, loaded.provenance
    tower = "CT-ViT" if config.ctvit is not None else f"ViT3D, {config.vision.size}"
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    informed = "yes" if known.get("label_informed") else "no"
    if "label_informed" not in known:
        informed = "not recorded"
    windows = ", ".join(f"{low:g} to {high:g} HU" for low, high in volumes.windows_hu)
    facts = "\n".join(
        f"| {key.replace('_', ' ')} | {value} |"
        for key, value in sorted(known.items())
        if isinstance(value, str | int | float | bool) and key != "label_informed"
    )
    readout = ""
    if config.vision.readouts == 2:
        readout = (
            " Its `encode_image` gives what prompts are\ncompared with, not the reports' read-out."
        )
    return f"""---
license: {licence or _licence(known)}
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [ctclip, chest-ct, contrastive, 3d]
---
# {name}

A contrastive model of chest CT volumes and their reports, made with ctclip. For research; not a
medical device, and not for decisions about patients.

## Use
```python
from ctclip import hub

model = hub.from_pretrained("{name}")
```

In open_clip, after `import ctclip.models.open_clip`: `create_model("hf-hub:{name}")`, or
`create_model("local-dir:...")` for a folder that still lies where it was saved.{readout}

## Model
| | |
|---|---|
| volume tower | {tower} |
| text tower | {config.text.name_or_path or "small BERT"} |
| parameters | {parameters:.1f} M |
| embedding | {config.embed_dim} |

## Input
| | |
|---|---|
| voxels (D, H, W) | {" x ".join(map(str, volumes.size))} |
| spacing | {" x ".join(f"{s:g}" for s in volumes.spacing_mm)} mm |
| windows | {windows} |
| preprocessing | {volumes.recipe}, fingerprint {volumes.fingerprint()} |

## Training
| | |
|---|---|
| labels of the scored findings were used | {informed} |
{facts}

## Limits
Scores are not calibrated probabilities. Performance on scanners, populations and findings other
than those of its training and evaluation is unknown. Reports carry their readers' omissions into
the model.
"""


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: not a local directory, and not reachable on the Hugging Face Hub "
            f"({error})"
        ) from error


def _write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
