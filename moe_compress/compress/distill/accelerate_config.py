"""What a person's accelerate config file says of a training in several processes.

accelerate's own launcher starts the processes with the file (its GPUs, port, threads and the like); read here is what
the training itself has to know. `distributed_type: FSDP` with `fsdp_version: 2` divides parameters, gradients and
optimizer states among the processes (see `sharding`), `MULTI_GPU` shares the batches alone.

Without effect, because there is one way to do it here: how the model is read (`fsdp_cpu_ram_efficient_loading`: no
process ever reads more than a layer at a time), and how states are saved (`fsdp_state_dict_type`: each process its own
part). Refused, rather than left out: several machines, other kinds of parallelism, FSDP's first version, offloading,
activation checkpointing, compilation, fp16 and fp8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.commands.config.config_args import load_config_from_file
from yaml import YAMLError

from moe_compress.compress.distill.config import DistillConfig
from moe_compress.errors import UsageError

PRECISIONS: dict[str, Literal["float32", "bfloat16"]] = {"no": "float32", "bf16": "bfloat16"}
TYPES = ("FSDP", "MULTI_GPU")
WRAP = "TRANSFORMER_BASED_WRAP"


@dataclass(frozen=True)
class Launch:
    """The processes of a training, and whether they divide the parameters among them."""

    processes: int
    sharded: bool
    reshard_after_forward: bool  # whether a layer's parameters are given back between forward and backward pass
    precision: Literal["float32", "bfloat16"]
    use_cpu: bool

    def settle(self, config: DistillConfig) -> DistillConfig:
        """The settings with what the file decides.

        Raises `UsageError` when the batches cannot be shared among so many processes.
        """
        per_pass = config.micro_batch_size * self.processes
        if config.batch_size % per_pass:
            raise UsageError(
                f"batch_size ({config.batch_size}) should be a multiple of micro_batch_size x num_processes of "
                f"{config.accelerate_config} ({per_pass})."
            )
        return config.model_copy(update={"processes": self.processes, "precision": self.precision})


def read_launch(file: str) -> Launch:
    """What an accelerate config file, YAML or JSON, says.

    Raises `UsageError` when there is none, accelerate cannot read it, or it asks for what is not done here.
    """
    try:
        found = load_config_from_file(file)
        content: dict[str, Any] = found.to_dict()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise UsageError(f"the accelerate config {file} cannot be read: {why}.") from None
    # accelerate itself takes the names inside with and without the prefix
    fsdp = {f"fsdp_{key.removeprefix('fsdp_')}": value for key, value in content.get("fsdp_config", {}).items()}
    for name, why in _refused(content, fsdp):
        raise UsageError(f"`{name}` in the accelerate config {file} does not go with distillation: {why}.")
    return Launch(
        processes=content["num_processes"],
        sharded=content["distributed_type"] == "FSDP",
        reshard_after_forward=_is_true(fsdp.get("fsdp_reshard_after_forward", True)),
        precision=PRECISIONS[str(content.get("mixed_precision", "no")).lower()],
        use_cpu=content["use_cpu"],
    )


def _refused(content: dict[str, Any], fsdp: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the file asks for and cannot have: the setting and the reason."""
    if content["compute_environment"] != "LOCAL_MACHINE":
        yield "compute_environment", "it runs on this machine"
    if content["distributed_type"] not in TYPES:
        yield "distributed_type", f"use {' or '.join(TYPES)}"
    if content["num_machines"] != 1:
        yield "num_machines", "all processes run on one machine"
    if not isinstance(content["num_processes"], int) or content["num_processes"] < 2:
        yield "num_processes", "there should be 2 or more; one alone needs no config"
    if str(content.get("mixed_precision", "no")).lower() not in PRECISIONS:
        yield "mixed_precision", f"use {' or '.join(PRECISIONS)}"
    for section in ("deepspeed_config", "megatron_lm_config", "parallelism_config", "fp8_config", "mpirun_config"):
        if content.get(section):
            yield section, "leave it out"
    if content.get("dynamo_config", {}).get("dynamo_backend", "NO") != "NO":
        yield "dynamo_config", "nothing is compiled"
    if content["distributed_type"] == "FSDP":
        yield from _refused_of_fsdp(fsdp)


def _refused_of_fsdp(fsdp: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if fsdp.get("fsdp_version") != 2:
        yield "fsdp_version", "it should be 2"
    if str(fsdp.get("fsdp_auto_wrap_policy", WRAP)).upper() != WRAP:
        yield "fsdp_auto_wrap_policy", f"decoder layers are gathered one by one, which is {WRAP}"
    if str(fsdp.get("fsdp_reshard_after_forward", True)).lower() not in ("true", "false"):
        yield "fsdp_reshard_after_forward", "it should be true or false"
    if fsdp.get("fsdp_ignored_modules"):
        yield "fsdp_ignored_modules", "all parameters are divided"
    for name in ("fsdp_offload_params", "fsdp_activation_checkpointing"):
        if _is_true(fsdp.get(name, False)):
            yield name, "it is not done here; more processes or a smaller `micro_batch_size` save memory too"


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"
