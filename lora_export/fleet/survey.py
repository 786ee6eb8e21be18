"""The kinds of adapter in a fleet: the graph is exported with one adapter of each, and has the inputs of all.

Two adapters are of one kind if their options and the names and shapes of their tensors are equal: PEFT then puts the
same layers into the same modules.
"""

from __future__ import annotations

import hashlib
import json

from lora_export.adapters.folder import AdapterFolder

# What is recorded in an adapter's config and changes nothing of what is served.
_RECORDED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "lora_dropout")


def kind_of(folder: AdapterFolder) -> str:
    """A hash of the adapter's options and of its tensors' names and shapes."""
    options = {name: value for name, value in folder.config.items() if name not in _RECORDED}
    text = json.dumps([options, sorted(folder.shapes.items())], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
