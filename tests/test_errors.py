"""Every error says what, where, expected, found and the next step, and has an exit code."""

from __future__ import annotations

import pytest

from lora_export import EnvironmentUnusable, InputRefused, LoraExportError, UsageProblem
from lora_export.errors import some_of


def test_the_message_has_a_line_for_each_part_that_is_given():
    error = InputRefused("It is wrong", where="here", expected="this", found="that", next_step="do so")
    assert str(error).splitlines() == [
        "It is wrong",
        "  where:    here",
        "  expected: this",
        "  found:    that",
        "  next:     do so",
    ]
    assert str(InputRefused("It is wrong", found="")) == "It is wrong"


@pytest.mark.parametrize(("error", "code"), [(UsageProblem, 2), (InputRefused, 3), (EnvironmentUnusable, 4)])
def test_each_kind_has_its_exit_code(error, code):
    found = error("x", where="y").to_dict()
    assert issubclass(error, LoraExportError)
    assert (found["error"], found["exit_code"], found["what"], found["where"]) == (error.__name__, code, "x", "y")


def test_a_long_list_of_names_says_how_many_more_there_are():
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some_of(["a", "b"], 2) == "a, b" and some_of([], 2) == ""
