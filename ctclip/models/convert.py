"""CT-CLIP's checkpoint files become ctclip models.

Reads the released files (CT-CLIP, VocabFine, ClassFine) and those that its training scripts write,
accounts for every key, and never runs code from a file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from ctclip.findings import FINDINGS
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.head import LinearHead
from ctclip.models.text import CXR_BERT, TextConfig
from ctclip.models.weights import EmptyParameters, read_weights

_PREFIXES = ("module.", "trained_model.", "_orig_mod.")
"""What DDP, the ClassFine script and torch.compile put before a key."""

_V = "visual_transformer."
_BLOCK = rf"{re.escape(_V)}enc_(spatial|temporal)_transformer\.layers\.(\d+)\."

_L = f"{_V}enc_*_transformer.layers.#."
_RENAMES: tuple[tuple[str, str], ...] = (
    ("temperature", "logit_scale"),
    ("to_text_latent.weight", "text.proj.weight"),
    ("to_visual_latent.weight", "visual.proj.weight"),
    ("text_transformer.**", "text.transformer.**"),
    (f"{_V}to_patch_emb.1.*", "visual.stem.0.*"),
    (f"{_V}to_patch_emb.2.*", "visual.stem.1.*"),
    (f"{_V}to_patch_emb.3.*", "visual.stem.2.*"),
    (f"{_V}spatial_rel_pos_bias.net.0.0.*", "visual.offset_bias.net.0.*"),
    (f"{_V}spatial_rel_pos_bias.net.1.0.*", "visual.offset_bias.net.2.*"),
    (f"{_V}spatial_rel_pos_bias.net.2.*", "visual.offset_bias.net.4.*"),
    (f"{_L}0.dsconv.*", "visual.*.#.position.conv.*"),
    (f"{_L}1.norm.gamma", "visual.*.#.attn.norm.weight"),
    (f"{_L}1.q_scale", "visual.*.#.attn.q_scale"),
    (f"{_L}1.k_scale", "visual.*.#.attn.k_scale"),
    (f"{_L}1.to_q.weight", "visual.*.#.attn.to_q.weight"),
    (f"{_L}1.to_kv.weight", "visual.*.#.attn.to_kv.weight"),
    (f"{_L}1.to_out.weight", "visual.*.#.attn.proj.weight"),
    (f"{_L}3.0.*", "visual.*.#.mlp.norm.*"),
    (f"{_L}3.1.weight", "visual.*.#.mlp.fc1.weight"),
    (f"{_L}3.4.weight", "visual.*.#.mlp.fc2.weight"),
    (f"{_V}enc_*_transformer.norm_out.gamma", "visual.*_norm.weight"),
    (f"{_V}vq._codebook.embed", "visual.codebook.embed"),
    (f"{_V}vq._codebook.cluster_size", "visual.codebook.usage"),
)
"""The file's names and ours, read in both directions: ``*`` is a word, ``#`` a number, ``**`` the
rest. Names that no model has are found when the model is filled."""

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

_CLASSIFIER = ("classifier.weight", "classifier.bias")
"""ClassFine's head, which has a ReLU before the linear layer."""

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
    try:
        content = read_weights(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None
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
    origins: dict[str, str] = {}
    for key in map(str, content):
        name = _without_prefixes(key)
        if name in origins:
            raise ConversionError(
                f"{path} holds both {origins[name]} and {key}, so which weights are meant can't be "
                "told; save one of the two models alone"
            )
        origins[name] = key
    return {name: content[key] for name, key in origins.items()}


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
    classifier = [state.pop(key) for key in _CLASSIFIER] if set(_CLASSIFIER) <= set(state) else []
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
    renamed["visual.codebook.embed"] = renamed["visual.codebook.embed"].squeeze(0)
    for scalar_or_row in ("logit_scale", "visual.codebook.usage"):
        renamed[scalar_or_row] = renamed[scalar_or_row].reshape(-1)
    with EmptyParameters():
        model = build_model(config, hf_config=hf_config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    problems = [f"missing {_original(name)}" for name in wanted if name not in renamed]
    problems += [f"{key} has no place" for key, name in matched.items() if name not in wanted]
    problems += [
        f"{key} is {tuple(renamed[name].shape)} instead of {tuple(wanted[name])}"
        for key, name in matched.items()
        if name in wanted and renamed[name].shape != wanted[name]
    ]
    head = None
    if classifier:
        head = LinearHead(config.embed_dim, FINDINGS, relu=True)
        problems += [
            f"{key} is {tuple(value.shape)} instead of {tuple(own.shape)}"
            for key, value, own in zip(_CLASSIFIER, classifier, head.parameters(), strict=True)
            if value.shape != own.shape
        ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConversionError(
            f"{source}: not a complete CT-CLIP: {'; '.join(problems[:5])}{more}; it may be the "
            "file of a changed model, or of an interrupted save"
        )
    used = [(key, renamed[name]) for key, name in matched.items()]
    for key, value in (*used, *zip(_CLASSIFIER, classifier, strict=False)):
        if not value.isfinite().all():
            raise ConversionError(
                f"{source}: {key} holds NaN or infinite values; its training went wrong or the "
                "file is damaged, take an earlier checkpoint or fetch it again"
            )
    model.load_state_dict({name: value.float() for name, value in renamed.items()}, assign=True)
    if head is not None:
        weight, bias = (value.float() for value in classifier)
        head.linear.load_state_dict({"weight": weight, "bias": bias})
        head.eval()
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
    return next((new for old, ours in _RENAMES if (new := _translated(key, old, ours))), None)


def _original(name: str) -> str:
    """What a weight of ours is called in CT-CLIP's files."""
    return next((key for old, ours in _RENAMES if (key := _translated(name, ours, old))), name)


def _translated(name: str, pattern: str, other: str) -> str | None:
    """A name that fits a pattern of :data:`_RENAMES`, by the other pattern."""
    wild = re.compile(r"\*\*|\*|#")
    kinds = {"**": "(.+)", "*": "([a-z]+)", "#": r"(\d+)"}
    literal = [re.escape(part) for part in wild.split(pattern)]
    groups = [kinds[mark] for mark in wild.findall(pattern)]
    match = re.fullmatch("".join(a + b for a, b in zip(literal, [*groups, ""], strict=True)), name)
    if match is None:
        return None
    found = iter(match.groups())
    return wild.sub(lambda _mark: next(found), other)


def _reason_to_ignore(key: str) -> str | None:
    return next((why for pattern, why in _IGNORED if re.fullmatch(pattern, key)), None)


def _read_config(
    state: dict[str, Tensor],
    source: str,
    patch: tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    text_heads: int | None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Sizes of both towers from the shapes of their weights."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != axes or 0 in state[name].shape:
            raise ConversionError(
                f"{source} is not a CT-CLIP checkpoint: no usable {_original(name)}. Files of the "
                "volume encoder alone can't be scored; the whole model is needed"
            )
        return tuple(state[name].shape)

    words = "text.transformer.embeddings."
    embed_dim, flat = shape("visual.proj.weight", 2)
    width, voxels = shape("visual.stem.1.weight", 2)
    (head_dim,) = shape("visual.spatial.0.attn.q_scale", 1)
    inner, _ = shape("visual.spatial.0.attn.to_q.weight", 2)
    shape("visual.temporal.0.attn.q_scale", 1)
    _, codes, _ = shape("visual.codebook.embed", 3)
    shape("visual.codebook.usage", 2)
    vocabulary, text_width = shape(f"{words}word_embeddings.weight", 2)
    positions, _ = shape(f"{words}position_embeddings.weight", 2)
    types, _ = shape(f"{words}token_type_embeddings.weight", 2)
    feed_forward, _ = shape("text.transformer.encoder.layer.0.intermediate.dense.weight", 2)
    if "logit_scale" not in state:
        raise ConversionError(f"{source} is not a complete CT-CLIP: missing temperature")
    side = round((flat // width) ** 0.5)
    grid = grid or (side, side)
    edge = round((voxels / 10) ** 0.5)
    patch = patch or (10, edge, edge)
    if grid[0] * grid[1] * width != flat or patch[0] * patch[1] * patch[2] != voxels:
        raise ConversionError(
            f"{source}: {voxels} voxels a patch and {flat} pooled values don't make square patches "
            "10 slices deep on a square grid; ctclip.models.convert.convert takes others"
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
        "vocab_size": vocabulary,
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
        add(_CLASSIFIER, f"the classifier of {findings} findings")
    add([], "missing")
    return table
