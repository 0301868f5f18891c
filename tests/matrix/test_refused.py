"""What cannot be compressed ends in one clear sentence, before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_compress import inspect
from moe_compress.checkpoint.source import open_config
from moe_compress.errors import MoECompressError, UnsupportedModelError

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
DENSE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}
CASES: dict[str, tuple[Mapping[str, Any], str]] = {
    "dense": (DENSE, "LlamaForCausalLM has no routed experts"),
    "experts that are no fused module": (
        {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], **TINY},
        "keeps its experts as `model.layers.0.feed_forward.experts` (Llama4TextExperts)",
    ),
    "experts of attention": (
        {"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], **TINY},
        "keeps its experts as `model.layers.0.self_attention.experts` (JetMoeMoA)",
    ),
    "classifier": (
        {"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"], **TINY},
        "MixtralForSequenceClassification does not give the logits of every next token",
    ),
    "token classifier": (
        {"model_type": "openai_privacy_filter", "architectures": ["OpenAIPrivacyFilterForTokenClassification"]},
        "OpenAIPrivacyFilterForTokenClassification does not give the logits of every next token",
    ),
    "diffusion": (
        {"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"]},
        "DiffusionGemmaForBlockDiffusion does not give the logits of every next token",
    ),
    "several models in one": (
        {"model_type": "qwen3_omni_moe", "architectures": ["Qwen3OmniMoeForConditionalGeneration"]},
        "Qwen3OmniMoeForConditionalGeneration does not give the logits of every next token",
    ),
    "experts for pictures": (
        {"model_type": "ernie4_5_vl_moe", "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]},
        "2 sets of experts (`mlp.text_moe.experts` and `mlp.vision_moe.experts`)",
    ),
    "experts by token number": (
        {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]},
        "looks experts up by their number in `gate.tid2eid`",
    ),
    "unknown architecture": ({"model_type": "qwen3_mo"}, "did you mean `qwen3_moe`"),
    "encoder and decoder": (
        {"model_type": "switch_transformers"}, "no causal language model for `switch_transformers`",
    ),
    "settings that do not fit": (
        {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_act": "nothing", **TINY},
        "cannot build OlmoeForCausalLM from this configuration (KeyError: 'nothing')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    config, expected = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoECompressError, match=re.escape(expected)) as caught:
        inspect(str(tmp_path))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_quantized_source_can_only_be_looked_at(tmp_path: Path) -> None:
    config = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], **TINY}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match=re.escape("is quantized (fp8)")) as caught:
        open_config(str(tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert inspect(str(tmp_path))["model_type"] == "olmoe"
