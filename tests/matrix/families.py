"""Tiny random models of every Mixture-of-Experts family, built from their own configurations.

Each has 8 routed experts of width 16, a hidden size of 32 and 4 layers, and is saved in bfloat16 in several shards, in
the layout of the Hub. Families whose checkpoints on the Hub see and hear are built with their towers, which text
never passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_EXPERTS = 8
NUM_LAYERS = 4
VOCABULARY = 128

# Settings of every family that has them, under every name they go by.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2,
    "top_k_experts": 2, "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT_ATTENTION = {"num_key_value_heads": 4}  # multi-head latent attention has as many key as query heads
SPARSE = ["dense", *["sparse"] * (NUM_LAYERS - 1)]
GROUPS = {"n_group": 2, "topk_group": 1}
GATED_MULTIPLE_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "image_size": 16, "out_hidden_size": 32,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
WINDOWS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
    "sliding_window_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a family needs beside `COMMON`: settings of its language model, and of the configuration around it."""

    text: Mapping[str, Any] = field(default_factory=dict)
    outer: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "axk1": Family({**LATENT_ATTENTION, **GROUPS}),
    "axk2": Family(LATENT_ATTENTION),
    "bailing_hybrid": Family(),
    "beam": Family({"mlp_layer_types": SPARSE}),
    "cohere2_moe": Family(),
    "deepseek_v2": Family({**LATENT_ATTENTION, **GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": Family({**LATENT_ATTENTION, **GROUPS}),
    "deepseek_v32": Family({**LATENT_ATTENTION, **GROUPS}),
    "deepseek_v4": Family({
        "head_dim": 16, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "hc_mult": 2,
        "mlp_layer_types": ["moe"] * NUM_LAYERS,
    }),
    "dots1": Family(),
    "ernie4_5_moe": Family(),
    "exaone_moe": Family(),
    "flex_olmo": Family(),
    "flint": Family(),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(LATENT_ATTENTION),
    "glm_moe_dsa": Family(LATENT_ATTENTION),
    "gpt_oss": Family(),
    "granitemoe": Family({"residual_multiplier": 0.5}),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family({
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"] * (NUM_LAYERS // 2),
    }),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family({"moe_topk": [2] * NUM_LAYERS}),
    "hy_v3": Family(),
    "hy_v4": Family(LATENT_ATTENTION),
    "jamba": Family(),
    "kimi_linear": Family({**LATENT_ATTENTION, "linear_head_dim": 8, "linear_num_heads": 4}),
    "kolibri1": Family(),
    "laguna": Family({"moe_routed_scaling_factor": 2.0}),
    "lfm2_moe": Family({"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)}),
    "mellum": Family(),
    "mimo_v2_flash": Family(),
    "minimax": Family(),
    "minimax_m2": Family(),
    "mixtral": Family(),
    "nemotron_h": Family({
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
        "ssm_state_size": 8, "chunk_size": 8,
    }),
    "olmoe": Family(),
    "phimoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "solar_open": Family(),
    "zaya": Family({"num_experts_per_tok": 1, "router_hidden_size": 16}),
    # with towers
    "aria": Family({}, {"vision_config": TOWER, "image_token_index": 5, "projector_patch_to_query_dict": {16: 4}}),
    "deepseek_ocr2": Family(
        {"mlp_layer_types": SPARSE},
        {"vision_config": {
            "sam_config": {**TOWER, "output_channels": 8, "global_attn_indexes": [1], "mlp_dim": 16,
                           "downsample_channels": [8, 16], "scale": 32},
            "encoder_config": TOWER,
        }},
    ),
    "dots3_note": Family(
        {**LATENT_ATTENTION, "head_dim": 16, "shared_experts_intermediate_size": 16, "sliding_window": 8,
         "layer_types": ["indexed_attention"] * NUM_LAYERS},
        {"vision_config": {**TOWER, "moe_intermediate_size": 8, "adapter_in_dim": 16, "adapter_out_dim": 32,
                           "mlp_layer_types": ["dense", "sparse"], "num_local_experts": NUM_EXPERTS},
         "audio_config": {**TOWER, "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 32}},
    ),
    "gemma4": Family(
        {"enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
         "vocab_size_per_layer_input": VOCABULARY},
        {"vision_config": {**TOWER, "position_embedding_size": 16}},
    ),
    "glm4v_moe": Family(
        {"rope_parameters": {**GATED_MULTIPLE_ROPE, "mrope_section": [1, 1, 0]}}, {"vision_config": QWEN_TOWER}
    ),
    "glm5_next": Family(
        {**LATENT_ATTENTION, "qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4,
         "index_kpool": 4, "mlp_layer_types": SPARSE},
        {"vision_config": {**QWEN_TOWER, "projection_intermediate_size": 24}},
    ),
    "inkling_mm_model": Family(
        {**WINDOWS, "local_layer_ids": [0, 2]},
        {"vision_config": {"hidden_size": 16, "n_layers": 2, "num_attention_heads": 2, "text_hidden_size": 32},
         "audio_config": {"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8}},
    ),
    "inkling2": Family(
        {**WINDOWS, "unpadded_vocab_size": VOCABULARY - 8, "n_layers_per_attn_res_block": 2},
        {"vision_config": {**TOWER, "projection_hidden_dim": 16, "text_hidden_size": 32, "posemb_grid_size": 4}},
    ),
    "minimax_m3_vl": Family(
        {"rotary_dim": 4, "dense_intermediate_size": 24, "index_block_size": 4, "index_topk_blocks": 2},
        {"vision_config": TOWER, "projector_hidden_size": 16},
    ),
    "mistral4": Family(LATENT_ATTENTION),
    "mistral_large4": Family(LATENT_ATTENTION, {"vision_config": TOWER, "image_token_index": 5}),
    "muse_spark": Family(
        {"moe_hidden_size": 12},
        {"out_hidden_size": 16, "projector_hidden_size": 16,
         "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "patch_size": 4,
                           "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4},
         "audio_config": {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [2, 2], "out_hidden_size": 32,
                          "num_hidden_layers": 2}},
    ),
    "qwen3_5_moe": Family({}, {"vision_config": {**QWEN_TOWER, "num_position_embeddings": 16}}),
    "qwen3_omni_moe_thinker": Family(
        {},
        {"vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
         "audio_config": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
                          "num_mel_bins": 8, "downsample_hidden_size": 8, "output_dim": 32}},
    ),
    "qwen3_vl_moe": Family(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        {"vision_config": {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "qwen4_exp": Family(
        {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
         "indexer_compress_ratio": 4},
        {"vision_config": {**QWEN_TOWER, "num_position_embeddings": 16}},
    ),
    "unlimited_ocr": Family({}, {"vision_config": {
        "sam_config": {**TOWER, "output_channels": 8, "global_attn_indexes": [1], "downsample_channels": [8, 16]},
        "encoder_config": TOWER,
    }}),
}  # fmt: skip


def tiny_config(name: str) -> PretrainedConfig:
    """The family's configuration with tiny sizes."""
    family = FAMILIES[name]
    outer_class = CONFIG_MAPPING[name]
    text_class = outer_class.sub_configs.get("text_config", outer_class)
    known = {setting.name for setting in fields(text_class)} | set(text_class.attribute_map)
    text = {key: value for key, value in COMMON.items() if key in known} | dict(family.text)
    config: PretrainedConfig = (
        outer_class(**text) if text_class is outer_class else outer_class(text_config=text, **family.outer)
    )
    return config


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model in evaluation mode: weights, biases, norms and correction biases, all of 8 significant bits."""
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config)._from_config(config)
    persistent = model.state_dict(keep_vars=True).values()
    for tensor in persistent:
        if tensor.is_floating_point():
            tensor.data = (tensor.data + 0.1 * torch.randn_like(tensor)).bfloat16().to(tensor.dtype)
    return model.eval()


def model_class(config: PretrainedConfig) -> Any:
    """The language model of a configuration, with its towers if it has any."""
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    raise LookupError(config.model_type)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save as on the Hub: parameters in bfloat16, buffers (correction biases) in float32, several shards."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder, max_shard_size="40KB")
