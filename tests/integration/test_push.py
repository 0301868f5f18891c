"""Pushing to a loopback Hub, each client in its own process: what arrives, what is refused, what a break leaves."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moe_compress
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.manifest import NOT_HASHED
from moe_compress.publish import bundle
from moe_compress.report import page
from moe_compress.report.card import LOCATION
from moe_compress.report.markdown import CHECKS
from moe_compress.verification import checks
from tests.hub_server import Hub, serve
from tests.hub_state import GITATTRIBUTES
from tests.integration.test_hub_source import client, surroundings
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe

ROOT = Path(__file__).parents[2]
TASKS = ["reference_sums", "reference_code"]
EVALUATION = {"tasks": TASKS, "limit": 3, "max_gen_toks": 4, "speed": False}
COMMANDS = """
import json, os, sys, time

time.sleep = lambda seconds: None  # what the client waits between two tries
from typer.testing import CliRunner
from moe_compress.cli import app

answers = []
for call in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = call["token"]
    done = CliRunner().invoke(app, call["arguments"])
    answers.append({"code": done.exit_code, "out": done.stdout, "err": done.stderr})
print("ANSWERS" + json.dumps(answers))
"""
# A pushed checkpoint and the folder it was pushed from, loaded alike: logits of the same text.
LOAD = """
import json, sys

given = json.load(sys.stdin)
if given["plain"]:
    sys.modules["moe_compress"] = None
else:
    import moe_compress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

found = []
for place in given["places"]:
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype="auto")
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("The quick brown fox").input_ids])).logits.double()
    found.append(logits.flatten().tolist())
print("ANSWERS" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Mine\n")
    return folder


@pytest.fixture(scope="module")
def stock(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned and evaluated folder in tier `stock`."""
    out = tmp_path_factory.mktemp("stock") / "out"
    moe_compress.run(tiny_recipe(source, texts, 0.75, eval=EVALUATION), out)
    return out


@pytest.fixture(scope="module")
def plugin(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in tier `plugin`: uneven layers of packed experts."""
    out = tmp_path_factory.mktemp("plugin") / "out"
    step = {"op": "quantize", "method": "rtn", "average_bits": 3.0, "options": [2, 4], "group_size": 16}
    recipe = tiny_recipe(source, texts, export={"tier": "plugin", "max_shard_size": "20KB"})
    moe_compress.run(recipe | {"steps": [step | {"protect_super_experts": False}]}, out)
    return out


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def command(
    hub: Hub,
    home: Path,
    *calls: list[str],
    token: str | list[str] = "hf_valid",
    traceback: bool = False,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run commands in a fresh process whose Hub is `hub`; none shows its token, nor a traceback unless asked for."""
    tokens = [token] * len(calls) if isinstance(token, str) else token
    given = [{"arguments": call, "token": one} for call, one in zip(calls, tokens, strict=True)]
    answers: list[dict[str, Any]] = json.loads(
        client(COMMANDS, json.dumps(given), surroundings(hub, home) | environment)
    )
    for answer, one in zip(answers, tokens, strict=True):
        assert not one or one not in answer["out"] + answer["err"]
        assert ("Traceback" in answer["err"]) == traceback
    return answers


def pushed(hub: Hub, home: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """A push that succeeds."""
    (answer,) = command(hub, home, ["push", *arguments], **environment)
    assert answer["code"] == 0, answer["err"]
    return answer


def sentence(answer: dict[str, Any], code: int) -> str:
    """The one sentence of a refusal."""
    assert answer["code"] == code, answer
    errors = [line for line in answer["err"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith("."), answer["err"]
    return errors[0]


def same_logits(hub: Hub, home: Path, repo_id: str, folder: Path, *, plain: bool, **options: str) -> bool:
    """Whether a fresh process gets from the Hub the model that is in the folder; `plain`: without this package."""
    pushed_to, here = (
        {"pretrained_model_name_or_path": repo_id} | options,
        {"pretrained_model_name_or_path": str(folder)},
    )
    given = json.dumps({"places": [pushed_to, here], "plain": plain})
    answer = json.loads(client(LOAD, given, surroundings(hub, home) | {"HF_TOKEN": "hf_stranger"}))
    pulled, local = map(np.array, answer)
    return len(local) > 1000 and np.array_equal(pulled, local)


def local_files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """What a repository made of `folder` must hold."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    card = files["README.md"].decode()
    files["README.md"] = card.replace(LOCATION, repo_id).encode()
    return files | {".gitattributes": GITATTRIBUTES}


def large_files(folder: Path) -> set[str]:
    """The sha256 of every file that the Hub stores by LFS, by its own rule."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        sha256_of(file) for file in files if file.suffix in (".safetensors", ".npz") or file.stat().st_size >= 10_000
    }


def test_push_and_pull(hub: Hub, stock: Path, tmp_path: Path) -> None:
    dry, done = command(hub, tmp_path, ["push", str(stock), "me/small", "--dry-run"], ["push", str(stock), "small"])
    assert dry["code"] == done["code"] == 0, dry["err"] + done["err"]
    assert "edited" not in dry["out"] + done["out"]
    assert "nothing was sent" in dry["out"]
    nbytes = sum(map(len, local_files(stock, "me/small").values())) - len(GITATTRIBUTES)
    for answer in (dry, done):
        assert f"{hub.url}/me/small (new, public unless its owner's default is private), branch main" in answer["out"]
        assert f"{len(local_files(stock, '')) - 1} files" in answer["out"] and f"{nbytes:,} bytes" in answer["out"]
        assert "model.safetensors.index.json" in answer["out"]
    creations = [write for write in hub.writes() if "create" in write]
    assert len(creations) == 1  # the dry run made nothing

    repository = hub.repositories["me/small"]
    assert len(repository.commits) == 2 and not repository.private  # the Hub's own first commit, and one of all files
    assert repository.head() == local_files(stock, "me/small")
    assert re.search(rf"{hub.url}/me/small\ncommit: {repository.refs['main']}", done["out"])
    assert set(hub.uploads()) == large_files(stock) and len(hub.uploads()) == len(large_files(stock))
    manifest = json.loads(repository.head()["manifest.json"])
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(repository.head()[name]).hexdigest() == digest

    text = repository.head()["README.md"].decode()
    assert 'from_pretrained("me/small")' in text and LOCATION not in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0"
    assert same_logits(hub, tmp_path / "fresh", "me/small", stock, plain=True)


def test_the_pushed_id_is_evaluated_and_compressed_again(hub: Hub, stock: Path, texts: Path, tmp_path: Path) -> None:
    """Its figures are those of the report; a run of it names it, and its commit, as what it was made from."""
    pushed(hub, tmp_path, str(stock), "me/small")
    recipe = tiny_recipe(Path("me/small"), texts, 4, eval={"tasks": [], "speed": False})
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(recipe | {"model": "me/small"}))
    run = ["run", str(tmp_path / "next.yaml"), str(tmp_path / "next")]
    evaluate = f"eval me/small --limit 3 --tasks {','.join(TASKS)} max_gen_toks=4 speed=false --output".split()
    again, measured = command(hub, tmp_path / "fresh", run, [*evaluate, str(tmp_path / "results")], token="")
    assert again["code"] == measured["code"] == 0, again["err"] + measured["err"]
    tasks = json.loads((stock / "report.json").read_text())["compressed"]["tasks"]
    assert json.loads((tmp_path / "results" / "report.json").read_text())["compressed"]["tasks"] == tasks
    commit = hub.repositories["me/small"].refs["main"]
    card = (tmp_path / "next" / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["base_model"] == "me/small" and matter["license"] == "apache-2.0" and matter["language"] == "en"
    assert commit in card and "base_model_relation" not in matter
    assert not (tmp_path / "next" / ".eval_results").exists() and "model-index" not in matter

    pushed(hub, tmp_path, str(tmp_path / "next"), "org/smaller")
    assert hub.repositories["org/smaller"].head() == local_files(tmp_path / "next", "org/smaller")


def test_a_plugin_checkpoint_runs_from_the_hub(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    pushed(hub, tmp_path, str(plugin), "me/packed", "--revision", "bits-3")
    repository = hub.repositories["me/packed"]
    assert repository.head("main") == {".gitattributes": GITATTRIBUTES}
    text = repository.head("bits-3")["README.md"].decode()
    assert 'from_pretrained("me/packed", revision="bits-3"' in text and LOCATION not in text
    assert same_logits(hub, tmp_path / "fresh", "me/packed", plugin, plain=False, revision="bits-3")


def test_private_repositories(hub: Hub, stock: Path, tmp_path: Path) -> None:
    hub.repository("me/open").commit({".gitattributes": GITATTRIBUTES})
    hub.repository("me/closed", private=True).commit({".gitattributes": GITATTRIBUTES})
    new, refused, closed = command(
        hub,
        tmp_path,
        ["push", str(stock), "me/secret", "--private"],
        ["push", str(stock), "me/open", "--private"],
        ["push", str(stock), "me/closed"],
    )
    assert new["code"] == 0 and hub.repositories["me/secret"].private
    assert "(new, private)" in new["out"] and "(existing, private)" in closed["out"]
    assert "me/open exists and is public" in sentence(refused, 2)
    assert list(hub.repositories["me/open"].head()) == [".gitattributes"]
    assert closed["code"] == 0 and hub.repositories["me/closed"].private
    assert hub.repositories["me/closed"].head() == local_files(stock, "me/closed")

    for answer in command(hub, tmp_path / "fresh", *[["inspect", "me/secret"]] * 2, token=["", "hf_stranger"]):
        assert "no such model on the Hub that you may read" in sentence(answer, 1)
    assert same_logits(hub, tmp_path / "fresh", "me/secret", stock, token="hf_valid", plain=True)


def test_who_may_not_push(hub: Hub, stock: Path, tmp_path: Path) -> None:
    hub.repository("stranger/theirs").commit({".gitattributes": GITATTRIBUTES})
    hub.repository("stranger/hidden", private=True).commit({".gitattributes": GITATTRIBUTES})
    before = dict(hub.repositories)
    hub.echoes_tokens = True  # `command` looks for them
    wrong, missing, reader, foreign, hidden, theirs, bad = command(
        hub,
        tmp_path,
        *(["push", str(stock), name] for name in ["me/a"] * 3),
        *(["push", str(stock), name] for name in ("nobody/a", "stranger/hidden", "stranger/theirs", "a/b/c")),
        token=["hf_wrong", "", "hf_reader", *["hf_valid"] * 4],
    )
    assert "does not accept your token" in sentence(wrong, 1)
    assert "hf auth login" in sentence(missing, 1)
    assert "may not write to me/a" in sentence(reader, 1)
    assert "may not write to nobody/a" in sentence(foreign, 1)
    assert "may not write to stranger/hidden" in sentence(hidden, 1)
    assert "may not write to stranger/theirs" in sentence(theirs, 1)
    assert "owner/name" in sentence(bad, 2)
    assert hub.repositories == before and not hub.uploads()

    (traced,) = command(hub, tmp_path, ["push", str(stock), "me/a", "--debug"], token="hf_wrong", traceback=True)
    assert "does not accept your token" in sentence(traced, 1)

    (offline,) = command(hub, tmp_path, ["push", str(stock), "me/a"], HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in sentence(offline, 1)
    unreachable, dry = command(
        hub, tmp_path, ["push", str(stock), "me/a"], ["push", str(stock), "me/a", "--dry-run"],
        HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert "http://127.0.0.1:9 failed" in sentence(unreachable, 1)
    assert dry["code"] == 0 and "the Hub was not asked" in dry["out"]
    (anonymous,) = command(hub, tmp_path, ["push", str(stock), "me/a", "--dry-run"], token="")
    assert anonymous["code"] == 0 and "there is no token" in anonymous["out"]


def test_an_existing_repository(hub: Hub, stock: Path, plugin: Path, tmp_path: Path) -> None:
    foreign = {"model.safetensors": b"weights", "notes.txt": b"keep", "README.md": b"# Theirs"}
    hub.repository("me/other").commit(foreign)
    hub.repository("me/notes").commit({"notes.txt": b"keep", "README.md": b"# Mine"})
    first, second, replaced, refused, forced, beside = command(
        hub,
        tmp_path,
        ["push", str(stock), "me/small"],
        ["push", str(stock), "me/small"],
        ["push", str(plugin), "me/small"],
        ["push", str(stock), "me/other"],
        ["push", str(stock), "me/other", "--force"],
        ["push", str(stock), "me/notes"],
    )
    repository = hub.repositories["me/small"]
    assert [answer["code"] for answer in (first, second, replaced, forced, beside)] == [0] * 5
    assert len(repository.commits) == 3  # the Hub's, the first, the third: the second changed nothing
    assert repository.head() == local_files(plugin, "me/small")
    stale = set(local_files(stock, "")) - set(local_files(plugin, ""))
    assert stale and all(name in replaced["out"] for name in stale)

    assert "model.safetensors" in sentence(refused, 2) and "--force" in sentence(refused, 2)
    kept = {"notes.txt": b"keep"}
    expected = {name: content for name, content in local_files(stock, "me/other").items() if name != ".gitattributes"}
    assert hub.repositories["me/other"].head() == expected | kept
    assert "model.safetensors" in forced["out"]
    expected = {name: content for name, content in local_files(stock, "me/notes").items() if name != ".gitattributes"}
    assert hub.repositories["me/notes"].head() == expected | kept


def test_only_what_was_verified_is_pushed(hub: Hub, stock: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(stock, folder)
        change(folder)
        return str(folder)

    def edit(folder: Path, file: str, old: str, new: str) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    def flip(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)

    def failed(folder: Path) -> None:
        """As a run leaves it in its work folder when a check fails."""
        report = json.loads((folder / "report.json").read_text())
        report["checks"]["logits"] = {"passed": False, "detail": "too far off."}
        (folder / "report.json").write_text(json.dumps(report))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["report.json"] = sha256_of(folder / "report.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def outside(folder: Path) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        (folder / "generation_config.json").unlink()
        (folder / "generation_config.json").symlink_to(tmp_path / "secret.txt")

    cases = {
        "flipped": (flip, 3, ".safetensors is not as it was verified"),
        "figures": (lambda f: edit(f, "report.json", '"value": ', '"value": 1'), 3, "report.json is not as it was"),
        "missing": (lambda f: (f / "tokenizer.json").unlink(), 3, "tokenizer.json is missing"),
        "failed": (failed, 3, "verification failed: logits (too far off)"),
        "outside": (outside, 3, "generation_config.json is missing"),
        "unmade": (lambda f: (f / "manifest.json").unlink(), 2, "no manifest.json"),
        "damaged": (lambda f: (f / "manifest.json").write_text("{"), 1, "manifest.json is damaged"),
    }
    folders = [broken(name, change) for name, (change, _, _) in cases.items()]
    answers = command(hub, tmp_path, *(["push", folder, "me/small"] for folder in folders))
    for answer, (_, code, fragment) in zip(answers, cases.values(), strict=True):
        assert fragment in sentence(answer, code)
    assert hub.log == []  # refused before the Hub heard of it


def test_owners_words_travel_and_strangers_files_do_not(hub: Hub, stock: Path, tmp_path: Path) -> None:
    """The card is its owner's to edit; a file that no run wrote stays here."""
    folder = tmp_path / "out"
    shutil.copytree(stock, folder)
    (folder / ".env").write_text("HF_TOKEN=hf_valid")
    (folder / "report.html").write_text("<!doctype html>somebody's figures")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## Contact\n\nAsk me.\n")
    answer = pushed(hub, tmp_path, str(folder), "me/small")
    head = hub.repositories["me/small"].head()
    assert head["README.md"].decode().endswith("Ask me.\n") and ".env" not in head
    assert head["report.html"] == (stock / "report.html").read_bytes(), "made anew of the records"
    assert "left out, no run wrote it: .env\n" in answer["out"]
    assert "README.md was edited since the run wrote it" in answer["out"]
    for name in ("report.html", "README.md"):
        (folder / name).unlink()
    answer = pushed(hub, tmp_path, str(folder), "me/bare")
    assert not {"report.html", "README.md"} & hub.repositories["me/bare"].head().keys()
    assert "edited" not in answer["out"]
    shutil.copy(stock / "README.md", folder)

    hub.ignored = {"ledger.json"}
    (kept_out,) = command(hub, tmp_path, ["push", str(folder), "me/third"])
    assert "me/third does not hold ledger.json" in sentence(kept_out, 1) and ".gitignore" in kept_out["err"]

    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("library_name: transformers", "library_name: [transformers]"))
    (refused,) = command(hub, tmp_path, ["push", str(folder), "me/other"])
    assert "front matter" in sentence(refused, 1) and "library_name must be a string" in refused["err"]
    assert list(hub.repositories["me/other"].head()) == [".gitattributes"]


def test_a_broken_connection_is_tried_again(hub: Hub, stock: Path, tmp_path: Path) -> None:
    """One transfer breaks off half way, one commit is answered with an error, the same command is given twice."""
    hub.upload_cuts, hub.failing_commits, hub.part_bytes = 1, 1, 8_000
    failed = subprocess.run(
        [sys.executable, "-m", "moe_compress", "push", str(stock), "me/small"],
        env=surroundings(hub, tmp_path) | {"HF_TOKEN": hub.token, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert failed.returncode == 1 and hub.upload_cuts == hub.failing_commits == 0
    *shown, message = failed.stderr.splitlines()
    assert all(re.match(r"\[(check|push)\] ", line) for line in shown), shown  # no bars, no signed addresses
    assert "answered 500" in message and "not sent twice" in message
    assert hub.token not in failed.stdout + failed.stderr
    assert list(hub.repositories["me/small"].head()) == [".gitattributes"]

    before = list(hub.uploads())
    pushed(hub, tmp_path, str(stock), "me/small")
    assert hub.repositories["me/small"].head() == local_files(stock, "me/small")
    assert hub.uploads() == before and len(before) == len(set(before))
    assert {upload.partition("#")[0] for upload in before} == large_files(stock)
    assert any("#2" in upload for upload in before)


def test_without_being_told_the_client_falls_back_to_lfs(hub: Hub, stock: Path, tmp_path: Path) -> None:
    """A server without Xet is noticed, though `hf_xet` is installed and nothing forbids to use it."""
    pytest.importorskip("hf_xet")
    pushed(hub, tmp_path, str(stock), "me/small", HF_HUB_DISABLE_XET="0")
    assert hub.repositories["me/small"].head() == local_files(stock, "me/small")
    asked = [entry.status for entry in hub.log if "xet-write-token" in entry.path]
    assert asked and set(asked) == {404}


def test_a_server_that_is_not_the_hub(hub: Hub, stock: Path, tmp_path: Path) -> None:
    """It gives no code for what is missing, and its ids of small files are its own, so that these are read back."""
    hub.is_a_mirror = True
    hub.ignored = {"ledger.json"}
    new, kept_out = command(
        hub, tmp_path, ["push", str(stock), "me/small", "--revision", "other"], ["push", str(stock), "me/small"]
    )
    for answer in (new, kept_out):
        assert "me/small does not hold ledger.json" in sentence(answer, 1)
    hub.ignored = set()
    pushed(hub, tmp_path, str(stock), "me/small")
    assert hub.repositories["me/small"].head() == local_files(stock, "me/small")
    fetched = {entry.path for entry in hub.log if entry.method == "GET" and "/resolve/" in entry.path}
    assert any(path.endswith("/recipe.yaml") for path in fetched)
    assert not any(path.endswith(".safetensors") for path in fetched), "of those the sha256 is known"


@contextmanager
def server(root: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Hub in a process of its own, whose state is in `root`."""
    started = [sys.executable, "-m", "tests.hub_server", str(root), "--port", str(port), *arguments]
    with subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_server_killed_in_mid_upload(stock: Path, tmp_path: Path) -> None:
    """Nothing is visible after the death; the push repeated sends what had not arrived, and nothing twice."""
    root = tmp_path / "root"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    there = Hub()
    there.url = f"http://127.0.0.1:{port}"
    shards = sum(file.stat().st_size for file in stock.glob("*.safetensors"))
    with server(root, port, "--die-after", str(shards // 2)) as process:
        (failed,) = command(there, tmp_path, ["push", str(stock), "me/small"])
        assert process.wait(10) == 9
    assert f"{there.url} failed" in sentence(failed, 1) and "run the same command again" in failed["err"]
    dead = Hub(root)
    assert list(dead.repositories["me/small"].head()) == [".gitattributes"]
    arrived = dead.uploads()
    assert 0 < len(arrived) < len(large_files(stock))

    with server(root, port):
        pushed(there, tmp_path, str(stock), "me/small")
    after = Hub(root)
    assert after.repositories["me/small"].head() == local_files(stock, "me/small")
    assert after.uploads()[: len(arrived)] == arrived
    assert len(after.uploads()) == len(set(after.uploads())) and set(after.uploads()) == large_files(stock)


def test_the_api_pushes_and_tells(hub: Hub, stock: Path, tmp_path: Path) -> None:
    code = """
import json, sys
from moe_compress import push
from moe_compress.errors import PublishError

given = json.load(sys.stdin)
planned = push(given["out"], "small", dry_run=True, token="hf_valid")
done = push(given["out"], "small", private=True, token="hf_valid")
try:
    push(given["out"], "small", token="hf_wrong")
except PublishError as error:
    print("ANSWERS" + json.dumps([planned, done, str(error)]))
"""
    answer = client(code, json.dumps({"out": str(stock)}), surroundings(hub, tmp_path))
    planned, done, refused = json.loads(answer)
    assert (planned["exists"], planned["repo_id"], "commit" in planned) == (False, "me/small", False)
    assert planned["files"] == done["files"] and done["bytes"] == sum(done["files"].values())
    sizes = {name: len(content) for name, content in hub.repositories["me/small"].head().items()}
    assert done["files"] == {name: size for name, size in sizes.items() if name != ".gitattributes"}
    assert done["commit"] == hub.repositories["me/small"].refs["main"] and done["private"]
    assert done["url"] == f"{hub.url}/me/small"
    assert "does not accept your token" in refused and "hf_wrong" not in refused


def test_files_are_known_by_sha256_or_by_git(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello\n")
    found = bundle.Bundle(tmp_path, {"a": sha256_of(tmp_path / "a")}, {"b": "hello\n"}, [], False)
    for name in "ab":
        assert found.is_known_by(name, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
        assert found.is_known_by(name, "ce013625030ba8dba906f756967f9e9ca394464a")  # `git hash-object`
        assert not any(found.is_known_by(name, other) for other in ("", "0" * 40, "0" * 64))


def test_push_knows_what_verify_calls_things() -> None:
    """It loads nothing that loads torch, so it has their names by itself."""
    assert (bundle.MANIFEST_FILE, bundle.PAGE_FILE) == (checks.MANIFEST_FILE, page.PAGE_FILE)
    assert {bundle.MANIFEST_FILE, bundle.CARD_FILE, bundle.PAGE_FILE} == set(NOT_HASHED)
    assert all(hasattr(checks, f"check_{name}") for name in CHECKS)
