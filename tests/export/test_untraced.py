"""What a library says of a model that it cannot trace, and what a refusal makes of it."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused, refused_if_it_fails
from lora_export.export.untraced import why_untraced

# As torch 2.13 and Transformers 5 said them of LongT5, LED, ResNet, Doge, ConvNeXt, Youtu and XMOD.
SAID = [
    (RuntimeError('Constraints violated (sequence_length)! For more information, run with TORCH_LOGS="+dynamic".\n -'),
     "the model fixes or bounds sequence_length, which a graph must leave free"),
    (RuntimeError("Could not guard on data-dependent expression 2*u4 - 1 < 0 (unhinted: 2*u4 - 1 < 0)."),
     "the model goes on by the values of its inputs"),
    (AttributeError("'ResNetConfig' object has no attribute 'image_size'"), "config says nothing of image_size"),
    (RuntimeError("Failed to convert the exported program to an ONNX model. \x1b[96mThis is step 3/3\x1b[0m of"),
     "something that ONNX has no operator for"),
    (RuntimeError("Given normalized_shape=[768], expected input with shape [768]"), "do not fit"),
    (RuntimeError("Attempting to broadcast a dimension of length 8 at -1!"), "do not fit"),
    (ValueError("Input language unknown."), "the model's own code failed on inputs of the usual kind"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "plain"), SAID)
def test_a_refusal_says_it_in_plain_words_and_then_the_reason(error, plain):
    with (
        pytest.raises(InputRefused) as refused,
        refused_if_it_fails("No.", where="config.json", next_step="x", found=why_untraced),
    ):
        raise error
    found = refused.value.found
    meaning, _, reason = found.partition("; reason: ")
    assert plain in meaning and str(error)[:20] in reason and len(reason) <= 160
    assert "\x1b" not in found and "\n" not in found
