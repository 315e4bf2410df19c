import shutil

import pytest
import torch

import ctclip
from ctclip import checkpoint, hub
from ctclip.checkpoint import CheckpointError
from ctclip.data.volume import VolumeConfig
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.head import LinearHead
from ctclip.models.text import TextConfig, Tokenizer
from ctclip.models.vit3d import VisionConfig

IMAGE = torch.rand(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def made(tmp_path, head=None, **vision):
    torch.manual_seed(0)
    shape = {"size": "tiny", "width": 48, "depth": 1, "heads": 2, "patch": (4, 8, 8)}
    config = ModelConfig(
        embed_dim=24,
        vision=VisionConfig(**(shape | vision)),
        text=TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64),
    )
    path = tmp_path / "model.safetensors"
    volumes = VolumeConfig(spacing_mm=(6.0, 4.0, 4.0), size=(8, 16, 16))
    known = {"step": 7, "git_commit": "abc", "label_informed": False}
    checkpoint.save(path, build_model(config), Tokenizer.builtin(64), config, volumes, known, head)
    return checkpoint.load(path)


def embeddings(loaded):
    text = loaded.tokenizer(["No nodule.", "Emphysema is present."])
    with torch.no_grad():
        return loaded.model(IMAGE, text)


def test_a_saved_model_comes_back_bit_equal_wherever_it_lies(tmp_path):
    before = made(tmp_path)
    hub.save_pretrained(before, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")

    after = hub.from_pretrained(tmp_path / "there")

    again, was = embeddings(after), embeddings(before)
    assert all(torch.equal(again[name], was[name]) for name in was)
    assert (after.model_config, after.volume_config) == (before.model_config, before.volume_config)
    assert after.provenance == before.provenance


def test_open_clip_builds_the_same_model_from_the_folder(tmp_path):
    import open_clip

    import ctclip.models.open_clip  # noqa: F401  registers the towers

    before = made(tmp_path)
    folder = hub.save_pretrained(before, tmp_path / "hub")

    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True).eval()

    text = before.tokenizer(["No nodule."])
    with torch.no_grad():
        assert torch.equal(model.encode_image(IMAGE), before.model.encode_image(IMAGE))
        assert torch.equal(model.encode_text(text), before.model.encode_text(text))


def test_transformers_reads_the_folders_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    before = made(tmp_path)
    folder = hub.save_pretrained(before, tmp_path / "hub")

    theirs = AutoTokenizer.from_pretrained(folder)("No pleural effusion.")["input_ids"]

    assert theirs == before.tokenizer("No pleural effusion.")[0].tolist()


def test_a_name_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    folder = hub.save_pretrained(made(tmp_path), tmp_path / "hub", repo_id="someone/model")
    asked = []

    def download(name):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    assert hub.from_pretrained("someone/model").provenance["step"] == 7
    assert asked == ["someone/model"]


def test_a_name_that_leads_nowhere_is_explained(monkeypatch):
    def unreachable(_name):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)

    with pytest.raises(FileNotFoundError, match="not reachable on the Hugging Face Hub"):
        hub.from_pretrained("someone/nothing")


def test_two_read_outs_and_a_classifier_survive(tmp_path):
    torch.manual_seed(1)
    before = made(tmp_path, head=LinearHead(24, ["Emphysema"]), readouts=2)

    after = hub.from_pretrained(hub.save_pretrained(before, tmp_path / "hub"))

    was = before.model.encode_image_readouts(IMAGE)
    again = after.model.encode_image_readouts(IMAGE)
    assert all(torch.equal(again[name], was[name]) for name in was)
    assert torch.equal(after.head.linear.weight, before.head.linear.weight)


def test_the_card_says_how_the_model_was_made(tmp_path):
    folder = hub.save_pretrained(made(tmp_path), tmp_path / "hub", licence="apache-2.0")

    card = (folder / "README.md").read_text()

    for words in (
        "license: apache-2.0",
        "6 x 4 x 4 mm",
        "| git commit | abc |",
        "labels of the scored findings were used | no",
        "not a\nmedical device",
    ):
        assert words in card


def test_the_card_names_the_library_that_opens_the_folder(tmp_path):
    one = hub.model_card(made(tmp_path), "someone/model")
    two = hub.model_card(made(tmp_path, readouts=2), "someone/model")

    for card in (one, two):
        assert "library_name: open_clip" in card
        assert 'create_model("hf-hub:someone/model")' in card
    assert "not the reports' read-out" in two
    assert "read-out" not in one


@pytest.mark.parametrize(
    "known", [{"kind": "ct-clip"}, {"step": 3, "started_from": {"kind": "ct-clip"}}]
)
def test_the_card_of_ct_clips_weights_and_what_grew_from_them_has_their_licence(tmp_path, known):
    loaded = made(tmp_path)
    assert "license: unknown" in hub.model_card(loaded, "a/b")
    loaded.provenance = known

    assert "license: cc-by-nc-sa-4.0" in hub.model_card(loaded, "a/b")
    assert "license: mit" in hub.model_card(loaded, "a/b", "mit")


def test_a_folder_is_a_checkpoint_to_every_command(tmp_path):
    before = made(tmp_path)
    folder = hub.save_pretrained(before, tmp_path / "hub")

    loaded, scanner = checkpoint.load(folder), ctclip.load(folder)

    assert torch.equal(loaded.model.encode_image(IMAGE), before.model.encode_image(IMAGE))
    assert scanner.checkpoint.sha256 == loaded.sha256


@pytest.mark.parametrize("part", ["open_clip_model.safetensors", "open_clip_config.json"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_folder_is_refused_by_the_part_that_is(tmp_path, part, kept):
    folder = hub.save_pretrained(made(tmp_path), tmp_path / "hub")
    (folder / part).write_bytes((folder / part).read_bytes()[:kept])

    with pytest.raises(CheckpointError, match=rf"{part} can't be read .* copy or download"):
        hub.from_pretrained(folder)


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    folder = hub.save_pretrained(made(tmp_path), tmp_path / "hub")
    (folder / "tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        hub.from_pretrained(folder)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no saved model: it holds no open_clip_config"):
        hub.from_pretrained(tmp_path)
