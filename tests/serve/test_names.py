"""The `model` field."""

from __future__ import annotations

import pytest

from lora_export.serve.names import adapters_in, parse_model, require_free_name
from lora_export.serve.problems import Problem

ADAPTERS = ["legal", "medical", "v1.2", "a+b", "c:1"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("base", {}),
        ("legal", {"legal": 1}),
        ("a+b", {"a+b": 1}),
        ("c:1", {"c:1": 1}),
        ("legal:0.5", {"legal": 0.5}),
        ("legal:0.7+medical:0.3", {"legal": 0.7, "medical": 0.3}),
        ("legal+v1.2:-2e-1", {"legal": 1, "v1.2": -0.2}),
    ],
)
def test_names_and_blends(model, expected):
    assert parse_model(model, "base", ADAPTERS) == expected


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("legel", "did you mean 'legal'?"),
        ("Base", "did you mean 'base'?"),
        ("", "GET /v1/models lists what is"),
        ("legal:1+x", "'x' is not served"),
        ("base:1", "'base' is not served"),
        ("legal+base", "'base' is not served"),
        ("+", "'' is not served"),
    ],
)
def test_what_is_not_served_is_404_and_never_the_base(model, said):
    with pytest.raises(Problem) as found:
        parse_model(model, "base", ADAPTERS)
    assert found.value.status == 404 and found.value.code == "model_not_found" and said in found.value.message


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("legal:", "is no weight"),
        ("legal:x", "'x' is no weight"),
        ("legal:nan", "not a finite number"),
        ("legal:inf", "not a finite number"),
        ("legal:0", "not a finite number other than 0"),
        ("legal:1+legal:2", "an adapter is in it twice"),
    ],
)
def test_a_bad_blend_is_refused(model, said):
    with pytest.raises(Problem) as found:
        parse_model(model, "base", ADAPTERS)
    assert found.value.status == 400 and said in found.value.message


def test_a_blend_has_at_most_eight_adapters():
    names = [f"n{index}" for index in range(9)]
    assert len(parse_model("+".join(names[:8]), "base", names)) == 8
    with pytest.raises(Problem, match="at most 8 are blended"):
        parse_model("+".join(names), "base", names)


def test_the_adapters_of_a_model():
    assert adapters_in("a+b", ADAPTERS) == ["a+b"]
    assert adapters_in("legal:0.7+medical:0.3+gone:1", ADAPTERS) == ["legal", "medical"]
    assert adapters_in("base", ADAPTERS) == []


@pytest.mark.parametrize("name", ["", "a:b", "a+b", "../x", ".x", "a/b", "a b", "ü", "x" * 101, "base", "a\n"])
def test_names_that_a_request_could_not_say_are_refused(name):
    with pytest.raises(Problem) as found:
        require_free_name(name, "base")
    assert found.value.status == 400 and found.value.param == "lora_name"


def test_a_plain_name_is_free():
    require_free_name("legal-v1.2_b", "base")
