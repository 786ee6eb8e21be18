"""`samples/js/adapters.js` against `AdapterSession`: the same feeds, bit for bit, and the same refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS, Tensors, damage
from javascript import SAMPLES, described, needs_node, node, run_cases
from references import decoder_feeds, inputs_for

from lora_export.artifact import MANIFEST, sha256_of
from lora_export.contract import AdapterInputKind
from lora_export.runtime.adapter_file import read_adapter
from lora_export.runtime.adapter_session import AdapterSession

pytestmark = needs_node
WEB = "onnxruntime-web"  # its WebAssembly, in node
BATCH = 4
ROWS = {
    "llama-kinds-required": (
        None, "chat", "gains", "biases", "tokens", "voice", {"gains": -0.3}, {"tokens": 0.7, "chat": 2, "biases": 1.5},
        ["chat", None, "gains", "biases"], ["voice", {"voice": 0.25, "gains": 0.5}, None, "tokens"], ["chat"] * 4,
        "activated", ["activated", None, "chat", {"activated": 0.5}],
    ),
    "bert-required": (None, "topic", "kind", ["topic", "kind", None, {"kind": 0.5}], {"topic": 0.125}),
}  # fmt: skip


def inputs_of(session: AdapterSession) -> dict[str, np.ndarray]:
    """A batch in which every second row has the invocation of "activated"."""
    if not session.contract.past:
        return inputs_for("bert", BATCH)
    inputs = inputs_for("llama", BATCH)
    inputs["input_ids"][::2, 3:5] = 70, 71
    return decoder_feeds(inputs, session.contract)


@pytest.mark.parametrize(
    ("name", "package"), [*((name, "onnxruntime-node") for name in ROWS), ("llama-kinds-required", WEB)]
)
def test_the_feeds_are_those_of_python_and_so_are_the_outputs(name, package, exports, tmp_path):
    session = AdapterSession(exports[name], "cpu")
    inputs = inputs_of(session)
    own = {key: described(array) for key, array in inputs.items()}
    cases = [
        {"adapters": rows, "batch": BATCH, "ids": inputs["input_ids"].tolist(), "inputs": own, "outputs": ["logits"]}
        for rows in ROWS[name]
    ]
    kinds = set()
    base = session.run(inputs)["logits"]
    for rows, case in zip(ROWS[name], run_cases(exports[name], cases, tmp_path / "found", package), strict=True):
        assert "error" not in case, case
        expected = session.feeds(inputs, rows)
        for entry in session.contract.adapter_inputs:
            fed = case["feeds"].pop(entry.name)
            if entry.kind is AdapterInputKind.GATE:
                fed, expected[entry.name] = np.broadcast_arrays(fed, expected[entry.name])
            np.testing.assert_array_equal(fed, expected[entry.name], err_msg=f"{rows}: {entry.name}", strict=True)
            kinds.add(entry.kind)
        assert case["feeds"] == {}
        wanted = session.run(inputs, rows)["logits"]
        np.testing.assert_allclose(case["outputs"]["logits"][_real(wanted)], wanted[_real(wanted)], atol=2e-5)
        differs = wanted.shape != base.shape or np.abs(wanted - base).max() > 0.01
        assert bool(differs) is (rows is not None)
        if name == "bert-required":
            classes = session.bank.classes(session.bank.rows(rows, BATCH)) or {"": [wanted.shape[-1]] * BATCH}
            assert [case["classes"]] == list(classes.values())
    assert kinds == (set(AdapterInputKind) if "llama" in name else {"lora_A", "lora_B", "weight", "bias"})


def test_where_kernels_take_nothing_empty_zeros_do_the_same(exports, tmp_path):
    """WebGPU: no tensor is without elements, and the outputs are those of rank 0."""
    name = "llama-kinds-required"
    inputs = inputs_of(AdapterSession(exports[name], "cpu"))
    own = {key: described(array) for key, array in inputs.items()}
    ids, rows = inputs["input_ids"].tolist(), (None, "voice", ["chat", "tokens", None, "activated"])
    case = {"batch": BATCH, "ids": ids, "inputs": own, "outputs": ["logits"]}
    cases = [case | {"adapters": chosen, "leastRank": least} for chosen in rows for least in (0, 1)]
    found = run_cases(exports[name], cases, tmp_path / "found", "onnxruntime-node")
    for empty, full in zip(found[::2], found[1::2], strict=True):
        assert any(array.size == 0 for array in empty["feeds"].values())
        assert all(array.size > 0 for array in full["feeds"].values())
        np.testing.assert_allclose(full["outputs"]["logits"], empty["outputs"]["logits"], atol=1e-6)


def _real(logits: np.ndarray) -> np.ndarray:
    """Classes that rows have: Python gives the lowest number for those that pad a smaller head."""
    return logits > np.finfo(logits.dtype).min


def test_float16_is_read_and_rounded_as_numpy_does(tmp_path):
    """All 65,536 of them, to numbers and back, and times a weight."""
    script = tmp_path / "half.mjs"
    script.write_text(f"""
        import {{ fromHalf, toHalf }} from "{SAMPLES}/js/adapters.js";
        const bits = Array.from({{ length: 65536 }}, (_, i) => i);
        const numbers = bits.map(fromHalf).map((x) => (Number.isFinite(x) ? x : String(x)));
        const back = bits.map((x) => toHalf(fromHalf(x)));
        const scaled = bits.map((x) => toHalf(Math.fround(fromHalf(x) * fromHalf(toHalf(0.7)))));
        console.log(JSON.stringify({{ numbers, back, scaled }}));
    """)
    found = json.loads(node(script))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(halves)
    assert [float(x) for x in np.array(found["numbers"], object)[finite]] == halves[finite].astype(float).tolist()
    nan = np.isnan(halves)
    assert np.array_equal(np.array(found["back"], np.uint16)[~nan], halves.view(np.uint16)[~nan])
    with np.errstate(invalid="ignore"):
        product = halves * 0.7
    assert np.array_equal(np.array(found["scaled"], np.uint16)[~nan].view(np.float16), product[~nan])


def not_finite(tensors: Tensors) -> Tensors:
    return {name: np.full_like(array, np.nan) if "lora_A" in name else array for name, array in tensors.items()}


OWN_FAULTS = FAULTS | {not_finite: ("The adapter holds numbers that are not finite", "lora_A")}


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_file_and_tensor(fault, exports, own, tmp_path):
    folder = own(exports["bert-required"])
    damage(folder / "adapters" / "topic.onnx_adapter", fault)
    (found,) = run_cases(rehashed(folder), [], tmp_path / "found")
    message, tensor = OWN_FAULTS[fault]
    assert found["error"]["name"] == "AdapterError", found
    assert found["error"]["message"].startswith(message)
    assert found["error"]["file"] == "adapters/topic.onnx_adapter"
    assert tensor in found["error"]["tensor"]
    assert found["error"]["file"] in found["error"]["message"] and found["error"]["tensor"] in found["error"]["message"]


def rehashed(folder: Path) -> Path:
    """The folder with a manifest that has the hashes of its files as they are."""
    fields = json.loads((folder / MANIFEST).read_text())
    fields["files"] = {name: sha256_of(folder / name) for name in fields["files"]}
    (folder / MANIFEST).write_text(json.dumps(fields))
    return folder


def test_a_file_cut_anywhere_is_refused(exports, tmp_path):
    """Every hundredth byte, and around all that tells where something is; never a RangeError, never tensors."""
    file = exports["bert-required"] / "adapters" / "topic.onnx_adapter"
    script = tmp_path / "cut.mjs"
    script.write_text(f"""
        import {{ readFileSync }} from "node:fs";
        import {{ AdapterError, readAdapter }} from "{SAMPLES}/js/adapters.js";
        const bytes = new Uint8Array(readFileSync("{file}"));
        const refused = {{}};
        for (let n = 0; n < bytes.length; n += n < 2000 ? 1 : 97) {{
          try {{
            readAdapter(bytes.subarray(0, n), "cut");
            throw new Error(`read with ${{n}} of ${{bytes.length}} bytes`);
          }} catch (error) {{
            if (!(error instanceof AdapterError) || !error.message.includes("cut")) throw error;
            refused[error.message.replace(/ \\[.*/, "")] = (refused[error.message.replace(/ \\[.*/, "")] ?? 0) + 1;
          }}
        }}
        let flipped = 0;
        for (let at = 0; at < Math.min(bytes.length, 4000); at++) {{
          const copy = bytes.slice();
          copy[at] ^= 255;
          try {{ readAdapter(copy, "flipped"); }} catch (error) {{ if (!(error instanceof AdapterError)) throw error; flipped++; }}
        }}
        console.log(JSON.stringify({{ refused, flipped, whole: Object.keys(readAdapter(bytes, "whole")).length }}));
    """)
    found = json.loads(node(script))
    assert found["whole"] == len(read_adapter(file))
    assert set(found["refused"]) <= {
        "The adapter file is truncated or damaged", "The adapter file is truncated", "The file is no ONNX Runtime adapter",
    }  # fmt: skip
    assert found["flipped"] > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "adapters" / "topic.onnx_adapter").write_bytes(b"x"),
            "is not the one that was exported",
        ),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b""), "The data file is truncated [model.onnx.data: "),
        (lambda folder: (folder / MANIFEST).write_text("{"), "The manifest is no JSON"),
        (lambda folder: (folder / MANIFEST).write_text('{"schema": 2}'), "expected schema 1; found schema 2"),
    ],
)
def test_a_damaged_folder_is_refused(change, message, exports, own, tmp_path):
    folder = own(exports["bert-required"])
    change(folder)
    (found,) = run_cases(folder, [], tmp_path / "found")
    assert found["error"]["name"] == "AdapterError" and message in found["error"]["message"], found


@pytest.mark.parametrize("file", ["../x.onnx_adapter", "/etc/x.onnx_adapter", "adapters/../../x", "adapters\\..\\x"])
def test_a_manifest_names_nothing_outside_its_folder(file, exports, own, tmp_path):
    folder = own(exports["bert-required"])
    fields = json.loads((folder / MANIFEST).read_text())
    fields["adapters"][0]["file"] = file
    (folder / MANIFEST).write_text(json.dumps(fields))
    (found,) = run_cases(folder, [], tmp_path / "found")
    assert found["error"]["message"].startswith("The manifest names a file outside its folder"), found


def test_a_folder_with_optional_inputs_is_refused_with_the_way_out(exports, tmp_path):
    (found,) = run_cases(exports["bert-dynamic"], [], tmp_path / "found")
    assert "lora-export dynamic --inputs required" in found["error"]["message"]


def test_a_graph_of_another_export_is_refused(exports, own, tmp_path):
    folder = own(exports["bert-required"])
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes((exports["classifier-dynamic"] / name).read_bytes())
    fields = json.loads((folder / MANIFEST).read_text())
    for entry in fields["contract"]["adapter_inputs"]:
        entry["default"] = None
    (folder / MANIFEST).write_text(json.dumps(fields))
    (found,) = run_cases(folder, [], tmp_path / "found", "onnxruntime-node")
    assert "not the one that the manifest describes" in found["error"]["message"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("nobody", 'No adapter "nobody" is loaded; found topic, kind'),
        (["topic"], "`adapters` must have one entry for each row; expected 4; found 1"),
        ({"topic": 0.5, "kind": 0.5}, "A row blends heads of different sizes [classifier.weight]"),
        ({"topic": "much"}, 'The weight of adapter "topic" is no finite number'),
    ],
)
def test_rows_that_cannot_be_are_refused(chosen, message, exports, tmp_path):
    (found,) = run_cases(exports["bert-required"], [{"adapters": chosen, "batch": BATCH}], tmp_path / "found")
    assert message in found["error"]["message"], found


def test_an_activated_adapter_without_a_prompt_and_in_a_blend_is_refused(exports, tmp_path):
    cases = [{"adapters": "activated", "batch": 1}, {"adapters": {"activated": 1, "chat": 1}, "batch": 1, "ids": [[5]]}]
    messages = [case["error"]["message"] for case in run_cases(exports["llama-kinds-required"], cases, tmp_path / "x")]
    assert messages[0].startswith("An activated LoRA needs the prompt's token ids")
    assert messages[1].startswith("A row blends an activated LoRA with another adapter")


def test_javascript_cannot_feed_optional_inputs(exports, tmp_path):
    """Why all this is needed: onnxruntime-node gives the base's output in silence, onnxruntime-web refuses the run."""
    session = AdapterSession(exports["bert-dynamic"], "cpu")
    inputs = inputs_for("bert", BATCH)
    fed = session.feeds(inputs, "topic")
    script = tmp_path / "optional.mjs"
    script.write_text("""
        import { readFileSync } from "node:fs";
        import { createRequire } from "node:module";
        const [folder, samples, feedsPath, name] = process.argv.slice(2);
        const ort = createRequire(`${samples}/package.json`)(name);
        const arrays = { int64: (d) => BigInt64Array.from(d, BigInt), float32: (d) => Float32Array.from(d) };
        const feeds = Object.entries(JSON.parse(readFileSync(feedsPath))).map(([key, { type, dims, data }]) => [
          key, new ort.Tensor(type, arrays[type](data), dims)]);
        const externalData = [{ path: "model.onnx.data", data: new Uint8Array(readFileSync(`${folder}/model.onnx.data`)) }];
        const options = { logSeverityLevel: 3, ...(name !== "onnxruntime-node" ? { externalData } : {}) };
        const session = await ort.InferenceSession.create(`${folder}/model.onnx`, options);
        try {
          const { logits } = await session.run(Object.fromEntries(feeds));
          console.log(JSON.stringify(Array.from(logits.data)));
        } catch (error) {
          console.log(JSON.stringify(String(error.message)));
        }
        process.exit(0);
    """)
    (tmp_path / "feeds.json").write_text(json.dumps({name: described(array) for name, array in fed.items()}))
    found = {}
    for name in ("onnxruntime-node", WEB):
        found[name] = json.loads(node(script, exports["bert-dynamic"], SAMPLES, tmp_path / "feeds.json", name))
    base = session.run(inputs)["logits"].ravel()
    np.testing.assert_allclose(found["onnxruntime-node"], base, atol=1e-5)
    assert "lora" in found[WEB] or "input" in found[WEB], found[WEB]
