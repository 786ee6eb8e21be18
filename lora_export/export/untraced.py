"""Why a base could not be traced, in words that need no knowledge of what traces it."""

from __future__ import annotations

import re

from lora_export.errors import told

_MOST_OF_A_REASON = 160
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What torch and Transformers say, and what it means; the first that fits counts.
_MEANINGS = (
    (re.compile(r"Constraints violated \((?P<what>[^)]*)\)"),
     "the model fixes or bounds {what}, which a graph must leave free"),
    (re.compile(r"data-dependent|Expected cond to be True"),
     "the model goes on by the values of its inputs, not by their shapes alone, and one graph cannot"),
    (re.compile(r"Config' object has no attribute '(?P<what>\w+)'"),
     "the model's config says nothing of {what}, which is needed to call it"),
    (re.compile(r"Failed to convert the exported program|No ONNX function|No decompositions"),
     "the model does something that ONNX has no operator for"),
    (re.compile(r"size of tensor|reduction dim|normalized_shape|broadcast|\bshapes?\b|kernel_size"),
     "inputs of the usual shape do not fit the model, or sizes in its config do not fit each other"),
)  # fmt: skip
_ELSE = "the model's own code failed on inputs of the usual kind"


def why_untraced(error: Exception) -> str:
    """What an error of a trace means for the model, then the first words of the error itself."""
    said = _ANSI.sub("", told(error))
    found = ((pattern.search(said), meaning) for pattern, meaning in _MEANINGS)
    plain = next((meaning.format(**match.groupdict()) for match, meaning in found if match), _ELSE)
    return f"{plain}; reason: {said[:_MOST_OF_A_REASON]}"
