"""Formulas of the merge methods in float64, of whole tensors: full sorts and loops.

Written from the papers and from what mergekit 0.1.5 was seen to do, for comparison with moeforge;
nothing here imports it. Every formula takes the inputs, the base first where there is one, and the
parameters by name.
"""

import math

import numpy as np
import torch
from scipy.stats import rankdata
from test_random import key_of, uniform16


def lines(x):
    """The rows of a tensor along its last dimension; a vector is one."""
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def linear(xs, p):
    total = sum(w * x for w, x in zip(p["weight"], xs, strict=True))
    return total / sum(p["weight"]) if p["normalize"] else total


def passthrough(xs, p):
    return p["scale"][0] * xs[0]


def rotated(a, b, t):
    """From a towards b, sin((1−t)θ) by the addition theorem; straight if nearly parallel."""
    cosine = max(
        -1.0, min(1.0, float(a @ b) / max(float(a.norm()), 1e-7) / max(float(b.norm()), 1e-7))
    )
    if 1 - abs(cosine) < 2**-25:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    on_b = math.sin(t * angle) / math.sin(angle)
    return (math.cos(t * angle) - on_b * math.cos(angle)) * a + on_b * b


def slerp(xs, p):
    a, b = (x.flatten() for x in xs)
    long = float(a.norm()) > 1e-8 and float(b.norm()) > 1e-8
    if long and abs(float(a @ b / a.norm() / b.norm())) > 0.9995:
        return ((1 - p["t"]) * a + p["t"] * b).view_as(xs[0])
    return rotated(a, b, p["t"]).view_as(xs[0])


def nuslerp(xs, p):
    base = xs[0] if p["weight"][0] is None else torch.zeros_like(xs[0])
    (a, b), (first, second) = [x - base for x in xs[-2:]], p["weight"][-2:]
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    if p["nuslerp_flatten"]:
        return base + rotated(a.flatten(), b.flatten(), t).view_as(a)
    turned = p["nuslerp_row_wise"] and a.dim() > 1
    a, b = (x.transpose(0, -1) if turned else x for x in (a, b))
    pairs = zip(lines(a), lines(b), strict=True)
    result = torch.stack([rotated(u, v, t) for u, v in pairs]).reshape(a.shape)
    return base + (result.transpose(0, -1) if turned else result)


def multislerp(xs, p):
    weights = [w for w in p["weight"] if w is not None]
    base = xs[0] if p["weight"][0] is None else 0 * xs[0]
    if len(weights) == 1:
        return xs[-1]
    if p["normalize_weights"]:
        weights = [w / sum(weights) for w in weights]
    ys = [(x - base).flatten() for x in xs[-len(weights) :]]
    units = [y / (y.norm() + p["eps"]) for y in ys]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if float(mean.norm()) < p["eps"]:
        return base + sum(w * y for w, y in zip(weights, ys, strict=True)).view_as(base)
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    step = tangent.norm() + p["eps"]
    length = sum(w * y.norm() for w, y in zip(weights, ys, strict=True))
    return base + (length * (mean * step.cos() + tangent * step.sin() / step)).view_as(base)


def karcher(xs, p):
    if len(xs) == 1:
        return xs[0]
    norms = [float(x.norm()) for x in xs]
    units = [(x / n).flatten() for x, n in zip(xs, norms, strict=True) if n > p["tol"]]
    if not units:
        return torch.zeros_like(xs[0])
    mean = sum(units) / len(units)
    mean = mean / mean.norm() if mean.norm() >= p["tol"] else units[0]
    for _ in range(p["max_iter"]):
        tangent = torch.zeros_like(mean)
        for u in units:
            cosine = max(-1.0, min(1.0, float(u @ mean)))
            angle = math.acos(cosine)
            if angle >= p["tol"]:
                tangent += (u - cosine * mean) * angle / math.sin(angle) / len(units)
        step = float(tangent.norm())
        if step < p["tol"]:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / mean.norm()
    return (sum(norms) / len(norms) * mean).view_as(xs[0])


def model_stock(xs, p):
    base, k = xs[0], len(xs) - 1
    moves = [lines(x - base) if p["filter_wise"] else (x - base).reshape(1, -1) for x in xs[1:]]
    rows = []
    for parts in zip(*moves, strict=True):
        cosines = [
            float(parts[i] @ parts[j]) / max(float(parts[i].norm() * parts[j].norm()), 1e-6)
            for i in range(k)
            for j in range(i)
        ]
        cosine = sum(max(-1.0, min(1.0, c)) for c in cosines) / len(cosines)
        divisor = 1 + (k - 1) * cosine
        rows.append((0.0 if abs(divisor) < 1e-6 else k * cosine / divisor) * sum(parts) / k)
    return base + torch.stack(rows).view_as(base)


def nearswap(xs, p):
    base, other = xs
    share = (p["t"] / (base - other).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * other + (1 - share) * base


def arcee_fusion(xs, p):
    base, other = map(lines, xs)
    p_, q = (torch.softmax(x, -1) + 1e-8 for x in (other, base))
    importance = ((other - base).abs() * (p_ * (p_ / q).log()).sum(-1, keepdim=True)).flatten()
    ordered = importance.sort().values
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    taken = importance >= median + 1.5 * (third - first)
    return torch.where(taken, other.flatten(), base.flatten()).view_as(xs[0])


def ranking(values):
    """Numbers of the elements from the largest to the smallest, equal ones by position."""
    return np.argsort(-values.numpy(), kind="stable")


def marked(chosen, shape):
    mask = torch.zeros(math.prod(shape), dtype=torch.float64)
    mask[torch.from_numpy(chosen.copy())] = 1
    return mask.reshape(shape)


def largest(i, delta, p):
    """TIES: the largest share `density`."""
    density = p["density"][i + 1]
    count = max(1, int(density * delta.numel())) if density > 0 else 0
    return marked(ranking(delta.flatten().abs())[:count], delta.shape)


def window(i, delta, p):
    """Breadcrumbs: ascending, what lies below the largest share gamma."""
    n = delta.numel()
    keep, top = int(p["density"][i + 1] * n), int(p["gamma"][i + 1] * n)
    low = max(0, n - keep - top)
    return marked(ranking(delta.flatten().abs())[::-1][low : low + keep], delta.shape)


def lottery(i, delta, p):
    """DARE: kept with probability `density`."""
    bound = round(p["density"][i + 1] * 2**16)
    drawn = uniform16(key_of(p["key"], i), delta.numel())
    return torch.from_numpy(drawn < bound).double().reshape(delta.shape)


def by_rank(i, delta, p):
    """DELLA: kept with probability from density − ε to density + ε by mean rank in the row."""
    density, epsilon = p["density"][i + 1], p["epsilon"][i + 1]
    if density <= 0:
        return torch.zeros_like(delta)
    drawn = uniform16(key_of(p["key"], i), delta.numel())
    rows = lines(delta).abs().float().numpy()
    rank = rankdata(rows, axis=1) - 1
    last = rows.shape[1] - 1
    share = density - epsilon + 2 * epsilon * rank / last if last else np.full(rows.shape, density)
    kept = drawn.reshape(rows.shape) < np.round(share * 2**16)
    return torch.from_numpy(kept).double().reshape(delta.shape)


def task(mask=None, consensus=False):
    """Task arithmetic with a sparsifier: Ilharco et al. 2022; signs as in Yadav et al. 2023."""

    def formula(xs, p):
        base, weights, parts = xs[0], p["weight"][1:], []
        for i, (x, weight) in enumerate(zip(xs[1:], weights, strict=True)):
            delta = x - base
            if mask and p["density"][i + 1] < 1:
                whole, delta = delta.abs().sum(), delta * mask(i, delta, p)
                if p["rescale"] and whole >= 1e-7 and delta.abs().sum() >= 1e-7:
                    delta = delta * whole / delta.abs().sum()
            parts.append(delta * weight)
        total, divisor = sum(parts), torch.full_like(base, sum(weights))
        if consensus:
            sign = torch.where(total >= 0, 1.0, -1.0).double()
            agree = [(part.sign() == sign).double() for part in parts]
            total = sum(part * yes for part, yes in zip(parts, agree, strict=True))
            divisor = sum(w * yes for w, yes in zip(weights, agree, strict=True))
        if p["normalize"]:
            total = total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        return base + p["lambda"] * total

    return formula


def sce(xs, p):
    parts = torch.stack([x - xs[0] for x in xs[1:]])
    if p["select_topk"] < 1:
        spread = ((parts - parts.mean(0)) ** 2).mean(0).flatten()
        varying = int((spread != 0).sum())
        count = int(np.float32(varying) * np.float32(p["select_topk"]))
        parts = parts * marked(ranking(spread)[:count], xs[0].shape)
    energy = [float((part**2).mean()) for part in parts]
    if sum(energy) < 1e-6:
        energy = [1 / len(energy)] * len(energy)
    weights = [e / sum(energy) for e in energy]
    sign = torch.where(parts.sum(0) >= 0, 1.0, -1.0).double()
    agree = [w * (part.sign() == sign).double() for w, part in zip(weights, parts, strict=True)]
    total = sum(part * share for part, share in zip(parts, agree, strict=True))
    return xs[0] + total / sum(agree).clamp(min=1e-6)


def ram(xs, p, grow=lambda shared, unique: 1.0):
    moves = [torch.where((x - xs[0]).abs() > p["epsilon"], x - xs[0], 0.0) for x in xs[1:]]
    count = sum((move != 0).double() for move in moves)
    total = sum(torch.where(count > 1, move / count.clamp(min=1), 0.0) for move in moves)
    for move in moves:
        alone, shared = (move != 0) & (count == 1), (move != 0) & (count > 1)
        total = total + torch.where(alone, move * grow(int(shared.sum()), int(alone.sum())), 0.0)
    return xs[0] + total


def ramplus_tl(xs, p):
    def grow(shared, unique):
        return 1 + p["r"] * min(max(shared / max(unique, p["epsilon"]), 0.0), p["alpha"])

    return ram(xs, p, grow)
