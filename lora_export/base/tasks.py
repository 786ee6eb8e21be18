"""The tasks that can be exported: which Transformers class each loads, what it takes and what it gives.

Names follow the Transformers pipelines and Optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NoReturn

from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER, SINGLE
from lora_export.errors import InputRefused


class Task(StrEnum):
    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"
    FILL_MASK = "fill-mask"
    IMAGE_CLASSIFICATION = "image-classification"
    SEMANTIC_SEGMENTATION = "semantic-segmentation"
    DEPTH_ESTIMATION = "depth-estimation"
    AUDIO_CLASSIFICATION = "audio-classification"
    CTC = "ctc-speech-recognition"
    TEXT_GENERATION = "text-generation"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    TEXT2TEXT_GENERATION = "text2text-generation"
    SPEECH_RECOGNITION = "automatic-speech-recognition"


@dataclass(frozen=True)
class _Entry:
    """A task in Transformers and PEFT.

    Attributes:
        auto_class: Transformers' class for it.
        classes: Transformers' table of the models that it leads to, by model type (in `modeling_auto`).
        peft_task_type: PEFT's name; None where PEFT has none.
        model_types: Those it is limited to; empty for no limit.
    """

    auto_class: str
    classes: str
    peft_task_type: str | None = None
    model_types: tuple[str, ...] = ()

    def takes(self, model_type: str | None) -> bool:
        return not self.model_types or model_type in self.model_types


_WITH_PROJECTION = "WithProjection"
# In the order in which an architecture is looked up: Bart's class is in two tables, CLIP's and Whisper's too.
_TABLE = {
    Task.TEXT_CLASSIFICATION: _Entry("AutoModelForSequenceClassification", "FOR_SEQUENCE_CLASSIFICATION", "SEQ_CLS"),
    Task.TOKEN_CLASSIFICATION: _Entry("AutoModelForTokenClassification", "FOR_TOKEN_CLASSIFICATION", "TOKEN_CLS"),
    Task.QUESTION_ANSWERING: _Entry("AutoModelForQuestionAnswering", "FOR_QUESTION_ANSWERING", "QUESTION_ANS"),
    Task.MULTIPLE_CHOICE: _Entry("AutoModelForMultipleChoice", "FOR_MULTIPLE_CHOICE"),
    Task.IMAGE_CLASSIFICATION: _Entry("AutoModelForImageClassification", "FOR_IMAGE_CLASSIFICATION"),
    Task.SEMANTIC_SEGMENTATION: _Entry("AutoModelForSemanticSegmentation", "FOR_SEMANTIC_SEGMENTATION"),
    Task.DEPTH_ESTIMATION: _Entry("AutoModelForDepthEstimation", "FOR_DEPTH_ESTIMATION"),
    Task.AUDIO_CLASSIFICATION: _Entry("AutoModelForAudioClassification", "FOR_AUDIO_CLASSIFICATION"),
    Task.CTC: _Entry("AutoModelForCTC", "FOR_CTC"),
    Task.TEXT_GENERATION: _Entry("AutoModelForCausalLM", "FOR_CAUSAL_LM", "CAUSAL_LM"),
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: _Entry(
        "AutoModelForZeroShotImageClassification", "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION"
    ),
    Task.SPEECH_RECOGNITION: _Entry("AutoModelForSpeechSeq2Seq", "FOR_SPEECH_SEQ_2_SEQ", "SEQ_2_SEQ_LM", ("whisper",)),
    Task.TEXT2TEXT_GENERATION: _Entry("AutoModelForSeq2SeqLM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "SEQ_2_SEQ_LM"),
    Task.FILL_MASK: _Entry("AutoModelForMaskedLM", "FOR_MASKED_LM"),
    Task.FEATURE_EXTRACTION: _Entry("AutoModel", "", "FEATURE_EXTRACTION"),
}
# Each row has one class.
CLASSIFIED = (Task.TEXT_CLASSIFICATION, Task.IMAGE_CLASSIFICATION, Task.AUDIO_CLASSIFICATION)
SEQ2SEQ = (Task.TEXT2TEXT_GENERATION, Task.SPEECH_RECOGNITION)
# Those whose heads have as many outputs as the config has labels.
CLASSIFICATION = (
    Task.TEXT_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.IMAGE_CLASSIFICATION, Task.SEMANTIC_SEGMENTATION,
    Task.AUDIO_CLASSIFICATION,
)  # fmt: skip
# Those whose head a base may lack, as an adapter brings it.
HEADED = (*CLASSIFICATION, Task.QUESTION_ANSWERING, Task.MULTIPLE_CHOICE)


def _classes(table: str) -> dict[str, frozenset[str]]:
    """Transformers' models of a table by model type."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_{table}_MAPPING_NAMES".replace("__", "_"))
    return {kind: frozenset([name] if isinstance(name, str) else name) for kind, name in names.items()}


def task_of_class(name: str) -> Task | None:
    """The task that a Transformers model class (`BertForSequenceClassification`) is for; None if it is none of ours."""
    if is_multimodal(name):
        return None
    for task, entry in _TABLE.items():
        if any(name in classes and entry.takes(kind) for kind, classes in _classes(entry.classes).items()):
            return task
    return Task.FEATURE_EXTRACTION if name.endswith(("Model", _WITH_PROJECTION)) else None


def is_multimodal(name: str) -> bool:
    """Whether a Transformers model class writes text about images or sounds: Gemma 3, Qwen-VL, LLaVA, Voxtral."""
    return any(name in classes for classes in _classes("FOR_MULTIMODAL_LM").values())


def resolve_task(
    requested: str | None,
    config: dict,
    peft_task_types: Mapping[str, str | None],
    *,
    where: str,
    trained_classes: Mapping[str, str | None] = MappingProxyType({}),
) -> Task:
    """The task to export: the one asked for, else the adapters' own, else the base config's architecture.

    Args:
        requested: `--task`, if given.
        config: The base's `config.json`.
        peft_task_types: `task_type` of each adapter by adapter name.
        where: The base's path, for messages.
        trained_classes: The model class that each adapter was trained on, by adapter name, where it records one.

    Raises:
        InputRefused: The adapters were trained for different tasks, or the architecture has no supported task.
    """
    if requested is not None:
        return Task(requested)
    model_type = config.get("model_type")
    asked = {name: kind for name, kind in peft_task_types.items() if kind}
    if len(set(asked.values())) > 1:
        _refuse_different("task_type", asked)
    for kind in asked.values():
        for task, entry in _TABLE.items():
            if entry.peft_task_type == kind and entry.takes(model_type):
                return task
        raise InputRefused(
            f"Adapters of PEFT task type {kind} are not exported",
            where="adapter_config.json: task_type",
            expected=", ".join(dict.fromkeys(e.peft_task_type for e in _TABLE.values() if e.peft_task_type)),
            next_step="name a supported task with --task if the base can do it",
        )
    trained = {name: task_of_class(kind) for name, kind in trained_classes.items() if kind}
    if len(set(trained.values())) > 1:
        _refuse_different("auto_mapping", {name: kind for name, kind in trained_classes.items() if kind})
    architectures = config.get("architectures") or []
    found = (*trained.values(), *(task_of_class(name) for name in architectures))
    for task in filter(None, found):
        return task
    if any(map(is_multimodal, architectures)):
        raise InputRefused(
            "The base is multimodal: it takes images or sounds beside text, and is not exported as a whole",
            where=f"{where}/config.json: architectures",
            found=", ".join(architectures),
            next_step="export its language model alone with --task text-generation",
        )
    raise InputRefused(
        "No supported task follows from the base's architecture",
        where=f"{where}/config.json: architectures",
        expected="a class of Transformers for one of: " + ", ".join(Task),
        found=", ".join(architectures) or "nothing",
        next_step="name the task with --task",
    )


def _refuse_different(name: str, found: Mapping[str, str]) -> NoReturn:
    raise InputRefused(
        "The adapters were trained for different tasks; one graph serves one task",
        where=f"adapter_config.json: {name}",
        found=", ".join(f"{adapter}: {kind}" for adapter, kind in found.items()),
        next_step="export each task to its own folder, or name the task with --task",
    )


def tasks_of(model_type: str | None) -> tuple[Task, ...]:
    """The tasks that Transformers has models of this type for."""
    return tuple(t for t, entry in _TABLE.items() if entry.takes(model_type) and model_type in _classes(entry.classes))


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
            next_step=f"name another task with --task, such as {Task.CTC} for an encoder with a CTC head",
        )


def auto_class(task: Task) -> type:
    """The Transformers `AutoModel…` class of `task`."""
    import transformers

    return getattr(transformers, _TABLE[task].auto_class)


def model_class(task: Task, config) -> type:
    """The class of `task` for a `PretrainedConfig`: the auto class, or the one it names where that does not lead to it.

    1. CLIP's encoders with their projections (`CLIPTextModelWithProjection`), and encoders of an encoder-decoder
       (`T5EncoderModel`).
    2. The whole of a multimodal model, whose language model alone is traced.
    """
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, name, None)
    if getattr(named, "config_class", None) is type(config):
        kind, usual = config.model_type, _classes("")
        encodes = name in _classes("FOR_TEXT_ENCODING").get(kind, ()) and name not in usual.get(kind, ())
        encodes |= name.endswith(_WITH_PROJECTION)
        if (task is Task.FEATURE_EXTRACTION and encodes) or (task is Task.TEXT_GENERATION and is_multimodal(name)):
            return named
    return auto_class(task)


def peft_task_type(task: Task) -> str | None:
    """PEFT's name of `task`; None where PEFT has none."""
    return _TABLE[task].peft_task_type
