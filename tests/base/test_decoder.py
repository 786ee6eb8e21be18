"""The cache that a decoder is traced with has the shapes that the model itself gives it; other states are refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_export.base.decoder import cache_shapes, decoder_sample
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
          "num_key_value_heads": 4, "intermediate_size": 24}  # fmt: skip
ALTERNATING = GATED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
BASES = {
    "multi-query Falcon": ("FalconConfig", SIZES | {"multi_query": True}, [((1, 8), (1, 8))] * 2),
    "grouped Falcon": (
        "FalconConfig", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}, [((4, 8), (4, 8))] * 2,
    ),
    "GPT-BigCode": ("GPTBigCodeConfig", SIZES, [((1, 8), (1, 8))] * 2),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]},
        [((2, 16), (2, 16))] * 2,
    ),
    "XGLM": (
        "XGLMConfig",
        {"vocab_size": 40, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 24},
        [((4, 8), (4, 8))] * 2,
    ),
    "CodeGen": (
        "CodeGenConfig", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        [((4, 8), (4, 8))] * 2,
    ),
    "latent attention": (
        "DeepseekV3Config",
        SIZES | LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2,
                          "topk_group": 1, "first_k_dense_replace": 1},
        [((1, 8), (1, 4))] * 2,
    ),
    "sizes by layer": (
        "Gemma4TextConfig",
        ALTERNATING | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                       "vocab_size_per_layer_input": 40},
        [((2, 8), (2, 8)), ((2, 16), (2, 16))],
    ),
    "layers that share a cache": (
        "Gemma3nTextConfig",
        ALTERNATING | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                       "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
                       "laurel_rank": 4, "intermediate_size": [24] * 4, "activation_sparsity_pattern": [0.0] * 4},
        [((2, 8), (2, 8))] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_the_model_tells_the_shapes_of_its_cache(name, _silent_libraries):
    kind, fields, expected = BASES[name]
    model = build_weightless(Task.TEXT_GENERATION, getattr(transformers, kind)(**fields), "float32")
    assert list(cache_shapes(model)) == expected
    assert decoder_sample(model).n_cached_layers == len(expected)
    real = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    given = real(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True)
    layers = [layer for layer in given.past_key_values.layers if getattr(layer, "keys", None) is not None]
    shapes = [tuple((t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)) for layer in layers]
    assert shapes == expected


def test_positions_are_an_input_where_the_model_takes_them(bases):
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)
    alibi = build_weightless(Task.TEXT_GENERATION, config, "float32")
    assert "position_ids" not in decoder_sample(alibi).inputs
    llama = build_weightless(Task.TEXT_GENERATION, transformers.AutoConfig.from_pretrained(bases["llama"]), "float32")
    assert "position_ids" in decoder_sample(llama).inputs
    # RoBERTa's first position is not 0, and it counts from its tokens.
    config = transformers.RobertaConfig(**SIZES, intermediate_size=24, is_decoder=True)
    assert "position_ids" not in decoder_sample(build_weightless(Task.TEXT_GENERATION, config, "float32")).inputs


@pytest.mark.parametrize("kind", ["BertConfig", "RobertaConfig", "RoFormerConfig"])
def test_an_encoder_with_a_language_model_s_head_is_no_decoder(kind):
    config = getattr(transformers, kind)(**SIZES, intermediate_size=24)
    with pytest.raises(InputRefused, match="keeps no keys and values from one token to the next") as refused:
        cache_shapes(build_weightless(Task.TEXT_GENERATION, config, "float32"))
    assert refused.value.found == "is_decoder is false: each token sees those after it"
    assert refused.value.next_step == "try another --task"


LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1,
          "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
          "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
OTHERS = {
    "mamba": ("MambaConfig", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}, "linear_attention"),
    "jamba": ("JambaConfig", GATED | {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
                                      "attn_layer_offset": 1}, "full_attention, linear_attention"),
    "qwen3_next": ("Qwen3NextConfig", GATED | LINEAR, "full_attention, linear_attention"),
    "lfm2": ("Lfm2Config", GATED | {"layer_types": ["conv", "full_attention"]}, "conv, full_attention"),
    "falcon_h1": ("FalconH1Config", GATED | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, "hybrid"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_state_beside_keys_and_values_is_refused_by_name(model_type):
    kind, fields, layers = OTHERS[model_type]
    with pytest.raises(InputRefused, match=f"A {model_type} base keeps a state beside keys and values") as refused:
        build_weightless(Task.TEXT_GENERATION, getattr(transformers, kind)(**fields), "float32")
    assert (refused.value.where, refused.value.found) == (f"config.json: model_type {model_type}", layers)
