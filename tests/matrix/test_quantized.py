"""Every family in few bits: one scheme in the tier `stock`, all sorts of them in `plugin`, and layers of unequal size.

The judge of `stock` is plain transformers in a process that cannot import this package; of `plugin` it is what
`AutoModelForCausalLM` makes of the folder, matrix by matrix against the source.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from moe_compress.checkpoint.rewrite import Change, Ledger, take_layer
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import LayerPlan, PrunePlan
from moe_compress.compress.quantize.apply import QuantizeChange
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import KEEP, QuantizedLayer, QuantizePlan, plan_quantize
from moe_compress.compress.quantize.shapes import LinearLayer, expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import require_quantizable, scale_dtype_of
from moe_compress.errors import UnsupportedModelError
from moe_compress.models.experts import expert_weight, projections
from moe_compress.models.layers import routing_groups
from moe_compress.runtime.families import causal_model
from moe_compress.runtime.packed import PackedExperts, PackedLinear
from moe_compress.verification import reload
from tests.matrix.case import FamilyCase, relative
from tests.matrix.families import FAMILIES, NUM_EXPERTS, NUM_LAYERS

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of logits, relative to their spread
GROUP = 4  # weights that share a scale; it divides every width of these models
TOKENS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
W4 = QuantizeConfig(
    op="quantize", method="rtn", bits=4, group_size=GROUP, attention={"bits": 8, "group_size": "channel"}
)
MIXED = QuantizeConfig(
    op="quantize", method="gptq", average_bits=4, group_size=GROUP, symmetric=False, scale_search=2,
    attention={"bits": 4, "group_size": "channel"}, shared_experts={"bits": 3}, dense_mlp={"bits": 8},
    embeddings={"bits": 8},
)  # fmt: skip
OPTIONS = ("4", "8", "2", KEEP, "1", "3")  # expert e has option e + p for its p-th projection
# Largest relative error of a matrix rounded to nearest with groups of 4, generously.
LARGEST_ERROR = {"1": 0.9, "2": 0.6, "3": 0.3, "4": 0.15, "8": 0.02, KEEP: 0.0}
# Families whose checkpoints on the Hub keep a layer's experts in one tensor.
FUSED = {
    "aria", "gemma4", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v4",
    "inkling2", "inkling_mm_model", "mistral4", "muse_spark", "qwen3_vl_moe", "zaya",
}  # fmt: skip
# Families in which transformers also merges weights that are not packed; its quantizer loses these.
MERGED = {"bailing_hybrid", "dots3_note", "glm5_next", "kimi_linear", "minimax_m3_vl"}
# Families whose checkpoints are no causal language models in the eyes of transformers' auto class.
NOT_CAUSAL = {
    "aria", "deepseek_ocr2", "dots3_note", "glm4v_moe", "glm5_next", "inkling2", "inkling_mm_model", "minimax_m3_vl",
    "mistral4", "mistral_large4", "muse_spark", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp",
    "unlimited_ocr",
}  # fmt: skip
STOCK_SENTENCE = (
    "The tier `stock` holds quantized experts of every family but these, whose checkpoints keep a layer's experts in "
    "one tensor"
)
MERGED_SENTENCE = "Nor does it hold these, in which transformers also merges weights that are not packed"
PLUGIN_SENTENCE = (
    "The tier `plugin` holds every family but these, which `AutoModelForCausalLM` does not open as what they are"
)
# Families whose embeddings are of a class of their own, and are not packed.
SCALED = {"gemma4"}
# Pruned to layers of unequal size without quantization; what is special about them: see docs/architectures.md.
UNEVEN = ("deepseek_v4", "ernie4_5_moe", "gemma4", "gpt_oss", "nemotron_h", "qwen3_moe", "zaya")


class Case(FamilyCase):
    """What quantizing makes of one family's checkpoint, each thing once."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.ledgers: dict[str, Ledger] = {}

    @cached_property
    def linears(self) -> list[LinearLayer]:
        return list(linear_layers(self.stream.layers, self.stream.moe_layers))

    @cached_property
    def stock_plan(self) -> QuantizePlan:
        shapes = [expert_shapes(moe, self.stream.stored_dtypes) for moe in self.stream.moe_layers.values()]
        return plan_quantize(W4, shapes, None, fixed_bytes=0, num_decoder_layers=NUM_LAYERS, tier="stock")

    @cached_property
    def mixed_plan(self) -> QuantizePlan:
        """Other bits for every expert and projection; every other layer loses one expert of each routing group."""
        size = NUM_EXPERTS // routing_groups(self.source.config)
        layers = []
        for number, (layer, moe) in enumerate(self.stream.moe_layers.items()):
            keep = tuple(expert for expert in range(NUM_EXPERTS) if number % 2 == 0 or expert % size != 1)
            parts = [part for found in projections(moe.experts).values() for part in found]
            options = {
                part: tuple(OPTIONS[(expert + number) % len(OPTIONS)] for expert in keep)
                for number, part in enumerate(parts)
            }
            layers.append(QuantizedLayer(layer, NUM_EXPERTS, keep, options))
        config = MIXED.model_copy(update={"embeddings": None}) if self.name in SCALED else MIXED
        return QuantizePlan(config, tuple(layers), 4.0, 0, None)

    @cached_property
    def uneven_plan(self) -> PrunePlan:
        """8, 6, 4, 8, ... experts."""
        layers = []
        for number, layer in enumerate(self.stream.moe_layers):
            keep = tuple(expert for expert in range(NUM_EXPERTS) if expert % 4 < 4 - number % 3)
            layers.append(LayerPlan(layer, NUM_EXPERTS, keep, (0.0,) * NUM_EXPERTS, ()))
        return PrunePlan(PruneConfig(op="prune", criterion="reap", keep=0.75, scope="global"), tuple(layers))

    def quantize(self, plan: QuantizePlan, tier: str) -> QuantizeChange:
        return QuantizeChange(
            plan,
            self.linears,
            tier=tier,
            scale_dtype=scale_dtype_of(self.stream),
            tokens=TOKENS,
            batch_size=2,
        )

    @cached_property
    def stock(self) -> Path:
        self.rewrite("stock", self.quantize(self.stock_plan, "stock"))
        return self.folder / "stock"

    def rewrite(self, name: str, change: Change) -> Ledger:
        self.ledgers[name] = super().rewrite(name, change)
        return self.ledgers[name]


def modules_on_disk(tensors: Collection[str]) -> set[str]:
    """The modules that own tensors of a checkpoint, and what they would be called in a layer behind the last."""
    owners = {name.rpartition(".")[0] for name in tensors}
    beyond = {
        re.sub(r"(?<=layers\.)\d+", str(NUM_LAYERS), owner) for owner in owners
    }  # where some keep a prediction head
    return owners | beyond


def targets(folder: Path, name: str) -> list[str]:
    """The patterns of a folder's `quantization_config` that match a module's name, as compressed-tensors reads them."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    patterns = [target.removeprefix("re:") for group in groups for target in group["targets"]]
    return [pattern for pattern in patterns if re.match(pattern, name)]


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor on disk: dtype, shape and bytes by name."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in folder.glob("*.safetensors")
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture(scope="module")
def reloaded(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the reload of `verify` says of every family's stock folder, all in one process: nothing, or its error."""
    folders = {name: str(cases[name].stock) for name in FAMILIES if name not in FUSED | MERGED}
    file = tmp_path_factory.mktemp("reloaded") / "folders.json"
    file.write_text(json.dumps(folders))
    program = "import sys; sys.modules['moe_compress'] = None\n" + Path(reload.__file__).read_text() + RELOAD_ALL
    line = [sys.executable, "-c", program.replace('if __name__ == "__main__":\n    main', "lambda: main"), str(file)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == folders.keys()
    return found


RELOAD_ALL = """
import json
said = {}
for name, folder in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        main(Path(folder), folder + "/found.npy", "whole")
        main(Path(folder), folder + "/layers.npy", "layers")
        said[name] = ""
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_four_bits_in_stock(case: Case, request: pytest.FixtureRequest) -> None:
    """Every expert's matrices are packed, attention too, all else is the source's; plain transformers agrees."""
    if case.name in FUSED:
        with pytest.raises(UnsupportedModelError, match=r"not stored expert by expert.*export\.tier: plugin"):
            require_quantizable(W4, case.stream, "stock")
        with pytest.raises(UnsupportedModelError, match=r"not stored expert by expert.*export\.tier: plugin"):
            case.rewrite("refused", case.quantize(case.stock_plan, "stock"))
        assert not list((case.folder / "refused").glob("*.safetensors"))
        return
    if case.name in MERGED:
        with pytest.raises(UnsupportedModelError, match=r"it merges tensors like .*export\.tier: plugin"):
            require_quantizable(W4, case.stream, "stock")
        return
    require_quantizable(W4, case.stream, "stock")
    before, after = stored(case.folder / "source"), stored(case.stock)
    gone = before.keys() - after.keys()
    matrices = len(case.stock_plan.layers) * NUM_EXPERTS * len(case.stock_plan.layers[0].options)
    assert sum(".experts." in name for name in gone) == matrices
    assert after.keys() - before.keys() == {f"{name}_{part}" for name in gone for part in ("packed", "scale", "shape")}
    for name in gone:
        rows, columns = before[name][1]
        bits, groups = (4, columns // GROUP) if ".experts." in name else (8, 1)
        assert after[f"{name}_packed"][:2] == ("I32", (rows, ceil(columns * bits / 32)))
        assert after[f"{name}_scale"][:2] == ("BF16", (rows, groups))
        assert np.frombuffer(after[f"{name}_shape"][2], np.int64).tolist() == [rows, columns]
    assert [name for name in before.keys() & after.keys() if before[name] != after[name]] == []
    assert {name: found[:2] for name, found in after.items()} == case.ledgers["stock"].expected
    packed = {name.removesuffix(".weight") for name in gone}
    assert {name for name in modules_on_disk(before) if targets(case.stock, name)} == packed
    linears = {f"{case.stream.layers_name}.{linear.layer}.{linear.path}" for linear in case.linears}
    attention = {f"{case.stream.layers_name}.{e.layer}.{e.path}" for e in case.linears if e.part == "attention"}
    assert {name for name in linears if targets(case.stock, name)} == attention
    said = request.getfixturevalue("reloaded")[case.name]
    assert not said, said
    with np.load(case.stock / "probe.npz") as probe:
        for file in ("found.npy", "layers.npy"):
            assert relative(np.load(case.stock / file), probe["logits"]) < TOLERANCE


def test_mixed_bits_and_uneven_layers_in_plugin(case: Case) -> None:
    """Every matrix is as near to the source's as its bits allow; experts are dropped here and there."""
    if case.name in NOT_CAUSAL:
        with pytest.raises(UnsupportedModelError, match="tier `plugin`"):
            causal_model(case.source.config.to_dict())
        with pytest.raises(UnsupportedModelError, match="tier `plugin`"):
            case.rewrite("refused", case.quantize(case.mixed_plan, "plugin"))
        assert not list((case.folder / "refused").glob("*.safetensors"))
        return
    if case.name in SCALED:
        with pytest.raises(UnsupportedModelError, match="cannot be packed; leave out `embeddings`"):
            require_quantizable(MIXED, case.stream, "plugin")
    ledger = case.rewrite("mixed", case.quantize(case.mixed_plan, "plugin"))
    assert {name: found[:2] for name, found in stored(case.folder / "mixed").items()} == ledger.expected
    model = case.load("mixed")
    assert case.probe_error(model, "mixed") < TOLERANCE
    folder = case.folder / "mixed"
    reload.main(folder, str(folder / "layers.npy"), "layers")
    with np.load(folder / "probe.npz") as probe:
        assert relative(np.load(folder / "layers.npy"), probe["logits"]) < TOLERANCE
    for plan in case.mixed_plan.layers:
        original = take_layer(case.stream, plan.layer)
        moe = case.stream.moe_layers[plan.layer]
        packed = model.get_submodule(moe.experts_name)
        assert isinstance(packed, PackedExperts)
        path = moe.experts_name.removeprefix(f"{case.stream.layers_name}.{plan.layer}.")
        for name, parts in projections(moe.experts).items():
            fused = original[f"{path}.{name}"].float()
            fused = fused.mT if moe.experts.is_transposed else fused
            for new, old in enumerate(plan.keep):
                found = expert_weight(packed, name, new, torch.float32).chunk(len(parts))
                for part, matrix, expected in zip(parts, found, fused[old].chunk(len(parts)), strict=True):
                    error = float((matrix - expected).norm() / expected.norm())
                    assert error <= LARGEST_ERROR[plan.options[part][new]], (name, part, old)
    linears = {linear.part for linear in case.linears if linear.part in MIXED.parts}
    assert bool(linears) == any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_layers_in_plugin(name: str, cases: dict[str, Case]) -> None:
    """Pruned only; the weights are the source's bytes."""
    case = cases[name]
    ledger = case.rewrite("uneven", PruneChange(case.uneven_plan))
    assert {name: found[:2] for name, found in stored(case.folder / "uneven").items()} == ledger.expected
    model = case.load("uneven")
    assert case.probe_error(model, "uneven") < TOLERANCE
    for plan in case.uneven_plan.layers:
        name = case.stream.moe_layers[plan.layer].experts_name
        experts: Any = model.get_submodule(name)
        path = name.removeprefix(f"{case.stream.layers_name}.{plan.layer}.")
        original = take_layer(case.stream, plan.layer)[f"{path}.down_proj"]
        assert torch.equal(experts.down_proj.bfloat16(), original[list(plan.keep)].bfloat16())


def test_the_page_on_architectures_says_so(cases: dict[str, Case]) -> None:
    page = (ROOT / "docs/architectures.md").read_text()
    for sentence, names in ((STOCK_SENTENCE, FUSED), (MERGED_SENTENCE, MERGED), (PLUGIN_SENTENCE, NOT_CAUSAL)):
        assert f"{sentence}: {', '.join(f'`{name}`' for name in sorted(names))}." in " ".join(page.split())
