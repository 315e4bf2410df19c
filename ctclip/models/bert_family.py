"""Which Hugging Face encoders the text tower takes, and where each keeps what training opens.

open_clip's text side knows BERT and RoBERTa; the rest are registered with it as what they are:
encoders with BERT's inputs and outputs, whose embedding of a text doesn't depend on its padding.
ConvBERT and Nystromformer, for which it does, are left out, and MPNet, which can't recompute its
activations.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Names inside one kind of encoder."""

    layers: str = "encoder.layer"
    """Its list of layers."""

    embeddings: tuple[str, ...] = ("embeddings",)
    """What lies before the layers or is shared by them."""

    adapted: tuple[str, ...] = ("query", "value")
    """Linear maps that LoRA adapts (Hu et al. 2021): queries and values, fused or not."""

    has_pooler: bool = True
    """Whether it can have BERT's own pooler layer."""

    positions_after_padding: bool = False
    """Whether its positions are counted from behind the padding's id, as RoBERTa's are."""

    def layers_of(self, encoder: nn.Module) -> nn.ModuleList:
        """The list of layers of an encoder of this kind."""
        layers = encoder.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def embeddings_of(self, encoder: nn.Module) -> list[nn.Module]:
        """What an encoder of this kind has before its layers."""
        names = dict(encoder.named_modules())
        return [names[name] for name in self.embeddings if name in names]


_BERT = Layout()
_ROBERTA = Layout(positions_after_padding=True)

BERT_FAMILY: dict[str, Layout] = {
    "bert": _BERT,
    "cxr-bert": _BERT,
    "ernie": _BERT,
    "megatron-bert": _BERT,
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Layout(embeddings=("embeddings", "embeddings_project"), has_pooler=False),
    "distilbert": Layout(layers="transformer.layer", adapted=("q_lin", "v_lin"), has_pooler=False),
    "deberta": Layout(
        embeddings=("embeddings", "encoder.rel_embeddings"), adapted=("in_proj",), has_pooler=False
    ),
    "deberta-v2": Layout(
        embeddings=("embeddings", "encoder.rel_embeddings", "encoder.LayerNorm"),
        adapted=("query_proj", "value_proj"),
        has_pooler=False,
    ),
    "modernbert": Layout(layers="layers", adapted=("Wqkv",), has_pooler=False),
}
"""By ``model_type`` of the ``config.json``."""

_QUERIES = ("query", "q_lin", "in_proj", "query_proj", "Wqkv")
"""What the family's attention layers call the map that makes their queries."""


def is_attention(module: nn.Module) -> bool:
    """Whether a part of an encoder of the family is what turns queries and keys into weights."""
    return any(hasattr(module, name) for name in _QUERIES)


def register() -> None:
    """Make transformers know a ``cxr-bert``, and open_clip the whole family.

    CXR-BERT's repository offers remote code instead, which we never run; CT-CLIP too reads it as a
    BERT.
    """
    from open_clip.hf_configs import arch_dict
    from transformers import AutoConfig, AutoModel, BertConfig, BertModel

    class CXRBertConfig(BertConfig):
        model_type = "cxr-bert"

    class CXRBertModel(BertModel):
        config_class = CXRBertConfig

    if "cxr-bert" not in arch_dict:
        AutoConfig.register("cxr-bert", CXRBertConfig)
        AutoModel.register(CXRBertConfig, CXRBertModel)
    for model_type in BERT_FAMILY.keys() - arch_dict.keys():
        arch_dict[model_type] = arch_dict["bert"]
        if not BERT_FAMILY[model_type].has_pooler:
            config_class = type(AutoConfig.for_model(model_type))
            known: Any = AutoModel._model_mapping
            # open_clip tells every encoder whether to have a pooler; these take no such argument.
            AutoModel.register(config_class, _told_of_poolers(known[config_class]), exist_ok=True)


def _told_of_poolers(model_class: type[nn.Module]) -> type[nn.Module]:
    def __init__(self: Any, config: Any, add_pooling_layer: bool = False) -> None:
        model_class.__init__(self, config)

    return type(model_class.__name__, (model_class,), {"__init__": __init__})


def layout_of(model_type: str) -> Layout:
    """Where an encoder keeps its parts.

    Raises:
        ValueError: If its kind isn't one of the family.
    """
    if model_type not in BERT_FAMILY:
        raise ValueError(
            f"text model type {model_type!r} is not one that ctclip takes: "
            f"{', '.join(sorted(BERT_FAMILY))}"
        )
    return BERT_FAMILY[model_type]


def hf_config_of(values: dict[str, Any]) -> Any:
    """The Hugging Face config object of a ``config.json``'s values.

    Raises:
        ValueError: If it isn't of the family.
    """
    from transformers import AutoConfig

    register()
    values = {k: v for k, v in values.items() if k not in ("auto_map", "architectures")}
    model_type = values.pop("model_type", "bert")
    layout_of(model_type)
    if model_type == "modernbert":  # a number, no module: it could be neither repeated nor frozen
        values["attention_dropout"] = 0.0
    return AutoConfig.for_model(model_type, **values)
