"""Fresh Python processes as forks of one that has imported slow libraries already: nearly all that a small one does.

A server never imports this package. Each fork runs its program as `python -c` would, with the environment, the folder
and the input it is given, ends, and leaves the server as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# All that the reload of `verify` imports for a tiny model.
RELOADING = """
import accelerate, compressed_tensors, numpy, safetensors.torch, torch, transformers
import transformers.conversion_mapping, transformers.core_model_loading, transformers.quantizers.auto
from transformers import AutoModelForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM
"""
# Libraries that read no setting of the Hub's client, which each fork imports with its own.
NUMERICS = "import numpy, scipy.optimize, scipy.stats, torch, torch._dynamo, torch.distributed.tensor, torch.export"
SERVER = """
import gc, json, os, signal, sys, traceback

gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(900)  # what hangs fails
        status = 1
        try:
            os.dup2(os.open(asked["folder"] + "/input", os.O_RDONLY), 0)
            for number, name in ((1, "output"), (2, "errors")):
                os.dup2(os.open(f"{asked['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdin = open(0)
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["env"])
            sys.path[1:1] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            sys.argv = ["-c", *asked["arguments"]]
            assert not [name for name in sys.modules if name.partition(".")[0] == "moe_compress"]
            exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """Starts with the first process that is asked for, and ends with this one."""

    def __init__(self, imports: str) -> None:
        self.imports = imports

    @cached_property
    def folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory()

    @cached_property
    def process(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", self.imports + SERVER], stdin=pipe, stdout=pipe, text=True)

    def run(
        self, command: list[str], *, env: Mapping[str, str], cwd: str | None = None, input: str = "", **_: Any
    ) -> subprocess.CompletedProcess[str]:
        """In place of `subprocess.run` for `[python, "-c", program, *arguments]`."""
        assert command[:2] == [sys.executable, "-c"]
        assert self.process.stdin is not None and self.process.stdout is not None
        folder = Path(self.folder.name)
        (folder / "input").write_text(input)
        asked = {"program": command[2], "arguments": command[3:], "env": dict(env), "cwd": str(cwd or os.getcwd())}
        print(json.dumps(asked | {"folder": str(folder)}), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        said = [(folder / name).read_text() for name in ("output", "errors")]
        return subprocess.CompletedProcess(command, status, *said)


PLAIN_TRANSFORMERS = ForkServer(RELOADING)
WITHOUT_HUB = ForkServer(NUMERICS)
