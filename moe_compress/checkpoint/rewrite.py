"""The apply sweep: a checkpoint and a change in, a new checkpoint folder out, one layer in memory at a time.

Every layer is loaded, changed, put into the new model, run on a few probe tokens, and written in the Hub's layout. The
probe's logits are what the reloaded checkpoint has to reproduce. Tensors outside the layers are copied byte for byte.
What is expected to be on disk in the end is worked out from the new configuration before any weight is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from moe_compress.checkpoint.durable import sha256_of, sync
from moe_compress.checkpoint.hidden import forget_hidden, load_hidden, write_hidden
from moe_compress.checkpoint.index import TensorIndex, TensorInfo, read_header
from moe_compress.checkpoint.memory import give_back
from moe_compress.checkpoint.source import WEIGHT_SUFFIXES, Checkpoint
from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream, read_tensor
from moe_compress.checkpoint.writer import (
    SAFETENSORS_DTYPES,
    Shard,
    ShardWriter,
    forget_parts,
    tensor_sha256,
    write_json,
)
from moe_compress.errors import CheckpointError
from moe_compress.models.layers import PACKED, SECTION, MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Stage
from moe_compress.runtime.remote_code import write_remote_code
from moe_compress.runtime.scheme import Scheme, Shapes

PROBE_TOKENS = 32
PROBES = 1  # batches of a run that are the probe's; calibration tokens follow
PROBE_POSITIONS = 8  # logits are kept for this many of them
PROBE_FILE = "probe.npz"
LEDGER_FILE = "ledger.json"
TEMPLATES = "additional_chat_templates"  # the one subfolder that belongs to a checkpoint


Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors names it, shape


@dataclass(frozen=True)
class TableFormat:
    """How the embeddings or the head at `path` in the model are packed."""

    path: str
    scheme: Scheme
    scale_dtype: torch.dtype

    def tensors(self, height: int, width: int) -> Shapes:
        """Name, shape and dtype of what is stored of a table [height, width]."""
        return self.scheme.tensors(height, width, self.scale_dtype)

    def name(self, tensor: str) -> str:
        """The name that one of these tensors is stored under."""
        return f"{self.path}.{tensor}"


class Change:
    """What a transformation does to a checkpoint: its configuration and its layers' tensors. This one does nothing.

    `tokens` [N, S] are calibration sequences that pass the changed layers beside the probe, for `store` to look at.
    """

    tokens: Tensor | None = None
    batch_size = 1

    def prepare(self, stream: LayerStream) -> None:
        """See the empty model of the source, before anything else is asked for."""

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The new content of `config.json`."""
        return config

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new tensors of an MoE layer, both sides by name inside the decoder layer, in the model's layout."""
        return state

    def plain_layer(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of a layer without experts."""
        return state

    def store(self, target: LayerStream, index: int, run: Lockstep) -> dict[str, Tensor]:
        """What is written for a layer, by name in the checkpoint.

        The layer is resident in `target` with the tensors that `layer` gave, and the batches of `run`, the probe's
        first, stand before it. Where something else is stored than these tensors, they are replaced by what the stored
        ones stand for.
        """
        return target.stored_layer(index)

    def outside(self) -> Mapping[str, Tensor]:
        """New values of the model's tensors outside the layers, by name in the model; all others there are copied."""
        return {}

    def tables(self, stream: LayerStream) -> dict[str, TableFormat]:
        """The stored embeddings and heads that are packed, and how; all else outside the layers is copied."""
        return {}

    def pack_table(self, name: str, table_VH: Tensor, stored: TableFormat) -> dict[str, Tensor]:
        """What is stored of one of them, by the names of the scheme's tensors."""
        raise NotImplementedError

    def packs(self, index: int) -> Collection[str]:
        """The tensors of a layer that are stored in another form, by name inside it; experts' own need no mention."""
        return ()

    def expected(self, target: LayerStream, index: int) -> Tensors:
        """What must be on disk for a layer, worked out from the empty layer in `target`."""
        return described(target.stored_layer(index))


@dataclass(frozen=True)
class Ledger:
    """Where every source tensor went, and what has to be in the new checkpoint."""

    source_bytes: int
    copied: dict[str, str]  # tensor name -> sha256 of its bytes
    transformed: list[str]  # source tensors that passed through a layer
    unchanged: dict[str, str]  # those of them that must come out as they went in -> sha256 of their bytes
    expected: Tensors  # of the output
    shards: list[Shard]

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """The ledger in `folder`; `CheckpointError` when it is damaged, or none that this version wrote."""
        try:
            content = json.loads((folder / LEDGER_FILE).read_text(encoding="utf-8"))
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            content["expected"] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in content["expected"].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{folder / LEDGER_FILE} is damaged, or was written by another version; run again."
            ) from None

    def to_json(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": [shard.__dict__ for shard in self.shards]}


def rewrite(
    source: Checkpoint, folder: Path, change: Change, *, max_shard_bytes: int, device: torch.device | str, stage: Stage
) -> Ledger:
    """Write the changed checkpoint to `folder` (`ledger.json` and `probe.npz` beside the weights), or go on with it."""
    writer = ShardWriter(folder, max_shard_bytes)
    writer.drop_damaged()
    copy_companions(source.folder, folder)
    old_config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    stream = LayerStream(source, device)
    change.prepare(stream)
    write_config(source.folder, folder, change.config(json.loads(json.dumps(old_config))), old_config)

    config = dense_config(read_config(source, folder))
    target = LayerStream(replace(source, config=config), device)
    expected = expected_tensors(stream, target, change)
    tables, new = change.tables(stream), _replaced(stream, change)

    if not writer.has("rest"):
        writer.write("rest", _rest(stream, change, tables, new))
    done, hidden = load_hidden(folder)
    if not all(writer.has(_part(index)) for index in range(done)):
        done, hidden = 0, []
        forget_hidden(folder)
    target.load_trunk()
    _use_stored(target, tables, folder)
    _use_replaced(target, new)
    probe = probe_tokens(config)
    last = len(target.layers) - 1
    # Nothing looks at what the calibration tokens leave the last layer with.
    calibration = () if change.tokens is None or done > last else change.tokens.split(change.batch_size)
    run = Lockstep(
        target.model,
        target.layers,
        [tokens.to(device) for tokens in (probe, *calibration)],
        start=done,
        hidden=[h.to(device) for h in hidden],
    )
    target.release_embeddings()
    try:
        unchanged = _write_layers(stream, target, change, run, writer, stage, done)
        target.load_head()
        _use_stored(target, tables, folder)
        _use_replaced(target, new)
        logits = run.finish()[0]
    finally:
        run.close()
    positions = np.linspace(0, probe.shape[1] - 1, PROBE_POSITIONS).round().astype(int)
    np.savez(folder / PROBE_FILE, tokens=probe.numpy(), positions=positions, logits=logits[0, positions].cpu().numpy())
    copied = {name: tensor_sha256(source.index[name]) for name in stream.untouched if name not in {*tables, *new}}
    transformed = sorted(set(source.index) - set(copied))
    shards = writer.finish(["rest", *(_part(index) for index in range(len(stream.layers)))])
    ledger = Ledger(source.index.nbytes, copied, transformed, unchanged, expected, shards)
    for entry in folder.rglob("*"):
        sync(entry)
    write_json(folder / LEDGER_FILE, ledger.to_json())
    forget_progress(folder)
    return ledger


def forget_progress(folder: Path) -> None:
    """Remove what an interrupted `rewrite` would need to go on; only after its ledger is written."""
    forget_parts(folder)
    forget_hidden(folder)


def _write_layers(
    stream: LayerStream,
    target: LayerStream,
    change: Change,
    run: Lockstep,
    writer: ShardWriter,
    stage: Stage,
    done: int,
) -> dict[str, str]:
    """Load, change, run and write every layer from `done` on; returns hashes of what must come out as it went in.

    While one layer is worked on, the one before it waits for the disk.
    """
    unchanged: dict[str, str] = {}
    last = len(stream.layers) - 1

    def finish(index: int, *commits: Callable[[], None]) -> None:
        names = stream.passing(index, change.packs(index))
        unchanged.update({name: tensor_sha256(stream.checkpoint.index[name]) for name in names})
        for commit in commits:
            commit()

    with ThreadPoolExecutor(1) as background:
        before: Future[None] | None = None
        for index in range(done):
            finish(index)
            stage.advance("done before")
        for index in range(done, len(stream.layers)):
            state = take_layer(stream, index)
            moe = stream.moe_layers.get(index)
            state = change.plain_layer(index, state) if moe is None else change.layer(moe, state)
            target.layers[index].load_state_dict(state, assign=True)
            del state
            stored = change.store(target, index, run)
            run.through(index, PROBES if index == last else None)
            if before is not None:
                before.result()
            part = writer.begin(_part(index), stored)
            del stored
            target.release(index)
            before = background.submit(finish, index, part, write_hidden(writer.folder, index + 1, run.hidden))
            give_back()
            stage.advance()
        if before is not None:
            before.result()
    return unchanged


def take_layer(stream: LayerStream, index: int) -> dict[str, Tensor]:
    """A layer's tensors; the stream keeps none of them."""
    state = dict(stream.load(index).state_dict())
    stream.release(index)
    return state


def expected_tensors(stream: LayerStream, target: LayerStream, change: Change) -> Tensors:
    """Name, dtype and shape of every tensor the new checkpoint must hold, from its empty model and the old headers.

    Also hands the source's name conversions over to the target, which has seen no weights of its own.
    """
    index = stream.checkpoint.index
    target.model._weight_conversions = stream.model._weight_conversions
    tables = change.tables(stream)
    expected = {name: (index[name].dtype, index[name].shape) for name in stream.untouched if name not in tables}
    for name, stored in tables.items():
        height, width = index[name].shape
        for key, (shape, dtype) in stored.tensors(height, width).items():
            expected[stored.name(key)] = (SAFETENSORS_DTYPES[dtype], shape)
    for number in range(len(target.layers)):
        expected |= change.expected(target, number)
    return expected


def _rest(
    stream: LayerStream, change: Change, tables: Mapping[str, TableFormat], new: Mapping[str, Tensor]
) -> dict[str, Tensor | TensorInfo]:
    """What is written besides the layers: copies, packed tables, and new values."""
    index = stream.checkpoint.index
    rest: dict[str, Tensor | TensorInfo] = {name: index[name] for name in stream.untouched if name not in tables}
    rest |= new
    for name, stored in tables.items():
        packed = change.pack_table(name, read_tensor(index[name]), stored)
        rest |= {stored.name(key): tensor for key, tensor in packed.items()}
    return rest


def _replaced(stream: LayerStream, change: Change) -> dict[str, Tensor]:
    """The stored tensors outside the layers that get new values, by their names and in their types on disk."""
    values, index = change.outside(), stream.checkpoint.index
    found = {}
    for name, target in stream.outside_targets.items():
        if target in values:
            assert index[name].shape == tuple(values[target].shape), name
            found[name] = values[target].detach().to("cpu", TORCH_DTYPES[index[name].dtype])
    return found


def _use_replaced(target: LayerStream, new: Mapping[str, Tensor]) -> None:
    """Give resident tensors outside the layers the new values that are stored."""
    for name, value in new.items():
        tensor = target.model.get_parameter(target.outside_targets[name])
        if not tensor.is_meta:
            tensor.data.copy_(value)


def _use_stored(target: LayerStream, tables: Mapping[str, TableFormat], folder: Path) -> None:
    """Give resident embeddings and heads the values that their packed tables, written before, stand for."""
    written = {info.name: info for file in folder.glob("rest-*.safetensors") for info in read_header(file)}
    for module, names in target.end_names.items():
        weight = module.get_parameter("weight")
        for name in (name for name in names if name in tables and not weight.is_meta):
            height, width = weight.shape
            table = tables[name]
            stored = {key: read_tensor(written[table.name(key)]) for key in table.tensors(height, width)}
            weight.data.copy_(table.scheme.dequantize(stored, height, width, torch.float32))


def described(tensors: Mapping[str, Tensor]) -> Tensors:
    """Dtype and shape of tensors, by name."""
    return {name: (SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def probe_tokens(config: Any) -> Tensor:
    """Fixed pseudo-random token ids [1, PROBE_TOKENS] inside the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates, code and generation settings: every file of the source that is no weight.

    What their `auto_map` names and is not there, because code is not downloaded, is left out of it.
    """
    own = {"config.json", "README.md", "recipe.yaml", "plan.json", "experts.json", "audit.json", "manifest.json"}
    own |= {"report.json", "report.md", "report.html", LEDGER_FILE, PROBE_FILE}
    for file in source.iterdir():
        weight = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not weight and file.name not in own and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for file in folder.glob("*_config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and (whole := without_dangling(content, folder)) != content:
            file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_dangling(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a configuration file without the `auto_map` entries whose code is not in `folder`."""

    def leads_somewhere(reference: Any) -> bool:
        named = reference if isinstance(reference, list) else [reference]
        files = [folder / f"{name.rpartition('.')[0]}.py" for name in named if name is not None and "--" not in name]
        return all(file.exists() for file in files)

    auto_map = content.get("auto_map")
    if not isinstance(auto_map, dict):
        return dict(content)
    kept = {name: reference for name, reference in auto_map.items() if leads_somewhere(reference)}
    rest = {key: value for key, value in content.items() if key != "auto_map"}
    return dict(content) if kept == auto_map else rest | ({"auto_map": kept} if kept else {})


def write_config(source: Path, folder: Path, new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Write `config.json`; an unchanged one keeps its very bytes."""
    if SECTION in new:
        write_remote_code(folder)
    new = without_dangling(new, folder)
    if new == old:
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def read_config(source: Checkpoint, folder: Path) -> PretrainedConfig:
    """The configuration written to `folder`: of the source's class, or of its compressed family."""
    if SECTION in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return AutoConfig.from_pretrained(folder)  # type: ignore[no-any-return]
    return type(source.config).from_pretrained(folder)


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the configuration for the same model with unpacked weights."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    if SECTION in content:
        content[SECTION] = {key: value for key, value in content[SECTION].items() if key != PACKED}
    return type(config).from_dict(content)


def open_rewritten(folder: Path, source: Checkpoint) -> Checkpoint:
    """The new checkpoint, as the source of the next step; its revision is what was written, not when."""
    forget_progress(folder)  # left where a kill fell right after the ledger
    return replace(
        source,
        folder=folder,
        config=read_config(source, folder),
        revision=sha256_of(folder / LEDGER_FILE),
        index=TensorIndex.from_folder(folder),
    )


def _part(index: int) -> str:
    return f"layer-{index:05d}"
