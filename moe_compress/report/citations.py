"""The papers behind what a recipe does, as BibTeX for the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_compress.recipe import OPERATIONS


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


BIBLIOGRAPHY = {
    paper.arxiv: paper
    for paper in (
        Paper("hinton2015distilling", "Hinton, Geoffrey", "Distilling the Knowledge in a Neural Network", "1503.02531"),
        Paper(
            "liu2026score",
            "Liu, Zongfang",
            "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
            "2606.15716",
        ),
        Paper(
            "lasby2025reap",
            "Lasby, Mike",
            "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
            "2510.13999",
        ),
        Paper(
            "dong2025easyep",
            "Dong, Zican",
            "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
            "2504.06792",
        ),
        Paper(
            "zhang2025mone",
            "Zhang, Geng",
            "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE",
            "2507.00390",
        ),
        Paper(
            "chen2024hcsmoe",
            "Chen, I-Chun",
            "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering",
            "2410.08589",
        ),
        Paper(
            "li2023mcsmoe",
            "Li, Pingzhi",
            "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
            "2310.01334",
        ),
        Paper(
            "jha2026ream",
            "Jha, Saurav",
            "REAM: Merging Improves Pruning of Experts in LLMs",
            "2604.04356",
        ),
        Paper(
            "chakrabarti2026lorexperts",
            "Chakrabarti, Inesh",
            "Shape Mutating Expert Compression: LorExperts and BTExperts",
            "2608.07814",
        ),
        Paper(
            "jaggi2026tying",
            "Jaggi, Martin",
            "Tying the Loop -- Tied Expert Layers in Mixture-of-Experts Language Models",
            "2606.16825",
        ),
        Paper(
            "su2025super",
            "Su, Zunhai",
            "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
            "2507.23279",
        ),
        Paper(
            "frantar2022gptq",
            "Frantar, Elias",
            "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
            "2210.17323",
        ),
        Paper("huang2024mc", "Huang, Wei", "Mixture Compressor for Mixture-of-Experts LLMs Gains More", "2410.06270"),
        Paper(
            "lu2024naee",
            "Lu, Xudong",
            "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language "
            "Models",
            "2402.14800",
        ),
        Paper(
            "chen2026halving",
            "Chen, Xing",
            "Training-Free Halving of Activated Experts in Fine-Grained Mixture-of-Experts Models",
            "2609.04575",
        ),
        Paper(
            "liu2026allocmoe",
            "Liu, Baihui",
            "Alloc-MoE: Budget-Aware Expert Activation Allocation for Efficient Mixture-of-Experts Inference",
            "2604.08133",
        ),
        Paper(
            "lv2026zeda", "Lv, Xingtai", "Post-Trained MoE Can Skip Half Experts via Self-Distillation", "2605.18643"
        ),
        Paper(
            "zeng2024adamoe",
            "Zeng, Zihao",
            "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
            "2406.13233",
        ),
        Paper("dettmers2023qlora", "Dettmers, Tim", "QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"),
        Paper(
            "dettmers2022llmint8",
            "Dettmers, Tim",
            "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
            "2208.07339",
        ),
    )
}


def papers(steps: Sequence[Mapping[str, Any]]) -> list[Paper]:
    """The papers that these steps (their resolved settings) follow, each once, in the order of their use."""
    numbers = dict.fromkeys(number for step in steps for number in OPERATIONS[step["op"]].papers(step))
    return [BIBLIOGRAPHY[number] for number in numbers]
