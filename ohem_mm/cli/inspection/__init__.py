"""What a config mines, head by head, and what is wrong with it. Needs neither data nor a GPU.

It reads the config and builds no model. mmseg's OHEMPixelSampler and OhemCrossEntropy are read by
their own rules. ``tools/inspect_config.py`` shows what it finds; ``tools/train.py`` looks as well.
"""

from __future__ import annotations

import difflib
from typing import Any

from mmengine.registry import HOOKS

from ohem_mm import cli
from ohem_mm.cli.inspection.findings import FATAL, FINDINGS, merged, sentence
from ohem_mm.cli.inspection.heads import OURS, REGION, Head, Row
from ohem_mm.cli.inspection.mmseg import MMSEG, SAMPLER
from ohem_mm.cli.inspection.reading import Reading

__all__ = ["FINDINGS", "Inspector", "check", "sentence"]

# These hooks act on our loss alone.
OUR_HOOKS = ("FusedOhemHook", "OhemMonitorHook", "OhemScheduleHook")


class Inspector(Reading):
    """Reads one config: every loss of every head, and what is wrong with it, worst first."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.rows: list[Row] = []
        for path, node in self.heads():
            self.rows += Head(self, path, node).rows
        self._check_whole()
        self.findings = merged(self.findings)

    def _check_whole(self) -> None:
        self._check_lost()
        errors = any(finding.severity == "error" for finding in self.findings)
        self.add("no-heads", "model", not self.rows)
        idle = not errors and all(row.mines != "yes" for row in self.rows)
        self.add("name-says-ohem", "model", idle and "ohem" in self.name.lower(), name=self.name)
        has_ours = any(row.rule == OURS for row in self.rows)
        has_region = any(row.loss == REGION for row in self.rows)
        for place, node in enumerate(self.cfg.get("custom_hooks") or []):
            self.check_type(HOOKS, f"custom_hooks.{place}", node)
        for hook in self.hooks if not has_ours else ():
            idle = hook in OUR_HOOKS and not (hook == OUR_HOOKS[0] and has_region)
            self.add("hook-idle", "custom_hooks", idle, hook=hook)
        self.add("schedule", "custom_hooks", has_ours and "OhemScheduleHook" in self.hooks)
        imports = (self.cfg.get("custom_imports") or {}).get("imports") or []
        imports = [imports] if isinstance(imports, str) else imports
        if any(name.split(".")[0] == "ohem_mm" for name in imports):
            return
        for part in ("model", "custom_hooks"):
            for path, node in cli.iter_dicts(self.cfg.get(part), part):
                if node.get("type") in (OURS, REGION, *OUR_HOOKS):
                    self.add("not-imported", path, type=node["type"])

    def _check_lost(self) -> None:
        """OHEM settings, or a whole model, under a top-level key that nothing reads."""
        used = [node for _, node in cli.iter_dicts(self.model)]
        for key in self.cfg:
            if key in ("model", "custom_hooks", "default_hooks"):
                continue
            lost = [
                cli.type_name(node)
                for _, node in cli.iter_dicts(self.cfg[key], key)
                if cli.type_name(node) in (OURS, MMSEG, SAMPLER, *OUR_HOOKS)
                # A variable that the model was made from stays in the config.
                and not any(all(other.get(k) == v for k, v in node.items()) for other in used)
            ]
            meant = "custom_hooks" if lost and lost[0] in OUR_HOOKS else "model"
            alike = difflib.SequenceMatcher(None, key.lower(), meant).ratio() > 0.8
            if lost or (alike and isinstance(self.cfg[key], dict)):
                inside = ", ".join(f"{lost.count(name)} {name}" for name in dict.fromkeys(lost))
                inside = inside and f" ({inside})"
                self.add("lost", key, key=key, inside=inside, meant=meant)


def check(cfg: Any) -> None:
    """Look at a config before it is trained: errors and warnings go to stderr, once for all ranks.

    What would stop the training at its start, or at its first batch, ends in a UserError.
    """
    for finding in Inspector(cfg).findings:
        text = f"{finding.where}: {sentence(finding.what)} Remedy: {sentence(finding.remedy)}"
        if finding.code in FATAL:
            raise cli.UserError(text)
        if finding.severity != "note":
            cli.warn(text)
