import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from models_ct_clip import as_original, little_ct_clip
from safetensors.torch import load_file

from ctclip import checkpoint, cli
from ctclip.models import convert
from ctclip.models.convert import ConversionError
from ctclip.models.ctvit import CTViT

SHARED = os.environ.get("CTCLIP_TEST_DATA")
needs_fixtures = pytest.mark.skipif(
    SHARED is None, reason="set CTCLIP_TEST_DATA to the folder that holds ct-clip/fixtures"
)


class Original:
    """A recorded run of the original code: weights, inputs, outputs."""

    def __init__(self, name: str) -> None:
        folder = Path(str(SHARED)) / "ct-clip" / "fixtures" / name
        self.meta = json.loads((folder / "meta.json").read_text())
        self.state = load_file(folder / "state_dict.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.eval = load_file(folder / "outputs_eval.safetensors")
        self.train = load_file(folder / "outputs_train.safetensors")

    def convert(self):
        vit = self.meta["vit"]
        pair = lambda value: tuple(value) if isinstance(value, list) else (value, value)  # noqa: E731
        patch, image = pair(vit["patch_size"]), pair(vit["image_size"])
        converted = convert.convert(
            self.state,
            patch=(vit["temporal_patch_size"], *patch),
            grid=(image[0] // patch[0], image[1] // patch[1]),
            text_heads=self.meta["bert_config"]["num_attention_heads"],
        )
        return converted


@pytest.fixture(params=["square", "rect"])
def original(request):
    return Original(request.param)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@needs_fixtures
def test_every_stage_gives_the_originals_numbers(original):
    """Codes exactly, before the codebook to 1e-5, after it to 1e-6."""
    model, expected = original.convert().model, original.eval
    visual, image = model.visual, original.inputs["image"]
    taps = {}
    for kind in ("spatial", "temporal"):
        block = getattr(visual, kind)[0]
        for part, name in ((block.position, "peg"), (block.attn, "attn"), (block.mlp, "ff")):
            part.register_forward_hook(
                lambda _m, _i, out, tap=f"stage.{kind}_l0_{name}": taps.update({tap: out})
            )
    visual.spatial_norm.register_forward_hook(
        lambda _m, _i, out: taps.update({"stage.after_spatial": out})
    )
    visual.temporal_norm.register_forward_hook(
        lambda _m, _i, out: taps.update({"stage.after_temporal": out})
    )

    with torch.no_grad():
        continuous = visual.continuous_tokens(image)
        quantised = visual.codebook(continuous)

        patches = visual._embed(image).reshape(continuous.shape)
        close(patches, expected["stage.patch_tokens"], 1e-5)
        close(
            visual.offset_bias(*visual.grid_hw),
            expected["stage.spatial_pos_bias"],
            1e-5,
        )
        assert len(taps) == 8
        for name, value in taps.items():
            close(value, expected[name], 1e-5)
        close(continuous, expected["encoder_tokens_pre_vq"], 1e-5)
        assert torch.equal(
            visual.codebook.nearest(continuous),
            expected["codebook_ids"].reshape(quantised.shape[:-1]),
        )
        close(quantised, expected["encoder_tokens_quantized"], 1e-6)
        close(model.encode_image(image, normalize=True), expected["image_latents"], 1e-6)


@needs_fixtures
def test_text_and_scores_are_the_originals(original):
    model, expected, inputs = original.convert().model, original.eval, original.inputs
    ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 0)
    prompts = torch.where(inputs["prompt_attention_mask"].bool(), inputs["prompt_input_ids"], 0)

    with torch.no_grad():
        output = model(inputs["image"], ids)
        scale = output["logit_scale"]
        similarity = scale * output["text_features"] @ output["image_features"].T
        prompt = model.encode_text(prompts, normalize=True)

    close(output["text_features"], expected["text_latents"], 1e-6)
    close(similarity, expected["similarity_text_by_image"], 1e-6)
    logits = scale * output["image_features"] @ prompt.T
    close(logits, expected["prompt_logits"], 1e-6)
    close(logits.softmax(-1), expected["prompt_probs"], 1e-6)


@needs_fixtures
def test_a_training_step_is_the_originals(original):
    """Loss, gradients and codebook after one step, BERT without dropout."""
    converted, expected, inputs = original.convert(), original.train, original.inputs
    model = converted.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 0)

    output = model(inputs["image"], ids)
    similarity = output["logit_scale"] * output["text_features"] @ output["image_features"].T
    target = torch.arange(len(similarity))
    loss = sum(torch.nn.functional.cross_entropy(s, target) for s in (similarity, similarity.T)) / 2
    loss.backward()

    close(loss.detach().reshape(1), expected["train.loss"], 1e-5)
    parameters = dict(model.named_parameters())
    for key, gradient in expected.items():
        if key.startswith("train.grad."):
            ours = converted.matched[key.removeprefix("train.grad.")]
            close(parameters[ours].grad.reshape(gradient.shape), gradient, 1e-5)
    close(model.visual.codebook.embed[None], expected["train.codebook_embed_after"], 1e-6)
    close(model.visual.codebook.usage[None], expected["train.codebook_cluster_size_after"], 1e-6)


@needs_fixtures
def test_every_key_of_the_released_layout_is_known():
    keys = json.loads((Path(str(SHARED)) / "ct-clip/fixtures/keys_default.json").read_text())[
        "keys"
    ]
    names = [
        entry if isinstance(entry, str) else entry.get("key", entry.get("name")) for entry in keys
    ]

    assert len(names) == 361
    for name in [*names, "text_transformer.embeddings.position_ids"]:
        assert (convert._reason_to_ignore(name) or convert._renamed(name)) is not None, name


@pytest.fixture(scope="module")
def twin():
    return little_ct_clip()


BIAS = {"classifier.bias": torch.zeros(18)}
IMAGE = torch.rand(1, 1, 20, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("prefix", ["", "module.", "trained_model.", "module.trained_model."])
@pytest.mark.parametrize("outer", [None, "model", "state_dict"])
def test_wrapped_files_convert_to_the_same_model(twin, tmp_path, prefix, outer):
    state = {prefix + name: value for name, value in as_original(twin).items()}
    torch.save({outer: state} if outer else state, tmp_path / "CT-CLIP.pt")

    converted = convert.from_ct_clip(tmp_path / "CT-CLIP.pt")

    assert converted.kind == "CT-CLIP"
    assert set(converted.matched.values()) == set(twin.state_dict())
    assert torch.equal(converted.model.encode_image(IMAGE), twin.encode_image(IMAGE))
    text = torch.tensor([[2, 5, 9, 3, 0]])
    assert torch.equal(converted.model.encode_text(text), twin.encode_text(text))


def test_classfine_brings_its_head(twin, tmp_path):
    torch.manual_seed(1)
    weight, bias = torch.randn(18, 12), torch.randn(18)
    state = {f"trained_model.{name}": value for name, value in as_original(twin).items()}
    torch.save(state | {"classifier.weight": weight, "classifier.bias": bias}, tmp_path / "l.pt")

    converted = convert.from_ct_clip(tmp_path / "l.pt")

    latent = converted.model.encode_image(IMAGE, normalize=True)
    assert converted.kind == "ClassFine"
    torch.testing.assert_close(converted.head(latent), latent.relu() @ weight.T + bias)


def test_every_key_is_accounted_for(twin):
    state = as_original(twin)

    converted = convert.convert(state)

    assert set(converted.matched) | set(converted.ignored) == set(state)
    assert all(converted.ignored.values()), "each ignored key has a reason"


def test_the_command_converts_and_prints_what_became_of_every_key(
    twin, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    state = as_original(twin)
    torch.save(state, tmp_path / "CT_VocabFine_v2.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nnodule")
    out = tmp_path / "out.safetensors"

    cli.convert(["--from", "ct-clip", str(tmp_path / "CT_VocabFine_v2.pt"), "--out", str(out)])

    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    ]
    fates = {row[1]: (int(row[0]), row[2]) for row in rows}
    assert sum(count for count, _ in fates.values()) == len(state)
    assert fates["missing"] == (0, "")
    assert fates["ignored: BERT's pooler: CT-CLIP reads the CLS state before it"] == (
        1,
        "text_transformer.pooler.dense.weight",
    )
    loaded = checkpoint.load(out)
    assert loaded.provenance["kind"] == "ct-clip"
    assert loaded.provenance["label_informed"], "VocabFine was trained on labels"
    assert torch.equal(loaded.model.encode_image(IMAGE), twin.encode_image(IMAGE))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s.pop("to_visual_latent.weight"), "not a CT-CLIP checkpoint"),
        (
            lambda s: s.pop("visual_transformer.to_patch_emb.3.bias"),
            r"missing visual_transformer\.to_patch_emb\.3\.bias",
        ),
        (lambda s: s.update(surprise=torch.zeros(1)), "1 keys are not CT-CLIP's: surprise"),
        (
            lambda s: s.update({"visual_transformer.to_patch_emb.1.bias": torch.zeros(3)}),
            r"to_patch_emb\.1\.bias is \(3,\) instead of \(40,\)",
        ),
        (lambda s: s.pop("temperature"), "missing temperature"),
        (
            lambda s: s.update(temperature=torch.zeros(2)),
            r"temperature is \(2,\) instead of \(1,\)",
        ),
        (
            lambda s: s["visual_transformer.to_patch_emb.3.bias"].fill_(torch.nan),
            r"to_patch_emb\.3\.bias holds NaN or infinite",
        ),
        (
            lambda s: s.update({"classifier.weight": torch.zeros(18, 5)} | BIAS),
            r"classifier\.weight is \(18, 5\) instead of \(18, 12\)",
        ),
        (
            lambda s: s.update({"classifier.weight": torch.full((18, 12), torch.inf)} | BIAS),
            r"classifier\.weight holds NaN or infinite",
        ),
        (
            lambda s: s.update(
                {"visual_transformer.enc_spatial_transformer.norm_out.beta": torch.ones(24)}
            ),
            "is not zero",
        ),
    ],
)
def test_anything_else_is_refused(twin, damage, words):
    state = {key: value.clone() for key, value in as_original(twin).items()}
    damage(state)

    with pytest.raises(ConversionError, match=words):
        convert.convert(state)


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (Path("unpickled").touch, ())


def test_no_code_of_a_file_is_run(twin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(as_original(twin) | {"optimizer": Evil()}, "bad.pt")
    Path("worse.pt").write_bytes(pickle.dumps(Evil()))

    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(ConversionError, match="which ctclip never does") as refused:
            convert.from_ct_clip(name)
        assert "weights_only" not in str(refused.value), "torch advises to run the file"

    assert not Path("unpickled").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"not a checkpoint at all"])
def test_a_damaged_file_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content)

    with pytest.raises(ConversionError, match="damaged"):
        convert.from_ct_clip(path)


def test_a_file_that_is_cut_short_is_refused(twin, tmp_path):
    torch.save(as_original(twin), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:20_000])

    with pytest.raises(ConversionError, match=r"cut\.pt is not a readable file.*cut short"):
        convert.from_ct_clip(tmp_path / "cut.pt")


def test_two_models_in_one_file_are_refused(twin, tmp_path):
    state = as_original(twin)
    torch.save(state | {"module.temperature": torch.zeros(())}, tmp_path / "two.pt")

    with pytest.raises(ConversionError, match=r"both temperature and module\.temperature"):
        convert.from_ct_clip(tmp_path / "two.pt")


@pytest.fixture
def released(twin, tmp_path):
    """The file with its tokenizer beside it."""
    torch.save(as_original(twin), tmp_path / "CT-CLIP_v2.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nnodule")
    return tmp_path / "CT-CLIP_v2.pt"


def test_without_out_the_checkpoint_goes_beside_the_source_and_replaces_nothing(released, capsys):
    cli.convert([str(released)])

    written = released.with_suffix(".safetensors")
    assert f"wrote {written}" in capsys.readouterr().out
    assert checkpoint.load(written).provenance["source"] == "CT-CLIP_v2.pt"
    with pytest.raises(SystemExit):
        cli.convert([str(released)])
    assert f"{written} exists; name the file to write with --out" in capsys.readouterr().err


def test_a_name_that_could_not_be_read_again_is_refused(released, capsys):
    with pytest.raises(SystemExit):
        cli.convert([str(released), "--out", str(released.parent / "o.pt")])

    assert "end it in .safetensors" in capsys.readouterr().err
    assert not (released.parent / "o.pt").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.pt")

    with pytest.raises(ConversionError, match="epoch are no tensors"):
        convert.from_ct_clip(tmp_path / "other.pt")


def test_ctvit_still_gives_the_numbers_it_was_checked_with():
    """Recorded from this code when the original's recordings passed; guards later changes."""
    recorded = load_file(Path(__file__).parent / "ctvit_recorded.safetensors")
    model = CTViT(
        embed_dim=12,
        image_size=(12, 8),
        patch=(2, 4, 2),
        width=24,
        spatial_depth=2,
        temporal_depth=1,
        heads=2,
        head_dim=4,
        codes=32,
    ).eval()
    outputs = {key: recorded.pop(key) for key in ("image", "embedding", "ids", "continuous")}
    model.load_state_dict(recorded)

    with torch.no_grad():
        continuous = model.continuous_tokens(outputs["image"])
        close(continuous, outputs["continuous"], 1e-5)
        assert torch.equal(model.codebook.nearest(continuous), outputs["ids"])
        close(model(outputs["image"]), outputs["embedding"], 1e-6)
