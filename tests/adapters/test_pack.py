"""Packing: which tensors an adapter becomes, and the file that ONNX Runtime loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lora_export.adapters.factors import Adapter, LoraFactors, TokenRows
from lora_export.adapters.pack import choose_sites, pack, write_onnx_adapter
from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.packed import PackedPart
from lora_export.site_choice import SiteChoice


def pair_inputs(module: str, n_in: int, n_out: int, dtype: str = "float32") -> list[AdapterInput]:
    rank = f"{module}.rank"
    return [
        AdapterInput(f"{module}.lora_A.weight", module, AdapterInputKind.LORA_A, dtype, ("rows", n_in, rank)),
        AdapterInput(f"{module}.lora_B.weight", module, AdapterInputKind.LORA_B, dtype, ("rows", rank, n_out)),
    ]


def whole_inputs(module: str, n_in: int, *, bias: bool = True, dtype: str = "float32") -> list[AdapterInput]:
    out = f"{module}.out_features"
    found = [AdapterInput(f"{module}.weight", module, AdapterInputKind.WEIGHT, dtype, ("rows", n_in, out))]
    if bias:
        found.append(AdapterInput(f"{module}.bias", module, AdapterInputKind.BIAS, dtype, ("rows", 1, out)))
    return found


def factors(module: str, n_in: int, n_out: int, rank: int, scale: float = 1.5, *, in_out: bool = False) -> LoraFactors:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)
    return LoraFactors(module, a, b, scale, in_out)


def no_base(path: str) -> torch.Tensor:
    raise AssertionError(f"the base's {path} was read without need")


def test_pairs_and_heads_become_the_contracts_tensors_in_sorted_order():
    contract = GraphContract((), (), (*pair_inputs("q", 4, 6), *whole_inputs("head", 6)))
    pair = factors("q", 4, 6, 2)
    head, bias = torch.randn(3, 6), torch.randn(3)
    adapter = Adapter("x", {"q": pair}, {"head.weight": head, "head.bias": bias}, ("head",), {})
    found = pack(adapter, contract, no_base)
    assert list(found) == ["head.bias", "head.weight", "q.lora_A.weight", "q.lora_B.weight"]
    for r in range(2):
        for i in range(4):
            assert found["q.lora_A.weight"][0, i, r] == pair.a[r, i]
        for o in range(6):
            assert found["q.lora_B.weight"][0, r, o] == 1.5 * pair.b[o, r]
    assert torch.equal(found["head.weight"][0], head.T) and torch.equal(found["head.bias"][0, 0], bias)


def test_modules_that_share_a_pair_are_its_blocks():
    parts = (PackedPart("q", 6), PackedPart("k", 2), PackedPart("v", 3))
    entries = [replace(entry, parts=parts) for entry in pair_inputs("q+k+v", 4, 11)]
    pairs = {"v": factors("v", 4, 3, 1), "q": factors("q", 4, 6, 2)}
    found = pack(Adapter("x", pairs, {}, (), {}), GraphContract((), (), tuple(entries)), no_base)
    a, b = found["q+k+v.lora_A.weight"], found["q+k+v.lora_B.weight"]
    assert a.shape == (1, 4, 3) and b.shape == (1, 3, 11)
    x = torch.randn(5, 4)
    y = x @ a[0] @ b[0]
    for module, columns in {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 11)}.items():
        pair = pairs.get(module)
        expected = torch.zeros(5, 2) if pair is None else 1.5 * x @ pair.a.T @ pair.b.T
        torch.testing.assert_close(y[:, columns], expected)


@pytest.mark.parametrize("in_out", [False, True], ids=["Linear", "Conv1D"])
def test_a_pair_on_a_module_taken_as_a_whole_is_folded_into_the_bases_weight(in_out):
    """Another adapter replaces the module, so the graph has no pair there."""
    contract = GraphContract((), (), tuple(whole_inputs("head", 4)))
    pair = factors("head", 4, 3, 2, in_out=in_out)
    weight = torch.randn(4, 3) if in_out else torch.randn(3, 4)
    adapter = Adapter("x", {"head": pair}, {}, (), {})
    asked = []

    def base(path: str) -> torch.Tensor:
        asked.append(path)
        return weight

    found = pack(adapter, contract, base)
    assert asked == ["head.weight"] and list(found) == ["head.weight"]
    for i in range(4):
        for o in range(3):
            change = sum(1.5 * float(pair.b[o, r]) * float(pair.a[r, i]) for r in range(2))
            start = float(weight[i, o] if in_out else weight[o, i])
            assert float(found["head.weight"][0, i, o]) == pytest.approx(start + change, abs=1e-5)


def test_modules_that_the_graph_lacks_are_all_named():
    contract = GraphContract((), (), tuple(pair_inputs("layer.0.q", 4, 4)))
    names = [f"layer.{i}.q" for i in range(10)]
    lora = {name: factors(name, 4, 4, 2) for name in names}
    with pytest.raises(InputRefused, match="Adapter 'x' needs modules that the graph has no inputs for") as refused:
        pack(Adapter("x", lora, {"head.weight": torch.zeros(2, 2)}, ("head",), {}), contract, no_base)
    assert "--targets" not in refused.value.next_step, "which gives no head an input"
    with pytest.raises(InputRefused) as refused:
        pack(Adapter("x", lora, {}, (), {}), contract, no_base)
    assert refused.value.where == ", ".join(names[1:7]) + " and 3 more"
    assert refused.value.expected == "one of the 1 modules that the graph serves, in the same way"
    assert "--targets" in refused.value.next_step


def test_a_replaced_module_that_the_graph_serves_only_as_a_pair_is_refused():
    contract = GraphContract((), (), tuple(pair_inputs("head", 4, 4)))
    adapter = Adapter("x", {}, {"head.weight": torch.zeros(4, 4)}, ("head",), {})
    with pytest.raises(InputRefused, match="needs modules that the graph has no inputs for") as refused:
        pack(adapter, contract, no_base)
    assert refused.value.where == "head"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_is_what_onnxruntime_reads(dtype, tmp_path):
    contract = GraphContract(
        (), (), (*pair_inputs("q", 4, 6, dtype), *whole_inputs("head", 6, bias=False, dtype=dtype))
    )
    adapter = Adapter("x", {"q": factors("q", 4, 6, 2)}, {"head.weight": torch.randn(3, 6)}, ("head",), {})
    tensors = pack(adapter, contract, no_base)
    path = tmp_path / "x.onnx_adapter"
    write_onnx_adapter(path, tensors)
    ort.LoraAdapter().Load(str(path))
    read = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        value = read[name]
        assert value.data_type() == f"tensor({'float' if dtype == 'float32' else dtype})"
        assert value.shape() == list(tensor.shape)
        if dtype != "bfloat16":
            assert np.array_equal(value.numpy(), tensor.numpy())


def test_a_disk_that_is_full_is_told_in_one_message():
    with pytest.raises(EnvironmentUnusable, match="could not be written; nothing was published") as failed:
        write_onnx_adapter(Path("/dev/full"), {"a.lora_A.weight": torch.zeros(1, 64, 64)})
    assert failed.value.where == "/dev/full" and "Failed to write" in failed.value.found


def test_the_file_is_the_same_every_time(tmp_path):
    adapter = Adapter("x", {"q": factors("q", 4, 6, 2)}, {}, (), {})
    tensors = pack(adapter, GraphContract((), (), tuple(pair_inputs("q", 4, 6))), no_base)
    for name in ("one", "two"):
        write_onnx_adapter(tmp_path / name, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_chosen_sites_are_the_union_of_what_adapters_bring():
    """In the order in which adapters bring them: the graph's inputs come in that order."""
    bias = torch.zeros(4)
    gained = replace(factors("k", 4, 4, 2), magnitude=torch.ones(4))
    first = Adapter("first", {"q": factors("q", 4, 4, 2), "k": gained}, {"norm.bias": bias}, (), {})
    second = Adapter(
        "second",
        {"v": replace(factors("v", 4, 4, 2), bias=bias), "q": factors("q", 4, 4, 3)},
        {},
        (),
        {"alora_invocation_tokens": [7]},
        embeddings={"words": factors("words", 9, 4, 2)},
        token_rows={"words.weight": TokenRows(torch.tensor([3]), torch.zeros(1, 4))},
        convolutions={"patches": replace(factors("patches", 12, 4, 2), bias=bias)},
    )
    assert choose_sites([first, second], ["o", "q"]) == SiteChoice(
        lora_modules=("q", "k", "v", "o"),
        gain_modules=("k",),
        bias_modules=("norm", "v", "patches"),
        embedding_modules=("words",),
        token_modules=("words",),
        convolution_modules=("patches",),
        gate_modules=("v", "q"),
    )


def test_a_module_that_one_adapter_replaces_takes_nothing_else_of_another():
    head = replace(factors("head", 4, 4, 2), magnitude=torch.ones(4), bias=torch.zeros(4))
    pair = Adapter("pair", {"head": head}, {}, (), {"alora_invocation_tokens": [7]})
    whole = Adapter("whole", {}, {"head.weight": torch.zeros(4, 4), "head.bias": torch.zeros(4)}, ("head",), {})
    assert choose_sites([pair, whole], ["head"]) == SiteChoice(replaced_modules=("head",))
