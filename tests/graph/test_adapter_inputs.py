"""The contract of a dynamic graph, executed by ONNX Runtime alone: no part of this package's runtime is used here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from references import decoder_feeds, inputs_for

from lora_export.artifact import read_manifest
from lora_export.contract import AdapterInputKind

DYNAMIC = ["llama-dynamic", "gpt2-dynamic", "bert-dynamic", "classifier-dynamic", "albert-dynamic", "vit-dynamic"]
BASE = {name: name.split("-")[0] for name in DYNAMIC}


def opened(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def random_head(contract) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    found = {}
    for entry in contract.adapter_inputs:
        if entry.kind in (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS):
            found[entry.name] = rng.standard_normal((1, entry.dims[1], 3)).astype(np.float32)
    return found


class Graph:
    """A dynamic graph with its own feeds and its contract."""

    def __init__(self, folder: Path, base: str, rows: int = 4) -> None:
        self.contract = read_manifest(folder).contract
        self.session = opened(folder)
        inputs = inputs_for(base, rows=rows)
        self.feeds = decoder_feeds(inputs, self.contract) if "input_ids" in inputs else inputs
        self.output = self.contract.outputs[0].name
        # A base without a head scores zero whatever the adapter does, so it gets one.
        self.head = {} if all(e.base_has_default for e in self.contract.adapter_inputs) else random_head(self.contract)

    def run(self, adapter: dict[str, np.ndarray] | None = None, rows: slice = slice(None)) -> np.ndarray:
        feeds = {name: value[rows] for name, value in self.feeds.items()}
        return self.session.run([self.output], feeds | self.head | (adapter or {}))[0]

    def random_pairs(self, rows: int, ranks: dict[str, int] | int, seed: int = 1) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        found = {}
        for entry in self.contract.adapter_inputs:
            rank = ranks if isinstance(ranks, int) else ranks[entry.module]
            sizes = [rows if d == "rows" else rank if str(d).endswith(".rank") else d for d in entry.dims]
            if entry.kind in (AdapterInputKind.LORA_A, AdapterInputKind.LORA_B):
                found[entry.name] = (0.2 * rng.standard_normal(sizes)).astype(np.float32)
        return found


@pytest.fixture(scope="module", params=DYNAMIC)
def graph(request, exports) -> Graph:
    return Graph(exports[request.param], BASE[request.param])


def test_inputs_have_the_names_and_shapes_of_the_contract(graph):
    for module in graph.contract.modules:
        inputs = graph.contract.of_module(module)
        if AdapterInputKind.LORA_A in inputs:
            a, b = inputs[AdapterInputKind.LORA_A], inputs[AdapterInputKind.LORA_B]
            assert (a.name, b.name) == (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
            assert a.dims[0] == b.dims[0] == "rows" and a.dims[2] == b.dims[1] == f"{module}.rank"
            assert isinstance(a.dims[1], int) and isinstance(b.dims[2], int)
            assert a.default is None and b.default is None
        else:
            weight = inputs[AdapterInputKind.WEIGHT]
            assert weight.name == f"{module}.weight" and weight.dims[2] == f"{module}.out_features"
            assert inputs[AdapterInputKind.BIAS].dims == ("rows", 1, f"{module}.out_features")
            assert weight.default.shape[0] == 1


def test_no_two_modules_share_a_rank_symbol(graph):
    symbols = [e.dims[2] for e in graph.contract.adapter_inputs if e.kind is AdapterInputKind.LORA_A]
    assert len(symbols) == len(set(symbols)) > 1


def test_rank_zero_given_or_left_out_is_exactly_the_base(graph):
    base = graph.run()
    zero = graph.random_pairs(1, 0)
    assert np.array_equal(graph.run(zero), base)
    assert np.array_equal(graph.run(graph.random_pairs(len(base), 0)), base)


def test_one_adapter_for_all_rows_equals_the_same_for_each(graph):
    one = graph.random_pairs(1, 3)
    each = {name: np.repeat(value, 4, axis=0) for name, value in one.items()}
    assert np.abs(graph.run(one) - graph.run()).max() > 1e-2
    np.testing.assert_allclose(graph.run(each), graph.run(one), atol=2e-5)


def test_a_row_of_a_mixed_batch_equals_the_row_alone(graph):
    mixed = graph.random_pairs(4, 3)
    found = graph.run(mixed)
    for row in range(4):
        alone = graph.run({name: value[row : row + 1] for name, value in mixed.items()}, slice(row, row + 1))
        np.testing.assert_allclose(found[row : row + 1], alone, atol=2e-5, err_msg=f"row {row}")


def test_ranks_may_differ_by_module(graph):
    ranks = {module: 1 + index % 4 for index, module in enumerate(graph.contract.modules)}
    graph.run(graph.random_pairs(4, ranks))
    graph.run(graph.random_pairs(1, ranks))


def test_zero_padding_along_rank_changes_nothing(graph):
    small = graph.random_pairs(4, 2)
    wide = {
        name: np.concatenate([value, np.zeros_like(value)], axis=2 if name.endswith("lora_A.weight") else 1)
        for name, value in small.items()
    }
    np.testing.assert_allclose(graph.run(wide), graph.run(small), atol=2e-5)


def test_concatenation_along_rank_is_a_sum(graph):
    """Two halves of a pair, B scaled by a half each, are the pair."""
    whole = graph.random_pairs(1, 2)
    doubled = {
        name: np.concatenate([value, value], axis=2)
        if name.endswith("lora_A.weight")
        else np.concatenate([0.5 * value, 0.5 * value], axis=1)
        for name, value in whole.items()
    }
    np.testing.assert_allclose(graph.run(doubled), graph.run(whole), atol=2e-5)


def test_each_module_counts_by_itself(graph):
    """An adapter on one module alone changes the output: no pair is wired to nothing."""
    pairs = graph.random_pairs(1, 3)
    base = graph.run()
    for module in graph.contract.modules:
        own = {name: value for name, value in pairs.items() if name.rsplit(".", 2)[0] == module}
        if own and not (module.startswith("pooler") and graph.output == "last_hidden_state"):
            assert np.abs(graph.run(own) - base).max() > 1e-4, module


def test_an_overflowing_neighbour_stays_in_its_row(graph):
    """0 · inf is NaN, so a neighbour must never be multiplied in, not even by zero."""
    pairs = graph.random_pairs(4, 3)
    expected = graph.run(pairs)
    hostile = {name: value.copy() for name, value in pairs.items()}
    for name, value in hostile.items():
        value[2] = np.inf if name.endswith("lora_A.weight") else np.nan
    found = graph.run(hostile)
    assert not np.isfinite(found[2]).all()
    for row in (0, 1, 3):
        np.testing.assert_allclose(found[row], expected[row], atol=2e-5, err_msg=f"row {row}")


def head(graph: Graph, sizes: list[int], seed: int = 2) -> dict[str, np.ndarray]:
    """Heads of the given sizes for each row, padded with zero weights and the lowest bias."""
    entry = next(e for e in graph.contract.adapter_inputs if e.kind is AdapterInputKind.WEIGHT)
    rng, widest = np.random.default_rng(seed), max(sizes)
    weight = np.zeros((len(sizes), entry.dims[1], widest), np.float32)
    bias = np.full((len(sizes), 1, widest), np.finfo(np.float32).min)
    for row, n in enumerate(sizes):
        weight[row, :, :n] = rng.standard_normal((entry.dims[1], n))
        bias[row, 0, :n] = rng.standard_normal(n)
    return {entry.name: weight, entry.name.removesuffix("weight") + "bias": bias}


@pytest.mark.parametrize("name", ["bert-dynamic", "classifier-dynamic", "vit-dynamic", "tagger-dynamic"])
def test_a_head_is_x_times_its_own_weight_plus_bias(name, exports):
    """Against the hidden state that a head of identity columns reads out."""
    graph = Graph(exports[name], name.split("-")[0])
    entry = next(e for e in graph.contract.adapter_inputs if e.kind is AdapterInputKind.WEIGHT)
    eye = {
        entry.name: np.eye(entry.dims[1], dtype=np.float32)[None],
        entry.name.removesuffix("weight") + "bias": np.zeros((1, 1, entry.dims[1]), np.float32),
    }
    hidden = graph.run(eye).astype(np.float64)
    heads = head(graph, [2, 5, 3, 1])
    found = graph.run(heads)
    weight, bias = heads.values()
    for row in range(4):
        expected = hidden[row] @ weight[row].astype(np.float64) + bias[row, 0]
        real = [2, 5, 3, 1][row]
        np.testing.assert_allclose(found[row][..., :real], expected[..., :real], atol=2e-5)
        assert (found[row][..., real:] < -1e38).all(), "a padded class has a score"


def test_fusions_still_happen_around_adapter_inputs(exports):
    import onnx_ir as ir

    def operators(name: str) -> set[str]:
        return {node.op_type for node in ir.load(exports[name] / "model.onnx").graph}

    for provider in ("cpu", "cuda"):
        base = operators("llama-base" if provider == "cpu" else "llama-cuda-base")
        found = operators("llama-dynamic" if provider == "cpu" else "llama-cuda")
        assert "SkipSimplifiedLayerNormalization" in base
        assert base <= found, f"lost on {provider}"
    assert "SkipLayerNormalization" in operators("bert-dynamic")
