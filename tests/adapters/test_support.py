"""The table of what is merged, served and refused."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig, PeftType

from lora_export.adapters.support import (
    OPTIONS,
    TUNERS,
    Handling,
    markdown_table,
    options_in_use,
    require_supported,
)
from lora_export.errors import InputRefused

# A value that asks for something, for every option that a mode refuses.
ASKED_FOR = {
    "init_lora_weights": "corda",
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1e-4},
}
MERGED_ONLY, SERVED_ONLY = ("target_parameters", "kasa_config"), ("alora_invocation_tokens",)


def test_every_option_of_the_installed_peft_has_a_row():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    rows = [option.name for option in OPTIONS]
    assert len(rows) == len(set(rows)), "an option has two rows"
    assert fields - set(rows) == set(), "PEFT has options that the table does not know"


def test_a_default_config_uses_nothing_that_is_refused():
    config = {"peft_type": "LORA"} | LoraConfig().to_dict()
    config["peft_type"] = "LORA"
    require_supported(config, "merge", "a")
    require_supported(config, "dynamic", "a")


def test_the_table_below_covers_every_refused_option():
    refused = {option.name for option in OPTIONS if option.dynamic is Handling.REFUSED}
    assert refused == set(ASKED_FOR) - set(SERVED_ONLY)
    assert {option.name for option in OPTIONS if option.merge is Handling.REFUSED} - refused == set(SERVED_ONLY)
    assert {option.name for option in OPTIONS if option.merge is Handling.MERGED} & refused == set(MERGED_ONLY)


@pytest.mark.parametrize("name", MERGED_ONLY)
def test_what_is_only_merged_is_refused_by_dynamic_alone(name):
    require_supported({"peft_type": "LORA", name: ASKED_FOR[name]}, "merge", "a")


@pytest.mark.parametrize("name", SERVED_ONLY)
def test_what_is_only_served_is_refused_by_merge_alone(name):
    require_supported({"peft_type": "LORA", name: ASKED_FOR[name]}, "dynamic", "a")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (mode, name)
        for mode in ("merge", "dynamic")
        for name in ASKED_FOR
        if name not in (MERGED_ONLY if mode == "merge" else SERVED_ONLY)
    ],
)
def test_a_refusal_names_the_option_its_value_the_reason_and_the_way_out(name, mode):
    option = next(option for option in OPTIONS if option.name == name)
    with pytest.raises(InputRefused) as refused:
        require_supported({"peft_type": "LORA", "r": 4, name: ASKED_FOR[name]}, mode, "mine")
    error = refused.value
    assert error.what == f"Adapter 'mine' uses what `{mode}` does not export: {name} ({option.note})"
    assert error.where == f"adapter_config.json: {name}"
    assert error.found == f"{name} = {ASKED_FOR[name]!r}"
    assert error.next_step == option.way_out and option.way_out


def test_all_reasons_come_in_one_message():
    config = {"peft_type": "LORA", "layer_replication": [[0, 1]], "arrow_config": {"top_k": 1}, "use_qalora": True}
    with pytest.raises(InputRefused) as refused:
        require_supported(config, "merge", "a")
    for name in ("layer_replication", "arrow_config", "use_qalora"):
        assert name in refused.value.what and name in refused.value.where
    assert refused.value.next_step.count("train without it") == 1, "the same way out is said once"


@pytest.mark.parametrize("value", ["pissa_niter_16", "corda", "CorDA", "loftq", "lora_ga"])
def test_starts_that_cannot_be_repeated_are_refused(value):
    with pytest.raises(InputRefused, match="start cannot be repeated"):
        require_supported({"peft_type": "LORA", "init_lora_weights": value}, "merge", "a")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "pissa", "PiSSA", "olora"])
def test_other_starts_are_not(value):
    require_supported({"peft_type": "LORA", "init_lora_weights": value}, "merge", "a")


@pytest.mark.parametrize("value", [1, True, "yes", [0], {"a": 1}, 0.5])
def test_an_unknown_option_that_is_set_is_refused(value):
    with pytest.raises(InputRefused, match="options that this version does not know") as refused:
        require_supported({"peft_type": "LORA", "use_quantum": value}, "dynamic", "a")
    assert refused.value.where == "adapter_config.json: use_quantum"
    assert refused.value.found == f"use_quantum = {value!r}"


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_option_that_is_not_set_changes_nothing(value):
    require_supported({"peft_type": "LORA", "use_quantum": value}, "dynamic", "a")


def test_every_tuner_of_the_installed_peft_has_a_row():
    rows = [tuner.name for tuner in TUNERS]
    assert len(rows) == len(set(rows)), "a tuner has two rows"
    assert {kind.value for kind in PeftType} == set(rows)


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
@pytest.mark.parametrize("tuner", ["PREFIX_TUNING", "OSF", "LILY", "XLORA", "NEXT_YEARS", None, 3])
def test_tuners_that_cannot_be_merged_are_refused_with_the_reason(tuner, mode):
    note = {t.name: t.note for t in TUNERS}.get(tuner, "this version does not know it")
    with pytest.raises(InputRefused) as refused:
        require_supported({"peft_type": tuner}, mode, "a", convert_rank=8)
    assert refused.value.what == f"`{mode}` does not export adapters of this tuner (adapter 'a'): {note}"
    assert refused.value.found == repr(tuner)
    assert refused.value.next_step == "train without it, or serve it with PEFT"


def test_dynamic_names_the_merge_as_the_way_out_where_there_is_one():
    with pytest.raises(InputRefused) as refused:
        require_supported({"peft_type": "IA3"}, "dynamic", "a")
    assert refused.value.next_step == "merge this adapter into a graph of its own"
    assert "IA3" not in refused.value.expected and "LOHA" in refused.value.expected


def test_a_convertible_tuner_is_served_only_when_asked():
    require_supported({"peft_type": "LOHA"}, "merge", "a")
    require_supported({"peft_type": "LOHA"}, "dynamic", "a", convert_rank=8)
    with pytest.raises(InputRefused, match="serves it once it is converted") as refused:
        require_supported({"peft_type": "LOHA"}, "dynamic", "a")
    assert "--convert-rank R" in refused.value.next_step


def test_options_in_use_are_those_that_are_set_in_the_tables_order():
    config = {"peft_type": "LORA", "modules_to_save": ["classifier"], "r": 4, "use_rslora": False, "lora_dropout": 0.1}
    uses = options_in_use(config)
    assert [(use.option.name, use.value) for use in uses] == [("r", 4), ("modules_to_save", ["classifier"])]
    assert [use.verdict("merge") for use in uses] == [Handling.MERGED] * 2
    assert [use.verdict("dynamic") for use in uses] == [Handling.SERVED] * 2


def test_the_markdown_table_has_a_row_for_every_option():
    lines = markdown_table().splitlines()
    assert all(any(line.startswith(f"| `{option.name}` |") for line in lines) for option in OPTIONS)
    assert all(sum(f"`{tuner.name}`" in line for line in lines) == 1 for tuner in TUNERS)
    lines = [line for line in lines if line]
    assert all(line.count("|") == 5 for line in lines), "a note breaks the table"
