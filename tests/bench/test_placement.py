"""Where operators run: every node of every graph is counted once, with its provider."""

from __future__ import annotations

from lora_export.bench.placement import placements
from lora_export.runtime.seq2seq_session import open_export


def test_a_cpu_session_runs_all_on_the_cpu(exports):
    (found,) = placements("export", open_export(exports["bert-dynamic"], "cpu"))
    assert (found.session, found.graph, found.provider) == ("export", "model", "CPUExecutionProvider")
    assert found.operators["MatMul"] >= 12 and found.n_operators == sum(found.operators.values())
    counts = list(found.operators.values())
    assert counts == sorted(counts, reverse=True)


def test_an_encoder_decoder_has_each_of_its_graphs(exports):
    found = placements("export", open_export(exports["bart-dynamic"], "cpu"))
    assert [p.graph for p in found] == ["encoder_model", "decoder_model", "decoder_with_past_model"]
    assert all(p.provider == "CPUExecutionProvider" and p.n_operators > 0 for p in found)
