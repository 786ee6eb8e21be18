"""The low-rank form of a difference of weights, on one page.

`ΔW = U·diag(σ)·Vᵀ`, and its best approximation of rank r is the sum of the first r terms, with the remaining error
`‖ΔW − ΔW_r‖_F = sqrt(Σ_{i>r} σ_i²)` (Eckart and Young, 1936). Stored as `B = U_r·sqrt(σ)`, `A = sqrt(σ)·V_rᵀ`, so
that both carry the same share of the magnitude and the scale is 1. LoRA's claim that a growing rank converges to full
fine-tuning (Hu et al., arXiv 2106.09685, section 4.1) is this error going to zero.

Matrices with a short side up to `EXACT_SIZE` are decomposed exactly, by LAPACK in float64; larger ones by a randomized
range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1, as
`torch.svd_lowrank` has them) unless more than a quarter of all ranks is needed. The error that is reported is measured
either way, on the float32 factors as they are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EXACT_SIZE = 768
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4
_FIRST_GUESS = 64
_ROWS = 1024


@dataclass(frozen=True)
class RankChoice:
    """Either one rank for all, or for each matrix the smallest rank that holds a share of its energy `Σσ²`."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Spectrum:
    """Leading singular triplets of a matrix `[m, n]`.

    Attributes:
        u: `[m, k]`.
        values: `[k]`, descending.
        v: `[n, k]`.
        norm: Frobenius norm of the matrix, from its elements.
        complete: Whether k = min(m, n), so that nothing of the matrix is missing.
    """

    u: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor
    norm: float
    complete: bool

    def curve(self) -> tuple[float, ...]:
        """The relative error `sqrt(Σ_{i>r} σ_i²)/‖ΔW‖_F` for r = 0 … k."""
        squares = self.values.double().square()
        if self.complete:  # summed from the smallest, so that small errors keep their digits
            tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        else:
            tails = (self.norm**2 - torch.cat([squares.new_zeros(1), squares.cumsum(0)])).clamp(min=0.0)
        return tuple((tails.sqrt() / self.norm).tolist())

    def rank_for(self, energy: float) -> int | None:
        """The smallest rank that holds `energy` (a share, 0 to 1) of `‖ΔW‖_F²`; None if these triplets do not."""
        allowed = math.sqrt(max(0.0, 1.0 - energy))
        return next((rank for rank, error in enumerate(self.curve()) if rank and error <= allowed), None)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` `[rank, n]` and `B` `[m, rank]` in float32, with `B·A` the best approximation of that rank."""
        roots = self.values[:rank].double().sqrt()
        b = self.u[:, :rank].double() * roots
        a = (self.v[:, :rank].double() * roots).T
        return a.float().contiguous(), b.float().contiguous()


def frobenius(matrix: torch.Tensor) -> float:
    """`‖matrix‖_F`, squares summed in float64 a block of rows at a time."""
    return math.sqrt(sum(float(block.double().square().sum()) for block in matrix.split(_ROWS)))


def decompose(matrix: torch.Tensor, choice: RankChoice, *, exact: bool = False) -> tuple[Spectrum, int]:
    """Decompose a float32 `[m, n]` that is not zero; the triplets found, and the rank that `choice` asks for.

    Args:
        exact: All singular values, however large the matrix.
    """
    full = min(matrix.shape)
    norm = frobenius(matrix)
    n_wanted = min(choice.rank, full) if choice.rank else min(_FIRST_GUESS, full)
    while not exact and full > EXACT_SIZE and n_wanted + _OVERSAMPLING <= full // 4:
        spectrum = _randomized(matrix, n_wanted + _OVERSAMPLING, norm)
        rank = choice.rank or spectrum.rank_for(choice.energy)
        if rank is not None:
            return spectrum, rank
        n_wanted *= 2
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    spectrum = Spectrum(u, values, vh.T, norm, complete=True)
    return spectrum, min(choice.rank, full) if choice.rank else spectrum.rank_for(choice.energy) or full


def _randomized(matrix: torch.Tensor, n_triplets: int, norm: float) -> Spectrum:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapter from the same checkpoints
        u, values, v = torch.svd_lowrank(matrix, q=n_triplets, niter=_POWER_ITERATIONS)
    return Spectrum(u, values, v, norm, complete=False)


def remaining_error(matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """`‖matrix − B·A‖_F` (not relative) with the factors as stored, in float64, a block of rows at a time."""
    a = a.double()
    blocks = zip(matrix.split(_ROWS), b.split(_ROWS), strict=True)
    return math.sqrt(sum(float((block.double() - rows.double() @ a).square().sum()) for block, rows in blocks))
