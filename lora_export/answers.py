"""A task's outputs as people read them: classes, numbers, answers, words in a gap, transcripts. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_MOST_ANSWER_TOKENS = 30
_MOST_WORDS = 5
# A configuration's `problem_type`.
REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"


def class_answer(logits: np.ndarray, labels: Mapping[int, str], problem_type: str | None = None) -> dict:
    """The classes of `logits` `[n]`, the likeliest first.

    1. One of several classes: probabilities, which add up to 1.
    2. Several at once (`multi_label_classification`): a probability each, and those of 50 % or more.
    3. A regression, or one score (a reranker): the numbers as they are.
    """
    names = [class_name(labels, index) for index in range(len(logits))]
    order = np.argsort(-logits.astype(np.float64))
    values = class_values(logits, problem_type)
    scores = {names[i]: float(values[i]) for i in order}
    if problem_type == REGRESSION or len(logits) == 1:
        return {"values": scores}
    if problem_type == MULTI_LABEL:
        return {"labels": [name for name, score in scores.items() if score >= 0.5], "scores": scores}
    return {"label": next(iter(scores)), "scores": scores}


def class_name(labels: Mapping[int, str], index: int) -> str:
    """The name of class `index`; `LABEL_i`, as Transformers calls it, where it has none."""
    return labels.get(index, f"LABEL_{index}")


def class_values(logits: np.ndarray, problem_type: str | None = None) -> np.ndarray:
    """A probability for each class of `logits` `[n]`, in their order; the numbers as they are where they are scores."""
    values = logits.astype(np.float64)
    if problem_type == REGRESSION or len(values) == 1:
        return values
    return 1 / (1 + np.exp(-values)) if problem_type == MULTI_LABEL else _softmax(values)


def answer_span(start: np.ndarray, end: np.ndarray, first: int, *, last: int) -> tuple[int, int, float]:
    """The likeliest answer among the tokens `first` to `last`: its first and last token, and its probability."""
    starts, ends = (_softmax(scores[first : last + 1].astype(np.float64)) for scores in (start, end))
    # [tokens, lengths of an answer]: no text is long enough for a square of its tokens to fill the memory.
    following = np.lib.stride_tricks.sliding_window_view(
        np.pad(ends, (0, _MOST_ANSWER_TOKENS - 1)), _MOST_ANSWER_TOKENS
    )
    joint = starts[:, None] * following
    place, n_more = divmod(int(joint.argmax()), _MOST_ANSWER_TOKENS)
    return first + place, first + place + n_more, float(joint[place, n_more])


def likeliest_tokens(logits: np.ndarray, most: int = _MOST_WORDS) -> list[tuple[int, float]]:
    """The `most` likeliest tokens of `logits` `[vocabulary]`, with their probabilities."""
    scores = _softmax(logits.astype(np.float64))
    best = np.argpartition(-scores, min(most, len(scores)) - 1)[:most]
    return [(int(token), float(scores[token])) for token in best[np.argsort(-scores[best])]]


def ctc_tokens(logits: np.ndarray, blank: int) -> list[int]:
    """The tokens of `logits` `[frames, vocabulary]`: the likeliest of each frame, repeats as one, without blanks."""
    best = logits.argmax(axis=-1)
    is_new = np.append(True, best[1:] != best[:-1])
    return [int(token) for token in best[is_new] if token != blank]


def class_shares(logits: np.ndarray, labels: Mapping[int, str]) -> dict:
    """The share of the image that each class of `logits` `[classes, height, width]` takes, the largest first."""
    counts = np.bincount(logits.argmax(axis=0).ravel(), minlength=len(logits))
    shares = counts / counts.sum()
    found = {class_name(labels, int(i)): float(shares[i]) for i in np.argsort(-shares) if shares[i]}
    return {"label": next(iter(found)), "scores": found}


def token_classes(logits: np.ndarray, labels: Mapping[int, str]) -> dict:
    """The likeliest class of each token of `logits` `[tokens, classes]`."""
    return {"labels": [class_name(labels, int(i)) for i in logits.argmax(axis=-1)]}


def depth_answer(depth: np.ndarray) -> dict:
    """What `depth` `[height, width]` spans, in the model's units."""
    figures: Sequence[tuple[str, float]] = (("min", depth.min()), ("mean", depth.mean()), ("max", depth.max()))
    return {"predicted_depth": list(depth.shape)} | {name: float(value) for name, value in figures}


def _softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()
