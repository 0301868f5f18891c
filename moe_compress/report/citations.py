"""The papers behind what a recipe does, as BibTeX for the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv; `author` is the first one."""

    key: str
    author: str
    title: str
    arxiv: str

    @property
    def bibtex(self) -> str:
        year = f"20{self.arxiv[:2]}"  # an arXiv number begins with the year and the month
        return (
            f"@misc{{{self.key},\n  author = {{{self.author} and others}},\n  title = {{{self.title}}},\n"
            f"  year = {{{year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n"
            f"  url = {{https://arxiv.org/abs/{self.arxiv}}}\n}}"
        )


FAMILY = Paper(
    "liu2026score",
    "Liu, Zongfang",
    "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
    "2606.15716",
)
REAP = Paper(
    "lasby2025reap",
    "Lasby, Mike",
    "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    "2510.13999",
)
EASY_EP = Paper(
    "dong2025easyep",
    "Dong, Zican",
    "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    "2504.06792",
)
MONE = Paper(
    "zhang2025mone",
    "Zhang, Geng",
    "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE",
    "2507.00390",
)
SUPER_EXPERTS = Paper(
    "su2025super", "Su, Zunhai", "Unveiling Super Experts in Mixture-of-Experts Large Language Models", "2507.23279"
)
GPTQ = Paper(
    "frantar2022gptq",
    "Frantar, Elias",
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "2210.17323",
)
MIXTURE_COMPRESSOR = Paper(
    "huang2024mc", "Huang, Wei", "Mixture Compressor for Mixture-of-Experts LLMs Gains More", "2410.06270"
)
QLORA = Paper("dettmers2023qlora", "Dettmers, Tim", "QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314")
LLM_INT8 = Paper(
    "dettmers2022llmint8",
    "Dettmers, Tim",
    "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    "2208.07339",
)

CRITERIA = {"reap": REAP, "easy_ep": EASY_EP, "mone": MONE} | dict.fromkeys(("seer", "man", "msan"), FAMILY)
METHODS = {"gptq": GPTQ, "nf4": QLORA, "int8": LLM_INT8}
BUDGETS = ("average_bits", "stored_bytes", "active_bytes")


def papers(steps: Sequence[Mapping[str, Any]]) -> list[Paper]:
    """The papers that these steps (their resolved settings) follow, each once, in the order of their use."""
    return list(dict.fromkeys(paper for step in steps for paper in _papers_of(step)))


def _papers_of(step: Mapping[str, Any]) -> Iterator[Paper]:
    if step.get("op") == "prune":
        criterion = step.get("criterion")
        if isinstance(criterion, Mapping):
            yield FAMILY
        elif criterion in CRITERIA:
            yield CRITERIA[criterion]
        if step.get("protect_super_experts"):
            yield SUPER_EXPERTS
    elif step.get("op") == "quantize":
        if step.get("method") in METHODS:
            yield METHODS[step["method"]]
        if any(step.get(name) is not None for name in BUDGETS):
            if step.get("allocation") == "optimal":
                yield MIXTURE_COMPRESSOR
            if step.get("protect_super_experts"):
                yield SUPER_EXPERTS
