"""The packaged tokenizer: whole radiology words, and characters for every other word.

A general vocabulary shatters "bronchiectasis" into five pieces; small runs then spend their time on
spelling. Here each word of ``tokenizer/words.txt`` is one token, common endings are pieces, and any
other word falls apart into characters, so that nothing is ever unknown. No corpus is involved.
"""

import string
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

WORDS = Path(__file__).parent / "tokenizer" / "words.txt"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ENDINGS = (
    *("s", "es", "ed", "ing", "ly", "al", "ic", "ous", "ary", "ar", "ion", "ions", "ation", "sis"),
    *("ses", "tic", "itis", "oma", "omas", "osis", "ectasis", "ectasia", "ectomy", "ity", "ities"),
    *(
        "ness",
        "ment",
        "able",
        "er",
        "est",
        "ia",
        "ium",
        "um",
        "us",
        "ogram",
        "graphy",
        "ous",
        "ive",
    ),
)


def read_words(path: Path = WORDS) -> list[str]:
    """The words of a list, in order, each once; lines that start with # are comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    words = (word for line in lines if not line.startswith("#") for word in line.split())
    return list(dict.fromkeys(words))


def build(words: Sequence[str]) -> tokenizers.Tokenizer:
    """Make a lower-casing WordPiece tokenizer that knows these words.

    Args:
        words: Lower-case words; their order decides their ids.

    Returns:
        A tokenizer that puts [CLS] before and [SEP] after each text.
    """
    characters = sorted(
        set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase)
    )
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters)]
    pieces += [f"##{ending}" for ending in ENDINGS] + list(words)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer
