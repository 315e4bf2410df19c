import numpy as np
import pytest
import torch

from ctclip.evaluation import prompts
from ctclip.findings import FINDINGS


class HashingModel(torch.nn.Module):
    """Encodes each text as a fixed random unit vector; counts what it encodes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def encode_text(self, tokens, normalize=False):
        self.seen += len(tokens)
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(int(t))) for t in tokens]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def tokenizer(texts):
    import zlib

    return torch.tensor([zlib.crc32(text.encode()) for text in texts])


def test_ct_clip_prompts_are_the_published_pair():
    loaded = prompts.load("ct-clip")
    assert list(loaded.pairs) == list(FINDINGS)
    assert loaded.pairs["Lung nodule"] == (
        ("Lung nodule is present.", "Lung nodule is not present."),
    )


@pytest.mark.parametrize("name", ["ct-clip", "default", "synonyms"])
def test_shipped_sets_cover_every_finding_and_never_say_the_same_twice(name):
    loaded = prompts.load(name)
    for pairs in loaded.pairs.values():
        assert all(present != absent for present, absent in pairs)
        assert len(set(pairs)) == len(pairs)


def test_the_hash_follows_the_words():
    assert prompts.load("default").hash != prompts.load("ct-clip").hash
    assert prompts.load("default").hash == prompts.load("default").hash


def test_an_ensemble_is_the_normalised_mean_of_its_sentences_each_encoded_once(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "templates:\n"
        "- {present: '{Finding}.', absent: 'No {finding}.'}\n"
        "- {present: 'There is {finding}.', absent: 'No {finding}.'}\n"
    )
    model = HashingModel()
    encoded = prompts.encode(model, tokenizer, prompts.load(path))
    assert encoded.shape == (18, 2, 8)
    assert model.seen == 18 * 3
    parts = model.encode_text(tokenizer(["Emphysema.", "There is emphysema."]))
    expected = parts.mean(0) / parts.mean(0).norm()
    np.testing.assert_allclose(encoded[FINDINGS.index("Emphysema"), 0], expected, atol=1e-6)


def test_mistakes_in_a_prompt_file_are_named(tmp_path):
    path = tmp_path / "p.yaml"
    for text, message in [
        ("templates: [{present: x}]", "has present and absent"),
        ("template: []", "unknown key 'template'"),
        ("templates: []", "no prompts for 'Medical material'"),
        ("templates: [{present: '{disease}', absent: y}]", "can be filled in"),
        ("{templates: [{present: x, absent: y}], synonyms: {Flu: [a]}}", "'Flu' is not a finding"),
    ]:
        path.write_text(text)
        with pytest.raises(prompts.PromptError, match=message):
            prompts.load(path)
    with pytest.raises(FileNotFoundError, match="ctclip ships ct-clip, default"):
        prompts.load("deafult")


def test_direction_spread_tells_a_shared_axis_from_separate_ones():
    separate = np.stack([np.eye(4)[:3], np.zeros((3, 4))], axis=1)
    shared = np.stack([np.ones((3, 4)), np.zeros((3, 4))], axis=1)
    assert prompts.direction_spread(separate) == pytest.approx(0.0)
    assert prompts.direction_spread(shared) == pytest.approx(1.0)
