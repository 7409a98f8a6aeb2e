"""Owns mixtures of dense families that no MoE architecture holds: they bring code of their own."""

from __future__ import annotations

from collections.abc import Iterator

from moeforge.configs import Config, portable
from moeforge.dense import anatomy, hidden_size
from moeforge.errors import Path
from moeforge.families import Mixture, _remote
from moeforge.planners.copies import warn_of_copies
from moeforge.planners.fit import unlike
from moeforge.planners.model import Findings
from moeforge.planners.parts import Parts
from moeforge.planners.remote_mlps import Mlps
from moeforge.plans import ROUTERS, Plan, PlannedTensor, Read
from moeforge.recipe import REMOTE
from moeforge.tensors import DType, TensorSpec

WHY = "no MoE architecture that other engines know is exact, so the model brings code of its own"
TRUST = (
    f"the output comes with program text of its own, {_remote.FILE}: transformers loads it with "
    "trust_remote_code=True only, and other engines do not know it"
)
UNLOADED = "transformers does not load it: the model makes it anew, or has no use for it"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refuse(config: Config, mixture: Mixture) -> str:
    """Return why there is no mixture with code of its own for this dense model, or ""."""
    kind = str(config.get("model_type"))
    remote = _remote.REMOTE.get(kind)
    if remote is not None:
        had = remote.dense_if and config.get(remote.dense_if)
        return f"it has experts already ({remote.dense_if} in its config)" if had else ""
    if kind in _remote.REFUSED:
        return _remote.REFUSED[kind]
    if config.get("is_encoder_decoder"):
        return "it is an encoder and a decoder"
    if counted := [key for key in _COUNTS if config.get(key)]:
        return f"it has experts already ({counted[0]} in its config)"
    return f"moeforge does not know where the MLPs of a {kind} model lie"


def plan(parts: Parts, findings: Findings, notes: Findings, path: Path) -> Plan | None:
    """Plan a mixture with code of its own; None where something was found wrong.

    Args:
        parts: what it is made of; the base's type is one that `refuse` does not refuse.
        findings: receives what is wrong.
        notes: receives what is worth knowing.
        path: where the mixture stands in the recipe.
    """
    before, kind = len(findings), parts.base.config["model_type"]
    for expert in (*parts.experts, *parts.shared):
        for model in expert.distinct:
            if model.config.get("model_type") != kind:
                others = [each for e in (*parts.experts, *parts.shared) for each in e.distinct]
                findings.error(*unlike(parts.base, model, others), expert.path)
    if len(findings) > before:
        return None
    mlps = Mlps(parts, findings, path)
    if len(findings) > before:
        return None
    notes.error(TRUST, path=(*path, "architecture"))
    warn_of_copies(parts, mlps.of, notes)
    return _assemble(parts, mlps, notes)


def _assemble(parts: Parts, mlps: Mlps, notes: Findings) -> Plan:
    """Return the plan of a mixture whose MLPs are known to fit together."""
    config, mixture = parts.base.config, parts.mixture
    embeddings = mlps.base.get(anatomy(config).embeddings)
    dtype = parts.dtype or (embeddings or next(iter(mlps.base.values()))).spec.dtype
    text, model_type, model = _remote.code(config)
    layers = [layer for layer, sparse in enumerate(mixture.sparse) if sparse]
    written = portable(config, dtype.name)
    written.update(mlps.resized)
    written.update(
        model_type=model_type,
        architectures=[model],
        auto_map=_remote.auto_map(model),
        num_experts=mixture.experts,
        num_experts_per_tok=mixture.per_token,
        num_shared_experts=len(parts.shared),
        moe_layers=layers,
    )
    tensors = tuple(_tensors(parts, mlps, dtype))
    routers = [f"{mlps.block(layer)}.gate.weight" for layer in layers]
    parameters = sum(
        tensor.spec.numel
        for layer in layers
        for expert in parts.experts
        for tensor in mlps.expert(expert, layer).values()
    )
    return Plan(
        "moe",
        tensors,
        written,
        parts.sources(),
        parts.base.donor,
        parts.experts_of(REMOTE, routers, parameters),
        parts.base.tokenizer,
        {**parts.left_out(tensors), **dict.fromkeys(mlps.unloaded, UNLOADED)},
        tuple(notes),
        {_remote.FILE: text},
    )


def _tensors(parts: Parts, mlps: Mlps, dtype: DType) -> Iterator[PlannedTensor]:
    """Yield the base's tensors, in its order, with experts where it has MLPs."""
    done: set[int] = set()
    for name, tensor in mlps.base.items():
        place = mlps.split(name)
        if place is None or place[0] >= len(parts.mixture.sparse):
            yield _named(name, parts.cast(tensor))
        elif not parts.mixture.sparse[place[0]]:
            yield _named(name, mlps.dense(place[0])[place[1]])
        elif place[0] not in done:
            done.add(place[0])
            yield from _block(parts, mlps, place[0], dtype)


def _block(parts: Parts, mlps: Mlps, layer: int, dtype: DType) -> Iterator[PlannedTensor]:
    """Yield the router and the experts of a layer."""
    stem, router = mlps.block(layer), f"{mlps.block(layer)}.gate.weight"
    shape = (len(parts.experts), hidden_size(parts.base.config) or 0)
    yield PlannedTensor(router, TensorSpec(dtype, shape), Read(ROUTERS, router))
    for word, experts in (("experts", parts.experts), ("shared_experts", parts.shared)):
        for number, expert in enumerate(experts):
            for name, tensor in mlps.expert(expert, layer).items():
                yield _named(f"{stem}.{word}.{number}.{name}", tensor)


def _named(name: str, tensor: PlannedTensor) -> PlannedTensor:
    return PlannedTensor(name, tensor.spec, tensor.expr)
