"""What a host gives a graph, and what is filled in for it because it has an obvious value. NumPy only.

A tokenizer gives token ids and a mask. The rest of a text model's inputs follows from them:

1. `token_type_ids`: zeros, the first of the types, as Transformers takes them where none are given.
2. `position_ids`: from the mask, each real token's index among the real ones, cache included.
3. `past_key_values.…`: a cache of length 0, if none of it is given.

A decoder gives all tokens' logits, unless `num_logits_to_keep` says for how many of the last.

Token types that a tokenizer gives and the model has no table for are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_export.contract import LOGITS_TO_KEEP, PAST, GraphContract, TensorSpec
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import numpy_dtype

TOKEN_IDS, MASK, TYPES, POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"


def completed_inputs(
    inputs: Mapping[str, np.ndarray], contract: GraphContract, n_cached: int | None = None
) -> dict[str, np.ndarray]:
    """All inputs of the graph of `contract` but its adapters', for what a host gives.

    Args:
        n_cached: The tokens of a cache that the host does not give, as a `Cache` holds it; None where it does.

    Raises:
        UsageProblem: An input is missing that has no obvious value, or the graph has no such input.
    """
    own = {spec.name: spec for spec in contract.inputs}
    given = {name: np.asarray(array) for name, array in inputs.items() if name != TYPES or name in own}
    past = contract.past if n_cached is None else ()
    if TOKEN_IDS in given:
        ids = given[TOKEN_IDS]
        if not any(spec.name in given for spec in past):
            given |= {spec.name: empty(spec, len(ids)) for spec in past}
        if TYPES in own and TYPES not in given:
            given[TYPES] = np.zeros_like(ids)
        if POSITIONS in own and POSITIONS not in given and MASK in given:
            given[POSITIONS] = _positions(ids, given[MASK], _past_length(given) if n_cached is None else n_cached)
    _require(given, contract, held=() if n_cached is None else contract.past)
    if LOGITS_TO_KEEP in given:  # last: the others tell the number of rows
        given[LOGITS_TO_KEEP] = _n_kept(given.pop(LOGITS_TO_KEEP))
    return given


def _n_kept(given: np.ndarray) -> np.ndarray:
    if given.size != 1 or given.dtype.kind not in "iu" or given.min() < 0:
        raise UsageProblem(
            "The number of logits to keep is no number of tokens",
            where=LOGITS_TO_KEEP,
            expected="an integer from 0, which is for all tokens",
            found=f"{given.tolist()} of {given.dtype}",
        )
    return given.astype(np.int64).reshape(())


def empty(spec: TensorSpec, batch: int) -> np.ndarray:
    """A cache input of length 0: every size that varies is 0, but the batch."""
    return np.zeros((batch, *(dim if isinstance(dim, int) else 0 for dim in spec.dims[1:])), numpy_dtype(spec.dtype))


def positions_of(mask: np.ndarray) -> np.ndarray:
    """`position_ids` for an attention mask: each real token's index among the real ones, 0 on padding."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)


def _past_length(given: Mapping[str, np.ndarray]) -> int:
    return max((array.shape[2] for name, array in given.items() if name.startswith(PAST)), default=0)


def _positions(ids: np.ndarray, mask: np.ndarray, n_past: int) -> np.ndarray:
    n_tokens = ids.shape[1]
    if mask.shape[1] != n_past + n_tokens:
        raise UsageProblem(
            "The mask is not as long as the cache and the new tokens together, so positions do not follow from it",
            where=MASK,
            expected=f"{n_past} + {n_tokens} columns",
            found=f"{mask.shape[1]}",
            next_step=f"give the mask of all tokens, or {POSITIONS}",
        )
    return positions_of(mask)[:, n_past:].astype(np.int64)


def _require(given: Mapping[str, np.ndarray], contract: GraphContract, held: Sequence[TensorSpec]) -> None:
    own = [spec.name for spec in contract.inputs if spec not in held]
    missing = [name for name in own if name not in given]
    unknown = sorted(
        set(given) - set(own) - {entry.name for entry in (*contract.adapter_inputs, *contract.optional_inputs)}
    )
    if missing or unknown:
        raise UsageProblem(
            "The inputs are not those of the graph",
            where=", ".join([*(f"{name} is missing" for name in missing), *(f"{n} is unknown" for n in unknown)]),
            expected=", ".join(own),
        )
