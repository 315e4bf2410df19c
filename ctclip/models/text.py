"""The text tower: a BERT of Hugging Face through open_clip's ``HFTextEncoder``, and its tokenizer.

This module is the one seam to open_clip's text side and to transformers. B texts, L tokens, E
embedding width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ctclip.config import require_at_least
from ctclip.models.bert_family import hf_config_of, layout_of
from ctclip.models.ctvit import Codebook

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder

CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"
"""Default for real runs: BERT pretrained on radiology reports (Boecking et al. 2022)."""

BUILTIN_TOKENIZER = Path(__file__).parent / "tokenizer" / "tokenizer.json"
"""Small WordPiece vocabulary of radiology words that ships with the package."""

Truncation = Literal["head", "head-tail", "sample"]

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler", "pooler": "cls_pooler"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower and how much of it learns."""

    name_or_path: str | None = CXR_BERT
    """A Hugging Face name or a local directory; None builds a small random BERT (next three)."""

    width: int = 128
    layers: int = 2
    """0 makes a bag of words: token embeddings and pooling only."""
    heads: int = 4

    pooling: Literal["cls", "mean", "pooler"] = "cls"
    """CLS token's last state (CT-CLIP's), mean over tokens, or BERT's own pooler layer."""

    context_length: int = 512
    """Longest text in tokens."""

    truncation: Truncation = "head"
    """What stays of a longer text: its beginning; its two ends, half and half, which keeps the
    impression (Sun et al. 2019); or a window drawn anew in every training step (elsewhere the
    beginning). With ``text.shuffle_sentences`` the beginning is a random choice of sentences."""

    dropout: float = 0.1

    train: Literal["frozen", "last-n", "lora", "full"] = "full"
    """What of BERT learns; the projection into the joint space always does."""

    train_layers: int = 4
    """Layers that learn with ``train="last-n"``."""

    lora_rank: int = 8
    """Rank of the adapters with ``train="lora"``."""

    def __post_init__(self) -> None:
        require_at_least(self, "text.", 1, "width", "heads", "train_layers", "lora_rank")
        require_at_least(self, "text.", 0, "layers")
        require_at_least(self, "text.", 3, "context_length")  # two special tokens and a word
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"text.dropout must be in [0, 1), got {self.dropout}")
        if self.width % self.heads:
            raise ValueError(
                f"text.width ({self.width}) must be a multiple of text.heads ({self.heads})"
            )


@dataclass(frozen=True)
class TextLengths:
    """How much of some texts lies beyond a tokenizer's limit."""

    num_texts: int
    num_truncated: int
    num_tokens: int
    num_cut: int
    """Tokens that are left out."""

    def __add__(self, other: "TextLengths") -> "TextLengths":
        """Of both together."""
        return TextLengths(
            self.num_texts + other.num_texts,
            self.num_truncated + other.num_truncated,
            self.num_tokens + other.num_tokens,
            self.num_cut + other.num_cut,
        )

    @property
    def truncated_share(self) -> float:
        """Of the texts."""
        return self.num_truncated / max(1, self.num_texts)

    @property
    def cut_share(self) -> float:
        """Of the tokens."""
        return self.num_cut / max(1, self.num_tokens)


class Tokenizer:
    """Text to token ids, padded to the longest text of the batch and never further.

    Attributes:
        context_length: Longest output in tokens.
        truncation: What stays of a longer text.
        pad_token_id: Id that fills shorter texts; the text tower masks it.
        vocab_size: Number of ids.
        truncated: How many texts were cut since the tokenizer was made.
        tokens_cut: How many tokens these lost.
    """

    def __init__(
        self, tokenizer_json: str, context_length: int = 512, truncation: Truncation = "head"
    ) -> None:
        """Build from the contents of a ``tokenizer.json``.

        Raises:
            ValueError: If it isn't a tokenizer or has no padding token.
        """
        import tokenizers

        if "model" not in json.loads(tokenizer_json):
            raise ValueError("not the contents of a tokenizer.json: it has no key 'model'")
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        known = self._tokenizer.get_vocab()
        names = [token for token in ("[PAD]", "<pad>") if token in known]
        if not names:
            raise ValueError("tokenizer has neither [PAD] nor <pad>; give one with a padding token")
        self.pad_token = names[0]
        self.pad_token_id: int = known[self.pad_token]
        self.context_length = context_length
        self.truncation: Truncation = truncation
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.truncated = 0
        self.tokens_cut = 0
        self._tokenizer.no_truncation()

    @classmethod
    def builtin(cls, context_length: int = 512, truncation: Truncation = "head") -> "Tokenizer":
        """The small radiology vocabulary that ships with the package."""
        return cls(BUILTIN_TOKENIZER.read_text(encoding="utf-8"), context_length, truncation)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, context_length: int = 512, truncation: Truncation = "head"
    ) -> "Tokenizer":
        """The tokenizer of a Hugging Face model, by name or local directory.

        Raises:
            FileNotFoundError: If it is neither a local directory nor reachable on the Hub.
        """
        from transformers import AutoTokenizer, BertTokenizerFast  # type: ignore[attr-defined]

        folder = Path(name_or_path)
        if (folder / "tokenizer.json").is_file():
            content = (folder / "tokenizer.json").read_text(encoding="utf-8")
            return cls(content, context_length, truncation)
        if (folder / "vocab.txt").is_file():
            model_type = "cxr-bert"
        else:
            model_type = read_hf_config(name_or_path).get("model_type", "")
        # CXR-BERT names a tokenizer class of its own, remote code, for BERT's plain vocabulary.
        kind = BertTokenizerFast if model_type == "cxr-bert" else AutoTokenizer
        with _explained(name_or_path, "tokenizer"):
            tokenizer = kind.from_pretrained(name_or_path)
        return cls(tokenizer.backend_tokenizer.to_str(), context_length, truncation)

    def to_json(self) -> str:
        """Contents of a ``tokenizer.json`` that rebuilds this tokenizer.

        Other programs read it too; they cut at the same length, and keep the beginning.
        """
        self._tokenizer.enable_truncation(self.context_length)
        content = self._tokenizer.to_str()
        self._tokenizer.no_truncation()
        return content

    def lengths(self, texts: Sequence[str]) -> TextLengths:
        """Count what truncation takes from texts, without counting them as read."""
        lengths = [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        beyond = [num - self.context_length for num in lengths if num > self.context_length]
        return TextLengths(len(lengths), len(beyond), sum(lengths), sum(beyond))

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int | None = None,
        draws: Sequence[float] | None = None,
    ) -> Tensor:
        """Encode texts.

        Args:
            texts: One text or several.
            context_length: Overrides the longest output for this call.
            draws: One number in [0, 1) per text: where its window lies with
                ``truncation="sample"``; 0, the beginning, where nothing is given.

        Returns:
            ``(B, L)`` int64, L the longest text of this batch including its special tokens.

        Raises:
            TypeError: If something other than text is given.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected text, got {type(text).__name__}: {text!r}")
        if context_length is not None and context_length != self.context_length:
            return Tokenizer(self.to_json(), context_length, self.truncation)(texts, draws=draws)
        encodings = self._tokenizer.encode_batch(texts)
        kept = [
            self._cut(encoding.ids, encoding.special_tokens_mask, draw)
            for encoding, draw in zip(encodings, draws or [0.0] * len(texts), strict=True)
        ]
        ids = torch.full((len(texts), max(map(len, kept), default=0)), self.pad_token_id)
        for row, numbers in zip(ids, kept, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return ids

    def _cut(self, ids: list[int], special: list[int], draw: float) -> list[int]:
        """At most ``context_length`` ids; what the tokenizer puts around a text stays around it."""
        excess = len(ids) - self.context_length
        if excess <= 0:
            return ids
        self.truncated += 1
        self.tokens_cut += excess
        start, stop = special.index(0), len(ids) - special[::-1].index(0)
        room = stop - start - excess
        if self.truncation == "head-tail":
            gap = start + room - room // 2
            return ids[:gap] + ids[gap + excess :]
        skipped = int(draw * (excess + 1)) if self.truncation == "sample" else 0
        first = start + skipped
        return ids[:start] + ids[first : first + room] + ids[stop:]


def build_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer that belongs to a text config: the named model's or the built-in one.

    Raises:
        FileNotFoundError: If the named model can't be found.
        ValueError: If the named model's tokenizer and its BERT don't fit each other.
    """
    name = config.name_or_path
    if name is None:
        return Tokenizer.builtin(config.context_length, config.truncation)
    tokenizer = Tokenizer.from_pretrained(name, config.context_length, config.truncation)
    require_fit(tokenizer, hf_config_of(read_hf_config(name)), name, f"the text tower of {name}")
    return tokenizer


def require_fit(tokenizer: Tokenizer, hf_config: Any, name: str, tower: str) -> None:
    """Refuse a tokenizer of another model than the text tower's.

    Args:
        tokenizer: The tokenizer.
        hf_config: The tower's Hugging Face config.
        name: What errors call the tokenizer.
        tower: What errors call the tower.

    Raises:
        ValueError: If it has words that the tower doesn't know, or another padding: the tower would
            read the padding, so that a text's embedding would change with its batch.
    """
    if tokenizer.vocab_size > hf_config.vocab_size:
        raise ValueError(
            f"the tokenizer {name!r} has {tokenizer.vocab_size} words, {tower} knows "
            f"{hf_config.vocab_size}; it belongs to another model"
        )
    if tokenizer.pad_token_id != hf_config.pad_token_id:
        raise ValueError(
            f"the tokenizer {name!r} pads with {tokenizer.pad_token_id}, {tower} with "
            f"{hf_config.pad_token_id}; it belongs to another model, or one of the two files "
            "is wrong"
        )


def build_text_tower(
    config: TextConfig,
    embed_dim: int,
    *,
    hf_config: dict[str, Any] | None = None,
    pretrained: bool = True,
) -> "HFTextEncoder":
    """Build BERT, pooling and projection, and freeze what shall not learn.

    Args:
        config: The tower.
        embed_dim: E.
        hf_config: The BERT's full Hugging Face config, as a checkpoint stores it. With it nothing
            is read from a disk or the Hub, weights stay random for the checkpoint to fill, and
            nothing is frozen: call :func:`set_trainable` to train on.
        pretrained: Load the named model's weights.

    Returns:
        A module from token ids ``(B, L)`` to ``(B, E)``.

    Raises:
        FileNotFoundError: If the named model can't be found.
    """
    if hf_config is not None:
        return _encoder(hf_config, embed_dim, config.pooling)
    if config.name_or_path is None:
        tower = _encoder(small_bert(config), embed_dim, config.pooling)
    else:
        tower = _encoder(read_hf_config(config.name_or_path), embed_dim, config.pooling)
        if pretrained:
            with _explained(config.name_or_path, "weights"):
                has_pooler = layout_of(tower.config.model_type).has_pooler
                options = {"add_pooling_layer": config.pooling == "pooler"} if has_pooler else {}
                weights = type(tower.transformer).from_pretrained(
                    config.name_or_path, config=tower.config, **options
                )
            # transformers keeps a file's own dtype; half of a tower in fp16 helps nobody.
            tower.transformer = weights.float()
    limit = tower.context_length
    if 0 < limit < config.context_length:
        raise ValueError(
            f"text.context_length is {config.context_length}, but this BERT has {limit} positions"
        )
    set_trainable(tower, config)
    return tower


def set_trainable(tower: "HFTextEncoder", config: TextConfig) -> None:
    """Freeze or open the parts of BERT that ``config.train`` says. The projection stays open.

    Raises:
        ValueError: If ``last-n`` asks for more layers than there are.
    """
    bert, layout = tower.transformer, layout_of(tower.config.model_type)
    match config.train:
        case "full":
            bert.requires_grad_(True)
        case "frozen":
            freeze(bert)
        case "last-n":
            layers = layout.layers_of(bert)
            if not 0 < config.train_layers <= len(layers):
                raise ValueError(
                    f"model.text.train_layers is {config.train_layers}; this BERT has {len(layers)}"
                )
            for part in (*layout.embeddings_of(bert), *layers[: -config.train_layers]):
                freeze(part)
        case "lora":
            bert.requires_grad_(False)
            tower.transformer = _with_lora(bert, config.lora_rank, layout.adapted)


def freeze(module: nn.Module) -> None:
    """Stop a module from learning, from dropping out what can't learn, and from drifting.

    CT-CLIP's "frozen" towers still drop out BERT's features and still move their codebook.
    """
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, Codebook):
            part.decay = 1.0


def _with_lora(bert: nn.Module, rank: int, adapted: tuple[str, ...]) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError('text.train="lora" needs peft; run: pip install "ctclip[lora]"') from None
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapted))
    return inject_adapter_in_model(adapters, bert)


def small_bert(config: TextConfig) -> dict[str, Any]:
    """Hugging Face config of the BERT that a config without a name describes."""
    vocabulary = Tokenizer.builtin()
    return {
        "model_type": "bert",
        "vocab_size": vocabulary.vocab_size,
        "pad_token_id": vocabulary.pad_token_id,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "max_position_embeddings": config.context_length,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def read_hf_config(name_or_path: str) -> dict[str, Any]:
    """The values of a Hugging Face model's ``config.json``.

    Raises:
        FileNotFoundError: If it is neither a local directory nor reachable on the Hub.
    """
    from transformers import PretrainedConfig

    with _explained(name_or_path, "config.json"):
        values, _ = PretrainedConfig.get_config_dict(name_or_path)
    if not values:
        raise FileNotFoundError(f"{name_or_path} holds no Hugging Face config.json")
    return values


def _encoder(hf_config: dict[str, Any], embed_dim: int, pooling: str) -> "HFTextEncoder":
    from open_clip.hf_model import HFTextEncoder

    config = hf_config_of(hf_config)
    layout = layout_of(config.model_type)
    if pooling == "pooler" and not layout.has_pooler:
        raise ValueError(
            f'a {config.model_type} has no pooler layer: set text.pooling to "cls" or "mean"'
        )
    tower = HFTextEncoder(
        "",
        embed_dim,
        config=config,
        pooler_type=POOLERS[pooling],
        proj_type="linear",
    )
    if layout.positions_after_padding:
        tower.context_length -= config.pad_token_id + 1
    if layout.has_pooler and pooling != "pooler":
        # Without this BERT keeps a layer that never gets a gradient, which ZeRO and DDP dislike.
        tower.transformer.pooler = None
    return tower


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A module's weights with LoRA adapters added into what they adapt, under its plain names."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        base = f"{name}.base_layer."
        for key in [key for key in state if key.startswith(f"{name}.")]:
            value = state.pop(key)
            if key.startswith(base):
                state[f"{name}.{key.removeprefix(base)}"] = value
        delta = module.get_delta_weight("default")  # type: ignore[operator]
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    return state


class _explained:
    """Turn the Hub's many ways of not finding a model into one sentence."""

    def __init__(self, name: str, part: str) -> None:
        self.name, self.part = name, part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | ValueError):
            raise FileNotFoundError(
                f"no {self.part} for the text model {self.name!r}: not a local directory that "
                f"holds one, and not reachable on the Hugging Face Hub ({error}). Download it on a "
                "machine with a network (huggingface-cli download) and name its directory instead"
            ) from error
