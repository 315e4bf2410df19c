"""A little CT-CLIP, and the layout of the original's checkpoint files."""

import torch

from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.text import TextConfig


def little_ct_clip():
    """A CT-CLIP of a few thousand random weights, in eval mode."""
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=12,
        ctvit=CTViTConfig(
            image_size=(8, 8),
            patch=(10, 2, 2),
            width=24,
            spatial_depth=2,
            temporal_depth=1,
            heads=2,
            head_dim=4,
            codes=16,
        ),
        text=TextConfig(name_or_path=None, width=64, layers=1, heads=1, context_length=32),
    )
    return build_model(config).eval()


def as_original(model):
    """Its weights under the names, and with the useless extras, of the original's files."""
    ours, visual = model.state_dict(), "visual_transformer."
    state = {
        "temperature": ours["logit_scale"][0],
        "to_text_latent.weight": ours["text.proj.weight"],
        "to_visual_latent.weight": ours["visual.proj.weight"],
        "to_text_latent_extra.weight": torch.zeros(1),
        "to_visual_latent_extra.weight": torch.zeros(1),
        "text_transformer.embeddings.position_ids": torch.arange(32)[None],
        "text_transformer.pooler.dense.weight": torch.zeros(1),
        f"{visual}to_pixels.0.weight": torch.zeros(1),
        f"{visual}to_patch_emb_first_frame.2.bias": torch.zeros(1),
        f"{visual}vq._codebook.initted": torch.ones(1),
        f"{visual}vq._codebook.embed": ours["visual.codebook.embed"][None],
        f"{visual}vq._codebook.cluster_size": ours["visual.codebook.usage"][None],
    }
    for name, value in ours.items():
        if name.startswith("text.transformer."):
            state[name.replace("text.transformer.", "text_transformer.")] = value
    for i in range(3):
        for part in ("weight", "bias"):
            state[f"{visual}to_patch_emb.{i + 1}.{part}"] = ours[f"visual.stem.{i}.{part}"]
            place = ("net.0.0", "net.1.0", "net.2")[i]
            value = ours[f"visual.offset_bias.net.{2 * i}.{part}"]
            state[f"{visual}spatial_rel_pos_bias.{place}.{part}"] = value
    for kind, depth in (("spatial", 2), ("temporal", 1)):
        stack = f"{visual}enc_{kind}_transformer."
        state[f"{stack}norm_out.gamma"] = ours[f"visual.{kind}_norm.weight"]
        state[f"{stack}norm_out.beta"] = torch.zeros(24)
        for i in range(depth):
            theirs, mine = f"{stack}layers.{i}.", f"visual.{kind}.{i}."
            state[f"{theirs}1.null_kv"] = torch.zeros(2, 0, 4)
            state[f"{theirs}1.context_norm.gamma"] = torch.ones(24)
            state[f"{theirs}1.norm.beta"] = torch.zeros(24)
            for new, old in {
                "0.dsconv.weight": "position.conv.weight",
                "0.dsconv.bias": "position.conv.bias",
                "1.norm.gamma": "attn.norm.weight",
                "1.q_scale": "attn.q_scale",
                "1.k_scale": "attn.k_scale",
                "1.to_q.weight": "attn.to_q.weight",
                "1.to_kv.weight": "attn.to_kv.weight",
                "1.to_out.weight": "attn.proj.weight",
                "3.0.weight": "mlp.norm.weight",
                "3.0.bias": "mlp.norm.bias",
                "3.1.weight": "mlp.fc1.weight",
                "3.4.weight": "mlp.fc2.weight",
            }.items():
                state[theirs + new] = ours[mine + old]
    return state
