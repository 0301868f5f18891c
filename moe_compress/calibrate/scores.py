"""What calibration measured, per layer and per expert: the input of every plan. Numbers only, no torch.

`scores.safetensors` holds the arrays (`layer.<index>.<statistic>`, float64), `scores.json` the rest. Sums run over
the tokens routed to an expert; g is the value that truly multiplies the expert's raw output f.

| statistic | shape | meaning |
|---|---|---|
| `tokens` | [E] | n, tokens routed to the expert |
| `gate_sum` | [E] | sum of g |
| `norm_sum`, `norm_sq_sum` | [E] | sum of the L2 norm of f, and of its square |
| `gate_norm_sum`, `gate_sq_norm_sq_sum` | [E] | sum of g times the norm, and of its square |
| `output_sum`, `output_sq_sum` | [E, H] | sum of f and of f squared, per channel (mean and variance) |
| `gated_output_sum` | [E, H] | sum of g f, per channel |
| `max_abs` | [E] | largest absolute entry of f |
| `easy_ep` | [E] | sum of g times the norm times max(0, 1 - cos(h, h + routed output)) |
| `coselection` | [E, E] | tokens routed to both experts (the diagonal is `tokens`) |
| `windows_16`, `windows_64` | [E, 17], [E, 65] | windows of 16 (64) tokens in a row in which 0, 1, ... of them use it |
| `ablation` | [E] | what taking the expert out adds to the loss, nats per token; NaN where that was not measured |
| `cache_lookups`, `cache_hits` | [E], [E, 3] | how often caches of 1, 2, 3 times top-k looked for it, and had it |
| `router_gram` | [E, E] | sum over all tokens of products of router logits |
| `mean_output` | [E, H] | mean of f over a sample of all tokens, wherever they were routed; measured on demand |

Tables (`table.<index>.<name>`) are of a whole layer:

| table | shape | meaning |
|---|---|---|
| `gate_ratios` | [2, `RATIO_BINS`] | slots by the ratio r of their gate value to the token's largest, in equal bins |

Its first row counts all slots but the largest, its second the second largest alone; r is 0 where a slot does not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.errors import UsageError

FORMAT = 1
ABLATION = "ablation"  # the statistic that `calibrate.ablation` measures, on demand
PAIRWISE = ("coselection", "router_gram")  # statistics of pairs of experts
RATIO_BINS = 4096
Array = NDArray[np.float64]


@dataclass
class LayerScores:
    """Statistics of one MoE layer; `layer` is its index among all decoder layers."""

    layer: int
    num_experts: int
    top_k: int
    num_tokens: int
    cosine: float  # mean cosine between the decoder layer's input and output
    statistics: dict[str, Array]
    stream_energy: float = 0.0  # sum over tokens of the squared norm of the hidden states that leave the decoder layer
    tables: dict[str, Array] = field(default_factory=dict)

    def select(self, experts: Sequence[int]) -> LayerScores:
        """Of these experts only, in this order; tables are of all experts and left out."""
        kept = np.asarray(experts, dtype=np.intp)
        statistics = {name: values[kept] for name, values in self.statistics.items()}
        statistics |= {name: statistics[name][:, kept] for name in PAIRWISE if name in statistics}
        return replace(self, num_experts=len(kept), statistics=statistics, tables={})


@dataclass
class Scores:
    """All MoE layers' statistics and what they were measured on."""

    layers: list[LayerScores]
    fingerprint: dict[str, Any]
    min_tokens_per_expert: int = 1

    @property
    def starved(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert that saw fewer tokens than `min_tokens_per_expert`."""
        return [
            (scores.layer, int(expert))
            for scores in self.layers
            for expert in np.flatnonzero(scores.statistics["tokens"] < self.min_tokens_per_expert)
        ]

    def summary(self) -> dict[str, Any]:
        """Coverage in a few figures."""
        tokens = [scores.statistics["tokens"] for scores in self.layers]
        return {
            "moe_layers": len(self.layers),
            "experts": int(sum(len(counts) for counts in tokens)),
            "calibration_tokens": self.layers[0].num_tokens if self.layers else 0,
            "fewest_tokens_per_expert": int(min(counts.min() for counts in tokens)) if tokens else 0,
            "starved": [list(pair) for pair in self.starved],
        }

    def save(self, folder: Path) -> None:
        """Write `scores.safetensors` and `scores.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"layer.{scores.layer}.{name}": np.ascontiguousarray(values)
            for scores in self.layers
            for name, values in scores.statistics.items()
        }
        arrays |= {
            f"table.{scores.layer}.{name}": np.ascontiguousarray(values)
            for scores in self.layers
            for name, values in scores.tables.items()
        }
        temporary = folder / "scores.part"  # `scores.json` is there only when both files are whole
        save_file(arrays, temporary)
        replace_durably(temporary, folder / "scores.safetensors")
        layers = [
            {key: value for key, value in asdict(scores).items() if key not in ("statistics", "tables")}
            | {"tokens_per_expert": scores.statistics["tokens"].astype(int).tolist()}
            for scores in self.layers
        ]
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "min_tokens_per_expert": self.min_tokens_per_expert,
            "starved": self.starved,
            "layers": layers,
        }
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        replace_durably(temporary, folder / "scores.json")

    @classmethod
    def load(cls, folder: Path, only: Callable[[str], bool] = lambda name: True) -> Scores:
        """Read what `save` wrote, or `only` the statistics whose names it picks.

        Raises `UsageError` when the folder holds no scores of this format.
        """
        try:
            content = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            with safe_open(folder / "scores.safetensors", "np") as file:
                arrays = {name: file.get_tensor(name) for name in list(file.keys()) if only(name.split(".", 2)[2])}
        except FileNotFoundError:
            raise UsageError(f"{folder} holds no scores; make them with `moe-compress score`.") from None
        if content["format"] != FORMAT:
            raise UsageError(f"{folder} holds scores of format {content['format']}, this version reads {FORMAT}.")
        layers = []
        for entry in content["layers"]:
            entry.pop("tokens_per_expert")
            statistics, tables = (
                {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
                for prefix in (f"layer.{entry['layer']}.", f"table.{entry['layer']}.")
            )
            layers.append(LayerScores(**entry, statistics=statistics, tables=tables))
        return cls(layers, content["fingerprint"], content["min_tokens_per_expert"])
