"""A run of an encoder's rows: padded to one batch, each with its own adapter, an answer for each. NumPy only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.answers import likeliest_tokens
from lora_export.contract import GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import lowest, numpy_dtype
from lora_export.sentence import SENTENCE_EMBEDDING
from lora_export.serve.batching import LEAST_RETRY, Gaps, Row
from lora_export.serve.models import Models, Target, View
from lora_export.serve.options import Pooling
from lora_export.serve.problems import Problem
from lora_export.serve.tasks import CLASSIFICATION, CTC, GAPS, IMAGES, QUESTIONS, SOUNDS, TOKENS

_STATES, _POOLED = "last_hidden_state", "pooler_output"
_TYPES = "token_type_ids"
# What answers are made of, where that is not embeddings.
_OUTPUTS = {
    **dict.fromkeys((CLASSIFICATION, IMAGES, SOUNDS, TOKENS, GAPS, CTC), ("logits",)),
    QUESTIONS: ("start_logits", "end_logits"),
}
_OF_TOKENS = (TOKENS, QUESTIONS)
# Outputs that are one vector a row.
_VECTORS = (_POOLED, SENTENCE_EMBEDDING)


@dataclass(frozen=True)
class Answer:
    """What a row's model says; `target` is what it was asked of.

    Attributes:
        values: Float32. An embedding, or the scores of its own classes. Where each token has an answer, `[tokens, n]`:
            the scores of a token's classes, of all tokens in a sound's frame, or of being an answer's first and last.
            Of gaps, `[gaps, most]`: the probabilities of the likeliest `tokens`, the likeliest first.
        tokens: Int64 `[gaps, most]`; None but for gaps.
    """

    values: np.ndarray
    target: Target
    tokens: np.ndarray | None = None


class Encoder:
    """Answers rows with the models of the moment in which their run begins."""

    def __init__(self, models: Models, pooling: Pooling | None, *, normalize: bool | None) -> None:
        self._models, self._pooling = models, pooling or Pooling.MEAN
        self._contract: GraphContract = models.manifest.contract
        outputs = {spec.name for spec in self._contract.outputs}
        wanted = _POOLED if pooling is Pooling.POOLER else _STATES
        if pooling is None and SENTENCE_EMBEDDING in outputs:
            wanted = SENTENCE_EMBEDDING
        self._outputs = _OUTPUTS.get(models.task, (wanted,))
        if missing := [name for name in self._outputs if name not in outputs]:
            raise _no_output(missing[0], outputs)
        self._normalize = self._outputs != (SENTENCE_EMBEDDING,) if normalize is None else normalize
        pad = models.manifest.pad_token_id
        self._pad = pad if pad is not None else models.config.get("pad_token_id") or 0

    def run(self, rows: Sequence[Row]) -> list[Answer | Problem]:
        """An answer for each row, or why there is none: its model is served no longer, or it is another by now."""
        view = self._models.view
        found: list[Answer | Problem | None] = [None] * len(rows)
        targets: dict[int, Target] = {}
        for index, row in enumerate(rows):
            try:
                targets[index] = _current(view, row)
            except Problem as problem:
                found[index] = problem
        for together in self._batches(rows, targets):
            inputs = self._inputs([rows[index] for index in together])
            adapters = [targets[index].adapter for index in together]
            outputs = view.session.run(inputs, adapters, self._outputs)
            taken = [outputs[name] for name in self._outputs]
            if self._models.task == GAPS:
                values = _of_gaps(taken[0], [rows[index].gaps for index in together])
            else:
                values = self._values(taken, inputs.get("attention_mask"))
            for index, value in zip(together, values, strict=True):
                found[index] = _answer(value, targets[index], rows[index].gaps)
        return found

    @staticmethod
    def _batches(rows: Sequence[Row], places: Iterable[int]) -> list[list[int]]:
        """Those of `rows` in `places` that are run at once: all texts, and signals of one shape."""
        batches: dict[tuple[int, ...] | None, list[int]] = {}
        for place in places:
            signal = rows[place].signal
            batches.setdefault(None if signal is None else signal.shape, []).append(place)
        return list(batches.values())

    def _inputs(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Token ids, their mask and, where the graph takes them, types, `[rows, longest]`, padded on the right; or the
        signals `[rows, …]`."""
        if rows[0].signal is not None:
            spec = self._contract.inputs[0]
            return {spec.name: np.stack([row.signal for row in rows]).astype(numpy_dtype(spec.dtype))}
        longest = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), longest), self._pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for index, row in enumerate(rows):
            size = len(row.ids)
            ids[index, :size], mask[index, :size] = row.ids, 1
            if row.types is not None:
                types[index, :size] = row.types
        has_types = any(spec.name == _TYPES for spec in self._contract.inputs)
        return {"input_ids": ids, "attention_mask": mask} | ({_TYPES: types} if has_types else {})

    def most_tokens(self, most_bytes: int) -> int:
        """The tokens of a run whose scores take `most_bytes`, where each has a score for every token there is."""
        of_each = self._models.config.get("vocab_size") if self._models.task == GAPS else None
        return max(1, most_bytes // (4 * of_each)) if of_each else sys.maxsize

    def _values(self, outputs: Sequence[np.ndarray], mask: np.ndarray | None) -> list[np.ndarray]:
        task, first = self._models.task, outputs[0]
        if task in (CLASSIFICATION, IMAGES, SOUNDS):
            return [row[own_classes(row)].astype(np.float32) for row in first]
        if task == CTC:
            return [row[:, own_classes(row[0])].astype(np.float32) for row in first]
        if task in _OF_TOKENS:
            joined = first if len(outputs) == 1 else np.stack(outputs, axis=-1)
            rows = [row[:size, own_classes(row[0])] for row, size in zip(joined, mask.sum(axis=1), strict=True)]
            return [row.astype(np.float32) for row in rows]  # a copy: a view would keep the padding, too
        is_vector = self._outputs[0] in _VECTORS
        vectors = first.astype(np.float32) if is_vector else self._pooled(first, mask)
        return list(normalized(vectors) if self._normalize else vectors)

    def _pooled(self, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        states = states.astype(np.float32)
        if self._pooling is Pooling.MEAN:
            weights = mask[:, :, None].astype(np.float32)
            return (states * weights).sum(axis=1) / weights.sum(axis=1)
        place = 0 if self._pooling is Pooling.FIRST else mask.sum(axis=1) - 1
        return states[np.arange(len(states)), place]


def normalized(vectors: np.ndarray) -> np.ndarray:
    """`[rows, size]`, each of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _current(view: View, row: Row) -> Target:
    """What the row's model means now.

    Raises:
        Problem: 404 if it is served no longer; 409 if it is another than the row's tokens were made for.
    """
    target = view.target(row.model)
    if row.target is not None and row.target.rows != target.rows:
        raise Problem(
            409, f"{row.model!r} was replaced while the request waited; ask again", param="model", code="replaced",
            retry_after_s=LEAST_RETRY,
        )  # fmt: skip
    return target


def own_classes(scores: np.ndarray) -> slice:
    """Those of `[n]` that are a row's own: the lowest finite numbers are beyond; what is not finite has its place."""
    (own,) = np.nonzero(scores != lowest(scores.dtype))
    return slice(own[-1] + 1 if len(own) else 0)


def _of_gaps(scores: np.ndarray, gaps: Sequence[Gaps]) -> Iterator[np.ndarray]:
    """Of each row of `[rows, tokens, vocabulary]`, the scores at its gaps' places, one row's at a time."""
    for row, asked in zip(scores, gaps, strict=True):
        yield row[list(asked.places), own_classes(row[0])].astype(np.float32)


def _answer(values: np.ndarray, target: Target, gaps: Gaps | None) -> Answer | Problem:
    if not values.size or not np.isfinite(values).all():
        return Problem(500, f"The answer of {target.model!r} is not finite", code="not_finite")
    if gaps is None:
        return Answer(values, target)
    best = np.array([likeliest_tokens(scores, gaps.most) for scores in values])
    return Answer(best[..., 1].astype(np.float32), target, best[..., 0].astype(np.int64))


def _no_output(wanted: str, outputs: set[str]) -> UsageProblem:
    return UsageProblem(
        "The graph does not give what the answers are made of",
        where=f"output {wanted}",
        found=", ".join(sorted(outputs)),
        next_step="choose another --pooling" if wanted == _POOLED else None,
    )
