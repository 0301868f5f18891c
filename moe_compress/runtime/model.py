"""What every compressed model has over its family's class: layers that differ from each other, and packed weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_compress.errors import UsageError
from moe_compress.models.experts import expert_weight, projections
from moe_compress.models.layers import (
    PACKED,
    SECTION,
    banks,
    decoder_layers,
    expert_counts,
    is_experts_module,
    owners,
    routing_groups,
    set_num_experts,
)
from moe_compress.models.routing import layer_routings
from moe_compress.runtime.banks import Bank, BankedExperts, furnish, run_banked, share, shared_tensors
from moe_compress.runtime.packed import (
    ExpertCache,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedProjection,
    PackedWeight,
    TiedHead,
    cache_bytes,
    pack_experts,
)
from moe_compress.runtime.remote_code import HINT, write_remote_code
from moe_compress.runtime.routing import set_routing
from moe_compress.runtime.scheme import Scheme
from moe_compress.runtime.zero_experts import add_zero_experts

RUNTIME = "runtime"  # in the section: settings that may be changed by hand
SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"  # read by transformers when it loads a checkpoint


class CompressedModel(PreTrainedModel):
    """Mixed into a family's causal language model; `config.moe_compress` says how its layers depart from the family.

    `expert_cache_bytes` is how much memory may hold dequantized experts between uses, in bytes or as `1GB`; 0
    dequantizes at every use. Not given, it is what `config.moe_compress["runtime"]` says, else 0. Raises `UsageError`
    for what is no size, and where no expert is packed.
    `use_zero_experts=False` gives the model back that zero experts were added to.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *inputs: Any,
        expert_cache_bytes: int | str | None = None,
        use_zero_experts: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config, *inputs, **settings)
        _set_expert_counts(self)
        set_routing(self, use_zero_experts)
        limit = _cache_limit(getattr(config, SECTION), expert_cache_bytes)
        found = _banked_experts(self)
        for experts, bank, _ in found:
            furnish(experts, bank)
        _pack(self, ExpertCache(limit) if limit else None)
        for experts, _, owner in found:
            run_banked(experts)
            if owner is not None:
                share(experts, owner)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: Any, *inputs: Any, dequantize: bool = False, **settings: Any
    ) -> Any:
        """As in transformers; with `dequantize` all weights are dense in memory, which is the fast path.

        A cache of unpacked experts has nothing to do then: `UsageError` when both are asked for.
        """
        if dequantize and settings.get("expert_cache_bytes") is not None:
            raise UsageError("expert_cache_bytes has no effect with dequantize: no expert stays packed; leave one out.")
        with _one_thread():
            loaded = super().from_pretrained(path, *inputs, **settings)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if dequantize:
            model.dequantize()
        return loaded

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in transformers, and the parameters of experts that several layers use: name -> where it is stored."""
        tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return tied | {name: stored for name, stored in _shared_names(self).items() if name in parameters}

    def dequantize(self, dtype: torch.dtype | None = None) -> None:
        """Replace every packed weight by its numbers, in the model's dtype; saving then writes a dense checkpoint.

        The cache of unpacked experts goes, with what it held.
        """
        dtype = dtype or self.dtype
        stored_by = {id(experts): owner for experts, _, owner in _banked_experts(self)}
        packed = [module for module in self.modules() if isinstance(module, PackedExperts)]
        for module in packed:
            module.cache = None
        for module in packed:
            _unpack_experts(module, dtype, stored_by.get(id(module)))
        for name, module in [*self.named_modules()]:
            if isinstance(module, PackedLinear):
                self.set_submodule(name, _dense_linear(module, dtype))
        embeddings: Any = self.get_input_embeddings()
        if isinstance(embeddings, PackedEmbedding):
            self._unpack_ends(embeddings, dtype)
        section = dict(getattr(self.config, SECTION))
        for key in (PACKED, RUNTIME):
            section.pop(key, None)
        setattr(self.config, SECTION, section)

    def _unpack_ends(self, packed: PackedEmbedding, dtype: torch.dtype) -> None:
        """Exchange packed embeddings, and a head that is tied to them, for dense ones."""
        table = nn.Parameter(packed.dense(dtype), requires_grad=False)
        embeddings = nn.Embedding(table.shape[0], table.shape[1], padding_idx=packed.padding_idx, device="meta")
        embeddings.weight = table
        self.set_input_embeddings(embeddings)
        if isinstance(self.get_output_embeddings(), TiedHead):
            head = nn.Linear(packed.embedding_dim, packed.num_embeddings, bias=False, device="meta")
            head.weight = table
            self.set_output_embeddings(head)
            del self._tied_weights_keys  # those of the family again
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *inputs: Any, **settings: Any) -> None:
        """As in transformers, with what a reader without this package needs to be told."""
        self._tied_weights_keys = (type(self)._tied_weights_keys or {}) | _shared_names(self)  # read by transformers
        try:
            super().save_pretrained(save_directory, *inputs, **settings)
        finally:
            del self._tied_weights_keys
        file = Path(save_directory) / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["architectures"] = [f"{type(self).__name__} ({HINT})"]
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_remote_code(file.parent)

    def _init_weights(self, module: nn.Module) -> None:
        """Packed weights are never drawn; the family would look for its own parameters in them."""
        if not isinstance(module, (PackedExperts, PackedProjection, PackedWeight)):
            super()._init_weights(module)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let transformers read tensors one by one: packed ones are many and small, and its threads wait for each other.

    Seen on the built-in model at 2.5 bits: 0.12 s instead of 0.36 s.
    """
    before = os.environ.get(SYNCHRONOUS)
    os.environ[SYNCHRONOUS] = before or "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SYNCHRONOUS, None)
        else:
            os.environ[SYNCHRONOUS] = before


def _cache_limit(section: Mapping[str, Any], asked: object) -> int:
    """Bytes of the cache of unpacked experts: what was asked for, else what the configuration says."""
    if asked is not None and PACKED not in section:
        raise UsageError("expert_cache_bytes has no effect: no expert of this checkpoint is packed; leave it out.")
    runtime = section.get(RUNTIME) or {}
    return cache_bytes(runtime.get("expert_cache_bytes", 0) if asked is None else asked)


def _set_expert_counts(model: PreTrainedModel) -> None:
    """Exchange the layers whose expert count is not the family's, for layers of a model with that count everywhere.

    Of a layer with zero experts, the experts are of a model with as many, and the rest, which holds the router, is of
    one with as many more as there are zero experts.
    """
    counts = expert_counts(model.config)
    _, layers = decoder_layers(model)
    for count in sorted(set(counts.values())):
        donated = _donated(model, count)
        for index in (index for index, wanted in counts.items() if wanted == count):
            layers[index] = donated[index]
    wider = {index: found.zero_experts for index, found in layer_routings(model.config).items() if found.zero_experts}
    family_count = getattr(model.config, SECTION)["num_experts"]
    rows = {index: counts.get(index, family_count) + zeros for index, zeros in wider.items()}
    for count in sorted(set(rows.values())):
        donated = _donated(model, count)
        for index in (index for index, wanted in rows.items() if wanted == count):
            add_zero_experts(layers, index, donated[index], wider[index], routing_groups(model.config))


def _donated(model: PreTrainedModel, num_experts: int) -> nn.ModuleList:
    """The decoder layers of a model of the same family with so many experts in each; they share `model`'s settings."""
    family: Any = next(base for base in type(model).__mro__ if not issubclass(base, CompressedModel))
    config = copy.deepcopy(model.config)
    set_num_experts(config, getattr(config, SECTION)["num_experts"], num_experts)
    _, donated = decoder_layers(family(config))
    shared = {id(config): model.config, id(config.get_text_config()): model.config.get_text_config()}
    for module in donated.modules():  # settings changed later must reach these layers too
        own: Any = getattr(module, "config", None)
        if id(own) in shared:
            setattr(module, "config", shared[id(own)])  # noqa: B010
    return donated


def _banked_experts(model: PreTrainedModel) -> list[tuple[Any, Bank, Any]]:
    """The experts modules that run from a bank, with it and the module that stores their experts, if another."""
    found = {layer: Bank.from_json(content) for layer, content in banks(model.config).items()}
    if not found:
        return []
    _, layers = decoder_layers(model)
    return [
        (_experts(layers[layer]), bank, None if bank.layer is None else _experts(layers[bank.layer]))
        for layer, bank in sorted(found.items())
    ]


def _experts(layer: nn.Module) -> Any:
    return next(module for module in layer.modules() if is_experts_module(module))


def _shared_names(model: PreTrainedModel) -> dict[str, str]:
    """Each tensor of experts stored by another layer, packed or not, and the name that it is stored under."""
    shared = [(experts, owner) for experts, _, owner in _banked_experts(model) if owner is not None]
    names = {id(module): name for name, module in model.named_modules()} if shared else {}
    return {
        f"{names[id(experts)]}.{tensor}": f"{names[id(owner)]}.{tensor}"
        for experts, owner in shared
        for tensor in shared_tensors(owner)
    }


def _pack(model: PreTrainedModel, cache: ExpertCache | None) -> None:
    """Exchange the modules whose weights are stored packed."""
    packed = getattr(model.config, SECTION).get(PACKED)
    if packed is None:
        return
    schemes = [Scheme.from_json(content) for content in packed["schemes"]]
    scale_dtype: torch.dtype = getattr(torch, packed["scale_dtype"])
    _, layers = decoder_layers(model)
    tables = {int(index): table for index, table in packed["experts"].items()}
    tables |= {index: tables[owner] for index, owner in owners(model.config).items()}
    for index, table in tables.items():
        chosen = {
            part: [None if number is None else schemes[number] for number in numbers] for part, numbers in table.items()
        }
        pack_experts(_experts(layers[index]), chosen, scale_dtype, cache)
    for name, number in packed["linears"].items():
        linear: Any = layers.get_submodule(name)
        layers.set_submodule(name, PackedLinear(schemes[number], linear, scale_dtype))
    if "embeddings" in packed:
        _pack_ends(model, schemes[packed["embeddings"]], scale_dtype)


def _pack_ends(model: Any, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    """Exchange the embeddings and the head for packed ones."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = PackedEmbedding(scheme, embeddings, scale_dtype)
    model.set_input_embeddings(packed)
    if model.config.get_text_config().tie_word_embeddings:
        model.set_output_embeddings(TiedHead(packed))
        model._tied_weights_keys = {}
    else:
        model.set_output_embeddings(PackedLinear(scheme, head, scale_dtype))


def _unpack_experts(experts: Any, dtype: torch.dtype, owner: Any) -> None:
    """Give a packed experts module its family's fused parameters and class back, its bank kept.

    `owner` is the module that stores its experts, unpacked before it, if another does.
    """
    banked = isinstance(experts, BankedExperts)
    packed_class = type(experts).__bases__[1] if banked else type(experts)
    fused = {} if owner is not None else {name: _dense(experts, name, dtype) for name in projections(experts)}
    for parts in projections(experts).values():
        for part in parts:
            del experts._modules[part]
    experts.__class__ = packed_class.__bases__[1]
    for name, parameter in fused.items():
        experts.register_parameter(name, parameter)
    if banked:
        run_banked(experts)
    if owner is not None:
        share(experts, owner)


def _dense(experts: Any, name: str, dtype: torch.dtype) -> nn.Parameter:
    """A fused parameter [E, ...] from a packed experts module."""
    matrices = [expert_weight(experts, name, expert, dtype) for expert in range(experts.num_experts)]
    stacked = torch.stack([matrix.T if experts.is_transposed else matrix for matrix in matrices])
    return nn.Parameter(stacked.contiguous(), requires_grad=False)


def _dense_linear(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(packed.dense(dtype), requires_grad=False)
    linear.bias = packed.bias
    return linear
