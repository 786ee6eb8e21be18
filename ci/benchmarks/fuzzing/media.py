"""Small sounds, images and graphs, and folders that say how sounds and images are read."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lora_export.contract import GraphContract, TensorSpec

_RATE, _SIDE = 16_000, 8


def speech_folder(folder: Path) -> Path:
    """With a feature extractor of samples."""
    fields = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": _RATE,
              "padding_value": 0.0, "do_normalize": True, "return_attention_mask": False}  # fmt: skip
    return _with(folder, fields)


def vision_folder(folder: Path) -> tuple[Path, GraphContract]:
    """With an image processor, and the contract of a graph that takes its pixels."""
    fields = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": _SIDE, "width": _SIDE}}
    spec = TensorSpec("pixel_values", "float32", ("batch", 3, _SIDE, _SIDE))
    return _with(folder, fields), GraphContract((spec,), (TensorSpec("logits", "float32", ("batch", 2)),))


def _with(folder: Path, fields: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def sound_files() -> list[bytes]:
    """One and two channels of 16 bits."""
    found = []
    for n_channels in (1, 2):
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(n_channels)
            file.setsampwidth(2)
            file.setframerate(_RATE)
            file.writeframes(np.arange(400, dtype="<i2").tobytes())
        found.append(buffer.getvalue())
    return found


def image_files() -> list[bytes]:
    """The formats that a folder of images is searched for, in colour and in grey."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    found = []
    for name in ("PNG", "JPEG", "BMP", "GIF"):
        for mode in ("RGB", "L", "P"):
            buffer = io.BytesIO()
            try:
                Image.fromarray(pixels).convert(mode).save(buffer, name)
            except OSError:  # JPEG has no palettes
                continue
            found.append(buffer.getvalue())
    return found


def small_graphs() -> list[bytes]:
    """A linear map with its weight inside the file, and one beside it in a file named `weights`."""
    inside = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    beside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights", "offset": "0", "length": "256"}.items():
        entry = beside.external_data.add()
        entry.key, entry.value = key, value
    table = numpy_helper.from_array(np.ones((16, 8), np.float32), "table")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 8])
    found = []
    for weight in (inside, beside):
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["x"]),
            helper.make_node("MatMul", ["x", "w"], ["y"], name="/model/layers.0/q_proj/MatMul"),
            helper.make_node("Softmax", ["y"], ["logits"], axis=-1),
        ]
        graph = helper.make_graph(nodes, "g", [ids], [logits], [table, weight])
        found.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return found
