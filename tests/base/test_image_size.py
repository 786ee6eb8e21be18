"""How large a model's images are where its config does not say: its image processor does."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForImageClassification, ResNetConfig

from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.encoders import encoder_sample
from lora_export.base.tasks import Task
from lora_export.errors import InputRefused

SAID = [
    ({"size": {"height": 48, "width": 32}}, (48, 32)),
    ({"size": 40}, (40, 40)),
    ({"size": {"shortest_edge": 256}, "crop_size": 224}, (224, 224)),
    ({"size": {"shortest_edge": 256}, "crop_size": {"height": 200, "width": 100}, "do_center_crop": True}, (200, 100)),
    ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, (256, 256)),
    ({"size": {"longest_edge": 256}}, None),
    ({"size": [0, 5]}, None),
    ({"size": 2**40}, None),
    ({"size": "large"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("fields", "size"), SAID)
def test_the_processor_s_last_step_says_it(fields, size, bases, tmp_path):
    shutil.copytree(bases["vit"], tmp_path / "b")
    (tmp_path / "b/preprocessor_config.json").write_text(json.dumps(fields))
    assert Checkpoint.open(locate(str(tmp_path / "b"), kind="base")).image_size == size


def test_a_sample_has_it_where_the_config_is_silent():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    model = AutoModelForImageClassification.from_config(config)
    sample = encoder_sample(Task.IMAGE_CLASSIFICATION, model, image_size=(48, 32))
    assert sample.inputs["pixel_values"].shape[1:] == (3, 48, 32)
    with pytest.raises(InputRefused, match="how large the images of this resnet base are") as refused:
        encoder_sample(Task.IMAGE_CLASSIFICATION, model)
    assert "image processor" in refused.value.next_step
    config.image_size = 64
    assert encoder_sample(Task.IMAGE_CLASSIFICATION, model, image_size=(48, 32)).inputs["pixel_values"].shape[2] == 64
