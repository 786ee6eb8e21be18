"""Tasks beyond classification and generation: exported with an adapter, checked against PEFT, and tried with `run`."""

from __future__ import annotations

import base64
import io
import json
import time
import wave
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny
import torch
import transformers
from live import running

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.serve.batching import Gaps
from lora_export.serve.models import Models
from lora_export.serve.options import ServeOptions
from lora_export.trial import run_trial
from lora_export.verdict import Verdict

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE = {"image_size": 32, "patch_size": 8}
WAVE = {"conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [20, 8], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "pad_token_id": 0}  # fmt: skip
STAGES = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
          "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
          "decoder_hidden_size": 16, "image_size": 32, "num_labels": 3}  # fmt: skip
DEPTH = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
         "is_hybrid": False}  # fmt: skip
BASES = {
    "question-answering": ("BertForQuestionAnswering", lambda: tiny.bert_config(num_hidden_layers=1)),
    "fill-mask": ("BertForMaskedLM", lambda: tiny.bert_config(num_hidden_layers=1)),
    "multiple-choice": ("BertForMultipleChoice", lambda: tiny.bert_config(num_hidden_layers=1)),
    "ctc-speech-recognition": ("Wav2Vec2ForCTC", lambda: transformers.Wav2Vec2Config(**SMALL, **WAVE)),
    "audio-classification": (
        "Wav2Vec2ForSequenceClassification",
        lambda: transformers.Wav2Vec2Config(**SMALL, **WAVE, classifier_proj_size=16, num_labels=3),
    ),
    "semantic-segmentation": ("SegformerForSemanticSegmentation", lambda: transformers.SegformerConfig(**STAGES)),
    "depth-estimation": ("DPTForDepthEstimation", lambda: transformers.DPTConfig(**SMALL | IMAGE | DEPTH)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, _silent_libraries):
    """The folder of a task's dynamic export with adapter "a", its base and adapter; made once."""
    found: dict[str, tuple[Path, Path, Path]] = {}

    def get(task: str) -> tuple[Path, Path, Path]:
        if task not in found:
            folder = tmp_path_factory.mktemp(task)
            name, config = BASES[task]
            kind = getattr(transformers, name)
            model = tiny.randomize(kind(config()), task)
            model.save_pretrained(folder / "base")
            if model.main_input_name == "input_ids":
                save_tokenizer(folder / "base")
            elif model.main_input_name == "input_values":
                transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "base")
            else:
                size = {"height": 32, "width": 32}
                transformers.ViTImageProcessor(size=size).save_pretrained(folder / "base")
            tiny.adapter(folder / "base", folder / "a", name, r=3, target_modules=r".*\.(query|value|q_proj|v_proj)")
            export(Request(str(folder / "base"), ((str(folder / "a"), "a"),), "dynamic"), ExportOptions(folder / "out"))
            found[task] = folder / "out", folder / "base", folder / "a"
        return found[task]

    return get


def save_tokenizer(folder: Path) -> None:
    tiny.save_tokenizer(folder, classifier=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "[UNK]"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("task", BASES)
def test_check_passes_and_sees_the_adapters_effect(task, made):
    out, *_ = made(task)
    report, _ = check(out, SourceOverrides(), CheckOptions(provider="cpu", n_rows=4))
    assert report.subject.task == task and report.verdict is Verdict.PASS
    groups = {case.group for case in report.cases}
    assert {"adapter", "base", "rows"} <= groups
    effects = [case.largest_effect for case in report.cases if case.largest_effect is not None]
    assert effects and min(effects) > 1e-5


def reference(made, task: str):
    _, base, adapter = made(task)
    from peft import PeftModel

    return PeftModel.from_pretrained(getattr(transformers, BASES[task][0]).from_pretrained(base), adapter).eval()


def test_run_answers_a_question_out_of_the_text(made):
    out, base, _ = made("question-answering")
    question, text = "who?", "the quick brown fox"
    (result,) = run_trial(out, [question, text], {"a": 1.0}, provider="cpu", max_new_tokens=1)["results"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    given = tokenizer(question, text, return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        outputs = reference(made, "question-answering")(
            **{k: given[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        )
    n_question, n_tokens = len(tokenizer(question)["input_ids"]), given["input_ids"].shape[1]
    spans = [(i, j) for i in range(n_question, n_tokens) for j in range(i, n_tokens)]
    i, j = max(spans, key=lambda span: outputs.start_logits[0, span[0]] + outputs.end_logits[0, span[1]])
    assert result["text"] == tokenizer.decode(given["input_ids"][0, i : j + 1], skip_special_tokens=True).strip()
    with pytest.raises(UsageProblem, match="Question answering takes questions and texts in turn"):
        run_trial(out, [question], {}, provider="cpu", max_new_tokens=1)


def test_run_fills_a_gap(made):
    out, base, _ = made("fill-mask")
    (result,) = run_trial(out, ["a [UNK] b"], {"a": 1.0}, provider="cpu", max_new_tokens=1)["results"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    given = tokenizer("a [UNK] b", return_tensors="pt", return_token_type_ids=True)
    place = int((given["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    with torch.no_grad():
        logits = reference(made, "fill-mask")(
            **{k: given[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        ).logits
    assert result["label"] == tokenizer.decode([int(logits[0, place].argmax())]).strip()
    with pytest.raises(UsageProblem, match="The text has no gap to fill"):
        run_trial(out, ["no gap"], {}, provider="cpu", max_new_tokens=1)


def test_a_server_answers_questions_and_fills_gaps(made):
    out, base, _ = made("question-answering")
    question, text = "who?", "the quick brown fox"
    given = transformers.AutoTokenizer.from_pretrained(base)(
        question, text, return_tensors="pt", return_token_type_ids=True, return_offsets_mapping=True
    )
    offsets, sequence = given.pop("offset_mapping")[0].tolist(), given.sequence_ids(0)
    with torch.no_grad():
        outputs = reference(made, "question-answering")(**given)
    inside = [place for place, number in enumerate(sequence) if number == 1]
    starts, ends = (torch.softmax(s[0, inside].double(), -1) for s in (outputs.start_logits, outputs.end_logits))
    joint = torch.triu(starts[:, None] * ends[None, :])
    i, j = divmod(int(joint.argmax()), len(inside))
    with running(out, model_name="base") as live:
        found = live.post("/v1/question-answering", model="a", question=question, context=text).json()
        assert live.post("/v1/question-answering", model="a", question="", context=text).status_code == 400
        assert live.post("/v1/fill-mask", model="a", input="x").status_code == 400
    start, end = offsets[inside[i]][0], offsets[inside[j]][1]
    assert (found["answer"], found["start"], found["end"]) == (text[start:end], start, end)
    assert found["score"] == pytest.approx(float(joint.max()), abs=1e-5)

    out, base, _ = made("fill-mask")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    given = tokenizer("a [UNK] b [UNK]", return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        logits = reference(made, "fill-mask")(**given).logits[0]
    with running(out, model_name="base", max_queue=3) as live:
        (data,) = live.post("/v1/fill-mask", model="a", input="a [UNK] b [UNK]", top_k=3).json()["data"]
        refused = live.post("/v1/fill-mask", model="a", input="no gap")
        many = live.post("/v1/fill-mask", model="a", input=["[UNK] [UNK]", "[UNK] [UNK]"])
        ids, gaps = given["input_ids"][0].tolist(), Gaps([1], 3)
        (kept,) = live.service.batcher.submit("a", [ids], time.monotonic() + 20, gaps=[gaps]).future.result()
    assert many.status_code == 400 and "has 4 gaps; at most 3 are taken" in many.json()["error"]["message"]
    # Of [tokens, vocabulary], an answer keeps what was asked, and no view of the rest.
    assert kept.values.shape == kept.tokens.shape == (1, 3)
    assert all(array.base is None or array.base.size <= 6 for array in (kept.values, kept.tokens))
    assert refused.status_code == 400 and "write [UNK] where a word is missing" in refused.json()["error"]["message"]
    assert [(gap["start"], gap["end"]) for gap in data["gaps"]] == [(2, 7), (10, 15)]
    places = (given["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    for gap, place in zip(data["gaps"], places, strict=True):
        expected, tokens = torch.softmax(logits[place].double(), -1).topk(3)
        assert [each["token"] for each in gap["candidates"]] == tokens.tolist()
        assert [each["score"] for each in gap["candidates"]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert gap["candidates"][0]["text"] == tokenizer.decode([int(tokens[0])])


SOUND = (9000 * np.sin(np.arange(9000) / 7)).astype("<i2")


def of_sound(made, task: str, samples: np.ndarray) -> np.ndarray:
    """The logits of PEFT's model with Transformers' extractor."""
    given = transformers.Wav2Vec2FeatureExtractor()(samples / 32768, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return reference(made, task)(given["input_values"]).logits[0]


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(1), opened.setsampwidth(2), opened.setframerate(16000)
        opened.writeframes(samples.tobytes())
    return file.getvalue()


def test_a_server_classifies_sounds_of_different_lengths(made):
    out, *_ = made("audio-classification")
    urls = ["data:audio/wav;base64," + base64.b64encode(wav(SOUND[:n])).decode() for n in (9000, 7000, 9000)]
    with running(out, model_name="base") as live:
        found = live.post("/v1/classify", model="a", input=urls).json()["data"]
        refused = live.post("/v1/classify", model="a", input="data:audio/wav;base64,aGVsbG8=")
        short = "data:audio/wav;base64," + base64.b64encode(wav(SOUND[:3])).decode()
        too_short = live.post("/v1/classify", model="a", input=short)
    assert refused.status_code == 400 and "no WAV file" in refused.json()["error"]["message"]
    assert too_short.status_code == 400 and "shorter than the model takes" in too_short.json()["error"]["message"]
    for each, n in zip(found, (9000, 7000, 9000), strict=True):
        expected = torch.softmax(of_sound(made, "audio-classification", SOUND[:n]).double(), -1)
        assert each["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_server_writes_down_what_a_ctc_model_hears(made, own):
    out, *_ = made("ctc-speech-recognition")
    folder = own(out)
    words = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFG"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    expected = tokenizer.decode(of_sound(made, "ctc-speech-recognition", SOUND).argmax(-1))
    assert len(set(expected)) > 2
    with running(folder, model_name="base") as live:
        ask, file = live.openai().audio.transcriptions.create, ("a.wav", wav(SOUND))
        assert ask(model="a", file=file).text == expected
        verbose = ask(model="a", file=file, response_format="verbose_json")
        assert (verbose.text, verbose.duration) == (expected, 9000 / 16000)
        for fields in ({"language": "en"}, {"stream": True}, {"temperature": 0.5}):
            with pytest.raises(openai.BadRequestError, match="means nothing"):
                ask(model="a", file=file, **fields)
        with pytest.raises(openai.BadRequestError, match="There is no translation"):
            live.openai().audio.translations.create(model="a", file=file)
    (folder / "vocab.json").write_text(json.dumps({"eng": {"A": 0}}))
    with pytest.raises(InputRefused, match="The vocabulary of a sound's frames"):
        Models(folder, ServeOptions(provider="cpu"))


def test_run_chooses_an_ending(made):
    out, base, _ = made("multiple-choice")
    endings = ["one", "two", "three"]
    found = run_trial(out, ["count:", *endings], {"a": 1.0}, provider="cpu", max_new_tokens=1)
    given = transformers.AutoTokenizer.from_pretrained(base)(
        ["count:"] * 3, endings, return_tensors="pt", return_token_type_ids=True, padding=True
    )
    with torch.no_grad():
        named = {k: given[k][None] for k in ("input_ids", "attention_mask", "token_type_ids")}
        logits = reference(made, "multiple-choice")(**named).logits[0]
    assert found["inputs"] == ["count:"] and found["results"][0]["label"] == endings[int(logits.argmax())]
    with pytest.raises(UsageProblem, match="Multiple choice takes a text and its endings"):
        run_trial(out, ["count:", "one"], {}, provider="cpu", max_new_tokens=1)


@pytest.mark.parametrize(("task", "shown"), [("ctc-speech-recognition", "tokens"), ("audio-classification", "scores")])
def test_run_hears_sounds_of_different_lengths(task, shown, made, tmp_path):
    files = []
    for n_samples in (4000, 7000):
        files.append(str(tmp_path / f"{n_samples}.wav"))
        samples = (8000 * np.sin(np.arange(n_samples) / 9)).astype("<i2")
        with wave.open(files[-1], "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(samples.tobytes())
    results = run_trial(made(task)[0], files, {"a": 1.0}, provider="cpu", max_new_tokens=1)["results"]
    assert len(results) == 2 and all(shown in result for result in results)


@pytest.mark.parametrize(
    ("task", "shown"), [("semantic-segmentation", "scores"), ("depth-estimation", "predicted_depth")]
)
def test_run_sees_images(task, shown, made, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (result,) = run_trial(made(task)[0], [str(tmp_path / "image.png")], {"a": 1.0}, provider="cpu", max_new_tokens=1)[
        "results"
    ]
    assert shown in result
