"""What happens to every option of an adapter: merged, served as inputs, or refused. The one table.

It drives the refusals, `inspect` and the docs' table. It reads `adapter_config.json` as plain JSON, so an adapter is
refused before any work and without importing PEFT. What a supported option *means* is PEFT's business
(`peft_reader`); this table only says whether it is supported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from lora_export.errors import InputRefused


class Handling(StrEnum):
    MERGED = "merged"
    SERVED = "served as inputs"
    CONVERTED = "converted to LoRA with --convert-rank"
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
    merge: Handling
    dynamic: Handling
    note: str
    way_out: str = ""


def _given(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def _never(value: object) -> bool:
    return False


def _served(name: str, note: str) -> Option:
    return Option(name, _given, Handling.MERGED, Handling.SERVED, note)


def _ignored(name: str, note: str) -> Option:
    return Option(name, _never, Handling.NO_EFFECT, Handling.NO_EFFECT, note)


def _refused(name: str, note: str, way_out: str, *, is_set: Callable[[object], bool] = _given) -> Option:
    return Option(name, is_set, Handling.REFUSED, Handling.REFUSED, note, way_out)


def _merge_only(name: str, note: str) -> Option:
    return Option(name, _given, Handling.MERGED, Handling.REFUSED, note, "merge this adapter into a graph of its own")


# Starts that PEFT draws at random, or computes from data that the adapter does not carry.
_UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")


def _start_of(value: object) -> str:
    return re.sub(r"_\d+$", "", str(value).lower())


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
    _ignored("peft_type", "the tuner; see the second table"),
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
    _served("bias", "trained biases of the base, as the file holds them"),
    _served("use_dora", "each output rescaled by m / ‖W + s·B·A‖; on embeddings and convolutions only by `merge`"),
    _served("lora_bias", "B has a bias of its own, added to the module's"),
    _served("trainable_token_indices", "replaced rows of an embedding and of the head tied to it"),
    _served("use_bdlora", "block-diagonal A or B, multiplied out"),
    _served("velora_config", "changes training only"),
    Option(
        "alora_invocation_tokens",
        _given,
        Handling.REFUSED,
        Handling.SERVED,
        "the pairs are active from the last invocation on: a gate over the tokens, which weights cannot hold",
        "serve it with `lora-export dynamic`",
    ),
    Option(
        "init_lora_weights",
        lambda value: _start_of(value) in _UNREPEATABLE,
        Handling.REFUSED,
        Handling.REFUSED,
        "PiSSA and OLoRA change the base's weights: repeated on it, served at twice the rank; refused on the original "
        "base are randomized PiSSA (pissa_niter_N), CorDA, LoftQ and LoRA-GA, whose start cannot be repeated from it",
        "name the base that training started from, what the start left of the original, with --residual-base; or "
        "convert the adapter to plain LoRA with PEFT (save_pretrained(…, path_initial_model_for_weight_conversion=…))",
    ),
    _merge_only("target_parameters", "the pair targets a parameter, not a module (mixture of experts)"),
    _merge_only("kasa_config", "the base's weights are truncated first, by singular values"),
    _refused("layer_replication", "the adapter changes the number of layers", _RETRAIN),
    _refused("use_qalora", "A works on pooled groups of inputs; PEFT itself cannot merge it", _RETRAIN),
    _refused("monteclora_config", "its sampler is saved in a form that PEFT does not load", _RETRAIN),
    _refused("arrow_config", "adapters are chosen per token by a router", _RETRAIN),
)
_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class Tuner:
    """A PEFT method, by its `peft_type`. Its own options are PEFT's business: PEFT loads and merges each layer.

    Attributes:
        name: `peft_type` in `adapter_config.json`.
        merge: What `merge` does with it.
        dynamic: What `dynamic` does with it.
        note: What it does, or why it is refused.
    """

    name: str
    merge: Handling
    dynamic: Handling
    note: str


def _convertible(*names: str) -> tuple[Tuner, ...]:
    note = "adds to a weight; PEFT turns the sum into a pair by a truncated SVD"
    return tuple(Tuner(name, Handling.MERGED, Handling.CONVERTED, note) for name in names)


def _merged_by_peft(note: str, *names: str) -> tuple[Tuner, ...]:
    return tuple(Tuner(name, Handling.MERGED, Handling.REFUSED, note) for name in names)


def _no_tuner(note: str, *names: str) -> tuple[Tuner, ...]:
    return tuple(Tuner(name, Handling.REFUSED, Handling.REFUSED, note) for name in names)


TUNERS: tuple[Tuner, ...] = (
    Tuner("LORA", Handling.MERGED, Handling.SERVED, "by its options, above"),
    Tuner("ADALORA", Handling.MERGED, Handling.SERVED, "a pair with singular values, folded into A"),
    Tuner("TRAINABLE_TOKENS", Handling.MERGED, Handling.SERVED, "replaced rows of an embedding"),
    *_convertible("LOHA", "LOKR", "VERA", "RANDLORA", "VBLORA", "GRALORA", "DELORA", "MISS", "C3A", "TINYLORA"),
    *_convertible("UNILORA", "FOURIERFT", "WAVEFT"),
    *_merged_by_peft("multiplies or masks a weight", "OFT", "BOFT", "HRA", "IA3", "HIRA", "ROAD", "GLORA", "SHIRA"),
    *_merged_by_peft("adds to a weight what PEFT does not convert", "PVERA", "DEFT", "PEANUT", "SUPERTUNING"),
    *_merged_by_peft("replaces normalizations", "LN_TUNING"),
    *_merged_by_peft("adds to biases, which the modules must have", "BEFT"),
    *_no_tuner("its frozen part is computed from all of the base's weights when PEFT loads it", "PSOFT", "FROD"),
    *_no_tuner("its frozen part is computed from all of the base's weights when PEFT loads it", "ADAMSS", "OSF"),
    *_no_tuner("PEFT itself cannot merge it", "LILY", "SHADOW"),
    *_no_tuner("routes between adapters", "XLORA", "POLY"),
    *_no_tuner("adds tokens or states, not weights", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING"),
    *_no_tuner("adds tokens or states, not weights", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
)
_TUNER_BY_NAME = {tuner.name: tuner for tuner in TUNERS}


@dataclass(frozen=True)
class OptionUse:
    """An option that an adapter sets, and its row of the table."""

    option: Option
    value: object

    def verdict(self, mode: str) -> Handling:
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


def require_supported(config: dict, mode: str, adapter: str, *, convert_rank: float | None = None) -> None:
    """Refuse an adapter that `mode` ("merge" or "dynamic") cannot do exactly; all reasons in one message.

    Args:
        convert_rank: The rank, or share of energy, to convert other tuners with; None to refuse them.

    Raises:
        InputRefused: The tuner or an option is refused or unknown.
    """
    if config.get("peft_type") != "LORA":
        _require_tuner(config.get("peft_type"), mode, adapter, convert_rank=convert_rank)
        return
    refused = [use for use in options_in_use(config) if use.verdict(mode) is Handling.REFUSED]
    if refused:
        raise InputRefused(
            f"Adapter {adapter!r} uses what `{mode}` does not export: "
            + "; ".join(f"{use.option.name} ({use.option.note})" for use in refused),
            where="adapter_config.json: " + ", ".join(use.option.name for use in refused),
            found=", ".join(f"{use.option.name} = {use.value!r}" for use in refused),
            next_step="; or ".join(dict.fromkeys(use.option.way_out for use in refused)),
        )


def tuner_verdict(config: dict, mode: str) -> tuple[Handling, str]:
    """What `mode` does with the tuner of `config`, and the table's note; an unknown one is refused."""
    tuner = _TUNER_BY_NAME.get(config.get("peft_type"))
    if tuner is None:
        return Handling.REFUSED, "this version does not know it"
    return (tuner.merge if mode == "merge" else tuner.dynamic), tuner.note


def _require_tuner(name: object, mode: str, adapter: str, *, convert_rank: float | None) -> None:
    verdict, note = tuner_verdict({"peft_type": name}, mode)
    if verdict is Handling.CONVERTED and convert_rank is None:
        raise InputRefused(
            f"Adapter {adapter!r} is no LoRA; `dynamic` serves it once it is converted",
            where="adapter_config.json: peft_type",
            found=repr(name),
            next_step="add --convert-rank R (the error of each module is reported), or merge it exactly",
        )
    if verdict is Handling.REFUSED:
        can_merge = tuner_verdict({"peft_type": name}, "merge")[0] is Handling.MERGED
        raise InputRefused(
            f"`{mode}` does not export adapters of this tuner (adapter {adapter!r}): {note}",
            where="adapter_config.json: peft_type",
            expected=", ".join(t.name for t in TUNERS if tuner_verdict({"peft_type": t.name}, mode)[0] != "refused"),
            found=repr(name),
            next_step="merge this adapter into a graph of its own" if can_merge else _RETRAIN,
        )


def markdown_table() -> str:
    """The table as Markdown, for the docs; kept equal to it by a test."""
    rows = ["| option | `merge` | `dynamic` | |", "|---|---|---|---|"]
    for option in OPTIONS:
        note = option.note + (f"; instead: {option.way_out}" if option.way_out else "")
        rows.append(f"| `{option.name}` | {option.merge} | {option.dynamic} | {note} |")
    rows += ["", "| tuner | `merge` | `dynamic` | |", "|---|---|---|---|"]
    for note in dict.fromkeys((tuner.merge, tuner.dynamic, tuner.note) for tuner in TUNERS):
        names = [f"`{t.name}`" for t in TUNERS if (t.merge, t.dynamic, t.note) == note]
        rows.append(f"| {', '.join(names)} | {note[0]} | {note[1]} | {note[2]} |")
    return "\n".join(rows) + "\n"
