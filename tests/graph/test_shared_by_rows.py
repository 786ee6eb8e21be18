"""What all rows share has a result for each row once an adapter is an input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import transformers

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.graph.shared_by_rows import is_shared_by_rows, let_rows_through
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

ROWS, TOKENS, HEADS, SIZE = 3, 5, 2, 4
FLOAT = ir.DataType.FLOAT
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip


def graph_of(*middle: str) -> tuple[ir.Model, ir.Value]:
    """A table plus `extra`, `[rows, tokens, features]`; then `middle`, lines of ONNX's text format, from y to z."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[batch, {HEADS}, 6, {SIZE}] x, float[1, {TOKENS}, {HEADS * SIZE}] table,
           float[rows, {TOKENS}, {HEADS * SIZE}] extra) => (float[a, b, c, d] z)
        {{
            y = Add(table, extra)
            {" ".join(middle)}
        }}"""
    model = ir.from_onnx_text(text)
    values = {value.name: value for node in model.graph for value in node.outputs}
    return model, values["y"]


def shape(model: ir.Model, **dims: list) -> None:
    for node in model.graph:
        for value in node.outputs:
            if value.name in dims:
                value.shape, value.dtype = ir.Shape(dims[value.name]), FLOAT


SPLIT = [
    f"s = Constant <value_ints = [1, {TOKENS}, {HEADS}, {SIZE}]> ()",
    "split = Reshape(y, s)",
    "turned = Transpose <perm = [0, 2, 3, 1]> (split)",
]
BROADCAST = [*SPLIT, "z = MatMul(x, turned)"]
REPEATED = [
    *SPLIT,
    f"m = Constant <value_ints = [{HEADS}, {SIZE}, {TOKENS}]> ()",
    "merged = Reshape(turned, m)",
    "ones = Constant <value_ints = [1, 1, 1]> ()",
    "same = Expand(merged, ones)",
    "batch = Shape <start = 0, end = 1> (x)",
    "two = Constant <value_ints = [1, 1]> ()",
    "times = Concat <axis = 0> (batch, two)",
    "tiled = Tile(same, times)",
    f"back = Constant <value_ints = [-1, {HEADS}, {SIZE}, {TOKENS}]> ()",
    "unmerged = Reshape(tiled, back)",
    "z = MatMul(x, unmerged)",
]
DIMS = {
    "y": [1, TOKENS, HEADS * SIZE],
    "split": [1, TOKENS, HEADS, SIZE],
    "turned": [1, HEADS, SIZE, TOKENS],
    "merged": [HEADS, SIZE, TOKENS],
    "tiled": [f"{HEADS}*batch", SIZE, TOKENS],
    "z": ["batch", HEADS, 6, TOKENS],
}


@pytest.mark.parametrize("middle", [BROADCAST, REPEATED], ids=["broadcast", "repeated"])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_each_row_has_the_result_of_its_own_adapter(middle, rows):
    model, value = graph_of(*middle)
    shape(model, **DIMS)
    let_rows_through(model.graph, value, "module")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, HEADS, 6, SIZE)).astype(np.float32)
    extra = rng.standard_normal((rows, TOKENS, HEADS * SIZE)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    table = rng.standard_normal((1, TOKENS, HEADS * SIZE)).astype(np.float32)
    found = session.run(None, {"x": x, "table": table, "extra": extra})[0]
    for row in range(ROWS):
        own = (table + extra[min(row, rows - 1)])[0]
        for head in range(HEADS):
            expected = x[row, head] @ own[:, head * SIZE : (head + 1) * SIZE].T
            np.testing.assert_allclose(found[row, head], expected, rtol=1e-5, atol=1e-5)


def test_what_may_mix_rows_is_refused():
    model, value = graph_of("turned = Transpose <perm = [1, 0, 2]> (y)", "z = Identity(turned)")
    shape(model, y=DIMS["y"], turned=[TOKENS, 1, HEADS * SIZE])
    with pytest.raises(InputRefused, match="what reads it may mix rows") as refused:
        let_rows_through(model.graph, value, "encoder.query")
    assert refused.value.where == "encoder.query (Transpose)"


def test_an_axis_of_the_batch_is_not_shared():
    model, value = graph_of("z = Identity(y)")
    shape(model, y=DIMS["y"])
    assert is_shared_by_rows(model.graph, value)
    shape(model, y=[1, "5*batch", HEADS * SIZE])
    assert not is_shared_by_rows(model.graph, value)


def test_projections_of_contents_and_positions_are_served_by_row(tmp_path):
    """DeBERTa-v3 applies query_proj and key_proj to its texts and to its table of positions."""
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(**sizes, intermediate_size=48, max_position_embeddings=64, **RELATIVE)
    base, kind = tmp_path / "base", "DebertaV2ForSequenceClassification"
    tiny.randomize(transformers.DebertaV2ForSequenceClassification(config), "deberta").save_pretrained(base)
    tiny.save_tokenizer(base, classifier=True)
    targets = ["query_proj", "key_proj"]
    tiny.adapter(base, tmp_path / "dora", kind, r=2, target_modules=targets, use_dora=True)
    tiny.adapter(base, tmp_path / "biased", kind, r=3, target_modules=targets, bias="lora_only")
    chosen = tuple((str(tmp_path / name), name) for name in ("dora", "biased"))
    export(Request(str(base), chosen, "dynamic"), ExportOptions(tmp_path / "out"))
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict is Verdict.PASS
    assert {case.name for case in report.cases} >= {"dora", "biased"} and len(report.cases) > 3
