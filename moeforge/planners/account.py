"""Owns the account of a plan: every input tensor is used, or knowingly left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from moeforge.errors import Finding, PlanError
from moeforge.planners.model import listing, natural, reads
from moeforge.plans import ROUTERS, Plan, Read


def accounted(plan: Plan) -> Plan:
    """Return `plan` if it loses no tensor, reads none that is not there, and makes none twice.

    Planners say of each tensor what becomes of it; this holds them to it. What one model leaves out
    and another uses is no longer listed.

    Raises:
        PlanError: with every model that has tensors which nothing is said of.
    """
    used = {read for tensor in plan.tensors for read in reads(tensor)}
    known = used | plan.left_out.keys()
    named: dict[str, list[str]] = {}
    for part in used:
        named.setdefault(part.source, []).append(part.name)
    findings = []
    for key, source in plan.sources.items():
        specs = source.specs()
        lost = [name for name in specs if Read(key, name) not in known]
        if lost:
            what = f"{len(lost)} tensors of {key} have no place in the output: "
            fix = "No weight is dropped silently: moeforge does not know what these are for."
            findings.append(Finding(what + listing(sorted(lost, key=natural)), fix))
        absent = [name for name in named.get(key, ()) if name not in specs]
        if absent:
            what = f"{key} lacks {len(absent)} tensors: {listing(sorted(absent, key=natural))}"
            findings.append(Finding(what, "Download or export it again."))
    if unknown := sorted(named.keys() - plan.sources.keys() - {ROUTERS}):
        findings.append(Finding(f"the plan reads {listing(unknown)}, which it does not open"))
    counts = Counter(tensor.name for tensor in plan.tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        findings.append(Finding(f"{len(twice)} tensors would be made twice: {listing(twice)}"))
    if findings:
        raise PlanError(*findings)
    left_out = {read: why for read, why in plan.left_out.items() if read not in used}
    return replace(plan, left_out=left_out)
