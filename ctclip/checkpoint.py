"""One file that rebuilds its model: weights, config, tokenizer, preprocessing, provenance.

A ``.safetensors`` file whose header holds the rest as JSON. Nothing in it can run code, and a model
is rebuilt from it without a network.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ctclip
from ctclip import config
from ctclip.data.volume import VolumeConfig
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.text import Tokenizer, merged_state_dict

FORMAT = 1
"""Version of the header; raised when an older reader could misread a newer file."""


class CheckpointError(ValueError):
    """A file that can't be used as a checkpoint, with the reason in words."""


@dataclass(kw_only=True)
class Checkpoint:
    """A model and everything that is needed to use it as it was trained."""

    model: CTCLIP
    """In eval mode."""
    tokenizer: Tokenizer
    model_config: ModelConfig
    volume_config: VolumeConfig
    """How scans must be prepared for it."""
    provenance: dict[str, Any]
    """Where it comes from: step, git commit, cohort fingerprint, config of the run."""
    sha256: str
    """Of the file."""

    def require_volumes(self, volume_config: VolumeConfig, where: str = "the cohort") -> None:
        """Refuse volumes that were prepared in another way than the model's.

        Raises:
            ValueError: If the preprocessing differs.
        """
        if volume_config.fingerprint() != self.volume_config.fingerprint():
            mine, theirs = config.to_dict(self.volume_config), config.to_dict(volume_config)
            differing = "; ".join(
                f"{key} {mine[key]} in the checkpoint, {theirs[key]} there"
                for key in mine
                if key != "windows_hu" and mine[key] != theirs[key]
            )
            raise ValueError(
                f"{where} was prepared differently from what this model was trained on "
                f"({differing}); prepare it with the checkpoint's settings"
            )


def save(
    path: str | Path,
    model: CTCLIP,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    volume_config: VolumeConfig,
    provenance: dict[str, Any],
) -> None:
    """Write a checkpoint, all or nothing.

    Adapters (LoRA) are merged into the weights they adapt, so that a reader needs no peft.

    Args:
        path: Ends in ``.safetensors``; an existing file is replaced once the new one is complete.
        model: Its weights, from any device.
        tokenizer: The one that the text tower was trained with.
        model_config: What ``model`` was built from.
        volume_config: Preprocessing of the training volumes.
        provenance: JSON-able facts about the run.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "ctclip": ctclip.__version__,
        "model": config.to_dict(model_config),
        "text_hf_config": model.text.config.to_dict(),
        "volume": config.to_dict(volume_config),
        "provenance": provenance,
        "context_length": tokenizer.context_length,
        "tokenizer": tokenizer.to_json(),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in merged_state_dict(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        # One entry only: safetensors writes several in random order, and equal models should have
        # equal hashes.
        save_file(tensors, temporary, {"ctclip": json.dumps(header)})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its model.

    Args:
        path: A file that :func:`save` wrote.
        device: Where the model goes.

    Returns:
        The model in eval mode with its tokenizer, configs and provenance.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, isn't ctclip's, or doesn't fit its own config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train one with ctclip-pretrain")
    header = read_header(path)
    source = f"checkpoint {path}"
    try:
        model_config = config.from_dict(ModelConfig, header["model"], source)
        volume_config = config.from_dict(VolumeConfig, header["volume"], source)
    except config.ConfigError as error:
        raise CheckpointError(
            f"{error}; it was written by ctclip {header['ctclip']}, this is {ctclip.__version__}"
        ) from None
    model = build_model(model_config, hf_config=header["text_hf_config"])
    fill(model, load_file(path), source)
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=Tokenizer(header["tokenizer"], header["context_length"]),
        model_config=model_config,
        volume_config=volume_config,
        provenance=header["provenance"],
        sha256=sha256_of(path),
    )


def read_header(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself without reading its weights.

    Raises:
        CheckpointError: If the file is damaged or isn't ctclip's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short or of "
            "another kind. ctclip-convert reads CT-CLIP's .pt files"
        ) from None
    if "ctclip" not in metadata:
        raise CheckpointError(
            f"{path} holds weights but not ctclip's description of them; only files written by "
            "ctclip.checkpoint.save or ctclip-convert can be loaded"
        )
    header = json.loads(metadata["ctclip"])
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} was written by ctclip {header['ctclip']}, a newer one than this "
            f"({ctclip.__version__}); upgrade ctclip"
        )
    return header


def fill(model: CTCLIP, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights strictly: every one present, none left over, every shape right.

    Raises:
        CheckpointError: Naming what doesn't fit.
    """
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(t.shape)}, the model has {tuple(wanted[name].shape)}"
        for name, t in tensors.items()
        if name in wanted and t.shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CheckpointError(
            f"{source}: {len(problems)} weights don't fit the model it describes: {shown}"
        )
    model.load_state_dict(tensors)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
