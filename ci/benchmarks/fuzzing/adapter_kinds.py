"""What an adapter's folder or file holds, read as a user's is until PEFT would get it, on modules of one base."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from fuzzing.kind import Kind, of_a_file
from fuzzing.mutations import Form
from fuzzing.subjects import Subjects, linked

_WEIGHTS = "adapter_model.safetensors"
_PEFT = "base_model.model."
_OPTIONS = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def adapter_config(subjects: Subjects, work: Path) -> Kind:
    """`adapter_config.json`, and as the same bytes the model's config beside it."""
    from peft import LoraConfig

    file = linked(subjects.adapter, work / "of-config", "adapter_config.json")
    of_model = file.parent / "config.json"
    of_model.unlink(missing_ok=True)  # a link to the subject's

    def read() -> None:
        of_model.write_bytes(file.read_bytes())
        _opened(file.parent)

    fields = json.loads((subjects.adapter / file.name).read_bytes())
    others = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}, "revision": "main", "use_rslora": True}
    labelled = fields | {"id2label": {"0": "a"}, "pad_token_id": 0, "alora_invocation_tokens": [1, 2]}
    seeds = [json.dumps(each).encode() for each in (fields, fields | others, labelled)]
    words = (*LoraConfig.__dataclass_fields__, "id2label", "pad_token_id")
    return of_a_file("adapter config", Form.JSON, file, seeds, read, words)


def adapter_header(subjects: Subjects, work: Path) -> Kind:
    """A file of tensors in a PEFT folder; with the keys of other tools, the file alone."""
    from lora_export.adapters.dialects import convert
    from lora_export.adapters.foreign import _places, read_foreign
    from lora_export.base.checkpoint import Checkpoint, Located

    places, prefix = _places(Checkpoint.open(Located(subjects.base, "b")), None)
    file = linked(subjects.adapter, work / "of-header", _WEIGHTS)
    alone, made = work / "of-file.safetensors", work / "of-file"
    made.mkdir(exist_ok=True)

    def read(content: bytes) -> None:
        if _PEFT.encode() in content[:4096]:
            file.write_bytes(content)
            _opened(file.parent)
            return
        alone.write_bytes(content)
        adapter = read_foreign(alone)
        assert adapter is not None  # a file that is no adapter is refused
        convert(adapter, places, prefix, base="b", folder=made)
        _opened(made)

    whole = (subjects.adapter / _WEIGHTS).read_bytes()
    return Kind("adapter header", Form.SAFETENSORS, tuple(_seeds(whole)), read)


def _opened(path: Path) -> None:
    """All that is asked of an adapter's folder before its base is."""
    from lora_export.adapters.folder import open_adapter
    from lora_export.adapters.foreign import read_foreign, source_hashes
    from lora_export.adapters.support import require_supported
    from lora_export.base.checkpoint import Located
    from lora_export.export.origin import another_base, quantized_training
    from lora_export.fleet.survey import kind_of

    read_foreign(path)
    folder = open_adapter(path, "a")
    another_base(folder, Located(path, "b"))
    quantized_training(folder)
    kind_of(folder)
    source_hashes(path)
    folder.labels  # noqa: B018 it is read
    for mode in ("merge", "dynamic"):
        require_supported(folder.config, mode, "a")


def _seeds(whole: bytes) -> Iterator[bytes]:
    """The file as PEFT writes it, with options in its header, and with the keys of other tools."""
    (length,) = struct.unpack("<Q", whole[:8])
    fields = json.loads(whole[8 : 8 + length])
    tensors = {key: entry for key, entry in fields.items() if key != "__metadata__"}
    of_diffusers = {"lora_adapter_metadata": json.dumps(_OPTIONS)}
    of_kohya = {"ss_network_dim": "4", "ss_network_alpha": "8"}
    bare = {key.removeprefix(_PEFT): entry for key, entry in tensors.items()}
    kohya = {}
    for key, entry in bare.items():
        module, part, _ = key.rsplit(".", 2)
        kohya[f"lora_te_{module.replace('.', '_')}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = entry
    for keys, metadata in ((tensors, {}), (tensors, of_diffusers), (bare, of_diffusers), (bare, {}), (kohya, of_kohya)):
        text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **keys}).encode()
        yield struct.pack("<Q", len(text)) + text + whole[8 + length :]
