"""What the `forward` of a Transformers model takes, told from the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection


def is_dual_encoder(model) -> bool:
    """Whether `model` (a `PreTrainedModel`) takes texts and images and compares them, as CLIP does."""
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features")


# RoBERTa's kin: their tokenizers give no token types, and Optimum's graphs ask for none, whatever the config's default.
_WITHOUT_TOKEN_TYPES = frozenset(
    {"big_bird", "camembert", "data2vec-text", "ibert", "longformer", "roberta", "roberta-prelayernorm", "xlm-roberta",
     "xlm-roberta-xl", "xmod"}
)  # fmt: skip


def text_input_names(model, named: Collection[str] | None = None) -> tuple[str, ...]:
    """The encoder inputs of `model` (a `PreTrainedModel`); `token_type_ids` only where it has more than one type, and
    where its tokenizer gives them.

    Args:
        named: The inputs that the base's tokenizer names; None to go by the model type, as Optimum does.
    """
    names = ["input_ids", "attention_mask"]
    accepts = inspect.signature(model.forward).parameters
    has_types = "token_type_ids" in accepts and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    given = model.config.model_type not in _WITHOUT_TOKEN_TYPES if named is None else "token_type_ids" in named
    if has_types and given:
        names.append("token_type_ids")
    return tuple(names)


def cache_argument(forward: Callable) -> str:
    """What a Transformers model's `forward` calls its cache: `cache` from release 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
