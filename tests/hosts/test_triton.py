"""`samples/triton-server`: settings by Triton's protobuf schema, the Python backend's code without the server, and the client's protocol."""

from __future__ import annotations

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from javascript import SAMPLES
from references import inputs_for

from lora_export.artifact import read_manifest
from lora_export.runtime.adapter_session import AdapterSession

TRITON = SAMPLES / "triton-server"
SCHEMA = SAMPLES / "node_modules" / ".python" / "tritonclient" / "grpc" / "model_config_pb2.py"
ROWS = ["topic", None, {"kind": 0.5}, "kind", "topic"]
NAMES = ["topic", "", '{"kind": 0.5}', "kind", "topic"]


def module(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def config_pb2() -> types.ModuleType:
    if not SCHEMA.is_file():
        pytest.skip("Triton's schema is not here: run ci/setup hosts")
    return module(SCHEMA, "model_config_pb2")


@pytest.fixture(scope="module")
def repository(exports, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    module(TRITON / "repository.py", "repository").main(exports["bert-required"], out)
    return out


def settings(repository: Path, backend: str, config_pb2: types.ModuleType):
    text = (repository / backend / "lora" / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, config_pb2.ModelConfig())


def test_the_settings_follow_tritons_schema_and_describe_the_graph(repository, config_pb2, exports):
    contract = read_manifest(exports["bert-required"]).contract
    onnx = settings(repository, "onnx", config_pb2)
    assert (onnx.backend, onnx.max_batch_size) == ("onnxruntime", 0)
    types_ = {"float32": config_pb2.TYPE_FP32, "int64": config_pb2.TYPE_INT64}
    expected = {
        spec.name: (types_[spec.dtype], [dim if isinstance(dim, int) else -1 for dim in spec.dims])
        for spec in (*contract.inputs, *contract.adapter_inputs)
    }
    assert {each.name: (each.data_type, list(each.dims)) for each in onnx.input} == expected
    assert {each.name: list(each.dims) for each in onnx.output} == {"logits": [-1, -1]}
    for name in ("model.onnx", "model.onnx.data"):
        assert (repository / "onnx/lora/1" / name).read_bytes() == (exports["bert-required"] / name).read_bytes()
    python = settings(repository, "python", config_pb2)
    assert python.max_batch_size > 1 and python.HasField("dynamic_batching")
    assert [each.name for each in python.input] == [*(spec.name for spec in contract.inputs), "adapters"]
    assert all(each.allow_ragged_batch for each in python.input if each.name != "adapters")
    assert python.input[-1].data_type == config_pb2.TYPE_STRING


def test_a_setting_that_triton_does_not_know_is_told(config_pb2):
    with pytest.raises(text_format.ParseError, match="no field"):
        text_format.Parse('name: "x" adapters: 3', config_pb2.ModelConfig())


@pytest.fixture
def backend(repository, config_pb2, monkeypatch):
    """The model of the Python backend, on stand-ins of Triton's own classes."""
    utils = types.ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    class InferenceResponse:
        def __init__(self, output_tensors: list = (), error: object = None) -> None:
            self.outputs, self.error = {each.name: each.array for each in output_tensors}, error

    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, InferenceResponse, str
    utils.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name]) if name in request else None
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    model = module(repository / "python/lora/1/model.py", "triton_model").TritonPythonModel()
    config = json_format.MessageToJson(settings(repository, "python", config_pb2), preserving_proto_field_name=True)
    model.initialize({"model_config": config, "model_instance_kind": "CPU"})
    return model


def request(names: list[str], length: int, seed: int) -> dict[str, np.ndarray]:
    return inputs_for("bert", len(names), length, seed) | {
        "adapters": np.array([n.encode() for n in names], object)[:, None]
    }


def test_rows_of_several_requests_run_as_one_batch_each_with_its_adapter(backend, exports):
    requests = [request(NAMES, 9, 0), request(["kind"], 4, 1), request(["", "topic"], 7, 2)]
    session, runs = AdapterSession(exports["bert-required"], "cpu"), []
    run = backend.session.run
    backend.session.run = lambda *arguments: runs.append(arguments) or run(*arguments)
    answers = backend.execute(requests)
    assert len(runs) == 1
    for answer, asked, rows in zip(answers, requests, (ROWS, ["kind"], [None, "topic"]), strict=True):
        own = {name: array for name, array in asked.items() if name != "adapters"}
        expected = session.run(own, rows)["logits"]
        found = answer.outputs["logits"]
        assert answer.error is None and len(found) == len(rows)
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-5)


def test_a_request_that_cannot_be_gets_an_error_and_the_others_their_outputs(backend):
    lacking = request(["kind"], 4, 1)
    del lacking["attention_mask"]
    answers = backend.execute([request(["nobody"], 5, 0), request(["topic"], 5, 1), lacking, request(["{"], 5, 0)])
    assert "No adapter 'nobody' is loaded" in answers[0].error and not answers[0].outputs
    assert answers[1].error is None and answers[1].outputs["logits"].shape[0] == 1
    assert "lacks the input 'attention_mask'" in answers[2].error
    assert answers[3].error and not answers[3].outputs


def test_a_request_that_fails_in_the_run_does_not_fail_the_others(backend):
    wrong = request(["topic"], 5, 1)
    wrong["input_ids"] = wrong["input_ids"] + 10**6  # no such token: ONNX Runtime itself refuses it
    first, failed, last = backend.execute([request(["kind"], 4, 0), wrong, request(["topic", ""], 7, 2)])
    assert "indices" in failed.error and not failed.outputs
    assert first.error is None and first.outputs["logits"].shape[0] == 1
    assert last.error is None and last.outputs["logits"].shape[0] == 2


def test_shorter_requests_are_filled_up_with_the_token_of_the_manifest(backend, exports, own):
    """A classifier on a decoder reads a text at its last token that is not this one."""
    folder = own(exports["bert-required"])
    manifest = json.loads((folder / "lora_export.json").read_text())
    (folder / "lora_export.json").write_text(json.dumps(manifest | {"pad_token_id": 7}))
    outputs = [{"name": "logits"}]
    config = json.dumps({"output": outputs, "parameters": {"folder": {"string_value": str(folder)}}})
    backend.initialize({"model_config": config, "model_instance_kind": "CPU"})
    run, fed = backend.session.run, []
    backend.session.run = lambda *arguments: fed.append(arguments[0]) or run(*arguments)
    answers = backend.execute([request(["kind"], 4, 0), request(["topic"], 6, 1)])
    assert [answer.error for answer in answers] == [None, None]
    assert fed[0]["input_ids"][0, 4:].tolist() == [7, 7] and fed[0]["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.fixture
def server(exports) -> Iterator[str]:
    """KServe's v2 protocol, binary, over the export's own graph: what Triton's ONNX Runtime backend does."""
    session = AdapterSession(exports["bert-required"], "cpu")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length, n = int(self.headers["Content-Length"]), int(self.headers["Inference-Header-Content-Length"])
            body = self.rfile.read(length)
            asked, at, feeds = json.loads(body[:n]), n, {}
            for each in asked["inputs"]:
                size = each["parameters"]["binary_data_size"]
                dtype = {"FP32": np.float32, "INT64": np.int64}[each["datatype"]]
                feeds[each["name"]] = np.frombuffer(body[at : at + size], dtype).reshape(each["shape"])
                at += size
            if self.path != "/v2/models/lora/infer" or any(array.size == 0 for array in feeds.values()):
                return self._answer(400, {"error": "no such model, or a tensor without elements"})
            logits = session.session.run(["logits"], feeds)[0]
            output = {"name": "logits", "shape": list(logits.shape), "datatype": "FP32"}
            return self._answer(
                200, {"outputs": [output | {"parameters": {"binary_data_size": logits.nbytes}}]}, logits.tobytes()
            )

        def _answer(self, code: int, fields: dict, data: bytes = b"") -> None:
            header = json.dumps(fields).encode()
            self.send_response(code)
            self.send_header("Inference-Header-Content-Length", str(len(header)))
            self.end_headers()
            self.wfile.write(header + data)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_the_client_sends_adapters_by_the_v2_protocol(server, exports):
    client = module(TRITON / "client.py", "triton_client")
    session, inputs = AdapterSession(exports["bert-required"], "cpu"), inputs_for("bert")
    for rows in (ROWS, None, "topic"):
        feeds = client.without_empty(session.feeds(inputs, rows), session.contract)
        found = client.infer(server, "lora", feeds, ["logits"])["logits"]
        expected = session.run(inputs, rows)["logits"]
        np.testing.assert_allclose(found[expected > -1e30], expected[expected > -1e30], atol=1e-6)
    with pytest.raises(RuntimeError, match="no such model"):
        client.infer(server, "another", feeds, ["logits"])


def test_texts_are_sent_as_the_protocol_has_them():
    client = module(TRITON / "client.py", "triton_client")
    assert client._bytes(client.named(["a", "", "ü"])["adapters"]) == b"\x01\0\0\0a\0\0\0\0\x02\0\0\0\xc3\xbc"


def test_a_decoder_is_refused(exports, tmp_path):
    command = [sys.executable, TRITON / "repository.py", exports["llama-kinds-required"], tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3 and "for encoders and classifiers" in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_folder_of_the_samples_passes_for_a_library():
    """`python samples/…` puts the samples' folder first, where torch and Transformers look for what is optional."""
    from transformers.utils import import_utils

    optional = {name[3:-10] for name in dir(import_utils) if name.startswith("is_") and name.endswith("_available")}
    assert "accelerate" in optional
    folders = {path.name for path in SAMPLES.iterdir() if path.is_dir()}
    assert folders & (optional | {"triton", "jax", "tensorflow", "numba", "cupy"}) == set()
