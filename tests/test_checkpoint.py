import dataclasses
import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from ctclip import checkpoint
from ctclip.checkpoint import CheckpointError
from ctclip.data.volume import VolumeConfig
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.head import LinearHead
from ctclip.models.text import TextConfig, Tokenizer
from ctclip.models.vit3d import VisionConfig

CONFIG = ModelConfig(
    embed_dim=24,
    vision=VisionConfig(size="tiny", width=48, depth=1, heads=2, patch=(4, 8, 8)),
    text=TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64),
)
VOLUMES = VolumeConfig(spacing_mm=(6.0, 4.0, 4.0), size=(8, 16, 16))
IMAGE = torch.rand(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "run" / "model.safetensors"
    checkpoint.save(path, model, Tokenizer.builtin(64), CONFIG, VOLUMES, {"step": 7})
    return path


def rewritten(path, change_tensors=None, change_header=None):
    """The same checkpoint with something wrong in it."""
    tensors = load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["ctclip"])
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        change_header(header)
    save_file(tensors, path, metadata | {"ctclip": json.dumps(header)})
    return path


def test_a_checkpoint_reloads_bit_equal(model, saved):
    loaded = checkpoint.load(saved)
    text = loaded.tokenizer(["No nodule.", "Pleural effusion is present."])
    model.eval()

    again, before = loaded.model(IMAGE, text), model(IMAGE, text)

    assert not loaded.model.training
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert (loaded.model_config, loaded.volume_config) == (CONFIG, VOLUMES)
    assert loaded.provenance == {"step": 7}


def test_a_model_with_rotary_positions_reloads_with_its_frequencies(tmp_path):
    vision = dataclasses.replace(CONFIG.vision, positions="rotary")
    config = dataclasses.replace(CONFIG, vision=vision)
    model = build_model(config).eval()
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, Tokenizer.builtin(64), config, VOLUMES, {})

    assert torch.equal(checkpoint.load(path).model.encode_image(IMAGE), model.encode_image(IMAGE))


def test_copying_another_file_over_a_loaded_one_does_not_change_the_model(saved):
    loaded = checkpoint.load(saved)
    before = loaded.model.encode_image(IMAGE)
    with saved.open("r+b") as file:
        size = saved.stat().st_size
        file.seek(size // 4)
        file.write(bytes(size - size // 4))

    assert torch.equal(loaded.model.encode_image(IMAGE), before)


def test_a_file_in_half_precision_loads_as_a_model_in_fp32(saved):
    def halve(tensors):
        tensors |= {name: value.half() for name, value in tensors.items()}

    model = checkpoint.load(rewritten(saved, change_tensors=halve)).model

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_saving_twice_gives_the_same_bytes_hence_the_same_hash(model, saved, tmp_path):
    other = tmp_path / "other.safetensors"
    checkpoint.save(other, model, Tokenizer.builtin(64), CONFIG, VOLUMES, {"step": 7})

    assert checkpoint.load(saved).sha256 == checkpoint.load(other).sha256


def test_nothing_but_the_finished_file_is_left(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]


def test_a_failed_save_keeps_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))

    with pytest.raises(OSError, match="full"):
        checkpoint.save(saved, model, Tokenizer.builtin(64), CONFIG, VOLUMES, {})

    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="ctclip-pretrain"):
        checkpoint.load(tmp_path / "nothing.safetensors")


def test_a_cut_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        checkpoint.load(saved)


def test_weights_without_a_description_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")

    with pytest.raises(CheckpointError, match="not ctclip's description"):
        checkpoint.load(tmp_path / "bare.safetensors")


def test_missing_and_surplus_and_misshapen_weights_are_named(saved):
    def damage(tensors):
        tensors["surplus"] = torch.zeros(1)
        del tensors["visual.norm.weight"]
        tensors["logit_scale"] = torch.zeros(2)

    with pytest.raises(CheckpointError) as error:
        checkpoint.load(rewritten(saved, change_tensors=damage))

    for words in ("missing visual.norm.weight", "unexpected surplus", "logit_scale is (2,)"):
        assert words in str(error.value)


def test_a_config_of_another_version_is_refused_in_words(saved):
    def damage(header):
        header["model"]["vision"]["colour"] = "blue"

    with pytest.raises(CheckpointError, match=r"unknown config key vision\.colour.*written by"):
        checkpoint.load(rewritten(saved, change_header=damage))


def test_a_newer_format_is_refused(saved):
    with pytest.raises(CheckpointError, match="upgrade ctclip"):
        checkpoint.load(rewritten(saved, change_header=lambda header: header.update(format=99)))


def test_volumes_of_other_preprocessing_are_refused(saved):
    loaded = checkpoint.load(saved)
    loaded.require_volumes(dataclasses.replace(VOLUMES, windows_hu=((-160.0, 240.0),)))

    with pytest.raises(ValueError, match=r"spacing_mm \[6\.0, 4\.0, 4\.0\] in the checkpoint"):
        loaded.require_volumes(dataclasses.replace(VOLUMES, spacing_mm=(2.0, 2.0, 2.0)))


def test_a_classifier_travels_with_its_model(model, tmp_path):
    torch.manual_seed(1)
    head, path = LinearHead(24, ["Emphysema", "Lung nodule"]), tmp_path / "probed.safetensors"
    checkpoint.save(path, model, Tokenizer.builtin(64), CONFIG, VOLUMES, {}, head)

    loaded = checkpoint.load(path)

    embeddings = loaded.model.encode_image(IMAGE, normalize=True)
    assert loaded.head.findings == ("Emphysema", "Lung nodule")
    assert torch.equal(loaded.head(embeddings), head(embeddings))


def test_a_model_for_other_windows_is_not_saved(model, tmp_path):
    two = dataclasses.replace(VOLUMES, windows_hu=((-1000.0, 1000.0), (-160.0, 240.0)))

    with pytest.raises(ValueError, match="2 HU windows, the model takes 1"):
        checkpoint.save(tmp_path / "m.safetensors", model, Tokenizer.builtin(64), CONFIG, two, {})


@pytest.fixture
def ct_clip_file(tmp_path):
    """A little CT-CLIP in the original's layout, and the directory of its tokenizer."""
    from models_ct_clip import as_original, little_ct_clip

    (tmp_path / "bert").mkdir()
    words = [f"word{i}" for i in range(20)]
    (tmp_path / "bert" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    model = little_ct_clip()
    torch.save(as_original(model), tmp_path / "CT-CLIP_v2.pt")
    return tmp_path / "CT-CLIP_v2.pt", str(tmp_path / "bert"), model


def test_a_file_of_ct_clip_loads_with_its_own_preprocessing(ct_clip_file):
    path, tokenizer, original = ct_clip_file

    loaded = checkpoint.load(path, tokenizer=tokenizer)

    image = torch.zeros(1, 1, 20, 8, 8)
    assert torch.equal(loaded.model.encode_image(image), original.encode_image(image))
    assert loaded.volume_config.recipe == "ct-clip-inference"
    assert loaded.volume_config.size == (240, 8, 8)
    assert loaded.provenance["kind"] == "ct-clip"
    assert not loaded.provenance["label_informed"]
    assert loaded.tokenizer(["word3 word5"]).tolist() == [[2, 8, 10, 3]]


def test_a_vocabulary_beside_the_file_is_taken(ct_clip_file, tmp_path):
    path, tokenizer, _ = ct_clip_file
    (tmp_path / "vocab.txt").write_text((tmp_path / "bert" / "vocab.txt").read_text())

    beside, named = checkpoint.load(path), checkpoint.load(path, tokenizer=tokenizer)

    assert beside.tokenizer.to_json() == named.tokenizer.to_json()


def test_without_a_network_it_is_said_where_a_vocabulary_goes(ct_clip_file):
    path, _, _ = ct_clip_file

    with pytest.raises(FileNotFoundError, match=r"vocab\.txt beside it, or .* with --tokenizer"):
        checkpoint.load(path)


def test_a_converted_file_is_an_ordinary_checkpoint(ct_clip_file, tmp_path):
    path, tokenizer, original = ct_clip_file

    account = checkpoint.convert_ct_clip(path, tmp_path / "out.safetensors", tokenizer=tokenizer)
    loaded = checkpoint.load(tmp_path / "out.safetensors")

    image = torch.zeros(1, 1, 20, 8, 8)
    assert torch.equal(loaded.model.encode_image(image), original.encode_image(image))
    assert loaded.provenance["source"] == "CT-CLIP_v2.pt"
    assert account.ignored


def test_a_tokenizer_of_another_model_is_refused(ct_clip_file, tmp_path):
    path, tokenizer, _ = ct_clip_file
    vocabulary = tmp_path / "bert" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text() + "\n".join(["", *map(str, range(99_000))]))

    with pytest.raises(CheckpointError, match="belongs to another model"):
        checkpoint.load(path, tokenizer=tokenizer)


def test_a_tokenizer_that_pads_with_another_word_is_refused(ct_clip_file, tmp_path):
    """The tower would read its padding: a prompt's embedding would change with its batch."""
    path, tokenizer, _ = ct_clip_file
    words = (tmp_path / "bert" / "vocab.txt").read_text().split("\n")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join([words[1], words[0], *words[2:]]))

    with pytest.raises(CheckpointError, match="pads with 1, the text tower of .* with 0"):
        checkpoint.load(path, tokenizer=tokenizer)


def test_something_else_called_pt_is_refused_as_a_checkpoint(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.pt")

    with pytest.raises(CheckpointError, match="epoch are no tensors"):
        checkpoint.load(tmp_path / "other.pt")


def test_adapters_are_merged_so_that_reading_needs_no_peft(tmp_path):
    pytest.importorskip("peft")
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, train="lora"))
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "lora.safetensors"
    checkpoint.save(path, model, Tokenizer.builtin(64), config, VOLUMES, {})

    loaded = checkpoint.load(path)

    text = loaded.tokenizer(["no nodule"])
    assert not any("lora" in name for name in loaded.model.state_dict())
    torch.testing.assert_close(loaded.model.encode_text(text), model.encode_text(text))
