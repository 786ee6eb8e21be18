"""The kinds of input that come from elsewhere: for each, valid ones to begin with, and what reads them."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fuzzing.adapter_kinds import adapter_config, adapter_header
from fuzzing.kind import Kind, of_a_file
from fuzzing.media import image_files, sound_files, speech_folder, vision_folder
from fuzzing.mutations import Form
from fuzzing.requests import requests_of
from fuzzing.subjects import Subjects, linked
from fuzzing.templates import TEMPLATES, WORDS

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
OF_A_BASE = (
    "auto_map", "quantization_config", "num_labels", "num_hidden_layers", "torch_dtype", "pad_token_id", "rope_scaling",
    "text_config", "vision_config", "head_dim", "layer_types", "sliding_window", "encoder_layers", "depth", "id2label",
)  # fmt: skip


def kinds(subjects: Subjects, work: Path) -> dict[str, Callable[[], Kind]]:
    """What makes each kind, by name: reading one of them may need a session or a server."""
    makers = (
        adapter_config, adapter_header, _base_header, _base_config, _base_index, _manifest, _signature, _adapter_file,
        _sentence_modules, _examples, _roster, _sound, _image, _graph, _chat_template, _tokenizer, _settings,
        _encoder_requests, _writer_requests,
    )  # fmt: skip
    return {maker.__name__.strip("_").replace("_", " "): (lambda make=maker: make(subjects, work)) for maker in makers}


def _base_header(subjects: Subjects, work: Path) -> Kind:
    from lora_export.base.checkpoint import Checkpoint, Located

    file = linked(subjects.base, work / "of-base", "model.safetensors")
    whole = (subjects.base / file.name).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    fields = json.loads(whole[8 : 8 + length])
    first = sorted(fields.items(), key=lambda item: item[1].get("data_offsets", [0])[0])[:3]
    end = max(entry["data_offsets"][1] for _, entry in first if "data_offsets" in entry)
    text = json.dumps(dict(first)).encode()
    small = struct.pack("<Q", len(text)) + text + whole[8 + length : 8 + length + end]

    def read() -> None:
        checkpoint = Checkpoint.open(Located(file.parent, "b"), is_known=True)
        assert checkpoint.dtype
        for name in list(checkpoint.files.tensors)[:2]:
            checkpoint.files.read(name)

    return of_a_file("base header", Form.SAFETENSORS, file, [small, whole], read)


def _base_config(subjects: Subjects, work: Path) -> Kind:
    from lora_export.base.checkpoint import Checkpoint, Located

    file = linked(subjects.base, work / "of-base-config", CONFIG)

    def read() -> None:
        Checkpoint.open(Located(file.parent, "b")).load_config()

    return of_a_file("base config", Form.JSON, file, [(subjects.base / CONFIG).read_bytes()], read, OF_A_BASE)


def _base_index(subjects: Subjects, work: Path) -> Kind:
    from lora_export.base.stored import weight_files

    file = linked(subjects.base, work / "of-index", INDEX)
    (file.parent / "model.safetensors").rename(file.parent / "shard.safetensors")
    seed = {
        "metadata": {"total_size": 1},
        "weight_map": {"a.weight": "shard.safetensors", "b.weight": "shard.safetensors"},
    }
    return of_a_file("base index", Form.JSON, file, [json.dumps(seed).encode()], lambda: weight_files(file.parent))


def _manifest(subjects: Subjects, work: Path) -> Kind:
    from lora_export.artifact import read_manifest

    file = work / "of-manifest" / "lora_export.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    seeds = [(folder / file.name).read_bytes() for folder in (subjects.encoder, subjects.writer)]
    return of_a_file("manifest", Form.JSON, file, seeds, lambda: read_manifest(file.parent))


def _signature(subjects: Subjects, work: Path) -> Kind:
    """`model.sig` is read after its signature proved good only; what reads it is asked all the same."""
    from lora_export.errors import InputRefused
    from lora_export.integrity.signature import _MALFORMED, _signed_files

    file = work / "of-signature" / "model.sig"
    file.parent.mkdir(parents=True, exist_ok=True)
    statement = {"predicate": {"resources": [{"name": "a", "digest": "0" * 64, "algorithm": "sha256"}]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()

    def read() -> None:
        try:
            _signed_files(file)
        except _MALFORMED as error:
            raise InputRefused("The signature is malformed") from error

    return of_a_file("signature", Form.JSON, file, [json.dumps({"dsseEnvelope": {"payload": payload}}).encode()], read)


def _adapter_file(subjects: Subjects, work: Path) -> Kind:
    from lora_export.artifact import read_manifest
    from lora_export.runtime.adapter_file import read_adapter, require_fit

    file = work / "of-adapter-file.onnx_adapter"
    manifest = read_manifest(subjects.encoder)

    def read() -> None:
        require_fit(file, read_adapter(file), manifest.contract)

    seeds = [(subjects.encoder / record.file).read_bytes() for record in manifest.adapters]
    return of_a_file("adapter file", Form.BYTES, file, seeds, read)


def _sentence_modules(subjects: Subjects, work: Path) -> Kind:
    """`modules.json` of sentence-transformers, and the same bytes as its pooling's config."""
    from lora_export.base.sentence_folder import read_head, transformer_in

    folder = work / "of-modules"
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    kinds_of = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds_of.items()]
    pooling = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    places = {b"[": folder / "modules.json", b"{": folder / "1_Pooling" / "config.json"}
    seeds = {first: json.dumps(seed).encode() for first, seed in zip(places, (modules, pooling), strict=True)}

    def read(content: bytes) -> None:
        for first, place in places.items():
            place.write_bytes(content if content[:1] == first else seeds[first])
        transformer_in(folder)
        read_head(folder, None)

    return Kind(
        "sentence modules", Form.JSON, tuple(seeds.values()), read, ("pooling_mode", "include_prompt", "path", "type")
    )


def _examples(subjects: Subjects, work: Path) -> Kind:
    from lora_export.check.inputs.examples import read_examples

    file = work / "of-examples.jsonl"
    seed = b'{"text": "One lock.", "label_id": 1}\n{"text": "Two \\u00e9.", "label_id": null}\n\n{"text": ""}'
    return of_a_file(
        "examples", Form.LINES, file, [seed], lambda: read_examples(file, 8), ("text", "label_id", "label")
    )


def _roster(subjects: Subjects, work: Path) -> Kind:
    from lora_export.fleet.roster import read_roster

    lines, columns = work / "of-roster.jsonl", work / "of-roster.csv"
    seeds = (b'{"path": "adapters/a", "name": "a"}\n{"path": "hub/id", "revision": "main", "data": "x.txt"}',
             b"path,name,revision,data\nadapters/a,a,,\n\"hub/id\",b,main,x.txt\n")  # fmt: skip

    def read(content: bytes) -> None:
        for file in (lines, columns) if content[:1] != b"{" else (lines,):
            file.write_bytes(content)
            read_roster(file)

    return Kind("roster", Form.LINES, seeds, read, ("path", "name", "revision", "data", "x"))


def _sound(subjects: Subjects, work: Path) -> Kind:
    from lora_export.check.inputs.audio import read_samples

    folder, file = speech_folder(work / "of-sound"), work / "of-sound.wav"
    return of_a_file("sound", Form.BYTES, file, sound_files(), lambda: read_samples(folder, str(file)))


def _image(subjects: Subjects, work: Path) -> Kind:
    from lora_export.base.tasks import Task
    from lora_export.check.inputs.batcher import Batcher
    from lora_export.check.inputs.examples import Example
    from lora_export.runtime.images import MOST_PIXELS

    folder, contract = vision_folder(work / "of-image")
    batcher, file = Batcher(folder, Task.IMAGE_CLASSIFICATION, contract), work / "of-image.png"
    found = of_a_file("image", Form.BYTES, file, image_files(), lambda: batcher.batch([Example(str(file))]))
    # In its own mode and in colour, of at most 4 and 3 bytes a pixel.
    return replace(found, floor_bytes=found.floor_bytes + 7 * MOST_PIXELS)


def _graph(subjects: Subjects, work: Path) -> Kind:
    from fuzzing.media import small_graphs

    from lora_export.base.tasks import Task
    from lora_export.errors import refused_if_it_fails
    from lora_export.export.given_files import locate_graph
    from lora_export.graph.given import normalized, open_given
    from lora_export.graph.matching import given_weights

    file = work / "of-graph" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "weights").write_bytes(bytes(4096))

    def read() -> None:
        given = locate_graph(str(file.parent), Task.TEXT_GENERATION, dtype=None, is_quantized=False)
        given.hashes()
        with refused_if_it_fails("The given graph could not be read", where=str(file), next_step="make it again"):
            model = open_given(given.path)
            normalized(model, given.path, head_size=16)
            given_weights(model.graph)

    return of_a_file("graph", Form.BYTES, file, small_graphs(), read)


def _chat_template(subjects: Subjects, work: Path) -> Kind:
    from lora_export.errors import InputRefused
    from lora_export.runtime.chat_template import render

    messages = ({"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."})

    def read(content: bytes) -> None:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise InputRefused("No text") from error
        render(text, messages, {"bos_token": "<s>"}, where="here", options={})

    return Kind("chat template", Form.TEXT, TEMPLATES, read, WORDS)


def _tokenizer(subjects: Subjects, work: Path) -> Kind:
    from lora_export.runtime.tokenizer import open_tokenizer

    file = work / "of-tokenizer" / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = json.loads((subjects.writer / file.name).read_bytes())
    if "vocab" in seed.get("model", {}):
        few = {token: index for token, index in seed["model"]["vocab"].items() if index < 40}
        seed["model"] |= {"vocab": few, "merges": []}

    def read() -> None:
        tokenizer = open_tokenizer(file.parent)
        tokenizer.decode(tokenizer.encode("One lock \u00e9."))

    return of_a_file("tokenizer", Form.JSON, file, [json.dumps(seed).encode()], read)


def _settings(subjects: Subjects, work: Path) -> Kind:
    """The same bytes as each of an export's files of settings."""
    from lora_export.check.inputs.tokenizers import SeededTokenizer
    from lora_export.other_tools import find_graph
    from lora_export.runtime.generation_config import eos_ids_of, generation_defaults
    from lora_export.runtime.tokenizer import open_tokenizer

    folder = work / "of-settings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").touch()
    (folder / "tokenizer.json").write_bytes((subjects.writer / "tokenizer.json").read_bytes())
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "genai_config.json",
    )
    seeds = [(subjects.writer / name).read_bytes() for name in names if (subjects.writer / name).is_file()]

    def read(content: bytes) -> None:
        for name in names:
            (folder / name).write_bytes(content)
        eos_ids_of(generation_defaults(folder))
        find_graph(folder)
        SeededTokenizer.of(folder)
        open_tokenizer(folder)

    words = (
        "eos_token_id",
        "vocab_size",
        "text_config",
        "chat_template",
        "bos_token",
        "model",
        "max_position_embeddings",
    )
    return Kind("settings", Form.JSON, tuple(seeds), read, words)


def _encoder_requests(subjects: Subjects, work: Path) -> Kind:
    return Kind("encoder requests", Form.REQUEST, *requests_of(subjects.encoder))


def _writer_requests(subjects: Subjects, work: Path) -> Kind:
    return Kind("writer requests", Form.REQUEST, *requests_of(subjects.writer))
