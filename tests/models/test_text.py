import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from transformers import BertConfig, BertModel

from ctclip.models import wordpiece
from ctclip.models.text import (
    BUILTIN_TOKENIZER,
    TextConfig,
    Tokenizer,
    build_text_tower,
    build_tokenizer,
    merged_state_dict,
)

LITTLE = {"width": 32, "layers": 3, "heads": 2, "context_length": 64}


def little(**settings):
    return TextConfig(name_or_path=None, **(LITTLE | settings))


@pytest.fixture(scope="module")
def bert_directory(tmp_path_factory):
    """A BERT on disk as CXR-BERT's is: an unknown model type, heads of its own, half precision."""
    folder = tmp_path_factory.mktemp("cxr-bert")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pleural", "effusion", "no", "."]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).half().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "model_type": "cxr-bert",
        "architectures": ["CXRBertModel"],
        "auto_map": {"AutoConfig": "configuration_cxrbert.CXRBertConfig"},
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return folder


def test_prompts_are_padded_to_the_longest_and_not_further():
    ids = Tokenizer.builtin()(["Nodule.", "There is no pleural effusion."])

    assert ids.shape == (2, 8)
    assert ids[0, 4:].eq(Tokenizer.builtin().pad_token_id).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_padding_to_512_gives_the_same_embedding(pooling):
    torch.manual_seed(0)
    tower = build_text_tower(little(pooling=pooling, context_length=512), 16).eval()
    tokenizer = Tokenizer.builtin()
    ids = tokenizer(["Cardiomegaly is present.", "There is a 7 mm nodule in the right upper lobe."])
    padded = torch.full((2, 512), tokenizer.pad_token_id)
    padded[:, : ids.shape[1]] = ids

    torch.testing.assert_close(tower(ids), tower(padded), rtol=0, atol=1e-5)


WORDS = ["no", "pleural", "effusion", "on", "the", "right", "side", "and", "small", "nodule"]


def words_kept(truncation: str, draw: float | None = None) -> list[str]:
    """Which of ten words stay where six fit between [CLS] and [SEP]."""
    tokenizer = Tokenizer.builtin(8, truncation)
    word_of = {int(tokenizer(word)[0, 1]): word for word in WORDS}
    draws = None if draw is None else [draw]
    ids = tokenizer([" ".join(WORDS)], draws=draws)[0].tolist()
    ends = tokenizer("x")[0].tolist()
    assert [ids[0], ids[-1]] == [ends[0], ends[-1]]
    assert (tokenizer.truncated, tokenizer.tokens_cut) == (1, 4)
    return [word_of[number] for number in ids[1:-1]]


def test_long_texts_are_cut_as_the_user_says_and_counted():
    assert words_kept("head") == WORDS[:6]
    assert words_kept("head-tail") == WORDS[:3] + WORDS[-3:]
    assert words_kept("sample") == WORDS[:6]
    windows = {tuple(words_kept("sample", draw)) for draw in np.linspace(0, 0.999, 30)}
    assert windows == {tuple(WORDS[start : start + 6]) for start in range(5)}


def test_what_will_be_cut_is_counted_beforehand():
    tokenizer = Tokenizer.builtin(8)
    found = tokenizer.lengths([" ".join(WORDS), "no effusion", "nodule"])
    assert (found.num_texts, found.num_truncated) == (3, 1)
    assert (found.num_tokens, found.num_cut) == (12 + 4 + 3, 4)
    assert found.truncated_share == pytest.approx(1 / 3)
    assert found.cut_share == pytest.approx(4 / 19)
    assert tokenizer.truncated == 0


def test_cutting_is_what_other_programs_do_with_the_json():
    tokenizer = Tokenizer.builtin(8)
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert theirs.encode(" ".join(WORDS)).ids == tokenizer(" ".join(WORDS))[0].tolist()


def test_one_text_is_a_batch_of_one_and_no_text_is_none():
    assert Tokenizer.builtin()("nodule").shape[0] == 1
    assert Tokenizer.builtin()([]).shape == (0, 0)


def test_something_other_than_text_is_refused():
    with pytest.raises(TypeError, match="expected text, got float"):
        Tokenizer.builtin()(["nodule", float("nan")])


def test_a_tokenizer_survives_its_json():
    tokenizer = Tokenizer.builtin(32)

    again = Tokenizer(tokenizer.to_json(), 32)

    text = ["Bilateral bronchiectasis; 12 mm, xyz."]
    assert torch.equal(again(text), tokenizer(text))


def test_json_that_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"not the contents of a tokenizer\.json"):
        Tokenizer("{}")


def test_the_packaged_tokenizer_is_built_from_the_packaged_words():
    built = wordpiece.build(wordpiece.read_words())

    assert json.loads(built.to_str()) == json.loads(BUILTIN_TOKENIZER.read_text())


def test_words_of_radiology_are_whole_and_other_words_are_spelt():
    tokenizer = wordpiece.build(wordpiece.read_words())

    assert tokenizer.encode("Bronchiectasis").tokens == ["[CLS]", "bronchiectasis", "[SEP]"]
    assert tokenizer.encode("Zqj").tokens[1:-1] == ["z", "##q", "##j"]
    assert "[UNK]" not in tokenizer.encode("".join(map(chr, range(33, 127)))).tokens


def trained(tower):
    return {name for name, p in tower.named_parameters() if p.requires_grad}


def test_frozen_text_learns_its_projection_only():
    tower = build_text_tower(little(train="frozen"), 16)

    assert trained(tower) == {"proj.weight"}


def test_frozen_means_frozen_in_training_mode_too():
    """No dropout: what can't learn gives the same features in training as in use."""
    tower = build_text_tower(little(train="frozen", dropout=0.5), 16)
    ids = Tokenizer.builtin()("no nodule")

    assert torch.equal(tower.train()(ids), tower.eval()(ids))


def test_last_n_opens_the_last_layers():
    tower = build_text_tower(little(train="last-n", train_layers=1), 16)

    assert {name.split(".")[3] for name in trained(tower) if "layer" in name} == {"2"}
    assert not any("embeddings" in name for name in trained(tower))


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"train_layers is 9; this BERT has 3"):
        build_text_tower(little(train="last-n", train_layers=9), 16)


def test_full_training_leaves_no_parameter_without_gradient():
    for pooling in ("cls", "mean", "pooler"):
        tower = build_text_tower(little(pooling=pooling), 16)
        tower(Tokenizer.builtin()(["no nodule", "effusion"])).sum().backward()
        assert [name for name, p in tower.named_parameters() if p.grad is None] == [], pooling


def test_no_layers_make_a_bag_of_words():
    tower = build_text_tower(little(layers=0, pooling="mean"), 16).eval()

    assert tower(Tokenizer.builtin()(["no nodule"])).shape == (1, 16)


def test_adapters_learn_and_merge_into_plain_weights():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = build_text_tower(little(train="lora"), 16)
    ids = Tokenizer.builtin()(["no pleural effusion"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    plain = build_text_tower(little(), 16)
    plain.load_state_dict(merged_state_dict(adapted))

    assert all("lora_" in name or name == "proj.weight" for name in trained(adapted))
    torch.testing.assert_close(plain.eval()(ids), adapted.eval()(ids))


def test_a_bert_of_a_directory_is_loaded_in_full_precision(bert_directory):
    config = TextConfig(name_or_path=str(bert_directory), context_length=32)

    tower = build_text_tower(config, 8).eval()
    ids = build_tokenizer(config)(["no pleural effusion."])

    reference = BertModel.from_pretrained(bert_directory).float().eval()
    expected = reference(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    torch.testing.assert_close(tower(ids), expected @ tower.proj.weight.T)
    assert ids.tolist() == [[2, 7, 5, 6, 8, 3]]


def test_more_context_than_positions_is_refused(bert_directory):
    config = TextConfig(name_or_path=str(bert_directory), context_length=64)

    with pytest.raises(ValueError, match="context_length is 64, but this BERT has 32 positions"):
        build_text_tower(config, 8)


def test_a_roberta_reads_as_many_tokens_as_it_has_positions_behind_the_padding():
    roberta = {"model_type": "roberta", "vocab_size": 9, "pad_token_id": 1, "hidden_size": 16}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 34}
    config = TextConfig(name_or_path=None, context_length=32)

    tower = build_text_tower(config, 8, hf_config=roberta | shape)

    assert tower.context_length == 32
    tower(torch.full((1, 32), 5))  # one more has no position


def test_a_tokenizer_that_pads_otherwise_than_its_bert_is_refused(bert_directory, tmp_path):
    shutil.copytree(bert_directory, tmp_path / "bert")
    words = (bert_directory / "vocab.txt").read_text().split("\n")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join([words[1], words[0], *words[2:]]))

    with pytest.raises(ValueError, match="pads with 1, the text tower of .* with 0"):
        build_tokenizer(TextConfig(name_or_path=str(tmp_path / "bert"), context_length=32))


def test_a_directory_without_a_bert_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no Hugging Face config\.json"):
        build_text_tower(TextConfig(name_or_path=str(tmp_path)), 8)


def test_a_model_that_cannot_be_found_is_explained(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", unreachable)

    with pytest.raises(FileNotFoundError, match="name its directory instead"):
        build_text_tower(TextConfig(name_or_path="somebody/some-bert"), 8)
