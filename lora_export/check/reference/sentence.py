"""The embedding of a text, written a second time: with PyTorch, token by token of a row, and no code of the graph's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_export.base.sentence_folder import read_head
from lora_export.errors import InputRefused
from lora_export.sentence import Dense, Pooling, SentenceEmbedding

_ACTIVATIONS = {
    "Identity": torch.nn.Identity(),
    "Tanh": torch.nn.Tanh(),
    "ReLU": torch.nn.ReLU(),
    "Sigmoid": torch.nn.Sigmoid(),
    "GELU": torch.nn.GELU(),
}


class SentenceReference:
    """What `embedding` makes of hidden states, at the dtype of these.

    Args:
        weights: Of its linear layers, in order.
    """

    def __init__(self, embedding: SentenceEmbedding, weights: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._embedding = embedding
        self._weights = [{name: torch.from_numpy(array) for name, array in each.items()} for each in weights]

    @classmethod
    def of_folder(cls, embedding: SentenceEmbedding, root: Path | None) -> SentenceReference:
        """Of `embedding`, its linear layers read in the sentence-transformers folder `root`.

        Raises:
            InputRefused: It has linear layers, and there is no such folder.
        """
        if not any(embedding.layers):
            return cls(embedding, ())
        if root is None:
            raise InputRefused(
                "The linear layers of the export's embedding are nowhere to be read",
                where=f"sentence_embedding.source: {embedding.source!r}",
                expected="the sentence-transformers folder that the export was made from",
                next_step="export again with --pooling auto, the folder's own adapter or base among the sources",
            )
        return cls(embedding, read_head(root, embedding.source).weights())

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[rows, size]`, of states `[rows, tokens, size]` and a mask `[rows, tokens]`."""
        vectors = torch.stack([self._of_row(row, real == 1) for row, real in zip(states, mask, strict=True)])
        linear = iter(self._weights)
        for layer in self._embedding.layers:
            is_linear = layer is not None
            vectors = _through(vectors, layer, next(linear)) if is_linear else torch.nn.functional.normalize(vectors)
        return vectors

    def _of_row(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        places = torch.nonzero(real)[:, 0]
        return torch.cat([_pooled(way, states[places], places) for way in self._embedding.pooling])


def _pooled(way: Pooling, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The states `[n, size]` of a row's own tokens, which are at `places` in it, as one vector."""
    if way is Pooling.CLS:
        return states[0]
    if way is Pooling.LAST_TOKEN:
        return states[-1]
    if way is Pooling.MAX:
        return states.amax(dim=0)
    if way is Pooling.WEIGHTED_MEAN:
        weights = (places - places[0] + 1).to(states.dtype)
        return weights @ states / weights.sum()
    return states.sum(dim=0) / (len(states) ** 0.5 if way is Pooling.MEAN_SQRT_LEN else len(states))


def _through(vectors: torch.Tensor, layer: Dense, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    parts = {name: tensor.to(vectors.dtype) for name, tensor in weights.items()}
    return _ACTIVATIONS[layer.activation](torch.nn.functional.linear(vectors, parts["weight"], parts.get("bias")))
