"""CT-CLIP's checkpoint files become ctclip models.

Reads the released files (CT-CLIP, VocabFine, ClassFine) and those that its training scripts write,
accounts for every key, and never runs code from a file.
"""

import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from ctclip.findings import FINDINGS
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.head import LinearHead
from ctclip.models.text import CXR_BERT, TextConfig

_PREFIXES = ("module.", "trained_model.", "_orig_mod.")
"""What DDP, the ClassFine script and torch.compile put before a key."""

_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile)

_V = "visual_transformer."
_BLOCK = rf"{re.escape(_V)}enc_(spatial|temporal)_transformer\.layers\.(\d+)\."

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"temperature", "logit_scale"),
    (r"to_text_latent\.weight", "text.proj.weight"),
    (r"to_visual_latent\.weight", "visual.proj.weight"),
    (r"text_transformer\.(.+)", r"text.transformer.\1"),
    (rf"{_V}to_patch_emb\.1\.(weight|bias)", r"visual.stem.0.\1"),
    (rf"{_V}to_patch_emb\.2\.(weight|bias)", r"visual.stem.1.\1"),
    (rf"{_V}to_patch_emb\.3\.(weight|bias)", r"visual.stem.2.\1"),
    (rf"{_V}spatial_rel_pos_bias\.net\.0\.0\.(weight|bias)", r"visual.offset_bias.net.0.\1"),
    (rf"{_V}spatial_rel_pos_bias\.net\.1\.0\.(weight|bias)", r"visual.offset_bias.net.2.\1"),
    (rf"{_V}spatial_rel_pos_bias\.net\.2\.(weight|bias)", r"visual.offset_bias.net.4.\1"),
    (rf"{_BLOCK}0\.dsconv\.(weight|bias)", r"visual.\1.\2.position.conv.\3"),
    (rf"{_BLOCK}1\.norm\.gamma", r"visual.\1.\2.attn.norm.weight"),
    (rf"{_BLOCK}1\.(q_scale|k_scale|to_q\.weight|to_kv\.weight)", r"visual.\1.\2.attn.\3"),
    (rf"{_BLOCK}1\.to_out\.weight", r"visual.\1.\2.attn.proj.weight"),
    (rf"{_BLOCK}3\.0\.(weight|bias)", r"visual.\1.\2.mlp.norm.\3"),
    (rf"{_BLOCK}3\.1\.weight", r"visual.\1.\2.mlp.fc1.weight"),
    (rf"{_BLOCK}3\.4\.weight", r"visual.\1.\2.mlp.fc2.weight"),
    (rf"{_V}enc_(spatial|temporal)_transformer\.norm_out\.gamma", r"visual.\1_norm.weight"),
    (rf"{_V}vq\._codebook\.embed", "visual.codebook.embed"),
    (rf"{_V}vq\._codebook\.cluster_size", "visual.codebook.usage"),
)

_IGNORED: tuple[tuple[str, str], ...] = (
    (r"text_transformer\.embeddings\.position_ids", "a counter that transformers no longer stores"),
    (r"text_transformer\.pooler\..+", "BERT's pooler: CT-CLIP reads the CLS state before it"),
    (r"to_(text|visual)_latent_extra\.weight", "never used: copies for a loss that is off"),
    (rf"{_V}to_patch_emb_first_frame\..+", "never called: embeds a single first frame"),
    (rf"{_V}to_pixels(_first_frame)?\..+", "never called: what is left of the decoder"),
    (rf"{_BLOCK}1\.context_norm\.(gamma|beta)", "never called: norm of a cross-attention"),
    (rf"{_BLOCK}1\.null_kv", "holds no elements"),
    (rf"{_V}vq\._codebook\.initted", "a flag: the codebook is initialised"),
    (rf"{_V}.+\.beta", "a fixed zero"),
)

_DEAD_BUT_PRESENT = re.compile(rf"{_V}.+\.(norm|norm_out)\.beta")


class ConversionError(ValueError):
    """A file that isn't a CT-CLIP checkpoint, or not one that can be read exactly."""


@dataclass
class Conversion:
    """A converted model and the account of its file's keys."""

    model: CTCLIP
    """In eval mode."""
    model_config: ModelConfig
    kind: str
    """``CT-CLIP`` (VocabFine's files are of this kind too) or ``ClassFine``."""
    head: LinearHead | None = None
    """ClassFine's classifier."""
    matched: dict[str, str] = field(default_factory=dict)
    """The file's key to ours."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The file's key to the reason why it isn't needed."""


def from_ct_clip(path: str | Path, *, text_heads: int | None = None) -> Conversion:
    """Read a CT-CLIP checkpoint.

    Every size is read from the shapes of the weights, so that small test files convert like the
    released ones. What shapes don't tell is taken from CT-CLIP's code: the patch is 10 slices deep,
    its rows and columns are equal to each other and the grid is square, unless the file says
    otherwise (see :func:`convert`).

    Args:
        path: ``CT-CLIP_v2.pt``, ``CT_VocabFine_v2.pt``, ``CT_LiPro_v2.pt`` or a training file.
        text_heads: Attention heads of the BERT; 64 channels each by default.

    Returns:
        The model in eval mode and the account of keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ConversionError: If it can't be read without running code, or a key is missing, unknown or
            of another shape.
    """
    path = Path(path)
    state = read_state(path)
    return convert(state, source=str(path), text_heads=text_heads)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` or ``.safetensors`` file, unwrapped and without prefixes.

    Raises:
        FileNotFoundError: If there is no such file.
        ConversionError: If it holds anything but tensors in dictionaries.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it ends early"
        raise ConversionError(
            f"{path} can't be read as plain tensors: it is damaged, or holds Python objects that "
            f"would run code when loaded, which ctclip never does ({reason})"
        ) from None
    for outer in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(outer), dict):
            content = content[outer]
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds no dictionary of weights")
    not_tensors = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise ConversionError(
            f"{path} is not a CT-CLIP checkpoint: {', '.join(not_tensors[:5])} are no tensors"
        )
    return {_without_prefixes(str(key)): value for key, value in content.items()}


def convert(
    state: dict[str, Tensor],
    *,
    source: str = "state dict",
    patch: tuple[int, int, int] | None = None,
    grid: tuple[int, int] | None = None,
    text_heads: int | None = None,
) -> Conversion:
    """Convert a state dict of CT-CLIP.

    Args:
        state: Keys without wrappers' prefixes.
        source: What errors call it.
        patch: Voxels of a token; by default 10 slices and a square of what the weights imply.
        grid: Tokens along height and width; by default a square.
        text_heads: Attention heads of the BERT.

    Raises:
        ConversionError: If a key is missing, unknown or of another shape.
    """
    state = dict(state)
    head = _take_head(state)
    renamed, matched, ignored, unknown = {}, {}, {}, []
    for key, value in state.items():
        new = _renamed(key)
        reason = _reason_to_ignore(key)
        if reason is not None:
            if _DEAD_BUT_PRESENT.fullmatch(key) and bool(value.any()):
                raise ConversionError(
                    f"{source}: {key} is not zero, which CT-CLIP's training can't produce; this "
                    "file was changed by other means and would give other numbers here"
                )
            ignored[key] = reason
        elif new is None:
            unknown.append(key)
        else:
            renamed[new], matched[key] = value, new
    if unknown:
        raise ConversionError(
            f"{source}: {len(unknown)} keys are not CT-CLIP's: {', '.join(sorted(unknown)[:5])}"
        )
    config, hf_config = _read_config(renamed, source, patch, grid, text_heads)
    renamed["logit_scale"] = renamed["logit_scale"].reshape(1)
    renamed["visual.codebook.embed"] = renamed["visual.codebook.embed"].squeeze(0)
    renamed["visual.codebook.usage"] = renamed["visual.codebook.usage"].reshape(-1)
    model = build_model(config, hf_config=hf_config)
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(renamed))
    shapes = [
        f"{name} is {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in renamed.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    surplus = [f"{name} has no place" for name in renamed if name not in wanted]
    if missing or shapes or surplus:
        problems = [*(f"missing {name}" for name in missing), *shapes, *surplus]
        raise ConversionError(f"{source}: not a complete CT-CLIP: {'; '.join(problems[:5])}")
    model.load_state_dict({name: value.float() for name, value in renamed.items()})
    return Conversion(
        model=model.eval(),
        model_config=config,
        kind="CT-CLIP" if head is None else "ClassFine",
        head=head,
        matched=matched,
        ignored=ignored,
    )


def _without_prefixes(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _renamed(key: str) -> str | None:
    for pattern, replacement in _RENAMES:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    return None


def _reason_to_ignore(key: str) -> str | None:
    return next((why for pattern, why in _IGNORED if re.fullmatch(pattern, key)), None)


def _take_head(state: dict[str, Tensor]) -> LinearHead | None:
    """ClassFine's head, which has a ReLU before the linear layer."""
    if "classifier.weight" not in state or "classifier.bias" not in state:
        return None
    weight, bias = state.pop("classifier.weight"), state.pop("classifier.bias")
    if len(weight) != len(FINDINGS):
        raise ConversionError(
            f"the classifier has {len(weight)} outputs, ClassFine's has {len(FINDINGS)}"
        )
    head = LinearHead(weight.shape[1], FINDINGS, relu=True)
    head.linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.eval()


def _read_config(
    state: dict[str, Tensor],
    source: str,
    patch: tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    text_heads: int | None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Sizes of both towers from the shapes of their weights."""
    try:
        embed_dim, flat = state["visual.proj.weight"].shape
        width, voxels = state["visual.stem.1.weight"].shape
        head_dim = state["visual.spatial.0.attn.q_scale"].shape[0]
        inner = state["visual.spatial.0.attn.to_q.weight"].shape[0]
        codes = state["visual.codebook.embed"].shape[1]
        words, text_width = state["text.transformer.embeddings.word_embeddings.weight"].shape
        positions = state["text.transformer.embeddings.position_embeddings.weight"].shape[0]
        types = state["text.transformer.embeddings.token_type_embeddings.weight"].shape[0]
        feed_forward = state["text.transformer.encoder.layer.0.intermediate.dense.weight"].shape[0]
        state["logit_scale"], state["visual.codebook.usage"]
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{source} is not a CT-CLIP checkpoint: no usable {error.args[0]!r}. Files of the "
            "volume encoder alone can't be scored; the whole model is needed"
        ) from None
    side = round((flat // width) ** 0.5)
    grid = grid or (side, side)
    edge = round((voxels / 10) ** 0.5)
    patch = patch or (10, edge, edge)
    if grid[0] * grid[1] * width != flat or patch[0] * patch[1] * patch[2] != voxels:
        raise ConversionError(
            f"{source}: {voxels} voxels a patch and {flat} pooled values don't make square patches "
            f"10 slices deep on a square grid; give the patch and the grid"
        )
    depths = {
        kind: 1 + max(int(key.split(".")[2]) for key in state if key.startswith(f"visual.{kind}."))
        for kind in ("spatial", "temporal")
    }
    layers = {int(key.split(".")[4]) for key in state if ".encoder.layer." in key}
    ctvit = CTViTConfig(
        image_size=(grid[0] * patch[1], grid[1] * patch[2]),
        patch=patch,
        width=width,
        spatial_depth=depths["spatial"],
        temporal_depth=depths["temporal"],
        heads=inner // head_dim,
        head_dim=head_dim,
        codes=codes,
    )
    text = TextConfig(name_or_path=CXR_BERT, pooling="cls", context_length=positions)
    hf_config = {
        "model_type": "bert",
        "vocab_size": words,
        "hidden_size": text_width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": text_heads or max(text_width // 64, 1),
        "intermediate_size": feed_forward,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "pad_token_id": 0,
    }
    return ModelConfig(embed_dim=embed_dim, ctvit=ctvit, text=text), hf_config


def report(conversion: Conversion) -> RenderableType:
    """The account of a conversion's keys, for a terminal."""
    table = Table("keys", "what became of them", "which", title=f"{conversion.kind} checkpoint")

    def add(keys: Sequence[str], fate: str) -> None:
        shown = ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")
        table.add_row(str(len(keys)), fate, shown)

    add(list(conversion.matched), "matched: each has its place in the model")
    by_reason: dict[str, list[str]] = {}
    for key, reason in conversion.ignored.items():
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        add(keys, f"ignored: {reason}")
    if conversion.head is not None:
        findings = len(conversion.head.findings)
        add(["classifier.weight", "classifier.bias"], f"the classifier of {findings} findings")
    add([], "missing")
    return table
