"""A packed model in use: opened in every way, generating, saved again, evaluated, made dense, and small in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.rewrite import rewrite
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.apply import QuantizeChange
from moe_compress.compress.quantize.config import PartConfig, QuantizeConfig
from moe_compress.compress.quantize.plan import KEEP, QuantizedLayer, QuantizePlan
from moe_compress.compress.quantize.shapes import linear_layers
from moe_compress.compress.quantize.storage import scale_dtype_of
from moe_compress.errors import UsageError
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.models.experts import projections
from moe_compress.progress import SilentProgress
from moe_compress.runtime.model import SYNCHRONOUS, _one_thread
from moe_compress.runtime.packed import ExpertCache, PackedExperts, PackedProjection, PackedWeight
from moe_compress.runtime.remote_code import FILE
from tests.fork_server import WITHOUT_HUB
from tests.tiny_checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[2]
TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))
OPTIONS = ("4", "8", "2", KEEP, "1", "3", "5")
TASK = """
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
dataset_path: json
test_split: test
"""


def packed_checkpoint(source: Path, folder: Path, options: tuple[str, ...], config: QuantizeConfig) -> Path:
    """`source` rounded to nearest with an option for every expert and projection in turn; layer 1 loses an expert."""
    checkpoint = open_checkpoint(str(source))
    stream = LayerStream(checkpoint)
    layers = []
    for layer, moe in stream.moe_layers.items():
        keep = tuple(range(moe.num_experts - (layer == 1 and len(options) > 1)))
        parts = [part for found in projections(moe.experts).values() for part in found]
        table = {p: tuple(options[(e + n) % len(options)] for e in keep) for n, p in enumerate(parts)}
        layers.append(QuantizedLayer(layer, moe.num_experts, keep, table))
    change = QuantizeChange(
        QuantizePlan(config, tuple(layers), 4.0, 0, None),
        list(linear_layers(stream.layers, stream.moe_layers)),
        tier="plugin", scale_dtype=scale_dtype_of(stream), tokens=None, batch_size=1,
    )  # fmt: skip
    with SilentProgress().stage("apply", len(stream.layers)) as stage:
        rewrite(checkpoint, folder, change, max_shard_bytes=10**8, device="cpu", stage=stage)
    return folder


def rounding(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate(
        {"op": "quantize", "method": "rtn", "average_bits": 4, "scale_search": 1} | settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven widths, plain matrices among them, zero points, packed attention and tables, layers of 8 and 7 experts."""
    source = tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")
    config = rounding(group_size=8, symmetric=False, attention=PartConfig(bits=4), embeddings=PartConfig(bits=8))
    return packed_checkpoint(source, source.parent / "packed", OPTIONS, config)


def opened(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | settings).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


# -------------------------------------------------------------------------------------------------- ways of opening it

WAYS = """
import hashlib, json, os, sys
import numpy, safetensors.torch, torch

folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))


def auto():
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM


def digest(model):
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return type(model).__name__ + " " + hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def package_first():
    import moe_compress
    assert "transformers" not in sys.modules, "importing the package imports nothing heavy"
    return digest(auto().from_pretrained(folder, dtype=torch.float32))


def package_last():
    found = auto()
    found._model_mapping, found.from_pretrained
    import moe_compress
    return digest(found.from_pretrained(folder, dtype=torch.float32))


def remote_code():
    model = auto().from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    return digest(model)


def config_alone():
    import moe_compress
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(folder)
    return digest(auto().from_pretrained(folder, config=config, dtype=torch.float32))


def without(**settings):
    sys.modules["moe_compress"] = None
    try:
        auto().from_pretrained(folder, **settings)
    except Exception as error:
        return type(error).__name__ + ": " + " ".join(str(error).split())


def without_package():
    return without()


def without_package_trusting():
    return without(trust_remote_code=True)


WAYS = [package_first, package_last, remote_code, config_alone, without_package, without_package_trusting]
for way in WAYS:  # each in a process that has imported neither transformers nor the package
    assert "transformers" not in sys.modules and "moe_compress" not in sys.modules
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            print(json.dumps([way.__name__, way()]), flush=True)
            os._exit(0)
        except BaseException as error:
            print(json.dumps([way.__name__, repr(error)]), flush=True)
            os._exit(1)
    os.waitpid(pid, 0)
"""


def test_opened_with_and_without_the_package(folder: Path) -> None:
    line = [sys.executable, "-c", WAYS, str(folder), json.dumps(TOKENS.tolist())]
    done = WITHOUT_HUB.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found = dict(json.loads(line[line.index('["') :]) for line in done.stdout.splitlines() if '["' in line)
    assert len(found) == 6, done.stderr
    assert found.pop("without_package").startswith("ValueError: ")
    trusting = found.pop("without_package_trusting")
    assert trusting.startswith("ImportError: ") and "pip install moe-compress" in trusting
    assert len(set(found.values())) == 1, found
    assert found["remote_code"].startswith("CompressedQwen3MoeForCausalLM ")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["CompressedQwen3MoeForCausalLM (pip install moe-compress)"]


# --------------------------------------------------------------------------------------------------------------- in use


def test_generates_what_the_dense_model_does(folder: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    packed, dense = opened(folder), opened(folder, dequantize=True)
    one = packed.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **settings)
    two = dense.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **settings)
    assert one.shape == (2, 32) and torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"], ids=str)
def test_saved_and_opened_again(folder: Path, dtype: Any, tmp_path: Path) -> None:
    """Whatever it computes in, what is packed is saved as it was stored."""
    model = opened(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    packed = {name: tensor for name, tensor in stored(folder).items() if ".weight_" in name}
    before, after = stored(folder), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert equal(packed, {name: after[name] for name in packed})
    if dtype in (torch.bfloat16, "auto"):
        assert equal(before, after)
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["architectures"] == ["CompressedQwen3MoeForCausalLM (pip install moe-compress)"]
    assert (tmp_path / "saved" / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert torch.equal(logits(opened(tmp_path / "saved", dtype=dtype)), logits(model))


def test_a_cast_leaves_what_is_packed_alone(folder: Path) -> None:
    model = opened(folder)
    packed = {n: b.clone() for n, b in model.named_buffers() if ".weight_" in n}
    assert torch.equal(logits(opened(folder, dtype=torch.bfloat16).float()), logits(model))
    assert equal(packed, {name: buffer for name, buffer in model.half().named_buffers() if name in packed})
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float16


def test_dequantized_is_the_dense_model(folder: Path, tmp_path: Path) -> None:
    packed, dense = opened(folder), opened(folder, dequantize=True)
    assert not any(isinstance(module, (PackedExperts, PackedProjection, PackedWeight)) for module in dense.modules())
    assert type(dense.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    torch.testing.assert_close(logits(dense), logits(packed), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert "packed" not in json.loads((tmp_path / "dense/config.json").read_text())["moe_compress"]
    again = opened(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))
    assert equal(again.state_dict(), dense.state_dict())
    assert torch.equal(logits(packed), logits(opened(folder))), "the packed one is as it was"


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_packed(tied: bool, tmp_path: Path) -> None:
    """One table where they are tied; rows that are looked up are those of the whole table."""
    source = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    config = rounding(group_size=8, embeddings=PartConfig(bits=5))
    folder = packed_checkpoint(source, tmp_path / "packed", ("4",), config)
    tables = {name for name in stored(folder) if "embed" in name or "head" in name}
    assert tables == {
        f"{path}.weight_{kind}"
        for path in ("model.embed_tokens", "lm_head")[: 1 if tied else 2]
        for kind in ("packed", "scale")
    }
    model = opened(folder)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    original = stored(source)["model.embed_tokens.weight"].float()
    largest = original.unflatten(1, (-1, 8)).abs().amax(2).repeat_interleave(8, 1)
    assert ((embeddings.weight - original).abs() <= largest / 31 * 2.02).all(), "a step of 5 bits, scales in bf16"
    assert torch.equal(embeddings(TOKENS), embeddings.weight[TOKENS])
    assert torch.equal(head.weight, embeddings.weight) == tied
    hidden = torch.randn(2, 3, embeddings.embedding_dim)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    dense = opened(folder, dequantize=True)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    for number, found in enumerate((model, dense)):
        found.save_pretrained(tmp_path / f"saved-{number}")
        assert torch.equal(logits(opened(tmp_path / f"saved-{number}")), logits(found))


def test_cache_of_experts_gives_the_same_and_keeps_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(opened(folder))
    matrix = 4 * 32 * 32
    for limit in (1, 3 * matrix, 10**9):
        model = opened(folder, expert_cache_bytes=limit)
        (cache,) = {id(m.cache): m.cache for m in model.modules() if isinstance(m, PackedExperts)}.values()
        assert isinstance(cache, ExpertCache)
        largest = 0
        get = cache.get

        def watched(*arguments: Any, get: Any = get, cache: ExpertCache = cache) -> Tensor:
            nonlocal largest
            found: Tensor = get(*arguments)
            largest = max(largest, sum(held.nbytes for held in cache._held.values()))
            assert cache.size == sum(held.nbytes for held in cache._held.values())
            return found

        monkeypatch.setattr(cache, "get", watched)
        assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
        assert largest <= limit and (largest > 0) == (limit >= matrix)
        assert torch.equal(logits(model.to(torch.bfloat16)), logits(opened(folder).to(torch.bfloat16)))
    assert opened(folder).model.layers[0].mlp.experts.cache is None, "off unless asked for"
    config = AutoConfig.from_pretrained(folder)
    config.moe_compress = config.moe_compress | {"runtime": {"expert_cache_bytes": 5 * matrix}}
    assert opened(folder, config=config).model.layers[0].mlp.experts.cache.limit == 5 * matrix


def test_size_of_the_cache_is_checked_wherever_it_is_said(folder: Path, tmp_path: Path) -> None:
    def limit(model: Any) -> int:
        cache = model.model.layers[0].mlp.experts.cache
        return 0 if cache is None else int(cache.limit)

    def said(value: object) -> Any:
        config = AutoConfig.from_pretrained(folder)
        config.moe_compress = config.moe_compress | {"runtime": {"expert_cache_bytes": value}}
        return config

    for value, size in (("1GB", 10**9), ("1.5 MiB", 3 * 2**19), (4096, 4096), (0, 0)):
        assert limit(opened(folder, expert_cache_bytes=value)) == limit(opened(folder, config=said(value))) == size
    for value in (-1, "-1GB", "much", True, 0.5):
        for settings in ({"expert_cache_bytes": value}, {"config": said(value)}):
            with pytest.raises(UsageError, match=f"should be 0 or a size such as `1GB`, got `{value}`"):
                opened(folder, **settings)
    with pytest.raises(UsageError, match="no effect with dequantize"):
        opened(folder, expert_cache_bytes="1GB", dequantize=True)
    model = opened(folder, config=said("1GB"))
    logits(model)
    cache = weakref.ref(model.model.layers[0].mlp.experts.cache)
    assert cache().size > 0
    model.dequantize()
    assert cache() is None, "nothing holds on to what was unpacked"
    model.save_pretrained(tmp_path / "dense")
    assert "runtime" not in json.loads((tmp_path / "dense/config.json").read_text())["moe_compress"]
    with pytest.raises(UsageError, match="no expert of this checkpoint is packed"):
        opened(tmp_path / "dense", expert_cache_bytes="1GB")


@pytest.mark.parametrize("before", [None, "", "0", "1"])
def test_loading_leaves_the_environment_as_it_was(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SYNCHRONOUS, raising=False)
    if before is not None:
        monkeypatch.setenv(SYNCHRONOUS, before)
    with _one_thread():
        assert os.environ[SYNCHRONOUS] == (before or "1")
    assert os.environ.get(SYNCHRONOUS) == before


def test_lm_eval_measures_the_same_as_on_the_dense_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_compress.eval import harness

    manager = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda paths, include_defaults: manager(paths, include_defaults=False))
    monkeypatch.setattr(harness, "compute_dtype", lambda config, device: torch.float32)
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A first text.", "And a second, longer.")))
    (tmp_path / "text.yaml").write_text(TASK.lstrip() + f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n")
    opened(folder, dequantize=True).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "dense")
    config = EvalConfig(tasks=["text"], include_path=str(tmp_path))
    one, two = (
        evaluate(path, config)["tasks"]["text"]["bits_per_byte"]["value"] for path in (folder, tmp_path / "dense")
    )
    assert one == pytest.approx(two, rel=1e-4) and one > 0


# ----------------------------------------------------------------------------------------------------- memory and time


def resident(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


MEMORY = """
import gc, os, sys
import torch
from transformers import AutoModelForCausalLM
import moe_compress


def rss():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    with torch.no_grad():
        model(input_ids=torch.arange(64)[None])
    return model


load()  # everything is imported, and has its workspace
before = rss()
model = load()
for tensor in (*model.parameters(), *model.buffers()):
    tensor.view(-1)[::64].sum()  # read from every page, should it still be on disk
print(rss() - before)
"""


def test_packed_weights_stay_packed_in_memory(folder: Path, tmp_path: Path) -> None:
    """By tensors, and by what the system counts for a model of 80 MB."""
    for dtype in (torch.float32, torch.bfloat16):
        index = TensorIndex.from_folder(folder)
        dense = sum(info.numel for name, info in index.items() if ".weight_" not in name) * dtype.itemsize
        packed = sum(info.nbytes for name, info in index.items() if ".weight_" in name)
        assert packed + dense <= resident(opened(folder, dtype=dtype)) <= 1.01 * (packed + dense) + 1024

    large = tiny_checkpoint(
        tmp_path / "large", hidden_size=512, moe_intermediate_size=256, num_experts=32, num_hidden_layers=3,
        max_shard_size="1GB",
    )  # fmt: skip
    small = packed_checkpoint(large, tmp_path / "small", ("3",), rounding(group_size=128, attention=PartConfig(bits=4)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(small)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    taken, stored_bytes = int(done.stdout), TensorIndex.from_folder(small).nbytes
    print(f"resident: {taken:,} of {stored_bytes:,} bytes stored")
    assert stored_bytes < 0.25 * TensorIndex.from_folder(large).nbytes
    assert 0.8 * stored_bytes < taken <= 1.2 * stored_bytes + 4e6, "4 MB for what the interpreter does meanwhile"


def test_loading_the_packed_reference_takes_no_longer(tmp_path: Path) -> None:
    from moe_compress.checkpoint.source import REFERENCE

    packed = packed_checkpoint(REFERENCE, tmp_path / "packed", ("3",), rounding(group_size=32))
    seconds: dict[Path, list[float]] = {REFERENCE: [], packed: []}
    for _ in range(9):
        for path, times in seconds.items():
            start = time.process_time()
            AutoModelForCausalLM.from_pretrained(path)
            times.append(time.process_time() - start)
    dense_s, packed_s = (min(times) for times in seconds.values())
    print(f"loading: dense {dense_s:.3f} s, packed {packed_s:.3f} s of CPU time")
    assert packed_s <= 1.15 * dense_s, "as long, but for what else the machine does"
