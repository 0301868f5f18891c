"""The few facts that structure does not tell."""

from __future__ import annotations

# Names that configurations use for the number of routed experts, and for routed experts per token.
EXPERT_COUNT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"
)  # fmt: skip
TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"
)  # fmt: skip
# Sections of a configuration that describe towers text does not pass; their experts, if any, are their own.
OTHER_TOWERS = ("vision_config", "audio_config")
# Families whose routers never divide gate values by the sum of those picked, though some have a setting for it.
UNDIVIDED_GATES = ("deepseek_v2", "jamba", "phimoe", "zaya")
# Families whose routers always divide them, whatever their setting for it says.
DIVIDED_GATES = ("deepseek_v4",)
# Families whose routers' code allows one top-k only.
FIXED_TOP_K = ("phimoe", "zaya")
