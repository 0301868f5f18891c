"""The cost formulas against counted parameters and torch's own FLOP counter, on tiny random models."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.errors import UnsupportedModelError
from moe_compress.eval.cost import UNKNOWN, cost, stored_by_part
from moe_compress.measure import cost_figures
from moe_compress.preview import inspect
from moe_compress.report.build import build_report
from moe_compress.report.markdown import limits
from moe_compress.report.tables import summary_rows
from moe_compress.runtime.families import parsed_config, with_layers
from tests.tiny_checkpoint import tiny_checkpoint

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "dtype": torch.float32,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
    | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    | {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "lfm2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    | {"layer_types": ["conv", "full_attention"]},
}
STATE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    | {"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}
PREFILL = 32


@cache
def tiny(family: str) -> PreTrainedModel:
    settings = COMMON | (TINY | STATE)[family]
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def counted(model: PreTrainedModel, *calls: dict[str, Any]) -> float:
    """FLOPs per token of the last call, as torch counts them; earlier calls fill the cache."""
    cache: Any = None
    for call in calls:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            cache = model(**call, past_key_values=cache, use_cache=len(calls) > 1).past_key_values
    return counter.get_total_flops() / calls[-1]["input_ids"].numel()


@pytest.mark.parametrize("family", [*TINY, *STATE])
def test_parameters_are_counted_once_each(family: str) -> None:
    model = tiny(family)
    derived = cost(model.config)
    assert derived.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert sum(derived.params.values()) == derived.total_params
    assert derived.stored_bytes >= 4 * derived.total_params  # float32, and the persistent buffers
    assert derived.stored_bytes <= 4 * derived.total_params + 1024
    assert not derived.notes


@pytest.mark.parametrize("family", TINY)
def test_prefill_flops_match_the_flop_counter(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(1, 128, (2, PREFILL))
    assert cost(model.config, PREFILL).flops_per_token == pytest.approx(counted(model, {"input_ids": ids}), rel=0.01)


# transformers expands the whole latent cache at every step, where the formula is of the absorbed form.
@pytest.mark.parametrize("family", [family for family in TINY if family != "deepseek_v3"])
def test_decode_flops_match_the_flop_counter(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(1, 128, (2, PREFILL))
    measured = counted(model, {"input_ids": ids[:, :-1]}, {"input_ids": ids[:, -1:]})
    assert cost(model.config, PREFILL).decode_flops_per_token == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("family", STATE)
def test_flops_of_state_models_match_outside_the_state(family: str) -> None:
    """Their scans are element-wise or chunked, so only a one-token prompt compares: attention to itself, no chunk."""
    model = tiny(family)
    derived = cost(model.config, 1)
    attention = 2 * 4 * (16 + 16)  # one attention layer: 4 heads, 16 dimensions
    without_state = derived.flops_per_token - derived.prefill_flops["attention_scores"] + attention
    warm = {"input_ids": torch.randint(1, 128, (2, 4))}
    step = {"input_ids": torch.randint(1, 128, (2, 1))}
    measured = counted(model, warm, step) - 4 * attention  # four keys more in the cache
    assert without_state == pytest.approx(measured, rel=0.03)


def test_parts_of_a_model_with_shared_experts_and_a_dense_layer() -> None:
    derived = cost(tiny("deepseek_v3").config, PREFILL)
    assert derived.params["routed_experts"] == 8 * 3 * 64 * 32
    assert derived.params["shared_experts"] == 3 * 64 * 64
    assert derived.params["router"] == 8 * 64
    assert derived.params["dense_mlp"] == 3 * 64 * 48
    assert derived.prefill_flops["routed_experts"] == 2 * 2 * 3 * 64 * 32
    assert derived.active_params == derived.total_params - 6 * 3 * 64 * 32


def test_cache_of_grouped_latent_windowed_and_state_layers() -> None:
    assert cost(tiny("qwen3_moe").config).kv_bytes_per_token == 4 * 2 * 2 * 2 * 16
    latent = cost(tiny("deepseek_v3").config, 100)
    assert latent.kv_bytes_per_token == 4 * 2 * (16 + 8)
    assert latent.decode_flops["attention_scores"] == 2 * 100 * 2 * 4 * (2 * 16 + 8)
    windowed = cost(tiny("gpt_oss").config, 100)
    assert windowed.cache_bytes == 4 * 2 * 2 * 16 * (8 + 100)
    mixed = cost(tiny("qwen3_next").config, 100)
    assert mixed.state_bytes == 4 * (4 * 8 * 12 + (2 * 2 * 8 + 4 * 12) * 4)
    assert mixed.cache_bytes == mixed.state_bytes + 100 * mixed.kv_bytes_per_token
    # What the library really caches.
    with torch.no_grad():
        output = tiny("deepseek_v3")(torch.ones(1, 7, dtype=torch.long), use_cache=True)
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in output.past_key_values.layers)
    assert latent.kv_bytes_per_token * 7 == 4 * elements


def test_tied_embeddings_are_stored_once_and_read_whole() -> None:
    tied, untied = cost(tiny("mixtral").config), cost(tiny("olmoe").config)
    assert tied.params["head"] == 0
    assert tied.prefill_flops["head"] == untied.prefill_flops["head"] == 2 * 128 * 64
    idle = 2 * 2 * 3 * 64 * 48  # two layers, two idle experts
    assert tied.stored_bytes - tied.active_bytes_per_token == 4 * idle
    idle = 2 * 6 * 3 * 64 * 48
    assert untied.stored_bytes - untied.active_bytes_per_token == 4 * (idle + 127 * 64)


def test_measured_inputs_replace_derived_ones() -> None:
    config: PretrainedConfig = tiny("qwen3_moe").config
    plain, measured = cost(config), cost(config, stored_bytes=123, experts_per_token=1.5)
    assert measured.stored_bytes == 123
    assert measured.experts_per_token == 1.5 and plain.experts_per_token == 3
    assert measured.expert_flops_per_token == plain.expert_flops_per_token / 2
    assert measured.active_params < plain.active_params


def test_known_published_sizes() -> None:
    """DeepSeek-V3: 671B in all, 37B active (its technical report, abstract), 70 KB of cache per token in bf16."""
    config = AutoConfig.for_model("deepseek_v3", dtype=torch.bfloat16)
    derived = cost(config)
    assert derived.total_params == pytest.approx(671e9, rel=0.001)
    assert derived.active_params == pytest.approx(37e9, rel=0.02)
    assert derived.kv_bytes_per_token == 61 * (512 + 64) * 2


def test_a_vision_tower_is_stored_but_does_no_work_on_text() -> None:
    config = AutoConfig.for_model("qwen3_vl_moe", architectures=["Qwen3VLMoeForConditionalGeneration"])
    derived = cost(config)
    tower = derived.params["other_towers"]
    assert tower > 0.9 * 566_949_104  # 27 blocks of its default size
    assert derived.active_params < derived.total_params - tower
    text = 2 * (derived.active_params - derived.params["embeddings"])  # every active weight once, the scores aside
    assert derived.flops_per_token - derived.prefill_flops["attention_scores"] == pytest.approx(text, rel=0.01)
    assert any("towers" in note for note in derived.notes)


def test_a_dense_model_is_refused() -> None:
    config = AutoConfig.for_model("llama", **COMMON)
    with pytest.raises(UnsupportedModelError):
        cost(config)


def test_to_dict_holds_the_sums() -> None:
    derived = cost(tiny("olmoe").config)
    content = derived.to_dict()
    assert content["flops_per_token"] == sum(content["prefill_flops"].values())
    assert content["expert_flops_per_token"] == content["prefill_flops"]["routed_experts"]


# ------------------------------------------------------------------------------------ what a reader is told beside them


def test_the_prompt_is_no_longer_than_the_model_reads_and_is_named() -> None:
    config = tiny("qwen3_moe").config
    assert cost(config) == cost(config, 128) != cost(config, 129)
    figures = cost_figures(cost(config).to_dict())
    assert figures["context"] == 128
    report = build_report(figures, figures)
    assert "context" not in report["ratio"] and "context" not in report["provenance"]
    labels = [row.label for row in summary_rows(report)]
    assert "FLOPs per token, prompt of 128" in labels and "routed expert FLOPs per token" in labels
    longer: Any = AutoConfig.for_model("qwen3_moe", **COMMON | TINY["qwen3_moe"] | {"max_position_embeddings": 40_960})
    assert cost(longer).context == 2048


def test_what_the_costs_leave_out_is_among_the_limits() -> None:
    note = "the sequence mixing of Strange is not counted, its projections are"
    figures = cost_figures(replace(cost(tiny("olmoe").config), notes=(note,)).to_dict())
    assert [limit for limit in limits(build_report(figures, figures)) if note in limit] == [
        f"Of the derived costs: {note}."
    ]


def test_stored_bytes_by_part_are_those_on_disk(tmp_path: Path) -> None:
    """Experts in bfloat16, the router in float32, a tensor no module reads: no mean size per parameter says that."""
    folder = tiny_checkpoint(tmp_path / "model")
    save_file({"model.layers.9.eh_proj.weight": torch.ones(10)}, folder / "extra.safetensors")
    index_file = folder / "model.safetensors.index.json"
    written = json.loads(index_file.read_text())
    written["weight_map"]["model.layers.9.eh_proj.weight"] = "extra.safetensors"
    index_file.write_text(json.dumps(written))
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        kept = {name: tensor.float() if ".mlp.gate." in name else tensor for name, tensor in tensors.items()}
        save_file(kept, shard, {"format": "pt"})
    index = TensorIndex.from_folder(folder)
    found = stored_by_part(AutoConfig.from_pretrained(folder), index)
    assert sum(found.values()) == index.nbytes and found[UNKNOWN] == 40
    by_name = {"routed_experts": ".mlp.experts.", "router": ".mlp.gate.", "attention": ".self_attn.", "head": "lm_head"}
    for part, text in by_name.items():
        assert found[part] == sum(info.nbytes for name, info in index.items() if text in name) > 0
    facts = inspect(str(folder))
    assert facts["bytes"] == found and facts["bytes_are"] == "measured"


# -------------------------------------------------------------------------------------- tokens that skip some experts

QWEN3_30B: dict[str, Any] = {
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 1,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 40960,
    "vocab_size": 64, "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip


@pytest.mark.parametrize(("context", "prefill", "decode"), [(1024, 1.403, 1.443), (8192, 1.178, 1.261)])
def test_published_ratios_of_flops_at_a_skip_ratio_of_half(context: int, prefill: float, decode: float) -> None:
    """Table of ZEDA (arXiv 2605.18643): Qwen3-30B-A3B, 64 zero experts, half of all slots skipped.

    Its decode is of `context` tokens one after the other, so the mean of those with half the keys.
    """
    original = AutoConfig.for_model("qwen3_moe", **QWEN3_30B)
    entry = {"zero_experts": 64, "experts_per_token": 4.0}
    adapted = parsed_config(with_layers(original.to_dict(), 128, {0: entry}))
    parts = ("attention_projections", "attention_scores", "routed_experts", "router")

    def flops(config: PretrainedConfig) -> tuple[float, float]:
        middle = [cost(config, keys).decode_flops for keys in (context // 2 - 1, context // 2)]
        whole = cost(config, context).prefill_flops
        return sum(whole[part] for part in parts), sum(found[part] for found in middle for part in parts) / 2

    ratios = [before / after for before, after in zip(flops(original), flops(adapted), strict=True)]
    assert [round(ratio, 3) for ratio in ratios] == [prefill, decode]


def test_experts_that_tokens_skip_cost_nothing() -> None:
    config = tiny("qwen3_moe").config
    before = cost(config, PREFILL)
    one = 3 * 64 * 32  # elements of an expert

    def departed(*entries: dict[str, Any]) -> PretrainedConfig:
        content = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
        return parsed_config(with_layers(content, 8, dict(enumerate(entries))))

    fewer = cost(departed({"top_k": 1, "normalise_over": 3}, {"skip": {"threshold": 0.5}, "experts_per_token": 2.25}))
    assert fewer.experts_per_token == (1 + 2.25) / 2
    assert fewer.prefill_flops["routed_experts"] == 2 * (1 + 2.25) * one
    assert fewer.active_params == before.active_params - (2 + 0.75) * one
    assert fewer.total_params == before.total_params and fewer.stored_bytes == before.stored_bytes
    assert "how many routed experts a token uses was counted on calibration text" in fewer.notes

    unknown = cost(departed({"zero_experts": 4}, {"zero_experts": 4}))
    assert unknown.experts_per_token == pytest.approx(3 * 8 / 12)
    assert unknown.params["router"] == before.params["router"] + 2 * 4 * 64
    assert unknown.prefill_flops["router"] == 2 * unknown.params["router"]
    assert any("was not measured" in note for note in unknown.notes)
    assert cost(departed({"top_k": 2, "normalise_over": 3})).notes == ()
