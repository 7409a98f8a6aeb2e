"""Owns what plans, checkpoints, shelves and results look like, as tables and as JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from moeforge import catalog, families, gates, methods
from moeforge.checking.needs import peak_memory
from moeforge.checking.origins import groups
from moeforge.engine import Settings
from moeforge.families import _remote
from moeforge.markdown import amount
from moeforge.methods import REQUIRED, Method
from moeforge.output.layout import lay_out
from moeforge.planners.model import from_source, listing
from moeforge.plans import Plan, dump
from moeforge.prepare import Prepared
from moeforge.recipe import REMOTE
from moeforge.shown import show_size
from moeforge.sources import Source

if TYPE_CHECKING:
    from moeforge.proof.heldout import HeldOut

SHELVES = ("methods", "families", "gates")


def describe(prepared: Prepared, shard_size: int) -> dict[str, Any]:
    """Return a plan as plain data: totals, config, and every tensor with its place and origin.

    Args:
        prepared: what will be made.
        shard_size: most bytes of tensors per file.
    """
    plan = prepared.plan
    shards = lay_out(plan.tensors, shard_size)
    data: dict[str, Any] = {
        "kind": plan.kind,
        "architecture": (plan.config.get("architectures") or ["unknown"])[0],
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "bytes_read": plan.bytes_read,
        "bytes_written": sum(shard.nbytes for shard in shards),
        "bytes_copied": plan.bytes_copied,
        "disk_needed": sum(shard.nbytes for shard in shards),
        "peak_memory": peak_memory(prepared, Settings()),
        "config": plan.config,
        "sources": list(plan.sources),
        "notes": [note.as_data() for note in plan.notes],
        "left_out": {f"{at.source}: {at.name}": why for at, why in plan.left_out.items()},
        "tensors": [
            {
                "name": entry.tensor.name,
                "dtype": entry.tensor.spec.dtype.name,
                "shape": list(entry.tensor.spec.shape),
                "file": shard.name,
                "offset": entry.offset,
                "from": dump(entry.tensor.expr),
            }
            for shard in shards
            for entry in shard.entries
        ],
    }
    if plan.experts:
        data["experts"] = {
            "family": plan.experts.family,
            "experts": list(plan.experts.labels),
            "per_token": plan.experts.per_token,
            "gate_mode": plan.experts.gate_mode,
            "layers": list(plan.experts.layers),
            "shared": list(plan.experts.shared),
            "considered": dict(plan.experts.considered),
        }
    return data


def plan_table(plan: Plan, described: dict[str, Any]) -> Table:
    """Return the totals of a plan."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("makes", f"{described['architecture']}, {len(plan.tensors)} tensors")
    parameters = amount(plan.parameters)
    if plan.experts:
        parameters += f", {amount(plan.active_parameters)} active per token"
        e = plan.experts
        table.add_row(
            "experts", f"{len(e.labels)}, {e.per_token} per token, gate mode {e.gate_mode}"
        )
        if e.shared:
            table.add_row("shared", escape(", ".join(e.shared)))
        if "num_hidden_layers" in plan.config and len(e.layers) < plan.config["num_hidden_layers"]:
            table.add_row("in layers", ", ".join(map(str, e.layers)))
        for name, why in e.considered:
            table.add_row("architecture", escape(f"{name}: {why}"))
    table.add_row("parameters", parameters)
    table.add_row("reads", escape(f"{show_size(plan.bytes_read)} from {', '.join(plan.sources)}"))
    copied = 100 * plan.bytes_copied / max(plan.nbytes, 1)
    files = len({tensor["file"] for tensor in described["tensors"]})
    written = show_size(described["bytes_written"])
    table.add_row("writes", f"{written} in {files} file(s), {copied:.0f} % copied as it is")
    table.add_row("needs", f"about {show_size(described['peak_memory'])} memory, {written} disk")
    for left in groups(plan.left_out):
        where = listing(left["where"])
        what = f"{left['tensors']} tensors of {left['model']}: {where} ({left['why']})"
        table.add_row("leaves out", escape(what))
    for note in plan.notes:
        table.add_row("note", escape(str(note)))
    return table


_FACTS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
)


def facts(source: Source) -> dict[str, Any]:
    """Return what a checkpoint is, as plain data."""
    model = from_source(source)
    specs = source.specs()
    dtypes: dict[str, int] = {}
    for spec in specs.values():
        dtypes[spec.dtype.name] = dtypes.get(spec.dtype.name, 0) + spec.numel
    kind = str(source.config.get("model_type"))
    homes = [family.model_type for family in families.candidates(kind)]
    homes += [REMOTE] if kind in _remote.REMOTE else []
    return {
        "model": source.key,
        "architecture": (source.config.get("architectures") or ["unknown"])[0],
        "parameters": sum(spec.numel for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "tensors": len(specs),
        "dtypes": dtypes,
        "layers": model.layers.count,
        "tied_head": model.tied,
        **{key: source.config[key] for key in _FACTS if key in source.config},
        "moe_families": homes,
    }


def facts_table(found: dict[str, Any]) -> Table:
    """Return the facts of a checkpoint as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in found.items():
        text = str(value)
        if key == "parameters":
            text = f"{amount(value)} ({value:,})"
        elif key == "bytes":
            text = show_size(value)
        elif key == "dtypes":
            text = ", ".join(value)
        elif key == "moe_families":
            text = ", ".join(value) or "none"
        table.add_row(key, escape(text))
    return table


_WHOSE = {"shared": "", "input": " (each)", "non_base": " (each)"}


def _models(method: Method) -> str:
    """Return how many models a method takes, in words."""
    fewest, most = method.inputs
    words = "a base, " if method.base == "required" else ""
    if words:
        fewest, most = fewest - 1, None if most is None else most - 1
    if most == fewest:
        words += f"{fewest} other{'' if fewest == 1 else 's'}" if words else str(fewest)
    elif words:
        words += f"{fewest or 'any number of'}{' or more' if fewest else ''} others"
    else:
        words = f"{fewest} or more"
    return words + (", a base if wanted" if method.base == "optional" else "")


def shelf_rows(shelf: str) -> list[dict[str, Any]]:
    """Return the entries of a shelf as plain data."""
    rows: list[dict[str, Any]] = []
    for name in catalog.names(shelf):
        if shelf == "methods":
            method = methods.load(name)
            params = [
                f"{key}{'' if param.default is REQUIRED else f'={param.default}'}"
                + _WHOSE[param.scope]
                for key, param in method.params.items()
                if not param.unused
            ]
            rows.append(
                {
                    "name": name,
                    "models": _models(method),
                    "paper": method.paper,
                    "parameters": ", ".join(params),
                }
            )
        elif shelf == "families":
            family = families.load(name)
            rows.append(
                {
                    "name": name,
                    "from": ", ".join(sorted(family.accepts)),
                    "class": family.architecture,
                }
            )
        else:
            gate = gates.load(name)
            rows.append(
                {"name": name, "prompts": "yes" if gate.needs_prompts else "no", "what": gate.title}
            )
    if shelf == "families":
        kinds = ", ".join(sorted(_remote.REMOTE))
        rows.append({"name": REMOTE, "from": kinds, "class": "code of its own"})
    return rows


def shelf_table(shelf: str) -> Table:
    """Return a shelf as a table."""
    rows = shelf_rows(shelf)
    table = Table(title=shelf, title_justify="left")
    columns = [column for column in rows[0] if column != "paper"]  # too wide; --json has it
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def short_labels(labels: tuple[str, ...]) -> list[str]:
    """Return the last part of each path, as long as they differ."""
    short = [os.path.basename(label.rstrip("/")) or label for label in labels]
    return short if len(set(short)) == len(set(labels)) else list(labels)


def heldout_tables(heldout: HeldOut) -> list[str | Table]:
    """Return losses and routing on held-out text as headings and tables."""
    names = tuple(heldout.losses)
    table = Table()
    table.add_column("model")
    for domain in (*heldout.domains, "mean"):
        table.add_column(escape(domain), justify="right")
    for name, label in zip(names, short_labels(names), strict=True):
        cells = [f"{loss:.3f}" for loss in (*heldout.losses[name], heldout.mean(name))]
        table.add_row(escape(label), *cells, style="bold" if name == names[-1] else "")
    shown: list[str | Table] = ["\nLoss on held-out text, nats per token (lower is better)", table]
    if heldout.routing:
        table = Table()
        table.add_column("text")
        for expert in short_labels(heldout.experts):
            table.add_column(escape(expert), justify="right")
        for domain, shares in heldout.routing.items():
            best = max(shares)
            cells = [f"[bold]{s:.0%}[/]" if s == best else f"{s:.0%}" for s in shares]
            table.add_row(escape(domain), *cells)
        shown += ["\nWhere the mixture's tokens go, share of router weight", table]
    return shown
