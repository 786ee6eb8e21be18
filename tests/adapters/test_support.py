"""The table of what is merged, served and refused."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from lora_export.adapters.support import OPTIONS, Verdict, markdown_table, options_in_use, require_supported
from lora_export.errors import InputRefused

# A value that asks for something, for every option that is refused.
ASKED_FOR = {
    "init_lora_weights": "pissa",
    "bias": "lora_only",
    "use_dora": True,
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1e-4},
}


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
    refused = {option.name for option in OPTIONS if option.merge is Verdict.REFUSED}
    assert refused == set(ASKED_FOR)


@pytest.mark.parametrize("name", ASKED_FOR)
@pytest.mark.parametrize("mode", ["merge", "dynamic"])
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
    config = {"peft_type": "LORA", "use_dora": True, "bias": "all", "use_qalora": True}
    with pytest.raises(InputRefused) as refused:
        require_supported(config, "merge", "a")
    for name in ("use_dora", "bias", "use_qalora"):
        assert name in refused.value.what and name in refused.value.where
    assert refused.value.next_step.count("merge_and_unload") == 1, "the same way out is said once"


@pytest.mark.parametrize("value", ["pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(value):
    with pytest.raises(InputRefused, match="change the base's weights"):
        require_supported({"peft_type": "LORA", "init_lora_weights": value}, "merge", "a")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initializations_that_leave_the_base_alone_are_not(value):
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


@pytest.mark.parametrize("tuner", ["IA3", "LOHA", "PREFIX_TUNING", None, 3])
def test_other_tuners_are_refused(tuner):
    with pytest.raises(InputRefused, match=r"Adapters of this tuner are not exported \(adapter 'a'\)") as refused:
        require_supported({"peft_type": tuner}, "merge", "a")
    assert (refused.value.expected, refused.value.found) == ("LORA", repr(tuner))
    assert "save_as_lora" in refused.value.next_step


def test_options_in_use_are_those_that_are_set_in_the_tables_order():
    config = {"peft_type": "LORA", "modules_to_save": ["classifier"], "r": 4, "use_rslora": False, "lora_dropout": 0.1}
    uses = options_in_use(config)
    assert [(use.option.name, use.value) for use in uses] == [("r", 4), ("modules_to_save", ["classifier"])]
    assert [use.verdict("merge") for use in uses] == [Verdict.MERGED] * 2
    assert [use.verdict("dynamic") for use in uses] == [Verdict.SERVED] * 2


def test_the_markdown_table_has_a_row_for_every_option():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(OPTIONS)
    assert all(line.count("|") == 5 for line in lines), "a note breaks the table"
