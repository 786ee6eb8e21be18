"""Further tiny random bases, each tried with one LoRA adapter, merged and dynamic; `matrix.py` runs them."""

from __future__ import annotations

from architectures import (
    ALTERNATING,
    BART,
    GROUPED,
    LM,
    SEQ2SEQ,
    SEQUENCE,
    SMALL,
    T5,
    TEXT,
    WINDOWED,
    Architecture,
)

GPT = {"vocab_size": 600, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
FALCON = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = TEXT | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
                 "qk_rope_head_dim": 8, "v_head_dim": 12}  # fmt: skip
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 32}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                     "first_k_dense_replace": 1, "topk_group": 1, "n_shared_experts": 1}  # fmt: skip
PADDED = GROUPED | {"pad_token_id": 0}
HEADED = PADDED | {"head_dim": 16}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}
SOUND = SMALL | {"conv_dim": [32, 32], "conv_kernel": [10, 4], "conv_stride": [20, 8], "num_feat_extract_layers": 2,
                 "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
                 "pad_token_id": 0, "classifier_proj_size": 32}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
             "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
             "decoder_hidden_size": 32, "image_size": 64}  # fmt: skip
WITHOUT_SIZE = {name: value for name, value in SEGFORMER.items() if name != "image_size"}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
PVT = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2], "image_size": 64}
DEPTH = IMAGE | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
                 "fusion_hidden_size": 16, "is_hybrid": False}  # fmt: skip
SIGLIP = {"text_config": TEXT | {"max_position_embeddings": 64, "projection_size": 64}, "vision_config": IMAGE}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
QWEN_TOKENS = {"image_token_id": 599, "video_token_id": 598, "vision_start_token_id": 597, "vision_end_token_id": 596}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}  # fmt: skip
# Attention between contents and positions, as the published checkpoints have it.
DISENTANGLED = TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1,
                       "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip
PAIR, QUERY = ["q_proj", "v_proj"], ["query", "value"]


def _decoder(config: str, fields: dict, targets: str | list[str] = "all-linear", refused: str | None = None):
    return Architecture(config, LM, "CAUSAL_LM", targets, fields, refused=refused)


def _stateful(config: str, model_type: str, fields: dict, targets: list[str]) -> Architecture:
    return _decoder(config, fields, targets, refused=f"A {model_type} base keeps a state beside keys and values")


def _language_model(config: str, text: dict, image: dict, **fields: object) -> Architecture:
    """The language model of a multimodal base."""
    parts = {"text_config": text, "vision_config": image}
    targets = r".*language_model.*\.(q_proj|v_proj)"
    return Architecture(config, "AutoModelForImageTextToText", "CAUSAL_LM", targets, parts | fields)


def _other(config: str, auto: str, fields: dict, targets: list[str], task_type: str | None = None) -> Architecture:
    return Architecture(config, f"AutoModel{auto}", task_type, targets, fields)


def _classifier(config: str, fields: dict, targets: list[str]) -> Architecture:
    return Architecture(config, SEQUENCE, "SEQ_CLS", targets, fields)


def _translator(config: str, fields: dict, targets: list[str]) -> Architecture:
    return Architecture(config, SEQ2SEQ, "SEQ_2_SEQ_LM", targets, fields)


MORE = {
    "Falcon, multi-query": _decoder("FalconConfig", FALCON | {"multi_query": True}),
    "Falcon, grouped": _decoder("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "GPT-J": _decoder("GPTJConfig", GPT | {"rotary_dim": 8}, PAIR),
    "CodeGen": _decoder("CodeGenConfig", GPT | {"rotary_dim": 8}, ["qkv_proj", "fc_in"]),
    "GPT-Neo": _decoder(
        "GPTNeoConfig",
        {"vocab_size": 600, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512},
        PAIR,
    ),
    "GPT-BigCode": _decoder("GPTBigCodeConfig", GPT, ["c_attn", "c_fc"]),
    "BLOOM": _decoder(
        "BloomConfig", {"vocab_size": 600, "hidden_size": 64, "n_layer": 2, "n_head": 4}, ["query_key_value"]
    ),
    "MPT": _decoder("MptConfig", {"vocab_size": 600, "d_model": 64, "n_layers": 2, "n_heads": 4}, ["Wqkv"]),
    "XGLM": _decoder(
        "XGLMConfig",
        {"vocab_size": 600, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128}
        | {"max_position_embeddings": 512},
        PAIR,
    ),
    "BioGPT": _decoder("BioGptConfig", TEXT, PAIR),
    "BERT, decoder": _decoder("BertConfig", TEXT | {"is_decoder": True}, QUERY),
    "RoBERTa, decoder": _decoder("RobertaConfig", TEXT | {"is_decoder": True, "type_vocab_size": 1}, QUERY),
    "RoFormer, decoder": _decoder("RoFormerConfig", TEXT | {"is_decoder": True, "embedding_size": 64}, QUERY),
    "RoFormer without a cache": _decoder(
        "RoFormerConfig", TEXT, QUERY, refused="A roformer base keeps no keys and values"
    ),
    "BERT without a cache": _decoder("BertConfig", TEXT, QUERY, refused="A bert base keeps no keys and values"),
    "CTRL": _decoder("CTRLConfig", GPT | {"dff": 128}, ["Wq"]),
    "DeepSeek V2": _decoder(
        "DeepseekV2Config",
        DEEPSEEK | {"topk_method": "greedy", "n_group": 1},
        ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"],
    ),
    "DeepSeek V3": _decoder(
        "DeepseekV3Config", DEEPSEEK | {"n_group": 2}, ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"]
    ),
    "MiniCPM3": _decoder("MiniCPM3Config", LATENT, ["q_a_proj", "o_proj"]),
    "Gemma": _decoder("GemmaConfig", GROUPED | {"head_dim": 16}),
    "Gemma 3n": _decoder(
        "Gemma3nTextConfig",
        ALTERNATING
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4}
        | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600}
        | {"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4},
        ["q_proj", "o_proj"],
    ),
    "Gemma 4": _decoder(
        "Gemma4TextConfig",
        ALTERNATING
        | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        | {"vocab_size_per_layer_input": 600},
        ["q_proj", "o_proj"],
    ),
    "Cohere": _decoder("CohereConfig", GROUPED),
    "Cohere 2": _decoder("Cohere2Config", ALTERNATING),
    "Granite": _decoder("GraniteConfig", GROUPED),
    "Granite MoE": _decoder("GraniteMoeConfig", GROUPED | FEW_EXPERTS, PAIR),
    "OLMo": _decoder("OlmoConfig", PADDED),
    "OLMo 2": _decoder("Olmo2Config", PADDED),
    "OLMo 3": _decoder("Olmo3Config", ALTERNATING | {"pad_token_id": 0}),
    "OLMoE": _decoder("OlmoeConfig", PADDED | FEW_EXPERTS, PAIR),
    "SmolLM3": _decoder("SmolLM3Config", PADDED),
    "StarCoder2": _decoder("Starcoder2Config", GROUPED | {"sliding_window": 8}),
    "Phi": _decoder("PhiConfig", GROUPED),
    "Phi-MoE": _decoder("PhimoeConfig", GROUPED | FEW_EXPERTS, PAIR),
    "StableLM": _decoder("StableLmConfig", GROUPED),
    "Nemotron": _decoder("NemotronConfig", GROUPED),
    "GLM": _decoder("GlmConfig", HEADED),
    "Helium": _decoder("HeliumConfig", HEADED),
    "GLM 4": _decoder("Glm4Config", HEADED),
    "EXAONE 4": _decoder("Exaone4Config", ALTERNATING),
    "GPT-OSS": _decoder("GptOssConfig", ALTERNATING | FEW_EXPERTS, PAIR),
    "Persimmon": _decoder("PersimmonConfig", TEXT),
    "Ministral": _decoder("MinistralConfig", WINDOWED),
    "Seed-OSS": _decoder("SeedOssConfig", HEADED),
    "Arcee": _decoder("ArceeConfig", GROUPED),
    "ERNIE 4.5": _decoder("Ernie4_5Config", HEADED),
    "Hunyuan": _decoder("HunYuanDenseV1Config", HEADED),
    "Apertus": _decoder("ApertusConfig", GROUPED),
    "OpenAI GPT": _decoder(
        "OpenAIGPTConfig",
        GPT,
        ["c_attn", "c_fc"],
        refused="A openai-gpt base keeps no keys and values from one token to the next",
    ),
    "Mamba": _stateful(
        "MambaConfig", "mamba", {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2}, ["x_proj"]
    ),
    "Jamba": _stateful(
        "JambaConfig",
        "jamba",
        GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        ["q_proj"],
    ),
    "LFM2": _stateful("Lfm2Config", "lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, ["q_proj"]),
    "Qwen3-Next": _stateful(
        "Qwen3NextConfig",
        "qwen3_next",
        GROUPED | FEW_EXPERTS | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
        ["q_proj"],
    ),
    "Falcon-H1": _stateful(
        "FalconH1Config", "falcon_h1", GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, ["q_proj"]
    ),
    "Gemma 3, multimodal": _language_model(
        "Gemma3Config",
        ALTERNATING,
        IMAGE,
        mm_tokens_per_image=4,
        image_token_index=599,
        boi_token_index=597,
        eoi_token_index=598,
    ),
    "LLaVA": _language_model(
        "LlavaConfig",
        PADDED | {"model_type": "llama"},
        IMAGE | {"model_type": "clip_vision_model"},
        image_token_index=599,
    ),
    "Qwen2-VL": _language_model(
        "Qwen2VLConfig",
        PADDED | ROTARY,
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        **QWEN_TOKENS,
    ),
    "Qwen3-VL": _language_model(
        "Qwen3VLConfig",
        HEADED | ROTARY,
        {
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 32,
            "deepstack_visual_indexes": [0],
        },
        **QWEN_TOKENS,
    ),
    "ELECTRA": _classifier("ElectraConfig", TEXT | {"embedding_size": 32}, QUERY),
    "MPNet": _classifier("MPNetConfig", TEXT, ["q", "v"]),
    "DeBERTa": _classifier("DebertaConfig", DISENTANGLED, ["in_proj", "pos_proj", "pos_q_proj"]),
    "DeBERTa-v3": _classifier(
        "DebertaV2Config",
        DISENTANGLED | {"share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
        ["query_proj", "key_proj", "value_proj"],
    ),
    "XLM-R": _classifier("XLMRobertaConfig", TEXT | {"type_vocab_size": 1}, QUERY),
    "CamemBERT": _classifier("CamembertConfig", TEXT | {"type_vocab_size": 1}, QUERY),
    "ERNIE": _classifier("ErnieConfig", TEXT, QUERY),
    "ConvBERT": _classifier("ConvBertConfig", TEXT | {"embedding_size": 64}, QUERY),
    "FNet": _classifier("FNetConfig", TEXT, ["intermediate.dense", "output.dense"]),
    "LayoutLM": _classifier("LayoutLMConfig", TEXT, QUERY),
    "Megatron-BERT": _classifier("MegatronBertConfig", TEXT, QUERY),
    "EuroBERT": _classifier("EuroBertConfig", PADDED, PAIR),
    "Nomic": _other("NomicBertConfig", "", TEXT | {"pad_token_id": 0}, PAIR, "FEATURE_EXTRACTION"),
    "Qwen3, embedder": _other("Qwen3Config", "", HEADED, PAIR, "FEATURE_EXTRACTION"),
    "Gemma 3, classifier": _classifier("Gemma3TextConfig", ALTERNATING | {"pad_token_id": 0}, PAIR),
    "T5, encoder": Architecture("T5Config", "T5EncoderModel", "FEATURE_EXTRACTION", ["q", "v"], T5),
    "BERT, question answering": _other(
        "BertConfig", "ForQuestionAnswering", TEXT | {"num_labels": 2}, QUERY, "QUESTION_ANS"
    ),
    "BERT, masked": _other("BertConfig", "ForMaskedLM", TEXT, QUERY),
    "BERT, multiple choice": _other("BertConfig", "ForMultipleChoice", TEXT, QUERY),
    "DINOv2": _other("Dinov2Config", "ForImageClassification", IMAGE, PAIR),
    "DINOv3": _other("DINOv3ViTConfig", "", IMAGE, PAIR),
    "DeiT": Architecture("DeiTConfig", "DeiTForImageClassification", None, PAIR, IMAGE),
    "BEiT": _other("BeitConfig", "ForImageClassification", IMAGE, PAIR),
    "Swin": _other("SwinConfig", "ForImageClassification", SWIN, PAIR),
    "SigLIP": _other("SiglipConfig", "ForZeroShotImageClassification", SIGLIP, PAIR),
    "SegFormer": _other("SegformerConfig", "ForSemanticSegmentation", SEGFORMER, PAIR),
    "SegFormer, classifier": _other("SegformerConfig", "ForImageClassification", WITHOUT_SIZE, PAIR),
    "ResNet": _other("ResNetConfig", "ForImageClassification", CONVOLUTIONS | {"layer_type": "basic"}, ["convolution"]),
    "PVT v2": _other("PvtV2Config", "ForImageClassification", PVT, "all-linear"),
    "Data2Vec, images": _other("Data2VecVisionConfig", "ForImageClassification", IMAGE, QUERY),
    "DINOv2 with registers": _other("Dinov2WithRegistersConfig", "ForImageClassification", IMAGE, PAIR),
    "DPT": _other("DPTConfig", "ForDepthEstimation", DEPTH, QUERY),
    "Wav2Vec2, CTC": _other("Wav2Vec2Config", "ForCTC", SOUND, PAIR),
    "Wav2Vec2, classifier": _other("Wav2Vec2Config", "ForAudioClassification", SOUND, PAIR),
    "HuBERT, CTC": _other("HubertConfig", "ForCTC", SOUND, PAIR),
    "AST": _other(
        "ASTConfig",
        "ForAudioClassification",
        SMALL | {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8} | {"frequency_stride": 8},
        PAIR,
    ),
    "Marian": _translator(
        "MarianConfig",
        BART | {"max_position_embeddings": 512, "scale_embedding": True, "forced_eos_token_id": None},
        PAIR,
    ),
    "M2M100": _translator("M2M100Config", BART | {"max_position_embeddings": 512}, PAIR),
    "mBART": _translator("MBartConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "Pegasus": _translator("PegasusConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "Blenderbot": _translator("BlenderbotConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "Blenderbot, small": _translator("BlenderbotSmallConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "MVP": _translator("MvpConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "PLBart": _translator("PLBartConfig", BART | {"max_position_embeddings": 512}, PAIR),
    "mT5": _translator("MT5Config", T5 | {"feed_forward_proj": "gated-gelu"}, ["q", "v"]),
}
