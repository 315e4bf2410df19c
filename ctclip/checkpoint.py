"""One file that rebuilds its model: weights, config, tokenizer, preprocessing, provenance.

A ``.safetensors`` file whose header holds the rest as JSON. Nothing in it can run code, and a model
is rebuilt from it without a network. CT-CLIP's own ``.pt`` files load as the same type.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ctclip import config
from ctclip.data.volume import VolumeConfig
from ctclip.models import convert
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.head import LinearHead
from ctclip.models.text import CXR_BERT, Tokenizer, merged_state_dict, require_fit
from ctclip.models.weights import EmptyParameters, read_tensors

VERSION = version("ctclip")

FORMAT = 1
"""Version of the header; raised when an older reader could misread a newer file."""


HEAD = "head."
"""Prefix of a classifier's weights."""

FOLDER_CONFIG = "open_clip_config.json"
FOLDER_WEIGHTS = "open_clip_model.safetensors"
FOLDER_HEAD = "head.safetensors"
"""The parts of a model that :mod:`ctclip.hub` saved as a folder; its tokenizer lies beside them."""

CT_CLIP_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""Kinds of file that CT-CLIP's weights come in; ours is none of them."""


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
    head: LinearHead | None = None
    """A classifier that was trained on the model's embeddings, if there is one."""

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
    head: LinearHead | None = None,
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
        head: A classifier on the model's embeddings.

    Raises:
        ValueError: If preprocessing and model don't fit each other, or the name is another kind's.
    """
    path = _checkpoint_name(path)
    if volume_config.channels != model_config.channels:
        raise ValueError(
            f"the volumes have {volume_config.channels} HU windows, the model takes "
            f"{model_config.channels}; set vision.channels to the number of windows_hu"
        )
    header = describe(model, tokenizer, model_config, volume_config, provenance)
    state = merged_state_dict(model)
    if head is not None:
        header["head"] = {"findings": list(head.findings), "relu": head.relu}
        state |= {f"{HEAD}{name}": value for name, value in head.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
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


def load(
    path: str | Path, device: str | torch.device = "cpu", *, tokenizer: str | None = None
) -> Checkpoint:
    """Read a checkpoint and rebuild its model.

    Args:
        path: A file that :func:`save` wrote, a folder of :func:`ctclip.hub.save_pretrained`, or one
            of CT-CLIP's files (``CT-CLIP_v2.pt`` and so on).
        device: Where the model goes.
        tokenizer: Hugging Face name or directory of the tokenizer that belongs to a CT-CLIP file,
            which doesn't hold it. By default a ``tokenizer.json`` or ``vocab.txt`` beside the
            file, else CXR-BERT's by name. Our own checkpoints carry theirs.

    Returns:
        The model in eval mode with its tokenizer, configs and provenance.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, isn't ctclip's, or doesn't fit its own config.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, device)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train one with ctclip-pretrain")
    if path.suffix in CT_CLIP_SUFFIXES:
        return _load_ct_clip(path, device, tokenizer or _tokenizer_beside(path))
    return rebuild(
        read_header(path), read_tensors(path), sha256_of(path), f"checkpoint {path}", device
    )


def describe(
    model: CTCLIP,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    volume_config: VolumeConfig,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Everything but weights that :func:`rebuild` needs, JSON-able."""
    return {
        "format": FORMAT,
        "ctclip": VERSION,
        "model": config.to_dict(model_config),
        "text_hf_config": model.text.config.to_dict(),
        "volume": config.to_dict(volume_config),
        "provenance": provenance,
        "context_length": tokenizer.context_length,
        "tokenizer": tokenizer.to_json(),
    }


def rebuild(
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    sha256: str,
    source: str,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Build a model from its description and weights.

    Args:
        header: From :func:`describe`, with a key ``head`` if there is a classifier.
        tensors: Weights under ctclip's names, a classifier's start with ``head.``; the model
            keeps and owns them.
        sha256: Of the file that the weights come from.
        source: What errors call it.
        device: Where the model goes.

    Raises:
        CheckpointError: If description and weights don't fit each other or this version.
    """
    try:
        model_config = config.from_dict(ModelConfig, header["model"], source)
        volume_config = config.from_dict(VolumeConfig, header["volume"], source)
    except config.ConfigError as error:
        raise CheckpointError(
            f"{error}; it was written by ctclip {header['ctclip']}, this is {VERSION}"
        ) from None
    with EmptyParameters():
        model = build_model(model_config, hf_config=header["text_hf_config"])
    tensors, head = dict(tensors), None
    if "head" in header:
        findings = header["head"]["findings"]
        head = LinearHead(model_config.embed_dim, findings, header["head"]["relu"])
        names = [name for name in tensors if name.startswith(HEAD)]
        fill(head, {name.removeprefix(HEAD): tensors.pop(name) for name in names}, source)
        head = head.to(device).eval()
    fill(model, tensors, source)
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=Tokenizer(
            header["tokenizer"], header["context_length"], model_config.text.truncation
        ),
        model_config=model_config,
        volume_config=volume_config,
        provenance=header["provenance"],
        sha256=sha256,
        head=head,
    )


def convert_ct_clip(
    source: str | Path, out: str | Path, *, tokenizer: str | None = None
) -> convert.Conversion:
    """Turn a CT-CLIP file into a ctclip checkpoint (the command ``ctclip-convert``).

    Args:
        source: ``CT-CLIP_v2.pt``, ``CT_VocabFine_v2.pt``, ``CT_LiPro_v2.pt`` or a training file.
        out: The ``.safetensors`` to write; an existing file is replaced.
        tokenizer: Hugging Face name or directory, as for :func:`load`.

    Returns:
        The account of keys; :func:`ctclip.models.convert.report` prints it.

    Raises:
        FileNotFoundError: If the file or the tokenizer can't be found.
        ValueError: If the file isn't CT-CLIP's in every key, or ``out`` can't name a
            checkpoint.
    """
    path, out = Path(source), _checkpoint_name(out)
    if path.exists() and out.exists() and path.samefile(out):
        raise ValueError(f"{out} is the file to convert; name another to write")
    conversion = convert.from_ct_clip(path)
    loaded = _from_conversion(conversion, path, tokenizer or _tokenizer_beside(path))
    save(
        out,
        loaded.model,
        loaded.tokenizer,
        loaded.model_config,
        loaded.volume_config,
        loaded.provenance,
        loaded.head,
    )
    return conversion


def _checkpoint_name(path: str | Path) -> Path:
    """Names tell the kinds of files apart: under another's a checkpoint can't be read again."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is no name for a checkpoint; end it in .safetensors")
    return Path(path)


def _tokenizer_beside(path: Path) -> str:
    here = any((path.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return str(path.parent) if here else CXR_BERT


def _load_folder(folder: Path, device: str | torch.device) -> Checkpoint:
    for name in (FOLDER_CONFIG, FOLDER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is no saved model: it holds no {name}; name a model.safetensors or a "
                "folder of ctclip.hub.save_pretrained"
            )
    content = _part_of_folder(folder / FOLDER_CONFIG, lambda path: json.loads(path.read_bytes()))
    if "ctclip" not in content:
        raise CheckpointError(
            f"{folder / FOLDER_CONFIG} describes an open_clip model, but not ctclip's"
        )
    header = content["ctclip"]
    require_readable(header, str(folder))
    header["tokenizer"] = _part_of_folder(
        folder / "tokenizer.json", lambda path: path.read_text(encoding="utf-8")
    )
    tensors = {
        name.replace("visual.trunk.", "visual.", 1): value
        for name, value in _part_of_folder(folder / FOLDER_WEIGHTS, read_tensors).items()
    }
    if "head" in header:
        head = _part_of_folder(folder / FOLDER_HEAD, read_tensors)
        tensors |= {f"{HEAD}{name}": value for name, value in head.items()}
    return rebuild(header, tensors, sha256_of(folder / FOLDER_WEIGHTS), str(folder), device)


def _part_of_folder(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}); copy or download its folder again"
        ) from None


def _load_ct_clip(path: Path, device: str | torch.device, tokenizer: str) -> Checkpoint:
    try:
        conversion = convert.from_ct_clip(path)
    except convert.ConversionError as error:
        raise CheckpointError(str(error)) from None
    loaded = _from_conversion(conversion, path, tokenizer)
    loaded.model.to(device)
    if loaded.head is not None:
        loaded.head.to(device)
    return loaded


def _from_conversion(conversion: convert.Conversion, path: Path, tokenizer: str) -> Checkpoint:
    model_config = conversion.model_config
    try:
        text = Tokenizer.from_pretrained(tokenizer, model_config.text.context_length)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} doesn't hold its tokenizer: put tokenizer.json or vocab.txt beside it, or "
            f"give ctclip-convert their folder with --tokenizer ({error})"
        ) from None
    try:
        require_fit(text, conversion.model.text.config, tokenizer, f"the text tower of {path}")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    sha256 = sha256_of(path)
    assert model_config.ctvit is not None
    return Checkpoint(
        model=conversion.model,
        tokenizer=text,
        model_config=model_config,
        volume_config=ct_clip_volumes(model_config.ctvit),
        provenance={
            "kind": "ct-clip",
            "variant": conversion.kind,
            "source": path.name,
            "source_sha256": sha256,
            # VocabFine's files differ from CT-CLIP's by their values alone.
            "label_informed": conversion.head is not None or "vocab" in path.name.lower(),
        },
        sha256=sha256,
        head=conversion.head,
    )


def ct_clip_volumes(ctvit: CTViTConfig) -> VolumeConfig:
    """CT-CLIP's preprocessing, in the order of steps of its own evaluation."""
    depth = ctvit.patch[0] * (240 // 10)
    return VolumeConfig(size=(depth, *ctvit.image_size), recipe="ct-clip-inference")


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
    require_readable(header, str(path))
    return header


def require_readable(header: dict[str, Any], source: str) -> None:
    """Refuse what a newer ctclip wrote.

    Raises:
        CheckpointError: If its format is newer than this version knows.
    """
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{source} was written by ctclip {header['ctclip']}, a newer one than this "
            f"({VERSION}); upgrade ctclip"
        )


def fill(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Give a model its weights, strictly: all present, none left over, every shape right.

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
    as_wanted = {name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()}
    model.load_state_dict(as_wanted, assign=True)


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
