"""What a model costs, derived from its empty skeleton alone: parameters, bytes, FLOPs, cache. No weights are read.

One multiply-add is 2 FLOPs; element-wise work (norms, activations, softmax, rotary angles) is not counted. Symbols:
C keys in the context, H query heads, dq and dv the head dimensions of queries and values, k routed experts per token.

* A weight of n elements that multiplies every token: 2n. Such are projections, the router, dense and shared MLPs,
  depthwise convolutions, and the output head (for every token, tied or not). Looking up an embedding is free.
* Routed experts: 2k times the elements of one expert's matrices, per MoE layer. Where tokens may skip experts, k is the
  mean that was measured on calibration text.
* Attention scores, queries times keys and probabilities times values: 2 C H (dq + dv) per token. In prefill C is the
  prompt length for every token, the full square that kernels without causal skipping compute; in decode a sliding
  window bounds C.
* Latent attention (DeepSeek-V2, section 2.1.3), rank r with a rotary part of p: prefill as above over expanded heads;
  decode in the absorbed form over the cached latent, 2 C H (2r + p). The key-value up-projection costs 2n in both.
* A layer with a fixed state of s elements (linear attention, state space): 4s per token to write and to read, 6s under
  the delta rule, which reads before it writes. Chunked kernels spend more in prefill.
* Cache per token: the outputs of k_proj and v_proj, or r + p for latent attention.
* Active parameters: all but the routed experts that a token does not use. Active bytes per token: their bytes, less
  the rows of an untied embedding that are not looked up.

Not covered, and then named in `Cost.notes`: the scores of sequence mixers of other kinds, token selection by an
indexer, the bytes of quantized weights, and the work of vision or audio towers, whose parameters are `other_towers`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.stream import stored_targets
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers
from moe_compress.models.skeleton import build_skeleton

MAX_CONTEXT = 2048  # tokens of the prompt that FLOPs are derived for, unless the model's own context is shorter
# How a packed weight's tensors are called; the dense one is `.weight`.
PACKED_NAME = re.compile(r"\.weight_(packed|scale|shape|zero_point|absmax|plain)$")
UNKNOWN = "unknown_to_the_model"  # prediction heads and the like: stored, but no part of the forward pass
PARTS = (
    "routed_experts",
    "shared_experts",
    "router",
    "attention",
    "dense_mlp",
    "embeddings",
    "head",
    "norms_and_other",
    "other_towers",
)


@dataclass(frozen=True)
class Cost:
    """Derived costs of one model.

    FLOPs are per token and by part: in prefill of a prompt of `context` tokens, in decode with `context` keys.
    """

    context: int
    experts_per_token: float  # mean over the MoE layers
    total_params: int
    active_params: int
    params: dict[str, int]
    stored_bytes: int
    active_bytes_per_token: int
    prefill_flops: dict[str, float]
    decode_flops: dict[str, float]
    kv_bytes_per_token: int  # what one more token adds while every window has room
    state_bytes: int  # fixed, per sequence
    cache_bytes: int  # of one sequence of `context` tokens
    notes: tuple[str, ...]

    @property
    def flops_per_token(self) -> float:
        """All FLOPs per prefilled token."""
        return sum(self.prefill_flops.values())

    @property
    def decode_flops_per_token(self) -> float:
        """All FLOPs of one decoded token."""
        return sum(self.decode_flops.values())

    @property
    def expert_flops_per_token(self) -> float:
        """FLOPs per token inside the routed experts."""
        return self.prefill_flops["routed_experts"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, the sums included, ready for JSON."""
        return asdict(self) | {
            "flops_per_token": self.flops_per_token,
            "decode_flops_per_token": self.decode_flops_per_token,
            "expert_flops_per_token": self.expert_flops_per_token,
        }


@dataclass(frozen=True)
class Mixer:
    """Sequence mixing of one layer: FLOPs per key and cached elements per key, or a fixed state."""

    prefill_flops_per_key: int = 0
    decode_flops_per_key: int = 0
    cached_per_key: int = 0
    window: int | None = None
    state: int = 0
    state_flops: int = 0
    note: str | None = None


def cost(
    config: PretrainedConfig,
    context: int | None = None,
    *,
    stored_bytes: int | None = None,
    experts_per_token: float | None = None,
) -> Cost:
    """Costs of the model that `config` describes, for prompts of `context` tokens: its own context, at most 2,048.

    `stored_bytes` replaces the derived size by one measured on disk; `experts_per_token` the configured top-k by a
    measured mean. Raises `UnsupportedModelError` when there are no routed experts.
    """
    dtype = config.get_text_config().dtype
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32
    return model_cost(build_skeleton(config, dtype=dtype), context, stored_bytes, experts_per_token)


def model_cost(
    model: PreTrainedModel,
    context: int | None = None,
    stored_bytes: int | None = None,
    experts_per_token: float | None = None,
) -> Cost:
    """Costs of a model or skeleton in memory; see `cost`."""
    text: Any = model.config.get_text_config()
    context = context or min(MAX_CONTEXT, getattr(text, "max_position_embeddings", None) or MAX_CONTEXT)
    layers = find_moe_layers(model)
    top_k = [layer.experts_per_token if experts_per_token is None else experts_per_token for layer in layers]
    structure = _Structure(model, layers)
    params, weights = _count(model, structure)
    routed, idle, idle_bytes = _routed(layers, top_k)
    embedding, head = structure.embedding, structure.head
    element = embedding.element_size()
    if head is not embedding:
        idle_bytes += embedding[1:].numel() * element
    towers = params["other_towers"]
    derived_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _stored_tensors(model))

    flops = {
        "attention_projections": 2.0 * weights["attention"],
        "routed_experts": 2.0 * routed,
        "shared_experts": 2.0 * weights["shared_experts"],
        "router": 2.0 * weights["router"],
        "dense_mlp": 2.0 * weights["dense_mlp"],
        "head": 2.0 * head.numel(),
        "other": 2.0 * weights["norms_and_other"],
    }
    mixers = [mixer_of(module, model.config.get_text_config()) for module in structure.mixers.values()]
    keys = [context if mixer.window is None else min(context, mixer.window) for mixer in mixers]
    prefill = sum(mixer.prefill_flops_per_key * context + mixer.state_flops for mixer in mixers)
    decode = sum(mixer.decode_flops_per_key * n + mixer.state_flops for mixer, n in zip(mixers, keys, strict=True))
    cached = sum(mixer.cached_per_key * n for mixer, n in zip(mixers, keys, strict=True))
    state = sum(mixer.state for mixer in mixers)
    notes = {mixer.note for mixer in mixers if mixer.note}
    if towers:
        notes.add("vision or audio towers are stored, but no work is counted for them")
    if any(getattr(layer.experts, "constants", None) is not None for layer in layers):
        notes.add("every routed expert is counted as if it ran, those that are constants too")
    if any(layer.routing.is_uncertain for layer in layers) and experts_per_token is None:
        notes.add("how many experts a token skips was not measured; all rows of a router are taken to be chosen alike")
    if any(layer.routing.experts_per_token is not None for layer in layers) and experts_per_token is None:
        notes.add("how many routed experts a token uses was counted on calibration text")
    if getattr(model.config, "quantization_config", None) is not None:
        notes.add(f"active bytes are derived for unquantized {str(embedding.dtype).removeprefix('torch.')} weights")
    return Cost(
        context=context,
        experts_per_token=sum(top_k) / len(top_k),
        total_params=sum(params.values()),
        active_params=round(sum(params.values()) - idle - towers),
        params=dict(params),
        stored_bytes=derived_bytes if stored_bytes is None else stored_bytes,
        active_bytes_per_token=round(derived_bytes - idle_bytes - towers * element),
        prefill_flops=flops | {"attention_scores": float(prefill)},
        decode_flops=flops | {"attention_scores": float(decode)},
        kv_bytes_per_token=element * sum(mixer.cached_per_key for mixer in mixers),
        state_bytes=element * state,
        cache_bytes=element * (cached + state),
        notes=tuple(sorted(notes)),
    )


def stored_by_part(config: PretrainedConfig, index: TensorIndex) -> dict[str, int]:
    """Bytes that the tensors of a checkpoint take on disk, by part; `unknown_to_the_model` is what no module reads.

    `config` is that of the dense model; what is packed counts for the part that it is unpacked to.
    """
    model: Any = build_skeleton(config)
    structure = _Structure(model, find_moe_layers(model))
    modules = dict(model.named_modules())
    head = next(name for name, module in modules.items() if module is model.get_output_embeddings())
    sizes: Counter[str] = Counter()
    for name, target in dense_targets(model, index).items():
        target = target or name * structure.is_routed(name)  # in the tier `plugin` experts have the model's own names
        part = "head" if target.startswith(f"{head}.") else structure.part_of(target) if target else UNKNOWN
        sizes[part] += index[name].nbytes
    return dict(sizes)


def dense_targets(model: Any, index: TensorIndex) -> dict[str, str]:
    """Of each stored tensor, packed or not, the dense model's one that it belongs to; empty where there is none."""
    names = {name: PACKED_NAME.sub(".weight", name) for name in index}
    targets = dict(stored_targets(model, get_model_conversion_mapping(model), set(names.values())))
    return {name: targets[dense] for name, dense in names.items()}


def _count(model: PreTrainedModel, structure: _Structure) -> tuple[Counter[str], Counter[str]]:
    """By part: all parameters, and those among them that multiply every token."""
    params: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    weights: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = structure.part_of(name)
        params[part] += parameter.numel()
        if structure.is_weight(name, parameter):
            weights[part] += parameter.numel()
    return params, weights


def _routed(layers: list[MoELayer], top_k: list[float]) -> tuple[float, float, float]:
    """Of the routed experts: matrix elements that multiply a token, idle parameters, idle bytes.

    Layers that share their stored experts use them one after the other; at most all of them are used.
    """
    used = idle = idle_bytes = 0.0
    shares: dict[int, tuple[Tensor, float]] = {}
    for layer, k in zip(layers, top_k, strict=True):
        experts: Any = layer.experts
        stored = {id(tensor) for tensor in layer.expert_tensors().values()}
        routed = len(experts.bank.slots) if hasattr(experts, "bank") else layer.num_experts
        for name, tensor in experts.named_parameters():
            share = k / (layer.num_experts if id(tensor) in stored else routed)
            multiplies = tensor.ndim == 3 or name.endswith(("_left", "_right"))  # biases and constants do not
            used += share * tensor.numel() if multiplies else 0
            shares[id(tensor)] = tensor, min(1.0, share + shares.get(id(tensor), (tensor, 0.0))[1])
    for tensor, share in shares.values():
        idle += (1 - share) * tensor.numel()
        idle_bytes += (1 - share) * tensor.numel() * tensor.element_size()
    return used, idle, idle_bytes


# ---------------------------------------------------------------------------------------------------------- structure


class _Structure:
    """Which part of the model a parameter belongs to, and where tokens are mixed."""

    def __init__(self, model: PreTrainedModel, layers: list[MoELayer]) -> None:
        skeleton: Any = model
        self._modules = dict(model.named_modules())
        self._text = decoder_layers(model)[0].rpartition(".")[0]  # the language model: all but towers and head
        self._experts = tuple(f"{layer.experts_name}." for layer in layers)
        self._blocks = tuple(f"{layer.block_name}." for layer in layers)
        self._routers = {f"{layer.block_name}.{name}" for layer in layers for name in layer.router_tensors()}
        self.embedding: Tensor = skeleton.get_input_embeddings().weight  # [vocabulary, H]
        self.head: Tensor = skeleton.get_output_embeddings().weight
        self.mixers: dict[str, nn.Module] = {}  # outermost ones: an indexer or a convolution may live inside attention
        for name, module in self._modules.items():
            inside = name.startswith(f"{self._text}.")
            if (
                inside
                and self._is_mixer(name, module)
                and not any(name.startswith(f"{outer}.") for outer in self.mixers)
            ):
                self.mixers[name] = module

    def _is_mixer(self, name: str, module: nn.Module) -> bool:
        """Mixers know their `layer_idx`, for the cache, and own projections; some MLPs and routers do so too."""
        owns_weights = any(isinstance(child, (nn.Linear, nn.Conv1d)) for child in module.children())
        is_mlp = "mlp" in type(module).__name__.lower()
        is_router = any(router.startswith(f"{name}.") for router in self._routers)
        return hasattr(module, "layer_idx") and owns_weights and not is_mlp and not is_router

    def is_routed(self, name: str) -> bool:
        """Whether a tensor of this name is the routed experts'."""
        return name.startswith(self._experts)

    def part_of(self, name: str) -> str:
        """The part of the parameter `name`."""
        owners = self._owners(name)
        if self.is_routed(name):
            return "routed_experts"
        if name in self._routers:
            return "router"
        if self._modules[owners[-1]]._parameters.get("weight") is self.head and self.head is not self.embedding:
            return "head"
        if self._text not in owners:
            return "other_towers"
        if isinstance(self._modules[owners[-1]], nn.Embedding):
            return "embeddings"
        if "shared" in name:
            return "shared_experts"
        if any(owner in self.mixers for owner in owners):
            return "attention"
        if name.startswith(self._blocks) and "norm" not in name:
            return "router" if ".gate." in name or ".router." in name else "dense_mlp"
        if any("mlp" in type(self._modules[owner]).__name__.lower() for owner in owners):
            return "dense_mlp"
        return "norms_and_other"

    def is_weight(self, name: str, parameter: Tensor) -> bool:
        """Whether every token is multiplied by this parameter as by a matrix."""
        owner, _, leaf = name.rpartition(".")
        if isinstance(self._modules[owner], (nn.Linear, nn.Conv1d)):
            return leaf == "weight"
        is_matrix = sum(size > 1 for size in parameter.shape) >= 2
        return is_matrix and not leaf.endswith(("bias", "A_log", "scale"))

    @staticmethod
    def _owners(name: str) -> list[str]:
        """The names of the modules around a parameter, outermost first."""
        parts = name.split(".")
        return [".".join(parts[:length]) for length in range(1, len(parts))]


def mixer_of(module: nn.Module, config: Any) -> Mixer:
    """The sequence mixing of an attention, linear attention, state-space or short-convolution module.

    `config` is that of the text model; its `layer_types` tell the kinds apart, the module's own projections the sizes.
    """
    geometry: Any = module
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[geometry.layer_idx] if layer_types else "full_attention"
    convolutions = sum(child.weight.numel() for child in module.children() if isinstance(child, nn.Conv1d))
    if kind == "linear_attention":
        state, flops = _fixed_state(geometry)
        if state:
            return Mixer(state=state + convolutions, state_flops=flops)
    elif not hasattr(module, "k_proj") and not hasattr(module, "kv_b_proj"):
        if convolutions:
            return Mixer(state=convolutions)
    else:
        output = module.o_proj if hasattr(module, "o_proj") else getattr(module, "out_proj", None)
        if isinstance(output, nn.Linear):
            return _softmax_attention(geometry, output, kind, config)
    return Mixer(note=f"the sequence mixing of {type(module).__name__} is not counted, its projections are")


def _softmax_attention(module: Any, output: nn.Linear, kind: str, config: Any) -> Mixer:
    note = None
    if hasattr(module, "indexer"):
        note = (
            f"{type(module).__name__} selects keys by an indexer; its scores are counted as if it attended to all keys"
        )
    value_dim = getattr(module, "v_head_dim", None) or module.head_dim
    heads = output.in_features // value_dim
    if hasattr(module, "kv_b_proj"):
        rank, cached = module.kv_b_proj.in_features, module.kv_a_proj_with_mqa.out_features
        query_dim = module.qk_nope_head_dim + module.qk_rope_head_dim
        decode = 2 * heads * (rank + cached)
    else:
        cached = module.k_proj.out_features + module.v_proj.out_features
        query_dim = module.head_dim
        decode = 2 * heads * (query_dim + value_dim)
    return Mixer(2 * heads * (query_dim + value_dim), decode, cached, _window(kind, config), note=note)


def _fixed_state(module: Any) -> tuple[int, int]:
    """Elements of the recurrent state, and FLOPs per token spent on it; zeros when the module is of no known kind."""
    if hasattr(module, "ssm_state_size"):
        state, factor = module.intermediate_size * module.ssm_state_size, 4
    elif hasattr(module, "head_k_dim"):
        state, factor = module.num_v_heads * module.head_k_dim * module.head_v_dim, 6
    elif hasattr(module, "forget_gate"):
        state, factor = module.num_heads * module.head_dim**2, 6
    elif hasattr(module, "num_attention_heads"):
        state, factor = module.num_attention_heads * module.head_dim**2, 4
    else:
        return 0, 0
    return state, factor * state


def _window(kind: str, config: Any) -> int | None:
    """Keys that a token of such a layer sees at most."""
    if "chunked" in kind:
        return int(config.attention_chunk_size)
    if "sliding" in kind or getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
        return int(window) if window else None
    return None


def _stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a checkpoint holds: parameters and persistent buffers, tied ones once."""
    names = model.state_dict(keep_vars=True).keys()
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if name in names)
