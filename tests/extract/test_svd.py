"""The mathematics against NumPy's float64 decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.extract import svd
from lora_export.extract.svd import RankChoice, decompose, frobenius, remaining_error


def matrix(rows: int, columns: int, decay: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Random singular vectors, singular values `exp(-decay·i)`."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, min(rows, columns))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, min(rows, columns))))
    return torch.from_numpy(((u * np.exp(-decay * np.arange(min(rows, columns)))) @ v.T).astype(np.float32))


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40), (7, 7), (1, 9)])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_factors_are_the_best_of_their_rank(rows, columns, rank):
    delta = matrix(rows, columns, 0.1)
    spectrum, chosen = decompose(delta, RankChoice(rank=rank))
    a, b = spectrum.factors(chosen)
    assert (a.dtype, a.shape, b.shape) == (torch.float32, (chosen, columns), (rows, chosen))
    assert chosen == min(rank, rows, columns)
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    best = np.sqrt((values[chosen:] ** 2).sum())
    found = np.linalg.norm(delta.double().numpy() - b.double().numpy() @ a.double().numpy())
    assert found == pytest.approx(best, rel=1e-5, abs=2e-7 * values[0] * np.sqrt(chosen))
    assert remaining_error(delta, a, b) == pytest.approx(found, rel=1e-9)
    assert frobenius(delta) == pytest.approx(np.linalg.norm(delta.double().numpy()), rel=1e-12)


def test_a_and_b_carry_the_same_magnitude():
    spectrum, rank = decompose(matrix(30, 20, 0.2), RankChoice(rank=5))
    a, b = spectrum.factors(rank)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


def test_the_curve_is_eckart_and_young():
    delta = matrix(20, 30, 0.3)
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    curve = decompose(delta, RankChoice(rank=2))[0].curve()
    expected = [np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()) for rank in range(21)]
    assert curve == pytest.approx(expected, rel=1e-8)
    assert curve[0] == pytest.approx(1) and curve[-1] == 0


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.999, 1.0])
def test_energy_takes_the_smallest_rank_that_holds_it(energy):
    delta = matrix(24, 16, 0.25)
    squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    shares = squares.cumsum() / squares.sum()
    expected = next((rank for rank, share in enumerate(shares, 1) if share >= energy - 1e-12), 16)
    assert decompose(delta, RankChoice(energy=energy))[1] == expected


@pytest.mark.parametrize("choice", [RankChoice(rank=8), RankChoice(energy=0.9)], ids=["rank", "energy"])
def test_large_matrices_are_found_by_random_projection(choice, monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIZE", 64)
    monkeypatch.setattr(svd, "_FIRST_GUESS", 4)
    delta = matrix(300, 200, 0.08)
    exact, exact_rank = decompose(delta, choice, exact=True)
    found, rank = decompose(delta, choice)
    assert (found.complete, exact.complete) == (False, True)
    assert rank == exact_rank
    best = remaining_error(delta, *exact.factors(rank))
    assert remaining_error(delta, *found.factors(rank)) == pytest.approx(best, rel=1e-3)
    assert found.curve()[: rank + 1] == pytest.approx(exact.curve()[: rank + 1], rel=1e-3)


def test_random_projection_gives_the_same_adapter_each_time_and_leaves_the_generator_alone(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIZE", 64)
    delta = matrix(300, 200, 0.05)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (decompose(delta, RankChoice(rank=8))[0].factors(8) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_energy_beyond_a_quarter_of_the_ranks_is_decomposed_exactly(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIZE", 64)
    delta = matrix(200, 200)
    spectrum, rank = decompose(delta, RankChoice(energy=0.9))
    assert spectrum.complete and rank == 180
