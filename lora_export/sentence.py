"""How the states of a text's tokens become one embedding, as sentence-transformers names it.

With `h` `[tokens, size]` the last hidden states, `m` `[tokens]` the attention mask and `i` a token's place, which is 1
for the first of the mask (release 6 of sentence-transformers; earlier ones count padding before it):

    cls                   h at the first token of the mask
    lasttoken             h at the last token of the mask
    max                   max over tokens of the mask
    mean                  Σ m h / Σ m
    mean_sqrt_len_tokens  Σ m h / √ Σ m
    weightedmean          Σ i m h / Σ i m

Several are put one behind the other. Linear layers with an activation, and a division by the embedding's length, may
follow. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

SENTENCE_EMBEDDING = "sentence_embedding"
# Files of a sentence-transformers folder: its modules, its prompts, and its Transformer's settings, today and in older
# releases.
MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
TEXT_SETTINGS = ("sentence_bert_config.json", "sentence_*_config.json")
# What may be asked for besides a way to pool: what the folders say, and hidden states alone.
AUTO, NONE = "auto", "none"


class Pooling(StrEnum):
    """One way to make one vector of a text's states."""

    CLS = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST_TOKEN = "lasttoken"


class Activation(StrEnum):
    """What follows a linear layer; `GELU` is the exact one."""

    IDENTITY = "Identity"
    TANH = "Tanh"
    RELU = "ReLU"
    SIGMOID = "Sigmoid"
    GELU = "GELU"


@dataclass(frozen=True)
class Dense:
    """A linear layer: `activation(W x + b)`.

    Attributes:
        sha256: Of the file with `linear.weight` and, with a bias, `linear.bias`.
    """

    in_features: int
    out_features: int
    bias: bool
    activation: Activation
    sha256: str


@dataclass(frozen=True)
class SentenceEmbedding:
    """The output `sentence_embedding` of a graph.

    Attributes:
        pooling: What is put one behind the other.
        layers: What follows, in order; None stands for a division by the embedding's length.
        source: The name of the adapter whose folder says all this; "" for the base's; None where the user named it.
    """

    pooling: tuple[Pooling, ...]
    layers: tuple[Dense | None, ...] = ()
    source: str | None = None

    @property
    def is_named(self) -> bool:
        """Whether the name of a way to pool says all of it, so that no folder needs to."""
        return len(self.pooling) == 1 and not self.layers

    @property
    def described(self) -> str:
        """In words, such as "mean, linear 768 → 256 (Tanh), length 1"."""
        names = [
            "length 1" if each is None else f"linear {each.in_features} → {each.out_features} ({each.activation})"
            for each in self.layers
        ]
        return ", ".join([" + ".join(self.pooling), *names])

    @classmethod
    def from_dict(cls, fields: Mapping) -> SentenceEmbedding:
        def dense(entry: Mapping | None) -> Dense | None:
            return entry and Dense(**{**entry, "activation": Activation(entry["activation"])})

        layers = tuple(map(dense, fields["layers"]))
        return cls(tuple(map(Pooling, fields["pooling"])), layers, fields["source"])


def equal_embeddings(*embeddings: SentenceEmbedding) -> bool:
    """Whether all of them compute the same, whichever folder says so."""
    return len({(each.pooling, each.layers) for each in embeddings}) <= 1


def transformer_files(files: Mapping[str, str]) -> dict[str, str]:
    """Of a source's files, by path: the Transformer's own, by name, without what says how its folder embeds."""
    if MODULES not in files:
        return dict(files)
    weights = (name for name in files if name.endswith((".safetensors", "adapter_config.json")))
    place = min(PurePosixPath(name).parent for name in weights)  # before the folders of layers: `0_Transformer`
    of_folder = (MODULES, PROMPTS, *TEXT_SETTINGS)
    own = {PurePosixPath(name): found for name, found in files.items()}
    return {
        path.name: found
        for path, found in own.items()
        if path.parent == place and not any(path.match(pattern) for pattern in of_folder)
    }
