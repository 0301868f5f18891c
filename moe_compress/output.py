"""What a finished folder holds beside its weights: the records of how it was made, then what was found out about it.

recipe.yaml, plan.json, experts.json, audit.json, manifest.json     before it is verified
report.json, report.md, README.md, .eval_results, report.html      when it is measured
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_compress import __version__
from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.rewrite import PROBE_FILE
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.manifest import (
    FORMAT,
    describe_source,
    file_hashes,
    hardware,
    identity_digest,
    identity_of,
    library_versions,
)
from moe_compress.measure import model_figures
from moe_compress.recipe import Recipe, dump_recipe
from moe_compress.report.audit import audit_section, load_audit
from moe_compress.report.build import build_report
from moe_compress.report.card import inherited_fields, model_card
from moe_compress.report.experts import EXPERTS_FILE, expert_statistics
from moe_compress.report.markdown import report_markdown
from moe_compress.report.page import write_page
from moe_compress.report.paths import without_local_paths
from moe_compress.report.scores import write_eval_results
from moe_compress.steps import FIRST_SCORES
from moe_compress.verification.checks import MANIFEST_FILE
from moe_compress.workspace import TOOL


class Output:
    """The folder of `finished`, the checkpoint that all steps of a run have made of `source` in the folder `work`."""

    def __init__(
        self, recipe: Recipe, source: Checkpoint, finished: Checkpoint, records: list[Record], work: Path, device: str
    ) -> None:
        self.recipe, self.source, self.finished, self.records = recipe, source, finished, records
        self.folder, self.device = finished.folder, device
        steps = [work / f"step-{number}" for number in range(len(records))]
        self.scores = [step / "scores" for step in steps]
        self.plans = [json.loads((step / "plan.json").read_text(encoding="utf-8")) for step in steps]
        self.audit = load_audit(work / FIRST_SCORES)

    @cached_property
    def published_recipe(self) -> str:
        """The recipe as others may see it."""
        return dump_recipe(Recipe.model_validate(without_local_paths(self.recipe.model_dump())))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the folder was made from and with; all but its files' hashes."""
        made: dict[str, Any] = without_local_paths(
            {
                "format": FORMAT,
                "tool": f"{TOOL} {__version__}",
                "source": describe_source(self.source),
                "recipe": self.recipe.model_dump(mode="json"),
                "steps": [record.to_json() for record in self.records],
                "stored_bytes": self.source.index.nbytes - sum(record.dropped_bytes for record in self.records),
                "versions": library_versions(),
                "hardware": hardware(self.device),
                "probe": PROBE_FILE,
                "identity": identity_digest(identity_of(self.recipe, self.source)),
            }
        )
        return made

    def write_records(self) -> None:
        """What `verify` and readers need to know of the checkpoint's making."""
        for cut_short in self.folder.rglob("*.part"):  # by a kill; the manifest must not list it
            cut_short.unlink()
        (self.folder / "recipe.yaml").write_text(self.published_recipe, encoding="utf-8")
        write_json(self.folder / "plan.json", without_local_paths({"steps": self.plans}))
        write_json(self.folder / EXPERTS_FILE, expert_statistics(self.scores))
        if self.audit:
            write_json(self.folder / AUDIT_FILE, without_local_paths(self.audit))
        write_json(self.folder / MANIFEST_FILE, self.manifest | {"files": file_hashes(self.folder)})

    def write_report(
        self, measured: list[dict[str, Any]], randoms: list[dict[str, Any]], checks: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Report, card and page of what was measured (original, compressed) and checked; returns the report."""
        report: dict[str, Any] = without_local_paths(
            build_report(
                model_figures(self.source, measured[0]),
                model_figures(self.finished, measured[1]),
                randoms,
                checks,
                self._settings(measured[1].get("settings", {})),
            )
        )
        write_json(self.folder / "report.json", report)
        text = report_markdown(report, self.published_recipe, self.plans)
        text += audit_section(self.audit) if self.audit else ""
        (self.folder / "report.md").write_text(text, encoding="utf-8")
        card = model_card(
            report,
            self.published_recipe,
            base_model=self.source.model_id,
            revision=self.source.revision,
            inherited=inherited_fields(self.source.folder),
            tier=self.recipe.export.tier,
        )
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        write_eval_results(self.folder, report)
        hashes = {"files": file_hashes(self.folder), "card": sha256_of(self.folder / "README.md")}
        write_json(self.folder / MANIFEST_FILE, self.manifest | hashes)
        write_page([self.folder])
        return report

    def _settings(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self.source.model_id,
            "revision": self.source.revision,
            "criterion": [record.label for record in self.records],
            "steps": [record.config for record in self.records],
            "calibration": calibration_of(self.records),
            "eval": dict(evaluation),
            "versions": self.manifest["versions"],
            "hardware": self.manifest["hardware"],
        }


def calibration_of(records: list[Record]) -> dict[str, Any] | None:
    """The first step's calibration, and under `step 2` and so on what differs in the later ones."""
    if not records:
        return None
    found: dict[str, Any] = records[0].coverage | records[0].calibration
    for number, record in enumerate(records[1:], start=2):
        coverage = dict(record.coverage)
        if not coverage:
            continue
        starved = coverage.pop("starved", [])
        coverage["experts with fewer tokens than the minimum"] = [
            f"layer {layer} expert {expert}" for layer, expert in starved
        ]
        found[f"step {number}"] = coverage
    return found or None
