"""Which task is exported."""

from __future__ import annotations

import pytest
import transformers
from transformers import AutoConfig

from lora_export.base.forward import text_input_names
from lora_export.base.tasks import CLASSIFICATION, Task, auto_class, graphs_of, model_class, resolve_task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", Task.TEXT_CLASSIFICATION),
        ("BertForTokenClassification", Task.TOKEN_CLASSIFICATION),
        ("ViTForImageClassification", Task.IMAGE_CLASSIFICATION),
        ("LlamaForCausalLM", Task.TEXT_GENERATION),
        ("GPT2LMHeadModel", Task.TEXT_GENERATION),
        ("BertModel", Task.FEATURE_EXTRACTION),
        ("CLIPModel", Task.ZERO_SHOT_IMAGE_CLASSIFICATION),
        ("CLIPTextModelWithProjection", Task.FEATURE_EXTRACTION),
        ("CLIPVisionModelWithProjection", Task.FEATURE_EXTRACTION),
        ("T5ForConditionalGeneration", Task.TEXT2TEXT_GENERATION),
        ("BartForConditionalGeneration", Task.TEXT2TEXT_GENERATION),
        ("WhisperForConditionalGeneration", Task.SPEECH_RECOGNITION),
        ("MarianMTModel", Task.TEXT2TEXT_GENERATION),
        ("T5EncoderModel", Task.FEATURE_EXTRACTION),
        ("Qwen3Model", Task.FEATURE_EXTRACTION),
        ("BertForMaskedLM", Task.FILL_MASK),
        ("BertForQuestionAnswering", Task.QUESTION_ANSWERING),
        ("RobertaForMultipleChoice", Task.MULTIPLE_CHOICE),
        ("Wav2Vec2ForCTC", Task.CTC),
        ("SegformerForSemanticSegmentation", Task.SEMANTIC_SEGMENTATION),
        ("DPTForDepthEstimation", Task.DEPTH_ESTIMATION),
    ],
)
def test_it_follows_from_the_architecture(architecture, task):
    assert resolve_task(None, {"architectures": [architecture]}, {}, where="here") is task


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("SEQ_CLS", Task.TEXT_CLASSIFICATION),
        ("TOKEN_CLS", Task.TOKEN_CLASSIFICATION),
        ("CAUSAL_LM", Task.TEXT_GENERATION),
        ("FEATURE_EXTRACTION", Task.FEATURE_EXTRACTION),
        ("SEQ_2_SEQ_LM", Task.TEXT2TEXT_GENERATION),
        ("QUESTION_ANS", Task.QUESTION_ANSWERING),
    ],
)
def test_the_adapters_task_goes_before_the_architecture(kind, task):
    assert resolve_task(None, {"architectures": ["BertModel"]}, {"a": kind, "b": None}, where="here") is task


def test_what_was_asked_for_goes_before_all():
    config = {"architectures": ["LlamaForCausalLM"]}
    assert resolve_task("feature-extraction", config, {"a": "CAUSAL_LM"}, where="here") is Task.FEATURE_EXTRACTION


def test_adapters_of_different_tasks_are_refused():
    with pytest.raises(InputRefused, match="The adapters were trained for different tasks") as refused:
        resolve_task(None, {}, {"a": "SEQ_CLS", "b": "TOKEN_CLS"}, where="here")
    assert refused.value.found == "a: SEQ_CLS, b: TOKEN_CLS"


def test_a_task_type_that_is_not_exported_is_refused():
    with pytest.raises(InputRefused, match="Adapters of PEFT task type XYZ are not exported") as refused:
        resolve_task(None, {}, {"a": "XYZ"}, where="here")
    assert "SEQ_CLS" in refused.value.expected


@pytest.mark.parametrize("architectures", [None, [], ["BertForPreTraining"]])
def test_an_architecture_without_a_task_is_refused(architectures):
    with pytest.raises(InputRefused, match="No supported task follows from the base's architecture") as refused:
        resolve_task(None, {"architectures": architectures}, {}, where="here")
    assert refused.value.where == "here/config.json: architectures"


def test_the_class_that_an_adapter_was_trained_on_goes_before_the_bases():
    config = {"architectures": ["BertForMaskedLM"]}
    trained = {"a": "BertForSequenceClassification", "b": None}
    assert resolve_task(None, config, {}, where="here", trained_classes=trained) is Task.TEXT_CLASSIFICATION
    with pytest.raises(InputRefused, match="The adapters were trained for different tasks") as refused:
        resolve_task(None, config, {}, where="here", trained_classes=trained | {"b": "BertForTokenClassification"})
    assert refused.value.where == "adapter_config.json: auto_mapping"


@pytest.mark.parametrize(
    "architecture",
    ["Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "VoxtralForConditionalGeneration"],
)
def test_a_multimodal_base_is_refused_by_name_unless_text_is_asked_for(architecture):
    config = {"architectures": [architecture]}
    with pytest.raises(InputRefused, match="The base is multimodal") as refused:
        resolve_task(None, config, {}, where="here")
    assert refused.value.found == architecture
    assert "--task text-generation" in refused.value.next_step
    assert resolve_task("text-generation", config, {}, where="here") is Task.TEXT_GENERATION
    assert resolve_task(None, config, {"a": "CAUSAL_LM"}, where="here") is Task.TEXT_GENERATION


@pytest.mark.parametrize(
    ("model_type", "task"), [("t5", Task.TEXT2TEXT_GENERATION), ("whisper", Task.SPEECH_RECOGNITION)]
)
def test_a_sequence_to_sequence_adapter_is_of_its_bases_kind(model_type, task):
    assert resolve_task(None, {"model_type": model_type}, {"a": "SEQ_2_SEQ_LM"}, where="here") is task


def test_speech_recognition_is_whispers(bases):
    with pytest.raises(InputRefused, match="automatic-speech-recognition is not exported") as refused:
        build_weightless(Task.SPEECH_RECOGNITION, AutoConfig.from_pretrained(bases["t5"]), "float32")
    assert (refused.value.expected, refused.value.found) == ("whisper", "t5")


def test_an_encoder_decoder_has_three_graphs():
    assert graphs_of(Task.TEXT_CLASSIFICATION) == ("model",)
    assert graphs_of(Task.TEXT2TEXT_GENERATION) == ("encoder_model", "decoder_model", "decoder_with_past_model")


def test_every_task_has_a_transformers_class():
    assert {auto_class(task).__name__.startswith("AutoModel") for task in Task} == {True}
    assert set(CLASSIFICATION) < set(Task)


@pytest.mark.parametrize("half", ["Text", "Vision"])
def test_an_encoder_named_with_its_projection_keeps_it(half):
    named = f"CLIP{half}ModelWithProjection"
    config = getattr(transformers, f"CLIP{half}Config")(architectures=[named])
    assert model_class(Task.FEATURE_EXTRACTION, config) is getattr(transformers, named)
    config.architectures = [f"CLIP{half}Model"]
    assert model_class(Task.FEATURE_EXTRACTION, config) is transformers.AutoModel


def test_an_encoder_of_an_encoder_decoder_is_what_it_says():
    config = transformers.T5Config(architectures=["T5EncoderModel"])
    assert model_class(Task.FEATURE_EXTRACTION, config) is transformers.T5EncoderModel
    config.architectures = ["T5Model"]
    assert model_class(Task.FEATURE_EXTRACTION, config) is transformers.AutoModel


@pytest.mark.parametrize("name", ["CLIPTextModelWithProjection", "NoSuchModelWithProjection", "os", ""])
def test_a_named_class_of_another_config_is_not_taken(name):
    config = transformers.BertConfig(architectures=[name])
    assert model_class(Task.FEATURE_EXTRACTION, config) is transformers.AutoModel


def test_token_types_are_an_input_only_where_there_are_several(bases):
    config = AutoConfig.from_pretrained(bases["bert"])
    model = build_weightless(Task.FEATURE_EXTRACTION, config, "float32")
    assert text_input_names(model) == ("input_ids", "attention_mask", "token_type_ids")
    config.type_vocab_size = 1
    assert text_input_names(model) == ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("kind", "named", "gives"),
    [
        ("Roberta", None, False),
        ("XLMRoberta", None, False),
        ("Camembert", None, False),
        ("Electra", None, True),
        ("Roberta", ("input_ids", "token_type_ids"), True),
        ("Electra", ("input_ids", "attention_mask"), False),
    ],
)
def test_token_types_are_an_input_only_where_the_tokenizer_gives_them(kind, named, gives):
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    config.type_vocab_size = 2
    model = build_weightless(Task.FEATURE_EXTRACTION, config, "float32")
    assert ("token_type_ids" in text_input_names(model, named)) is gives
