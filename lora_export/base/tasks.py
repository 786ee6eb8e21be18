"""The tasks that can be exported: which Transformers class each loads, what it takes and what it gives.

Names follow the Transformers pipelines and Optimum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER, SINGLE
from lora_export.errors import InputRefused


class Task(StrEnum):
    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    IMAGE_CLASSIFICATION = "image-classification"
    TEXT_GENERATION = "text-generation"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    TEXT2TEXT_GENERATION = "text2text-generation"
    SPEECH_RECOGNITION = "automatic-speech-recognition"


@dataclass(frozen=True)
class _Entry:
    auto_class: str
    architecture_suffixes: tuple[str, ...]
    peft_task_type: str | None
    model_types: tuple[str, ...] = ()  # those it is limited to; empty for no limit

    def takes(self, model_type: str | None) -> bool:
        return not self.model_types or model_type in self.model_types


_WITH_PROJECTION = "WithProjection"
_TABLE = {
    Task.TEXT_CLASSIFICATION: _Entry("AutoModelForSequenceClassification", ("ForSequenceClassification",), "SEQ_CLS"),
    Task.TOKEN_CLASSIFICATION: _Entry("AutoModelForTokenClassification", ("ForTokenClassification",), "TOKEN_CLS"),
    Task.IMAGE_CLASSIFICATION: _Entry("AutoModelForImageClassification", ("ForImageClassification",), None),
    Task.TEXT_GENERATION: _Entry("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM"),
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: _Entry("AutoModelForZeroShotImageClassification", ("CLIPModel",), None),
    # Before any other class that ends like Whisper's.
    Task.SPEECH_RECOGNITION: _Entry(
        "AutoModelForSpeechSeq2Seq", ("WhisperForConditionalGeneration",), "SEQ_2_SEQ_LM", ("whisper",)
    ),
    Task.TEXT2TEXT_GENERATION: _Entry("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",), "SEQ_2_SEQ_LM"),
    Task.FEATURE_EXTRACTION: _Entry("AutoModel", ("Model", _WITH_PROJECTION), "FEATURE_EXTRACTION"),
}
SEQ2SEQ = (Task.TEXT2TEXT_GENERATION, Task.SPEECH_RECOGNITION)
CLASSIFICATION = (Task.TEXT_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.IMAGE_CLASSIFICATION)


def resolve_task(requested: str | None, config: dict, peft_task_types: dict[str, str | None], where: str) -> Task:
    """The task to export: the one asked for, else the adapters' own, else the base config's architecture.

    Args:
        requested: `--task`, if given.
        config: The base's `config.json`.
        peft_task_types: `task_type` of each adapter by adapter name.
        where: The base's path, for messages.

    Raises:
        InputRefused: The adapters were trained for different tasks, or the architecture has no supported task.
    """
    if requested is not None:
        return Task(requested)
    asked = {name: kind for name, kind in peft_task_types.items() if kind}
    if len(set(asked.values())) > 1:
        raise InputRefused(
            "The adapters were trained for different tasks; one graph serves one task",
            where="adapter_config.json: task_type",
            found=", ".join(f"{name}: {kind}" for name, kind in asked.items()),
            next_step="export each task to its own folder, or name the task with --task",
        )
    for kind in asked.values():
        for task, entry in _TABLE.items():
            if entry.peft_task_type == kind and entry.takes(config.get("model_type")):
                return task
        raise InputRefused(
            f"Adapters of PEFT task type {kind} are not exported",
            where="adapter_config.json: task_type",
            expected=", ".join(dict.fromkeys(e.peft_task_type for e in _TABLE.values() if e.peft_task_type)),
            next_step="name a supported task with --task if the base can do it",
        )
    architectures = config.get("architectures") or []
    for task, entry in _TABLE.items():
        if any(name.endswith(entry.architecture_suffixes) for name in architectures):
            return task
    raise InputRefused(
        "No supported task follows from the base's architecture",
        where=f"{where}/config.json: architectures",
        expected="a class ending in " + ", ".join(s for e in _TABLE.values() for s in e.architecture_suffixes),
        found=", ".join(architectures) or "nothing",
        next_step="name the task with --task",
    )


def graphs_of(task: Task) -> tuple[str, ...]:
    """The stems of the graphs that `task` exports, in the order they run."""
    return (ENCODER, DECODER, DECODER_WITH_PAST) if task in SEQ2SEQ else (SINGLE,)


def require_model_type(task: Task, model_type: str) -> None:
    """Raise InputRefused if `task` is not exported for models of this type."""
    entry = _TABLE[task]
    if not entry.takes(model_type):
        raise InputRefused(
            f"{task} is not exported for this base's architecture",
            where="config.json: model_type",
            expected=" or ".join(entry.model_types),
            found=model_type,
        )


def auto_class(task: Task) -> type:
    """The Transformers `AutoModel…` class of `task`."""
    import transformers

    return getattr(transformers, _TABLE[task].auto_class)


def model_class(task: Task, config) -> type:
    """The class of `task` for a `PretrainedConfig`: the auto class, or the encoder with a projection that it names.

    No auto class leads to CLIP's encoders with their projections (`CLIPTextModelWithProjection`).
    """
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, name, None) if name.endswith(_WITH_PROJECTION) else None
    if task is Task.FEATURE_EXTRACTION and getattr(named, "config_class", None) is type(config):
        return named
    return auto_class(task)


def is_dual_encoder(model) -> bool:
    """Whether `model` (a `PreTrainedModel`) takes texts and images and compares them, as CLIP does."""
    return hasattr(model, "get_text_features") and hasattr(model, "get_image_features")


def peft_task_type(task: Task) -> str | None:
    """PEFT's name of `task`; None where PEFT has none."""
    return _TABLE[task].peft_task_type


# RoBERTa's kin: their tokenizers give no token types, and Optimum's graphs ask for none, whatever the config's default.
_WITHOUT_TOKEN_TYPES = frozenset(
    {"big_bird", "camembert", "data2vec-text", "ibert", "longformer", "roberta", "roberta-prelayernorm", "xlm-roberta",
     "xlm-roberta-xl", "xmod"}
)  # fmt: skip


def text_input_names(model, named: Collection[str] | None = None) -> tuple[str, ...]:
    """The encoder inputs of `model` (a `PreTrainedModel`); `token_type_ids` only where it has more than one type, and
    where its tokenizer gives them.

    Args:
        named: The inputs that the base's tokenizer names; None to go by the model type, as Optimum does.
    """
    names = ["input_ids", "attention_mask"]
    accepts = inspect.signature(model.forward).parameters
    has_types = "token_type_ids" in accepts and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    given = model.config.model_type not in _WITHOUT_TOKEN_TYPES if named is None else "token_type_ids" in named
    if has_types and given:
        names.append("token_type_ids")
    return tuple(names)


def cache_argument(forward: Callable) -> str:
    """What a Transformers model's `forward` calls its cache: `cache` from release 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
