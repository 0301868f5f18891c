"""Train the reference model: `python -m moe_compress.reference.train OUT`.

A Qwen3-MoE of about 12 million parameters, trained from nothing on the standard library, its documentation,
English prose and generated skills. Every row of every step is a function of the seed and the step alone, so a
run killed at any moment and started again ends where an uninterrupted one would.

* Matrices inside the layers are trained by Muon, everything else by AdamW.
* The load-balancing loss (Switch Transformer, eq. 4) is computed per layer: pooled over layers, as
  `transformers` does it, it is satisfied by layers that have collapsed onto one expert.
* The learning rate warms up, stays, and decays to zero over the last quarter (WSD), so a run can be extended
  from any state saved before the decay.

Not covered: several devices, anything that makes a large model train well.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_compress.reference import corpus, skills

VOCABULARY_SIZE = 4096
SEQUENCE_LENGTH = 512
END = "<|endoftext|>"
# Sixteen consecutive rows hold this many of each source.
ROWS = {"code": 6, "documentation": 1, "prose": 3, "facts": 2, "reasoning": 4}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}\n"
    "{% else %}Question: {{ message.content }}\nAnswer:{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result; a resumed run must have the same."""

    tokens: int = 11_000_000
    batch_rows: int = 8
    muon_learning_rate: float = 5e-3
    adam_learning_rate: float = 3e-3
    warmup_steps: int = 60
    decay_fraction: float = 0.25
    balance: float = 0.02
    prose_bytes: int = 8_000_000
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch_rows * SEQUENCE_LENGTH))

    def learning_rate_factor(self, step: int) -> float:
        """Warm-up, plateau, linear decay."""
        remaining = (self.steps - step) / max(1, round(self.steps * self.decay_fraction))
        return min(1.0, (step + 1) / self.warmup_steps, remaining)


def model_config() -> Qwen3MoeConfig:
    """The architecture: 8 layers, 16 experts, top-4."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=SEQUENCE_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.02,
    )
    config.head_dim = 64
    return config


# -------------------------------------------------------------------------------------------------------- data


def documents(settings: Settings, data: Path) -> dict[str, list[str]]:
    """The training side of the three text sources."""
    sources: dict[str, Iterator[tuple[str, str]]] = {
        "code": corpus.stdlib_code(),
        "documentation": corpus.stdlib_documentation(),
        "prose": corpus.prose(data / "enwik8.gz", settings.prose_bytes),
    }
    return {name: [text for title, text in items if not corpus.is_heldout(title)] for name, items in sources.items()}


def train_tokenizer(texts: dict[str, list[str]], seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that sums can be learnt."""
    rng = random.Random(f"tokenizer-{seed}")
    world = skills.facts()
    samples = [skills.fact_document(rng.choice(world), rng) for _ in range(20_000)]
    samples += [skills.draw(rng.choice(list(skills.REASONING)), rng, test=False).document() for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts["code"], *texts["documentation"], *texts["prose"], *samples], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=SEQUENCE_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents in one int16 array, each closed by the end token."""
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*document, 0], dtype=np.int16) for document in ids])


class Rows:
    """Row `n` of the training stream, for any n, in any order."""

    def __init__(self, tokens: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokens, self.tokenizer, self.seed = tokens, tokenizer, seed
        self.pattern = [name for name, count in ROWS.items() for _ in range(count)]
        random.Random(f"pattern-{seed}").shuffle(self.pattern)
        self.world = skills.facts()
        self._order: dict[tuple[str, int], np.ndarray] = {}

    def row(self, n: int) -> np.ndarray:
        name = self.pattern[n % len(self.pattern)]
        before = self.pattern[: n % len(self.pattern)].count(name)
        index = n // len(self.pattern) * ROWS[name] + before
        return self._text_row(name, index) if name in self.tokens else self._skill_row(name, index)

    def _text_row(self, name: str, index: int) -> np.ndarray:
        source = self.tokens[name]
        epoch, position = divmod(index, len(source) // SEQUENCE_LENGTH - 1)
        if (name, epoch) not in self._order:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(source) // SEQUENCE_LENGTH - 1)
            self._order[name, epoch] = order
        shift = epoch * 131 % SEQUENCE_LENGTH  # other windows in other epochs
        start = int(self._order[name, epoch][position]) * SEQUENCE_LENGTH + shift
        return source[start : start + SEQUENCE_LENGTH + 1]

    def _skill_row(self, name: str, index: int) -> np.ndarray:
        rng = random.Random(f"{self.seed}-{name}-{index}")
        row: list[int] = []
        while len(row) <= SEQUENCE_LENGTH:
            if name == "facts":
                document = skills.fact_document(rng.choice(self.world), rng)
            else:
                document = skills.draw(rng.choice(list(skills.REASONING)), rng, test=False).document()
            row += [*self.tokenizer(document, add_special_tokens=False)["input_ids"], 0]
        return np.array(row[: SEQUENCE_LENGTH + 1])

    def batch(self, step: int, rows: int) -> torch.Tensor:
        """Token ids [rows, SEQUENCE_LENGTH + 1] of one step."""
        return torch.from_numpy(np.stack([self.row(step * rows + i) for i in range(rows)]).astype(np.int64))


# ---------------------------------------------------------------------------------------------------- training


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), for stacks of matrices [..., R, C].

    `torch.optim.Muon` takes single matrices only; here all experts of a layer are updated by one batched product.
    A group's `fused` says how many matrices its parameters stack along their rows (2 for gate-and-up).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "fused": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                matrices = update.reshape(-1, update.shape[-2] // group["fused"], update.shape[-1])
                scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))  # same update size as AdamW
                parameter.add_(orthogonalise(matrices).view_as(update), alpha=-group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrices of a stack [N, R, C], roughly, by the quintic Newton-Schulz iteration."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = (x.mT if tall else x).float()
    return result


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of N/K * sum_i f_i P_i, each layer by itself; 1 when perfectly balanced."""
    losses = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        chosen_TK = probability_TE.topk(top_k).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[-1]) / len(logits_TE)
        losses.append((load_E * probability_TE.mean(0)).sum() * logits_TE.shape[-1] / top_k)
    return torch.stack(losses).mean()


def optimizers(model: Qwen3MoeForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts, AdamW for embeddings, routers and norms."""
    fused, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            fused.append(parameter)
        elif name.startswith("model.layers.") and parameter.ndim >= 2 and not name.endswith("gate.weight"):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return [
        Muon([{"params": matrices}, {"params": fused, "fused": 2}], lr=settings.muon_learning_rate),
        torch.optim.AdamW(rest, lr=settings.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(settings: Settings, out: Path, data: Path, save_every: int, autocast: bool) -> None:
    """Train into `out`, going on from `out/state.pt` if it is there."""
    out.mkdir(parents=True, exist_ok=True)
    texts = documents(settings, data)
    tokenizer_folder = out / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(texts, settings.seed).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = {name: tokenize(items, tokenizer) for name, items in texts.items()}
    for name, ids in tokens.items():
        print(f"{name}: {len(ids):,} tokens, {sum(len(t.encode()) for t in texts[name]) / len(ids):.2f} bytes each")
    rows = Rows(tokens, tokenizer, settings.seed)

    torch.manual_seed(settings.seed)
    config = model_config()
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {settings.steps:,} steps")
    optims = optimizers(model, settings)
    first = 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        if state["settings"] != asdict(settings) and first_decay_step(state["settings"]) <= state["step"]:
            raise ValueError(f"{out}/state.pt was trained with other settings: {state['settings']}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]

    started = time.monotonic()
    for step in range(first, settings.steps):
        for optimizer, rate in zip(optims, (settings.muon_learning_rate, settings.adam_learning_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * settings.learning_rate_factor(step)
        batch = rows.batch(step, settings.batch_rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
            loss = F.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            balance = balance_loss(output.router_logits, config.num_experts_per_tok)
        (loss + settings.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == settings.steps:
            done = (step + 1 - first) * settings.batch_rows * SEQUENCE_LENGTH
            rate = done / (time.monotonic() - started)
            record = {"step": step, "loss": round(loss.item(), 4), "balance": round(balance.item(), 4)}
            left = (settings.steps - step - 1) * settings.batch_rows * SEQUENCE_LENGTH / rate / 60
            print(f"{record}  {rate:,.0f} tokens/s  {left:.0f} min left", flush=True)
            with (out / "loss.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            save_state(out, settings, step + 1, model, optims)
    export(model, tokenizer, out / "checkpoint")


def first_decay_step(settings: dict[str, float]) -> int:
    """The step at which a run with these settings begins to lower its learning rate."""
    planned = Settings(**settings)  # type: ignore[arg-type]
    return planned.steps - round(planned.steps * planned.decay_fraction)


def save_state(
    out: Path, settings: Settings, step: int, model: torch.nn.Module, optims: list[torch.optim.Optimizer]
) -> None:
    """Write `state.pt` whole or not at all."""
    state = {
        "settings": asdict(settings),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optims],
    }
    torch.save(state, out / "state.part")
    (out / "state.part").rename(out / "state.pt")


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The finished model as a bf16 checkpoint in several shards."""
    model.bfloat16().save_pretrained(folder, max_shard_size="9MB")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the reference model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "moe_compress")
    parser.add_argument("--tokens", type=int, default=Settings.tokens)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, for processors with bf16 units")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Settings(tokens=arguments.tokens), arguments.out, arguments.data, arguments.save_every, arguments.bf16)


if __name__ == "__main__":
    main()
