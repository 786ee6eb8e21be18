"""Pairs of texts, as rerankers take them: in data files, `check`, `run`, and over HTTP."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import transformers
from click.testing import CliRunner
from serve.live import running
from tokenizers import processors

from lora_export.check.context import CheckOptions
from lora_export.check.inputs.examples import Example, as_pairs, built_in_examples, read_examples
from lora_export.cli.main import main
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export, plan_check
from lora_export.serve.problems import Problem
from lora_export.serve.reranking import relevances
from lora_export.trial import run_trial
from lora_export.verdict import Verdict

QUERY, DOCUMENTS = "how to open a socket", ["call socket()", "bread and butter", "a port is opened by bind"]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory, _silent_libraries):
    """A classifier with one label on a tokenizer that tells the texts of a pair apart; its dynamic export."""
    folder = tmp_path_factory.mktemp("reranker")
    config = tiny.bert_config(num_hidden_layers=1, num_labels=1, type_vocab_size=2)
    model = tiny.randomize(transformers.BertForSequenceClassification(config), "reranker")
    model.save_pretrained(folder / "base")
    tiny.save_tokenizer(folder / "base", classifier=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.model_max_length = 150
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder / "base")
    tiny.adapter(folder / "base", folder / "a", "BertForSequenceClassification", n_labels=1, r=3, task_type="SEQ_CLS",
                 target_modules=["query", "value"])  # fmt: skip
    export(Request(str(folder / "base"), ((str(folder / "a"), "a"),), "dynamic"), ExportOptions(folder / "out"))
    return folder


@pytest.fixture(scope="module")
def expected(reranker):
    """What Transformers and PEFT say of the pairs."""
    import peft
    import torch

    base = transformers.AutoModelForSequenceClassification.from_pretrained(reranker / "base")
    model = peft.PeftModel.from_pretrained(base, reranker / "a").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reranker / "base")
    pairs = tokenizer([QUERY] * 3, DOCUMENTS, return_tensors="pt", padding=True, return_token_type_ids=True)
    assert pairs["token_type_ids"].max() == 1
    with torch.no_grad():
        return model(**pairs).logits[:, 0].numpy()


def test_run_scores_pairs_as_peft_does(reranker, expected):
    inputs = [text for document in DOCUMENTS for text in (QUERY, document)]
    how = {"provider": "cpu", "max_new_tokens": 0}
    found = run_trial(reranker / "out", inputs, {"a": 1.0}, of_pairs=True, **how)
    np.testing.assert_allclose([each["values"]["LABEL_0"] for each in found["results"]], expected, atol=1e-5)
    assert found["inputs"][0] == f"{QUERY} / {DOCUMENTS[0]}"
    alone = run_trial(reranker / "out", DOCUMENTS, {"a": 1.0}, **how)["results"][0]["values"]["LABEL_0"]
    assert abs(alone - expected[0]) > 1e-3
    with pytest.raises(UsageProblem, match="--pairs takes texts two and two"):
        run_trial(reranker / "out", inputs[:3], {}, of_pairs=True, **how)
    said = CliRunner().invoke(main, ["run", str(reranker / "out"), "--pairs", "--adapter", "a", *inputs[:2]])
    assert said.exit_code == 0 and f"{expected[0]:.3f}   {QUERY} / {DOCUMENTS[0]}" in said.output, said.output


def test_a_long_pair_is_cut_as_its_tokenizer_cuts_it(reranker):
    long = "word " * 400
    found = run_trial(reranker / "out", [QUERY, long], {}, provider="cpu", max_new_tokens=0, of_pairs=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reranker / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reranker / "base").eval()
    pair = tokenizer([QUERY], [long], return_tensors="pt", truncation=True, return_token_type_ids=True)
    assert pair["input_ids"].shape == (1, 150)

    score = model(**pair).logits[0, 0].item()
    assert found["results"][0]["values"]["LABEL_0"] == pytest.approx(score, abs=1e-5)


def test_check_compares_pairs_of_a_file_and_by_default(reranker, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": QUERY, "text_pair": each}) + "\n" for each in DOCUMENTS))
    options = CheckOptions(provider="cpu", data={None: file})
    report, _ = check(reranker / "out", SourceOverrides(), options=options)
    assert report.verdict is Verdict.PASS and report.data == (f"default: {file} (3 of 3 rows)",)
    said = plan_check(reranker / "out", SourceOverrides(), options=CheckOptions(provider="cpu"))
    assert "each as a pair of its halves" in said[1]


def test_a_data_file_has_pairs_in_every_line_or_in_none(exports, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a", "text_pair": "b", "label_id": 1}\n')
    assert read_examples(file, 9).rows == (Example("a", 1, "b"),)
    with pytest.raises(InputRefused, match="text-generation takes one text a row"):
        plan_check(exports["llama-merged"], options=CheckOptions(provider="cpu", data={None: file}))
    file.write_text('{"text": "a", "text_pair": "b"}\n{"text": "a"}\n')
    with pytest.raises(InputRefused, match="Some lines of the data have two texts, and others one"):
        read_examples(file, 9)
    rows = as_pairs(built_in_examples(8)).rows
    assert all(row.text_pair for row in rows)


def test_the_server_reranks(reranker, expected):
    with running(reranker / "out", model_name="base") as live:
        body = {"model": "a", "query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]}
        found = live.post("/v1/rerank", **body).json()
        order, scores = np.argsort(-expected), 1 / (1 + np.exp(-expected))
        assert [each["index"] for each in found["results"]] == order.tolist()
        assert found["results"][0]["document"] == {"text": DOCUMENTS[order[0]]}
        np.testing.assert_allclose([each["relevance_score"] for each in found["results"]], scores[order], atol=1e-5)
        assert found["usage"]["total_tokens"] > 0 and found["model"] == "a"
        best = live.post("/v1/rerank", **body, top_n=1, return_documents=False).json()["results"]
        assert best == [{"index": int(order[0]), "relevance_score": pytest.approx(scores[order[0]], abs=1e-5)}]
        for change, param in (({"documents": []}, "documents"), ({"query": ""}, "query"), ({"top_n": 0}, "top_n"),
                              ({"documents": ["x" * 400]}, "documents")):  # fmt: skip
            refused = live.post("/v1/rerank", **{**body, **change})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_a_classifier_of_several_classes_is_no_reranker(exports):
    with running(exports["classifier-dynamic"], model_name="colours") as live:
        refused = live.post("/v1/rerank", model="colours", query="a", documents=["b"])
        assert refused.status_code == 400 and "a reranker one score" in refused.json()["error"]["message"]


def test_scores_go_through_what_sentence_transformers_recorded():
    logits = np.array([0.0, 2.0])
    np.testing.assert_allclose(relevances(logits, {}), [0.5, 0.880797], atol=1e-6)
    identity = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    assert relevances(logits, identity).tolist() == [0.0, 2.0]
    assert relevances(logits, {"sbert_ce_default_activation_function": "torch.nn.Identity"}).tolist() == [0.0, 2.0]
    with pytest.raises(Problem, match="Tanh"):
        relevances(logits, {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}})
