"""open_clip and timm learn to build ctclip's towers; importing this module registers them.

open_clip builds volume towers through timm by name alone, so a name carries the tower's settings
after a dot, where timm's own names carry a tag: ``ctclip_vit3d.size=tiny;patch=8,16,16``.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
import yaml
from safetensors.torch import save_file
from timm.models import register_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ctclip import config as config_module
from ctclip.models import bert_family
from ctclip.models.ctclip import ModelConfig
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.text import POOLERS, small_bert
from ctclip.models.vit3d import VisionConfig, ViT3D

Tower = TypeVar("Tower", VisionConfig, CTViTConfig)

CONFIGS = Path(__file__).parent / "configs"
"""Named models, one JSON file each, in the form of :class:`ModelConfig`."""

_folder = tempfile.TemporaryDirectory(prefix="ctclip-open-clip-")


def register(name: str, config: ModelConfig) -> None:
    """Make ``open_clip.create_model(name)`` build a model.

    Args:
        name: Any name without ``/`` and ``:``.
        config: What to build. The result is open_clip's ``CustomTextCLIP`` around our towers;
            :func:`from_ctclip` turns our weights into its.
    """
    folder = Path(_folder.name)
    text_source = config.text.name_or_path
    if text_source is None:
        text_source = str(folder / f"{name}-bert")
        _write_bert(small_bert(config.text), Path(text_source), config.text.pooling == "pooler")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(to_open_clip(config, text_source)), encoding="utf-8")
    open_clip.add_model_config(path)


def register_file(path: str | Path) -> str:
    """Register a JSON file that holds a :class:`ModelConfig`; its stem is the name.

    Returns:
        The name for ``open_clip.create_model``.
    """
    path = Path(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    register(path.stem, config_module.from_dict(ModelConfig, values, source=str(path)))
    return path.stem


def to_open_clip(config: ModelConfig, text_source: str) -> dict[str, Any]:
    """Our config in open_clip's terms; of two read-outs, ``encode_image`` gives the prompts'.

    Args:
        config: The model.
        text_source: Hugging Face name or directory of the BERT.
    """
    tower: VisionConfig | CTViTConfig = config.ctvit or config.vision
    converted: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "timm_model_name": _timm_name(tower),
            "timm_pool": "",
            "timm_proj": "",
        },
        "text_cfg": {
            "hf_model_name": text_source,
            "hf_tokenizer_name": text_source,
            "hf_pooler_type": POOLERS[config.text.pooling],
            "hf_proj_type": "linear",
            "context_length": config.text.context_length,
        },
        "custom_text": True,
        "nonscalar_logit_scale": True,
        "init_logit_scale": config.logit_scale_init,
    }
    if config.logit_bias_init is not None:
        converted["init_logit_bias"] = config.logit_bias_init
    return converted


def from_ctclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under open_clip's names."""
    return {
        f"visual.trunk.{name.removeprefix('visual.')}" if name.startswith("visual.") else name: t
        for name, t in state.items()
    }


def _write_bert(hf_config: dict[str, Any], folder: Path, pooler: bool) -> None:
    """A random BERT as a directory: open_clip loads a text tower's weights unless told not to."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        bert = BertModel(BertConfig(**hf_config), add_pooling_layer=pooler)
    save_file(bert.state_dict(), folder / "model.safetensors", {"format": "pt"})


def _timm_name(tower: VisionConfig | CTViTConfig) -> str:
    if isinstance(tower, VisionConfig):
        tower = replace(tower, inflate_from=None)  # a start, and a path can't be part of a name
    default = asdict(type(tower)())
    tag = ";".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in asdict(tower).items()
        if value != default[name]
    )
    return f"{'ctclip_vit3d' if isinstance(tower, VisionConfig) else 'ctclip_ctvit'}.{tag}"


def _parse(schema: type[Tower], tag: str) -> Tower:
    values: dict[str, Any] = {}
    for item in filter(None, tag.split(";")):
        name, _, text = item.partition("=")
        parts = [yaml.safe_load(part) for part in text.split(",")]
        values[name] = parts if len(parts) > 1 else parts[0]
    return config_module.from_dict(schema, values, source=f"model name with settings {tag!r}")


@register_model
def ctclip_vit3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Entry point of timm: ``num_classes`` is the embedding width, the name's tag the settings."""
    if pretrained:
        raise ValueError("there are no pretrained weights of ctclip_vit3d to download")
    vision = _parse(VisionConfig, kwargs.get("pretrained_cfg") or "")
    if kwargs.get("patch_drop_rate") is not None:
        vision = replace(vision, patch_dropout=kwargs["patch_drop_rate"])
    return ViT3D.from_config(vision, embed_dim=kwargs.get("num_classes") or 512)


@register_model
def ctclip_ctvit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Entry point of timm for CT-CLIP's tower."""
    if pretrained:
        raise ValueError("convert CT-CLIP's weights with ctclip-convert; nothing is downloaded")
    ctvit = _parse(CTViTConfig, kwargs.get("pretrained_cfg") or "")
    return CTViT.from_config(ctvit, embed_dim=kwargs.get("num_classes") or 512)


bert_family.register()
for _path in sorted(CONFIGS.glob("*.json")):
    register_file(_path)
