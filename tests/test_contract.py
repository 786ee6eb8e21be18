"""The table of adapter inputs: each kind once, and what it says of defaults, padding and blends, in plain loops.

The reference computes one row of a module in float64 from what the row is fed:
`y = (W x) ⊙ g + gate · (x A) B + b` of a linear module, `e[t] = W[t] + Σ_j [t = ids_j] · delta_j` of an embedding.
Both are linear in what an adapter brings, so a blend is `y_0 + Σ w_k (y_k − y_0)`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.contract import (
    ADAPTER_INPUT_KINDS,
    AdapterInput,
    AdapterInputKind,
    Blend,
    Default,
    GraphContract,
    KindSpec,
    StoredDefault,
    has_own_head,
    spec_of,
)
from lora_export.errors import InputRefused
from lora_export.runtime.adapter_file import require_fit
from lora_export.runtime.stacking import default_inputs, stack_rows
from lora_export.site_choice import SiteChoice

K = AdapterInputKind
N_IN, N_OUT, N_TOKENS = 3, 4, 5
RNG = np.random.default_rng(5)
X = RNG.standard_normal(N_IN)
TABLE = RNG.standard_normal((N_TOKENS, N_OUT))
BASE = {K.WEIGHT: RNG.standard_normal((N_IN, N_OUT)), K.BIAS: RNG.standard_normal((1, N_OUT))}
STACKED = [spec for spec in ADAPTER_INPUT_KINDS if spec.blend is not Blend.FROM_PROMPT]
each_kind = pytest.mark.parametrize("spec", ADAPTER_INPUT_KINDS, ids=lambda spec: spec.kind)
each_stacked_kind = pytest.mark.parametrize("spec", STACKED, ids=lambda spec: spec.kind)


def linear(fed: dict[K, np.ndarray]) -> list[float]:
    weight, bias = fed.get(K.WEIGHT, BASE[K.WEIGHT]), fed.get(K.BIAS, BASE[K.BIAS])
    found = []
    for o in range(weight.shape[1]):
        y = sum(float(X[i]) * float(weight[i, o]) for i in range(N_IN))
        y *= float(fed[K.GAIN][0, o]) if K.GAIN in fed else 1
        for r in range(fed[K.LORA_A].shape[1] if K.LORA_A in fed else 0):
            low = sum(float(X[i]) * float(fed[K.LORA_A][i, r]) for i in range(N_IN))
            low *= float(fed[K.GATE][0, 0]) if K.GATE in fed else 1
            y += low * float(fed[K.LORA_B][r, o])
        found.append(y + float(bias[0, o]))
    return found


def embedding(fed: dict[K, np.ndarray]) -> list[float]:
    found = []
    for t in range(N_TOKENS):
        for d in range(N_OUT):
            e = float(TABLE[t, d])
            for j in range(len(fed[K.TOKEN_IDS]) if K.TOKEN_IDS in fed else 0):
                if int(fed[K.TOKEN_IDS][j]) == t:
                    e += float(fed[K.TOKEN_DELTA][j, d])
            found.append(e)
    return found


def output(spec: KindSpec, fed: dict[K, np.ndarray]) -> np.ndarray:
    return np.array(embedding(fed) if spec.kind in (K.TOKEN_IDS, K.TOKEN_DELTA) else linear(fed))


def together(spec: KindSpec) -> list[KindSpec]:
    """`spec` and the kinds that go with it, on either side."""
    wanted = {spec.kind, *spec.companions, *(other.kind for other in STACKED if spec.kind in other.companions)}
    return [other for other in ADAPTER_INPUT_KINDS if other.kind in wanted]


def contract_of(specs: list[KindSpec]) -> GraphContract:
    sizes = {"in_features": N_IN, "embedding_dim": N_OUT}
    if all(spec.kind is not K.WEIGHT for spec in specs):
        sizes["out_features"] = N_OUT
    entries = []
    for spec in specs:
        module = "" if spec.kind is K.GATE else "m"
        stored = StoredDefault((1, *BASE[spec.kind].shape), 0, 0) if spec.is_stored else None
        dims, dtype = spec.dims_of(module, sizes), spec.dtype or "float32"
        entries.append(AdapterInput(spec.name(module), module, spec.kind, dtype, dims, stored))
    return GraphContract((), (), tuple(entries))


def stored_defaults() -> dict[str, np.ndarray]:
    return {spec_of(kind).name("m"): array[None].astype(np.float32) for kind, array in BASE.items()}


def adapter(specs: list[KindSpec], size: int, seed: int) -> dict[str, np.ndarray]:
    """What an adapter brings to module "m", of `size` along the axis in which adapters differ."""
    rng, found = np.random.default_rng(seed), {}
    shapes = {
        K.LORA_A: (N_IN, size), K.LORA_B: (size, N_OUT), K.GAIN: (1, N_OUT), K.WEIGHT: (N_IN, size), K.BIAS: (1, size),
        K.TOKEN_DELTA: (size, N_OUT),
    }  # fmt: skip
    for spec in specs:
        if spec.kind is K.TOKEN_IDS:
            found[spec.name("m")] = rng.integers(0, N_TOKENS, (1, size))
        else:
            found[spec.name("m")] = rng.standard_normal((1, *shapes[spec.kind])).astype(np.float32)
    return found


def row_of(contract: GraphContract, fed: dict[str, np.ndarray], row: int = 0) -> dict[K, np.ndarray]:
    return {entry.kind: fed[entry.name][row] for entry in contract.adapter_inputs if entry.name in fed}


def test_every_kind_has_exactly_one_entry_and_a_name_of_its_own():
    assert [spec.kind for spec in ADAPTER_INPUT_KINDS] == list(K)
    assert len({spec.name("m") for spec in ADAPTER_INPUT_KINDS}) == len(K)
    for spec in ADAPTER_INPUT_KINDS:
        assert spec_of(spec.kind) is spec


# The format that exported folders and their hosts in other languages go by.
WRITTEN = {
    "lora_A": ("m.lora_A.weight", ("rows", 7, "m.rank")),
    "lora_B": ("m.lora_B.weight", ("rows", "m.rank", 9)),
    "lora_magnitude": ("m.lora_magnitude", ("rows", 1, 9)),
    "weight": ("m.weight", ("rows", 7, 9)),
    "bias": ("m.bias", ("rows", 1, 9)),
    "token_ids": ("m.token_ids", ("rows", "m.n_tokens")),
    "token_delta": ("m.token_delta", ("rows", "m.n_tokens", 8)),
    "lora_gate": ("lora_gate", ("rows", "gate_length", 1)),
}


def test_names_and_dims_are_those_of_exports_that_are_out_there():
    sizes = {"in_features": 7, "out_features": 9, "embedding_dim": 8}
    found = {}
    for spec in ADAPTER_INPUT_KINDS:
        module = "" if spec.kind is K.GATE else "m"
        found[str(spec.kind)] = spec.name(module), spec.dims_of(module, sizes)
    assert found == WRITTEN
    assert spec_of(K.WEIGHT).companions == (K.BIAS,) and spec_of(K.BIAS).companions == ()
    head = {kind: spec_of(kind).dims_of("m", {"in_features": 7}) for kind in (K.WEIGHT, K.BIAS)}
    assert head == {K.WEIGHT: ("rows", 7, "m.out_features"), K.BIAS: ("rows", 1, "m.out_features")}


@each_kind
def test_an_entry_agrees_with_itself(spec):
    assert spec.dims[0] == "rows" and spec.axis != 0
    assert spec.axis is None or isinstance(spec.dims[spec.axis], str)
    if spec.blend in (Blend.CONCATENATE, Blend.CONCATENATE_WEIGHTED):
        assert spec.axis is not None and spec.default is Default.EMPTY
        # What is concatenated along one axis must stay in step: none comes without the others.
        in_step = [o for o in STACKED if o is not spec and o.axis and o.dims[o.axis] == spec.dims[spec.axis]]
        assert spec.companions == tuple(other.kind for other in in_step)


@each_kind
def test_the_default_leaves_the_base_untouched(spec):
    """The gate's is fed beside a pair, as it is there to switch one off."""
    specs = together(spec)
    if spec.blend is Blend.FROM_PROMPT:
        pair = {K.LORA_A: RNG.standard_normal((N_IN, 2)), K.LORA_B: RNG.standard_normal((2, N_OUT))}
        gate = np.full(*spec.constant(spec.dims))
        assert np.array_equal(linear(pair | {K.GATE: gate[0]}), linear(pair))
        return
    contract = contract_of(specs)
    fed = default_inputs(contract, stored_defaults())
    assert set(fed) == {entry.name for entry in contract.adapter_inputs}
    assert all(len(array) == 1 for array in fed.values())
    np.testing.assert_allclose(output(spec, row_of(contract, fed)), output(spec, {}), atol=1e-6)


@each_stacked_kind
def test_rows_of_the_base_alone_are_fed_nothing(spec):
    adapters = {"a": adapter(together(spec), 2, 0)}
    assert stack_rows(contract_of(together(spec)), adapters, [(), ()], defaults=stored_defaults()) == {}


@each_stacked_kind
@given(sizes=st.lists(st.integers(0, 4), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_padding_a_row_does_not_change_it(spec, sizes):
    """Of heads, the classes beyond a row's own have the lowest score."""
    specs = together(spec)
    contract = contract_of(specs)
    sizes = [max(size, 1) for size in sizes] if spec.is_stored else sizes
    adapters = {f"a{row}": adapter(specs, size, row) for row, size in enumerate(sizes)}
    rows = [((name, 1.0),) for name in adapters]
    fed = stack_rows(contract, adapters, rows, defaults=stored_defaults())
    for row, name in enumerate(adapters):
        alone = output(spec, row_of(contract, adapters[name]))
        found = output(spec, row_of(contract, fed, row))
        np.testing.assert_allclose(found[: len(alone)], alone, atol=1e-6)
        assert (found[len(alone) :] < -1e38).all() and len(found) == (max(sizes) if spec.is_stored else len(alone))


def test_a_row_of_fewer_tokens_is_filled_up_with_none():
    specs = together(spec_of(K.TOKEN_IDS))
    adapters = {"one": adapter(specs, 1, 0), "three": adapter(specs, 3, 1)}
    fed = stack_rows(contract_of(specs), adapters, [(("one", 1.0),), (("three", 1.0),)], defaults={})
    assert fed["m.token_ids"].dtype == np.int64
    assert fed["m.token_ids"][0, 1:].tolist() == [-1, -1] and not fed["m.token_delta"][0, 1:].any()


WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)


@each_stacked_kind
@given(blend=st.lists(st.tuples(st.integers(1, 4), WEIGHTS), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_blend_is_the_weighted_sum_of_what_each_adapter_changes(spec, blend):
    """`y_0 + Σ w_k (y_k − y_0)`; the second row of the batch is the base's."""
    specs = together(spec)
    contract = contract_of(specs)
    sizes = [N_OUT if spec.is_stored else size for size, _ in blend]
    adapters = {f"a{k}": adapter(specs, size, k) for k, size in enumerate(sizes)}
    row = tuple((name, weight) for name, (_, weight) in zip(adapters, blend, strict=True))
    fed = stack_rows(contract, adapters, [row, ()], defaults=stored_defaults())
    base = output(spec, {})
    expected = base + sum(w * (output(spec, row_of(contract, adapters[name])) - base) for name, w in row)
    np.testing.assert_allclose(output(spec, row_of(contract, fed)), expected, atol=1e-4)
    np.testing.assert_allclose(output(spec, row_of(contract, fed, 1)), base, atol=1e-6)


@pytest.mark.parametrize("spec", [spec for spec in STACKED if spec.companions], ids=lambda spec: spec.kind)
def test_a_file_without_a_companion_is_refused(spec):
    contract = contract_of(together(spec))
    tensors = adapter(together(spec), 2, 0)
    require_fit(Path("a.onnx_adapter"), tensors, contract)
    for kind in spec.companions:
        bare = {name: array for name, array in tensors.items() if name != spec_of(kind).name("m")}
        with pytest.raises(InputRefused, match="The adapter lacks a tensor") as refused:
            require_fit(Path("a.onnx_adapter"), bare, contract)
        assert refused.value.expected == f"{spec_of(kind).name('m')} beside {spec.name('m')}"


def test_a_gate_in_an_adapters_file_is_not_fed():
    """It is made of the prompt; of an adapter's own tensors nothing is known of its tokens."""
    contract = contract_of([spec_of(K.GATE)])
    assert (
        stack_rows(contract, {"a": {"lora_gate": np.zeros((1, 1, 1), np.float32)}}, [(("a", 1.0),)], defaults={}) == {}
    )
    assert default_inputs(contract, {}) == {}


def test_the_parameters_that_inputs_take_the_place_of():
    choice = SiteChoice(lora_modules=("q",), replaced_modules=("head",), bias_modules=("q", "norm"))
    assert choice.parameters == {"head.weight", "head.bias", "q.bias", "norm.bias"}
    assert SiteChoice(lora_modules=("q",), embedding_modules=("e",)).parameters == frozenset()


@pytest.mark.parametrize(("kind", "answers"), [(AdapterInputKind.WEIGHT, False), (AdapterInputKind.BIAS, True)])
def test_a_base_lacks_a_head_and_not_a_bias(kind, answers):
    lacks = AdapterInput("m.x", "m", kind, "float32", ("out_features",), base_has_default=False)
    assert has_own_head([lacks]) is answers
