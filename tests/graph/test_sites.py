"""A module's linear map is found by the module's path and the weight's shape."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_export.base.tasks import Task
from lora_export.errors import InputRefused
from lora_export.graph.sites import NAME_SCOPES, find_sites, module_of, refuse_unlinked, sites_in


@pytest.fixture
def albert(traces) -> ir.Graph:
    return traces("albert", Task.FEATURE_EXTRACTION)[0]


@pytest.fixture
def gpt2(traces) -> ir.Graph:
    return traces("gpt2", Task.TEXT_GENERATION)[0]


SHARED = "encoder.albert_layer_groups.0.albert_layers.0.attention.query"


def test_a_module_that_is_called_twice_has_two_sites(albert):
    sites = find_sites(albert, [SHARED, "pooler"])
    assert [len(sites[name]) for name in (SHARED, "pooler")] == [2, 1]
    first, second = sites[SHARED]
    assert first.weight is second.weight and first.node is not second.node
    assert first.weight.name == f"{SHARED}.weight"
    assert (first.in_features, first.out_features, first.weight_is_transposed) == (32, 32, True)


def test_conv1d_is_stored_in_out(gpt2):
    site = find_sites(gpt2, ["transformer.h.1.attn.c_attn"])["transformer.h.1.attn.c_attn"][0]
    assert (site.in_features, site.out_features, site.weight_is_transposed) == (32, 96, False)
    assert list(site.weight.shape) == [32, 96]


def test_a_tied_head_is_found_by_its_module(gpt2):
    site = find_sites(gpt2, ["lm_head"])["lm_head"][0]
    assert (site.in_features, site.out_features) == (32, 260)


def test_modules_that_are_no_linear_map_are_refused_by_name(albert):
    wrong = [
        "embeddings.word_embeddings",
        "encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm",
        "no.such",
    ]
    with pytest.raises(InputRefused, match="Adapted modules are not linear maps of the exported graph") as refused:
        find_sites(albert, [SHARED, *wrong])
    assert refused.value.where == ", ".join(wrong)
    with pytest.raises(InputRefused) as refused:
        find_sites(albert, [f"no.such.{i}" for i in range(9)])
    assert refused.value.where.endswith("no.such.5 and 3 more")


def test_the_module_path_is_the_last_scope_but_one():
    node = ir.node("Identity", [ir.Value(name="x")])
    assert module_of(node) is None
    node.metadata_props[NAME_SCOPES] = "['', 'model', 'model.layers.3.q_proj', 'linear']"
    assert module_of(node) == "model.layers.3.q_proj"
    node.metadata_props[NAME_SCOPES] = "['linear']"
    assert module_of(node) == ""


def test_a_module_that_one_of_several_graphs_does_not_call_has_no_site_there(albert):
    found = sites_in(albert, [SHARED, "decoder.query"])
    assert [len(sites) for sites in found.values()] == [2, 0]
    refuse_unlinked([])
    with pytest.raises(InputRefused, match="not linear maps of the exported graph") as refused:
        refuse_unlinked(["decoder.query"])
    assert refused.value.where == "decoder.query"
