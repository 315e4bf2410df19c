"""Encoders of BERT's kin as text towers, each saved and read as a user's would be."""

import dataclasses

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from ctclip import checkpoint, hub
from ctclip.data.volume import VolumeConfig
from ctclip.models.bert_family import BERT_FAMILY
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.text import (
    TextConfig,
    Tokenizer,
    build_text_tower,
    build_tokenizer,
    merged_state_dict,
)
from ctclip.models.vit3d import VisionConfig
from ctclip.training.dropout import make_reproducible

KINDS = sorted(BERT_FAMILY.keys() - {"cxr-bert"})
LAYERS = 3
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
OWN_NAMES = {
    "distilbert": {
        "dim": 32,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
    },
    "electra": SHAPE | {"embedding_size": 16},
    "modernbert": SHAPE
    | dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    | {"attention_dropout": 0.1, "mlp_dropout": 0.1},
    "deberta": SHAPE | DISENTANGLED,
    "deberta-v2": SHAPE | DISENTANGLED | {"norm_rel_ebd": "layer_norm"},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A small random encoder of one kind with its tokenizer, as the Hub would hold it."""
    kind = request.param
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(kind)
    tokens = Tokenizer.builtin()
    config = AutoConfig.for_model(
        kind,
        vocab_size=tokens.vocab_size,
        pad_token_id=tokens.pad_token_id,
        **OWN_NAMES.get(kind, SHAPE),
    )
    AutoModel.from_config(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(tokens.to_json())
    PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer).save_pretrained(path)
    return path


def config_of(folder, **settings):
    return TextConfig(name_or_path=str(folder), context_length=48, **settings)


def model_config(text):
    vision = VisionConfig(size="tiny", width=48, depth=1)
    return ModelConfig(embed_dim=8, vision=vision, text=text)


def trained(tower):
    return {name for name, p in tower.named_parameters() if p.requires_grad}


REPORTS = ["No nodule.", "There is a small pleural effusion on the right side, and cardiomegaly."]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_tower_is_the_library_s_encoder_pooled_and_projected(folder, pooling):
    config = config_of(folder, pooling=pooling)
    tower = build_text_tower(config, 8).eval()
    ids = build_tokenizer(config)(REPORTS[1:])

    states = (
        AutoModel.from_pretrained(folder)
        .eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        .last_hidden_state
    )
    pooled = states[:, 0] if pooling == "cls" else states.mean(dim=1)

    torch.testing.assert_close(tower(ids), pooled @ tower.proj.weight.T)


def test_padding_does_not_change_an_embedding(folder):
    config = config_of(folder)
    tower, tokenizer = build_text_tower(config, 8).eval(), build_tokenizer(config)
    ids = tokenizer(REPORTS)
    padded = torch.nn.functional.pad(ids, (0, 48 - ids.shape[1]), value=tokenizer.pad_token_id)

    torch.testing.assert_close(tower(padded), tower(ids), rtol=0, atol=1e-5)


def test_the_longest_text_that_it_takes_fits_its_positions(folder):
    tower = build_text_tower(config_of(folder), 8).eval()
    limit = tower.context_length

    assert tower(torch.full((1, limit), 7)).isfinite().all()
    if BERT_FAMILY[tower.config.model_type].positions_after_padding:
        with pytest.raises((IndexError, RuntimeError)):
            tower(torch.full((1, limit + 1), 7))


def test_the_last_layer_alone_learns_and_the_rest_drops_nothing_out(folder):
    tower = build_text_tower(config_of(folder, train="last-n", train_layers=1), 8)
    layer = f".{LAYERS - 1}."
    norms = ("transformer.final_norm.", "transformer.LayerNorm.", "transformer.encoder.ln.")

    assert any(layer in name for name in trained(tower))
    assert all(layer in name or name.startswith(("proj.", *norms)) for name in trained(tower))


def test_frozen_features_are_the_same_in_training_as_in_use(folder):
    config = config_of(folder, train="frozen")
    tower = build_text_tower(config, 8)
    ids = build_tokenizer(config)(REPORTS)

    assert trained(tower) == {"proj.weight"}
    assert torch.equal(tower.train()(ids), tower.eval()(ids))


def test_full_training_leaves_no_parameter_without_gradient(folder):
    config = config_of(folder)
    tower = build_text_tower(config, 8)
    tower(build_tokenizer(config)(REPORTS)).square().sum().backward()

    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_adapters_learn_alone_and_merge_into_plain_weights(folder):
    pytest.importorskip("peft")
    config = config_of(folder, train="lora")
    adapted = build_text_tower(config, 8)
    ids = build_tokenizer(config)(REPORTS)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = build_text_tower(config_of(folder), 8)
    before.proj.load_state_dict(adapted.proj.state_dict())

    plain = build_text_tower(config_of(folder), 8)
    plain.load_state_dict(merged_state_dict(adapted))

    assert all("lora_" in name or name == "proj.weight" for name in trained(adapted))
    torch.testing.assert_close(plain.eval()(ids), adapted.eval()(ids))
    assert not torch.allclose(plain(ids), before.eval()(ids))


def test_recomputing_activations_does_not_change_the_gradients(folder):
    text = config_of(folder, dropout=0.0)
    config = ModelConfig(
        embed_dim=8, vision=VisionConfig(size="tiny", width=48, depth=1), text=text
    )
    model = build_model(config).eval()  # dropout of a real config stays out of the comparison
    ids = build_tokenizer(text)(REPORTS)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        model.encode_text(ids).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.text.named_parameters() if p.grad is not None}

    kept = gradients()
    model.set_grad_checkpointing()
    again = gradients()

    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value)


def test_a_checkpoint_rebuilds_the_tower_without_its_folder(folder, tmp_path):
    text = config_of(folder)
    config = ModelConfig(
        embed_dim=8, vision=VisionConfig(size="tiny", width=48, depth=1), text=text
    )
    model, tokenizer = build_model(config).eval(), build_tokenizer(text)
    path = tmp_path / "model.safetensors"
    gone = dataclasses.replace(config, text=dataclasses.replace(text, name_or_path="gone/away"))
    checkpoint.save(path, model, tokenizer, gone, VolumeConfig(), {})

    loaded = checkpoint.load(path)

    ids = loaded.tokenizer(REPORTS)
    assert torch.equal(loaded.model.encode_text(ids), model.encode_text(ids))
    assert load_file(path).keys() == model.state_dict().keys()


def test_open_clip_builds_the_tower_from_a_saved_folder(folder, tmp_path):
    text = config_of(folder)
    config = model_config(text)
    model, tokenizer = build_model(config).eval(), build_tokenizer(text)
    checkpoint.save(tmp_path / "m.safetensors", model, tokenizer, config, VolumeConfig(), {})
    saved = hub.save_pretrained(checkpoint.load(tmp_path / "m.safetensors"), tmp_path / "hub")

    opened = open_clip.create_model(f"local-dir:{saved}").eval()

    ids = tokenizer(REPORTS)
    assert torch.equal(opened.encode_text(ids), model.encode_text(ids))


def test_an_encoder_without_a_pooler_says_so(folder):
    config = config_of(folder, pooling="pooler")
    kind = AutoConfig.from_pretrained(folder).model_type

    if BERT_FAMILY[kind].has_pooler:
        assert build_text_tower(config, 8).transformer.pooler is not None
    else:
        with pytest.raises(ValueError, match=f"a {kind} has no pooler layer: set text.pooling to"):
            build_text_tower(config, 8)


def test_a_model_of_another_family_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"'gpt2' is not one that ctclip takes: bert, camembert"):
        build_text_tower(TextConfig(name_or_path=None), 8, hf_config={"model_type": "gpt2"})


def test_a_text_s_dropout_is_its_own_however_the_batch_is_split(folder):
    """What exact training over processes and micro-batches rests on."""
    config = config_of(folder)
    tower = build_text_tower(config, 8).train()
    ids = build_tokenizer(config)(REPORTS * 2)
    rows = make_reproducible(tower)
    keys = torch.tensor([11, 12, 13, 14])

    def embedded(part):
        rows.keys = keys[part]
        return tower(ids[part])

    whole = embedded(slice(0, 4))
    parts = torch.cat([embedded(slice(0, 1)), embedded(slice(1, 4))])

    assert not torch.allclose(whole[0], whole[2])  # the same text under another key
    torch.testing.assert_close(parts, whole)
