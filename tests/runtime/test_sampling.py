"""Choosing tokens, against Transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_export.errors import UsageProblem
from lora_export.runtime.sampling import Sampler, Sampling, penalized, probabilities

SCORES = np.random.default_rng(1).standard_normal(60).astype(np.float32) * 3


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.001])
@pytest.mark.parametrize("top_k", [0, 1, 7, 60, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    scores = torch.from_numpy(SCORES)[None].double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = probabilities(SCORES, Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-12)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    seen = [3, 7, 3, 59, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.from_numpy(SCORES)[None].clone())
    before = SCORES.copy()
    np.testing.assert_allclose(penalized(SCORES, set(seen), penalty), expected[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(SCORES, before)


def test_the_penalty_counts_what_was_written_too():
    sampler = Sampler(Sampling(repetition_penalty=1000.0), [])
    scores = np.array([1.0, 3.0, 2.0], np.float32)
    assert [sampler.choose(scores) for _ in range(3)] == [1, 2, 0]
    assert Sampler(Sampling(repetition_penalty=1000.0), [1]).choose(scores) == 2


def test_drawn_tokens_have_their_probabilities():
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    sampler = Sampler(sampling, [])
    drawn = np.bincount([sampler.choose(SCORES[:8]) for _ in range(4000)], minlength=8) / 4000
    np.testing.assert_allclose(drawn, probabilities(SCORES[:8], sampling), atol=0.03)
    assert (drawn > 0).sum() == 3


def test_a_seed_draws_the_same_tokens():
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.choose(SCORES) for _ in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_at_the_ends_of_the_ranges_tokens_are_drawn(temperature, penalty):
    sampling = Sampling(temperature, 5, 0.9, penalty, seed=1)
    scores = SCORES * 1000
    shares = probabilities(scores, sampling)
    assert np.isfinite(shares).all() and abs(shares.sum() - 1) < 1e-12
    assert 0 <= Sampler(sampling, [int(scores.argmax())]).choose(scores) < 60
    if temperature < 1:
        assert shares.argmax() == scores.argmax() and shares.max() == 1


def test_a_penalty_that_ends_what_floats_can_say_chooses_nothing():
    huge = np.array([3e38, 1.0], np.float32)
    with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        Sampler(Sampling(1.0, repetition_penalty=1e-3), [0]).choose(huge)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_choose_nothing(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(Sampling(), []).choose(np.array([1.0, bad, 2.0], np.float32))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-310}, {"temperature": 101.0},
     {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e4}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
     {"repetition_penalty": 0.0}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused_by_name(wrong):
    with pytest.raises(UsageProblem, match="out of its range") as refused:
        Sampling(**wrong)
    assert refused.value.where == next(iter(wrong))
