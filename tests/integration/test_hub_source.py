"""`open_checkpoint` on Hub ids, against a loopback Hub, each client in its own process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.fork_server import WITHOUT_HUB
from tests.hub_server import Hub, serve
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

CONFIG = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CLIENT = """
import json, sys
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.errors import MoECompressError

answers = []
for arguments in json.load(sys.stdin):
    try:
        opened = open_checkpoint(**arguments)
        answers.append({
            "folder": str(opened.folder), "revision": opened.revision, "model_id": opened.model_id,
            "type": opened.config.model_type, "tensors": sorted(opened.index),
            "files": sorted(str(p.relative_to(opened.folder)) for p in opened.folder.rglob("*") if p.is_file()),
        })
    except MoECompressError as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print("ANSWERS" + json.dumps(answers))
"""


def model_files(seed: int = 0, **settings: Any) -> dict[str, bytes]:
    """A repository of two shards, a tokenizer file, a template, code, and what must not be downloaded."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=(50, 100)).astype(np.float32) for name in ("a", "b")}
    weight_map = {"a": FIRST, "b": SECOND}
    return {
        "config.json": json.dumps(CONFIG | settings).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        FIRST: save({"a": tensors["a"]}),
        SECOND: save({"b": tensors["b"]}),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_x.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "original/consolidated.safetensors": save(tensors),
        "consolidated.safetensors": save(tensors),
        "adapter_model.safetensors": save(tensors),
        "README.md": b"# A model",
        "LICENSE.txt": b"Its text.",
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def surroundings(hub: Hub, home: Path) -> dict[str, str]:
    """The environment in which `hub` is the Hub and `home` its cache."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return inherited | settings


def client(code: str, given: str, environment: dict[str, str]) -> str:
    """What `code` prints after ANSWERS in a process of its own, in which the Hub's client reads its settings anew."""
    environment = environment | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = WITHOUT_HUB.run([sys.executable, "-c", code], input=given, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("ANSWERS")[2]


def ask(hub: Hub, home: Path, *calls: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """Run the calls in a fresh process whose Hub is `hub` and whose cache is `home`."""
    answers: list[dict[str, Any]] = json.loads(client(CLIENT, json.dumps(calls), surroundings(hub, home) | environment))
    for answer in answers:
        if "error" in answer:
            assert "\n" not in answer["message"] and answer["message"].endswith("."), answer
    return answers


def test_download_then_offline(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repository("org/model")
    old = repository.commit(model_files(seed=1), ref="v1")
    new = repository.commit(model_files(seed=2))
    main, tagged = ask(hub, tmp_path, {"model": "org/model"}, {"model": "org/model", "revision": "v1"})
    assert (main["revision"], tagged["revision"]) == (new, old)
    assert main["model_id"] == "org/model" and main["type"] == "qwen3_moe" and main["tensors"] == ["a", "b"]
    wanted = {"config.json", "model.safetensors.index.json", FIRST, SECOND, "tokenizer.json", "chat_template.jinja"}
    wanted |= {"README.md", "LICENSE.txt"}
    assert set(main["files"]) == wanted
    assert Path(main["folder"], FIRST).read_bytes() == repository.commits[new][FIRST]
    assert Path(tagged["folder"], FIRST).read_bytes() == repository.commits[old][FIRST]
    assert Path(main["folder"]).is_relative_to(tmp_path)

    hub.log.clear()
    again, by_commit, uncached, other = ask(
        hub,
        tmp_path,
        {"model": "org/model"},
        {"model": "org/model", "revision": old},
        {"model": "org/model", "revision": "v2"},
        {"model": "org/other"},
        HF_HUB_OFFLINE="1",
    )
    assert again == main and by_commit == tagged
    assert uncached["error"] == other["error"] == "CheckpointError"
    assert "HF_HUB_OFFLINE" in uncached["message"] and "v2" in uncached["message"]
    assert "HF_HUB_OFFLINE" in other["message"]
    assert hub.log == []


def test_cut_connection_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    large = save({"b": np.arange(6_000_000, dtype=np.float32)})  # the client keeps what it has in units of 10 MiB
    hub.repository("org/model").commit(model_files() | {SECOND: large})
    hub.cuts[SECOND] = 1
    (opened,) = ask(hub, tmp_path, {"model": "org/model"})
    assert Path(opened["folder"], SECOND).read_bytes() == large
    first, second = hub.gets(SECOND)
    assert (first.range, first.status) == (None, 200)
    assert (second.range, second.status) == (f"bytes={10 << 20}-", 206)


def test_failed_download_keeps_complete_files(hub: Hub, tmp_path: Path) -> None:
    hub.repository("org/model").commit(model_files())
    hub.failing.add(SECOND)
    (failed,) = ask(hub, tmp_path, {"model": "org/model"})
    assert failed["error"] == "CheckpointError" and "start again" in failed["message"]
    hub.failing.clear()
    hub.log.clear()
    (opened,) = ask(hub, tmp_path, {"model": "org/model"})
    assert opened["tensors"] == ["a", "b"]
    assert len(hub.gets(SECOND)) == 1 and hub.gets(FIRST) == []


def test_refusals(hub: Hub, tmp_path: Path) -> None:
    hub.repository("org/model").commit(model_files())
    hub.repository("org/gated", gated=True).commit(model_files())
    hub.repository("org/private", private=True).commit(model_files())
    hub.repository("org/quantized").commit(model_files(quantization_config={"quant_method": "awq"}))
    hub.repository("org/unknown").commit(model_files(model_type="frobnicate"))
    weightless = {name: content for name, content in model_files().items() if "safetensors" not in name}
    hub.repository("org/pickle").commit(weightless)
    hub.repository("org/gguf").commit({"model-Q4.gguf": b"GGUF", "README.md": b"#"})
    names = ["absent", "gated", "private", "quantized", "unknown", "pickle", "gguf"]
    calls = [{"model": f"org/{name}"} for name in names] + [{"model": "org/model", "revision": "v9"}]
    answers = dict(zip([*names, "revision"], ask(hub, tmp_path, *calls), strict=True))
    expected = {
        "absent": ("CheckpointError", "no such model on the Hub"),
        "gated": ("CheckpointError", "gated"),
        "private": ("CheckpointError", "log in"),
        "quantized": ("UnsupportedModelError", "awq"),
        "unknown": ("UnsupportedModelError", "frobnicate"),
        "pickle": ("CheckpointError", "pytorch_model.bin"),
        "gguf": ("UnsupportedModelError", "GGUF"),
        "revision": ("CheckpointError", "no revision `v9`"),
    }
    for name, (error, fragment) in expected.items():
        assert answers[name].get("error") == error and fragment in answers[name]["message"], answers[name]
    assert hub.gets(FIRST) == [] and hub.gets("pytorch_model.bin") == []  # refused before any weight travelled


def test_private_with_token_and_without_server(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repository("org/private", private=True).commit(model_files())
    (opened,) = ask(hub, tmp_path, {"model": "org/private"}, HF_TOKEN=hub.token)
    assert opened["revision"] == commit
    (wrong,) = ask(hub, tmp_path / "empty", {"model": "org/private"}, HF_TOKEN="hf_wrong")
    assert wrong["error"] == "CheckpointError"
    cached, unreachable = ask(
        hub, tmp_path, {"model": "org/private"}, {"model": "org/other"}, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert cached["revision"] == commit
    assert unreachable["error"] == "CheckpointError" and "cannot be reached" in unreachable["message"]


def test_remote_code_is_never_downloaded(hub: Hub, tmp_path: Path) -> None:
    code = b"from transformers import PretrainedConfig\nclass XConfig(PretrainedConfig):\n    model_type = 'x_moe'\n"
    files = model_files(model_type="x_moe", auto_map={"AutoConfig": "modeling_x.XConfig"}) | {"modeling_x.py": code}
    hub.repository("org/strange").commit(files)
    hub.repository("org/known").commit(files | model_files(auto_map={"AutoConfig": "modeling_x.XConfig"}))
    refused, opened = ask(hub, tmp_path, {"model": "org/strange"}, {"model": "org/known"})
    assert refused["error"] == "UnsupportedModelError" and "never run" in refused["message"]
    assert opened["type"] == "qwen3_moe" and "modeling_x.py" not in opened["files"]


def test_server_serves_from_pretrained(hub: Hub, tmp_path: Path) -> None:
    """The loopback Hub is faithful enough for the library's own loaders."""
    vocabulary = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)  # type: ignore[no-untyped-call]
    sizes = {"hidden_size": 8, "head_dim": 8, "moe_intermediate_size": 8, "intermediate_size": 8, "vocab_size": 2}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3MoeConfig.from_dict(sizes | heads | {"num_experts": 2, "num_experts_per_tok": 1})
    tokenizer.save_pretrained(tmp_path / "model")
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    hub.repository("org/tiny").commit({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("org/tiny")
model = AutoModelForCausalLM.from_pretrained("org/tiny")
print("ANSWERS", len(tokenizer), sum(p.numel() for p in model.parameters()))
"""
    tokens, parameters = client(code, "", surroundings(hub, tmp_path / "home")).split()
    assert int(tokens) == 2
    assert int(parameters) == sum(p.numel() for p in Qwen3MoeForCausalLM(config).parameters())


def test_refused_before_weights_travel(hub: Hub, tmp_path: Path) -> None:
    """Impossible budgets, missing texts and misspelt tasks are known from the small files."""
    folder = tiny_checkpoint(tmp_path / "model")
    hub.repository("org/tiny").commit({path.name: path.read_bytes() for path in folder.iterdir()})
    texts = write_texts(tmp_path / "texts.txt")
    recipes = {
        "keep": tiny_recipe(Path("org/tiny"), texts, 9),
        "text": tiny_recipe(Path("org/tiny"), tmp_path / "absent.txt", 0.5),
        "task": tiny_recipe(Path("org/tiny"), texts, 0.5, eval={"tasks": ["reference_smus"]}),
    }
    code = """
import json, sys
import moe_compress
from moe_compress.errors import MoECompressError

given = json.load(sys.stdin)
answers = {}
for name, recipe in given["recipes"].items():
    for verb in ("run",) if name == "task" else ("score", "run"):
        try:
            getattr(moe_compress, verb)(recipe, given["out"])
        except MoECompressError as error:
            answers[f"{name} {verb}"] = str(error)
print("ANSWERS" + json.dumps(answers))
"""
    given = json.dumps({"recipes": recipes, "out": str(tmp_path / "out")})
    answers = json.loads(client(code, given, surroundings(hub, tmp_path / "home")))
    fragments = {"keep": "more experts than the 8", "text": "does not exist", "task": "did you mean `reference_sums`"}
    assert set(answers) == {"keep score", "keep run", "text score", "text run", "task run"}
    for name, message in answers.items():
        assert fragments[name.split()[0]] in message
    shards = [path.name for path in folder.glob("*.safetensors")]
    assert shards and all(hub.gets(name) == [] for name in shards)
    assert hub.gets("config.json")
