"""Owns mixtures of dense families that no MoE architecture holds: they bring code of their own."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.errors import Path
from moeforge.families import Mixture
from moeforge.planners.model import Findings
from moeforge.planners.parts import Parts
from moeforge.plans import Plan

WHY = "no MoE architecture of transformers is exact, so the model brings code of its own"


def refuse(config: Config, mixture: Mixture) -> str:
    """Return why there is no mixture with code of its own for this dense model, or ""."""
    return "not there yet"


def plan(parts: Parts, findings: Findings, notes: Findings, path: Path) -> Plan | None:
    """Plan a mixture with code of its own; None where something was found wrong."""
    raise NotImplementedError
