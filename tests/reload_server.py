"""The fresh process in which `verify` loads a result, as a fork of one that has imported plain transformers already.

Importing transformers is nearly all that such a process does for a tiny model. The server never imports this package;
each reload is a fork that runs the program of `verify` as `python -c` would, ends, and leaves the server as it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

SERVER = """
import gc, json, os, sys, traceback
import accelerate, compressed_tensors, numpy, safetensors.torch, torch, transformers
import transformers.conversion_mapping, transformers.core_model_loading, transformers.quantizers.auto
from transformers import AutoModelForCausalLM, OlmoeForCausalLM, Qwen3MoeForCausalLM

gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            output = os.open(asked["cwd"] + "/output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["env"])
            sys.argv = ["-c", *asked["arguments"]]
            assert not [name for name in sys.modules if name.partition(".")[0] == "moe_compress"]
            exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ReloadServer:
    """Starts with the first reload; `close` ends it."""

    @cached_property
    def process(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, command: list[str], *, env: Mapping[str, str], cwd: str, **_: Any
    ) -> subprocess.CompletedProcess[str]:
        """In place of `subprocess.run` for `[python, "-c", program, *arguments]`; `cwd` is a folder of its own."""
        assert command[:2] == [sys.executable, "-c"]
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"program": command[2], "arguments": command[3:], "env": dict(env), "cwd": str(cwd)}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, status, "", Path(cwd, "output").read_text())

    def close(self) -> None:
        if "process" in vars(self):
            self.process.communicate()
