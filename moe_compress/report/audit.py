"""What an audit found, for readers: sentences, rows of a table, and a page of Markdown. It measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_compress.calibrate.agreement import AUDIT_FILE

Found = Mapping[str, Any]

HEADER = (
    "criterion", "rho in layers", "95 % interval", "p, corrected", "tau in layers", "rho over all", "lowest less random"
)  # fmt: skip
BETTER, NO_BETTER = "better than random", "no better than random"


def load_audit(folder: Path) -> dict[str, Any]:
    """What an audit wrote into the folder of its scores; empty where none did."""
    file = folder / AUDIT_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def verdicts(found: Found) -> list[str]:
    """What the audit says, in sentences: of the recipe's criteria first, then which are no better than random."""
    by_name = {one["criterion"]: one for one in found["criteria"]}
    sentences = [_verdict(by_name[name]) for name in found["criteria_of_the_recipe"] if name in by_name]
    best = found["criteria"][0]
    if best["better_than_random"]:
        sentences.append(f"`{best['criterion']}` agrees best with what was measured ({_rho(best)}).")
    useless = [one["criterion"] for one in found["criteria"] if not one["better_than_random"]]
    others = [name for name in useless if name not in found["criteria_of_the_recipe"]]
    if others:
        names = ", ".join(f"`{name}`" for name in others)
        sentences.append(f"{NO_BETTER} within layers: {names}.")
    if "held_out" not in found["settings"]:
        sentences.append("the losses were measured on calibration sequences, which the other criteria have seen too.")
    low, high = found["chance"]["spearman_ci"]
    sentences.append(f"random scores reach rho between {low:+.2f} and {high:+.2f} in 95 of 100 cases.")
    if found["ceiling"] is not None:
        sentences.append(
            f"with the noise of these {found['settings']['sequences']} sequences, a perfect criterion would be "
            f"expected to reach {found['ceiling']:.2f}."
        )
    return sentences


def criterion_rows(found: Found) -> list[list[str]]:
    """The header and a row for each criterion, best first."""
    rows = [list(HEADER)]
    for one in found["criteria"]:
        rows.append([
            one["criterion"],
            f"{one['spearman']:+.3f}",
            _between(one["spearman_ci"]),
            f"{one['p_corrected']:.2g} ({BETTER if one['better_than_random'] else NO_BETTER})",
            f"{one['kendall']:+.3f} {_between(one['kendall_ci'])}",
            f"{one['pooled_spearman']:+.3f} {_between(one['pooled_spearman_ci'])}",
            f"{1000 * one['lowest_less_random']:+.2f} {_between(one['lowest_less_random_ci'], 1000, 2)}",
        ])  # fmt: skip
    return rows


def audit_markdown(found: Found) -> str:
    """The page `audit.md`."""
    settings, random = found["settings"], found["random_expert"]
    measured = sum(len(layer["experts"]) for layer in found["layers"])
    silenced = [str(layer["layer"]) for layer in found["layers"] if layer["layer"] not in settings["replaced_in"]]
    lines = [
        f"# Audit of {found['model']}",
        "",
        f"{measured} experts of {len(found['layers'])} layers were taken out, one by one, and the loss measured on "
        f"{settings['sequences']} held-out sequences of {settings['sequence_length']} tokens (whole model: "
        f"{found['loss']:.4f} nats per token). Taking out an expert drawn at random adds {1000 * random['change']:.2f} "
        f"{_between(random['change_ci'], 1000, 2)} thousandths of a nat. Scores are of "
        f"{settings['calibration_tokens']:,} calibration tokens.",
        "",
        *(f"* {sentence}" for sentence in verdicts(found)),
        "",
        "rho is Spearman's, tau Kendall's tau-b, between a criterion and the change of the loss: the mean of the "
        "layers' own, and over all experts at once. Intervals are bootstrapped over sequences and experts; p is "
        "one-sided, by reordering within layers, corrected for all criteria (Holm). The last column is what the "
        "lowest-scored of a layer's measured experts costs less one drawn at random, in thousandths of a nat: below 0 "
        "is better.",
        "",
        *_table(criterion_rows(found)),
        "",
        "## By layer",
        "",
        "rho of each criterion; `*` marks p < 0.05 after correction for all criteria and layers.",
        "",
        *_table(layer_rows(found)),
        "",
        "## Experts",
        "",
        "What taking an expert out adds to the loss, in thousandths of a nat per token, with its 95 % interval.",
        "",
        *_table(expert_rows(found)),
    ]
    if silenced:
        lines += [
            "",
            f"In layers {', '.join(silenced)} nothing took the expert's place: their routers cannot lose a single one.",
        ]
    return "\n".join(lines) + "\n"


def audit_section(found: Found) -> str:
    """What `report.md` says of the audit of the scores that a result was made with."""
    sentences = "\n".join(f"* {sentence}" for sentence in verdicts(found))
    return "\n".join(["", "## Audit of the criteria", "", sentences, "", *_table(criterion_rows(found)), ""])


def layer_rows(found: Found) -> list[list[str]]:
    """rho of every criterion in every layer."""
    rows = [["criterion", *(str(layer["layer"]) for layer in found["layers"])]]
    for one in found["criteria"]:
        marks = [f"{cell['spearman']:+.2f}{'*' if cell['p_corrected'] < 0.05 else ''}" for cell in one["layers"]]
        rows.append([one["criterion"], *marks])
    return rows


def expert_rows(found: Found) -> list[list[str]]:
    """The change of the loss without every measured expert."""
    rows = [["layer", "expert", "added to the loss", "95 % interval"]]
    for layer in found["layers"]:
        for expert, change, ends in zip(layer["experts"], layer["changes"], layer["changes_ci"], strict=True):
            rows.append([str(layer["layer"]), str(expert), f"{1000 * change:+.2f}", _between(ends, 1000, 2)])
    return rows


def _verdict(one: Found) -> str:
    figures = f"{_rho(one)}, p {one['p_corrected']:.2g}"
    if one["better_than_random"]:
        return f"`{one['criterion']}` ranks a layer's experts better than chance ({figures})."
    return (
        f"`{one['criterion']}` is no better than random at ranking a layer's experts, on this model and text "
        f"({figures}); do not choose experts by it."
    )


def _rho(one: Found) -> str:
    return f"rho {one['spearman']:+.2f}, 95 % interval {_between(one['spearman_ci'])}"


def _between(ends: Sequence[float], scale: float = 1, digits: int = 2) -> str:
    return f"[{scale * ends[0]:+.{digits}f}, {scale * ends[1]:+.{digits}f}]"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
