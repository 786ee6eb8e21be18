"""What happens to every option of an adapter: merged, served as inputs, or refused. The one table.

It drives the refusals, `inspect` and README's table. It reads `adapter_config.json` as plain JSON, so an adapter is
refused before any work and without importing PEFT. What a supported option *means* is PEFT's business
(`peft_reader`); this table only says whether it is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from lora_export.errors import InputRefused


class Verdict(StrEnum):
    MERGED = "merged"
    SERVED = "served as inputs"
    REFUSED = "refused"
    NO_EFFECT = "no effect on inference"


@dataclass(frozen=True)
class Option:
    """One option of `LoraConfig`.

    Attributes:
        name: The option's name in `adapter_config.json`.
        is_set: Whether a value asks for anything; an unset option is never refused.
        merge: What `merge` does with it.
        dynamic: What `dynamic` does with it.
        note: What it does, or why it is refused.
        way_out: What to do instead, where refused.
    """

    name: str
    is_set: Callable[[object], bool]
    merge: Verdict
    dynamic: Verdict
    note: str
    way_out: str = ""


def _given(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def _never(value: object) -> bool:
    return False


def _served(name: str, note: str) -> Option:
    return Option(name, _given, Verdict.MERGED, Verdict.SERVED, note)


def _ignored(name: str, note: str) -> Option:
    return Option(name, _never, Verdict.NO_EFFECT, Verdict.NO_EFFECT, note)


def _refused(name: str, note: str, way_out: str, is_set: Callable[[object], bool] = _given) -> Option:
    return Option(name, is_set, Verdict.REFUSED, Verdict.REFUSED, note, way_out)


MERGE_IN_PEFT = "merge it in PEFT (merge_and_unload), save the model, and export that as a base without adapters"
_RETRAIN = "train without it, or serve it with PEFT"

OPTIONS: tuple[Option, ...] = (
    _served("r", "rank of a module's pair, resolved by PEFT"),
    _served("lora_alpha", "scale alpha / r, folded into B"),
    _served("use_rslora", "scale alpha / sqrt(r), folded into B"),
    _served("rank_pattern", "rank by module"),
    _served("alpha_pattern", "alpha by module"),
    _served("target_modules", "which modules; `dynamic` serves the union over its adapters"),
    _served("exclude_modules", "which modules not"),
    _served("layers_to_transform", "which layers"),
    _served("layers_pattern", "how layers are named"),
    _served("fan_in_fan_out", "weights stored [in, out] (GPT-2)"),
    _served("modules_to_save", "replaced Linear modules such as heads; any other module only by `merge`"),
    _ignored("lora_dropout", "training only"),
    _ignored("task_type", "chooses the task to export"),
    _ignored("inference_mode", "training only"),
    _ignored("peft_type", "must be LORA"),
    _ignored("peft_version", "provenance"),
    _ignored("auto_mapping", "provenance"),
    _ignored("base_model_name_or_path", "the base when BASE is left out"),
    _ignored("revision", "the base's revision"),
    _ignored("eva_config", "initialization only"),
    _ignored("loftq_config", "initialization only; see init_lora_weights"),
    _ignored("corda_config", "initialization only; see init_lora_weights"),
    _ignored("lora_ga_config", "initialization only; see init_lora_weights"),
    _ignored("megatron_config", "used only with a Megatron base"),
    _ignored("megatron_core", "used only with a Megatron base"),
    _ignored("runtime_config", "training only"),
    _ignored("qalora_group_size", "used only with use_qalora"),
    _ignored("ensure_weight_tying", "tied copies are resolved by PEFT when it loads the adapter"),
    _refused(
        "init_lora_weights",
        "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights, so the pair does not fit the pristine base",
        "convert it to plain LoRA with PEFT (save_pretrained(…, path_initial_model_for_weight_conversion=…))",
        lambda value: str(value).split("_niter")[0].lower() in ("pissa", "olora", "corda", "loftq", "lora_ga"),
    ),
    _refused("bias", "the file replaces biases of the base", MERGE_IN_PEFT, lambda value: value not in (None, "none")),
    _refused("use_dora", "DoRA rescales each output by a learned magnitude", MERGE_IN_PEFT),
    _refused("lora_bias", "B has a bias of its own", MERGE_IN_PEFT),
    _refused("trainable_token_indices", "the file replaces rows of an embedding", MERGE_IN_PEFT),
    _refused("target_parameters", "the pair targets a parameter, not a module", MERGE_IN_PEFT),
    _refused("layer_replication", "the adapter changes the number of layers", _RETRAIN),
    _refused("alora_invocation_tokens", "the adapter is active only after an invocation string", _RETRAIN),
    _refused("use_qalora", "A works on pooled groups of inputs", _RETRAIN),
    _refused("use_bdlora", "A or B is block-diagonal", MERGE_IN_PEFT),
    _refused("arrow_config", "adapters are chosen per token by a router", _RETRAIN),
    _refused("velora_config", "activations are compressed in training; not verified here", MERGE_IN_PEFT),
    _refused("monteclora_config", "the pair is sampled", MERGE_IN_PEFT),
    _refused("kasa_config", "the base's weights are truncated by SVD first", MERGE_IN_PEFT),
)
_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class OptionUse:
    """An option that an adapter sets, and its row of the table."""

    option: Option
    value: object

    def verdict(self, mode: str) -> Verdict:
        return self.option.merge if mode == "merge" else self.option.dynamic


def options_in_use(config: dict) -> list[OptionUse]:
    """The rows of the table that `config` (an `adapter_config.json`) sets to something, in the table's order.

    Raises:
        InputRefused: The config has an option that the table does not know and that is set.
    """
    unknown = {name: value for name, value in config.items() if name not in _BY_NAME and _given(value)}
    if unknown:
        raise InputRefused(
            "The adapter sets options that this version does not know, so their effect is unknown",
            where="adapter_config.json: " + ", ".join(unknown),
            found=", ".join(f"{name} = {value!r}" for name, value in unknown.items()),
            next_step="a newer lora-export may know them; otherwise " + MERGE_IN_PEFT,
        )
    return [OptionUse(row, config[row.name]) for row in OPTIONS if row.name in config and row.is_set(config[row.name])]


def require_supported(config: dict, mode: str, adapter: str) -> None:
    """Refuse an adapter that `mode` ("merge" or "dynamic") cannot do exactly; all reasons in one message.

    Raises:
        InputRefused: The tuner is not LoRA, or an option is refused or unknown.
    """
    tuner = config.get("peft_type")
    if tuner != "LORA":
        raise InputRefused(
            f"Adapters of this tuner are not exported (adapter {adapter!r})",
            where="adapter_config.json: peft_type",
            expected="LORA",
            found=repr(tuner),
            next_step="convert it to LoRA with PEFT (save_as_lora) where PEFT can, or " + MERGE_IN_PEFT,
        )
    refused = [use for use in options_in_use(config) if use.verdict(mode) is Verdict.REFUSED]
    if refused:
        raise InputRefused(
            f"Adapter {adapter!r} uses what `{mode}` does not export: "
            + "; ".join(f"{use.option.name} ({use.option.note})" for use in refused),
            where="adapter_config.json: " + ", ".join(use.option.name for use in refused),
            found=", ".join(f"{use.option.name} = {use.value!r}" for use in refused),
            next_step="; or ".join(dict.fromkeys(use.option.way_out for use in refused)),
        )


def markdown_table() -> str:
    """The table as Markdown, for README; kept equal to it by a test."""
    rows = ["| option | `merge` | `dynamic` | |", "|---|---|---|---|"]
    for option in OPTIONS:
        note = option.note + (f"; instead: {option.way_out}" if option.way_out else "")
        rows.append(f"| `{option.name}` | {option.merge} | {option.dynamic} | {note} |")
    return "\n".join(rows) + "\n"
