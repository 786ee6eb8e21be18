"""What a run's outputs say, against plain loops."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from lora_export.answers import answer_span, class_answer, class_shares, ctc_tokens, depth_answer, likeliest_tokens

LABELS = {0: "red", 1: "green"}


def test_one_of_several_classes_has_probabilities_that_add_up():
    found = class_answer(np.array([1.0, 3.0, 2.0]), LABELS)
    assert found["label"] == "green" and list(found["scores"]) == ["green", "LABEL_2", "red"]
    assert sum(found["scores"].values()) == pytest.approx(1)
    assert found["scores"]["red"] == pytest.approx(math.exp(1) / (math.exp(1) + math.exp(3) + math.exp(2)))


def test_several_labels_at_once_have_a_probability_each():
    found = class_answer(np.array([2.0, -1.0, 0.0]), LABELS, "multi_label_classification")
    assert found["labels"] == ["red", "LABEL_2"]
    assert found["scores"]["green"] == pytest.approx(1 / (1 + math.e))


@pytest.mark.parametrize(("logits", "problem"), [([-4.5], None), ([-4.5], "regression")])
def test_a_regression_and_a_rerankers_score_are_numbers(logits, problem):
    assert class_answer(np.array(logits), {}, problem) == {"values": {"LABEL_0": -4.5}}


def test_an_answer_begins_before_it_ends_and_lies_in_the_text():
    rng = np.random.default_rng(0)
    for _ in range(20):
        start, end = rng.normal(size=(2, 50)) * 3
        first, last = 7, 45
        places = [(i, j) for i in range(first, last + 1) for j in range(i, min(last, i + 29) + 1)]
        best = max(places, key=lambda place: start[place[0]] + end[place[1]])
        found = answer_span(start, end, first, last=last)
        assert found[:2] == best
        total = sum(math.exp(start[i] + end[j]) for i in range(first, last + 1) for j in range(first, last + 1))
        assert found[2] == pytest.approx(math.exp(start[best[0]] + end[best[1]]) / total)


def test_the_answer_in_a_long_text_needs_no_square_of_its_tokens():
    n, place = 20_000, 12_345
    start, end = np.zeros((2, n), np.float32)
    start[place], end[place + 29], end[place + 30] = 30, 20, 40  # an answer has 30 tokens at most
    tracemalloc.start()
    found = answer_span(start, end, 0, last=n - 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[:2] == (place, place + 29) and most < 100 * 8 * n


def test_the_likeliest_tokens_are_those_of_a_whole_sort():
    logits = np.random.default_rng(3).normal(size=200).astype(np.float32)
    order, shares = np.argsort(-logits), np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    for most in (1, 7, 199, 200, 300):
        found = likeliest_tokens(logits, most)
        assert [token for token, _ in found] == order[:most].tolist()
        assert [score for _, score in found] == pytest.approx(shares[order[:most]])


def test_ctc_takes_repeats_as_one_unless_a_blank_is_between():
    best = [0, 5, 5, 0, 5, 7, 7, 0, 0, 7]
    assert ctc_tokens(np.eye(9)[best], blank=0) == [5, 5, 7, 7]


def test_words_shares_and_depths():
    assert [token for token, _ in likeliest_tokens(np.array([0.0, 4.0, 1.0, 3.0]))] == [1, 3, 2, 0]
    logits = np.zeros((2, 2, 4))
    logits[1, 0, :3] = 1
    assert class_shares(logits, LABELS) == {"label": "red", "scores": {"red": 0.625, "green": 0.375}}
    found = depth_answer(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert found == {"predicted_depth": [2, 2], "min": 1.0, "mean": 3.0, "max": 6.0}
