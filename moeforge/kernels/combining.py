"""Owns putting models' differences together: sums, those of the elected sign, and the base."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import ONE, STRETCH, ZERO, add, compiled, majority, store

# Up to three models in one loop each, which holds everything in registers. What is missing of three
# are negative zeros: adding them changes nothing, nor do they take part in anything.


@compiled
def _sum(parts: Any, base: Any, divisor: Any, step: Any, out: Any) -> None:
    for j in range(base.size):
        total = (parts[0, j] + parts[1, j] + parts[2, j]) / divisor
        store(out, j, base[j] + total * step)


@compiled
def _agreeing(one: Any, two: Any, three: Any) -> Any:
    """Return whether the sum is negative, and the magnitudes of what has its sign."""
    negative = one + two + three < ZERO
    one, two, three = (-one, -two, -three) if negative else (one, two, three)
    one, two = ZERO if one < ZERO else one, ZERO if two < ZERO else two
    return negative, one, two, ZERO if three < ZERO else three


@compiled
def _elected(parts: Any, base: Any, step: Any, out: Any) -> None:
    for j in range(base.size):
        negative, one, two, three = _agreeing(parts[0, j], parts[1, j], parts[2, j])
        total = one + two + three
        store(out, j, base[j] + (-total if negative else total) * step)


@compiled
def _elected_mean(parts: Any, base: Any, weight: Any, step: Any, out: Any) -> None:
    of_two, of_three = ONE / (np.float32(2.0) * weight), ONE / (np.float32(3.0) * weight)
    of_one = ONE / weight
    for j in range(base.size):
        negative, one, two, three = _agreeing(parts[0, j], parts[1, j], parts[2, j])
        taking = ONE if one > ZERO else ZERO
        taking += ONE if two > ZERO else ZERO
        taking += ONE if three > ZERO else ZERO
        # Where nobody takes part the result is zero, whatever it is divided by.
        share = of_three if taking > 2.5 else (of_two if taking > 1.5 else of_one)
        total = (one + two + three) * (-share if negative else share)
        store(out, j, base[j] + total * step)


@compiled
def _elected_average(parts: Any, base: Any, weights: Any, step: Any, out: Any) -> None:
    first, second, third = weights
    for j in range(base.size):
        negative, one, two, three = _agreeing(parts[0, j], parts[1, j], parts[2, j])
        taking = first if one > ZERO else ZERO
        taking += second if two > ZERO else ZERO
        taking += third if three > ZERO else ZERO
        share = ONE / (taking + (ONE if taking == ZERO else ZERO))
        total = (one + two + three) * (-share if negative else share)
        store(out, j, base[j] + total * step)


# Any number of models.


@compiled
def _add_agreeing(total: Any, taking: Any, row: Any, sign: Any, weight: Any) -> None:
    for j in range(row.size):
        value = row[j] * sign[j]
        value = ZERO if value < ZERO else value
        total[j] += value
        taking[j] += weight if value > ZERO else ZERO


@compiled
def _divide(total: Any, sign: Any, divisor: Any, normalize: Any, equal: Any, weight: Any) -> None:
    """Turn sums of what agrees into the election's result, in `total`."""
    if not normalize:
        for j in range(total.size):
            total[j] = total[j] * sign[j]
    elif equal:
        for j in range(total.size):
            total[j] = total[j] * (sign[j] / (max(divisor[j], ONE) * weight))
    else:
        for j in range(total.size):
            total[j] = total[j] * (sign[j] / (divisor[j] + (ONE if divisor[j] == ZERO else ZERO)))


@compiled
def _add_to_base(base: Any, total: Any, divisor: Any, step: Any, out: Any) -> None:
    for j in range(base.size):
        store(out, j, base[j] + (total[j] / divisor) * step)


@compiled
def _many(parts: Any, base: Any, weights: Any, how: Any, out: Any) -> None:
    consensus, normalize, equal, divisor, step = how
    room, size = np.empty((3, STRETCH), np.float32), base.size
    total, sign, taking = room[0, :size], room[1, :size], room[2, :size]
    total[:] = -ZERO
    for i in range(parts.shape[0]):
        add(total, parts[i, :size])
    if consensus:
        majority(total, sign)
        total[:], taking[:] = -ZERO, ZERO
        for i in range(parts.shape[0]):
            weight = ONE if equal else weights[i]
            _add_agreeing(total, taking, parts[i, :size], sign, weight)
        _divide(total, sign, taking, normalize, equal, weights[0])
    _add_to_base(base, total, divisor, step, out)


@compiled
def combine(parts: Any, base: Any, weights: Any, how: Any, out: Any) -> None:
    """Put the base plus the sum of differences into `out` [elements, up to STRETCH].

    Args:
        parts: float32 [models, elements or more], the differences; of less than three models three
            rows, the others negative zeros.
        base: float32 [elements].
        weights: float32 [models]; those of one model are equal.
        how: consensus: add up those only that have the sign of the sum of all; normalize: divide by
            the sum of the weights of those; equal: whether all weights are equal; divisor, float32:
            what the sum is divided by, one where there is an election; step, float32: what it is
            multiplied with.
        out: float32; or uint16, for bits of bfloat16.
    """
    consensus, normalize, equal, divisor, step = how
    if parts.shape[0] > 3:
        _many(parts, base, weights, how, out)
    elif not consensus:
        _sum(parts, base, divisor, step, out)
    elif not normalize:
        _elected(parts, base, step, out)
    elif equal:
        _elected_mean(parts, base, weights[0], step, out)
    else:
        third = weights[2] if weights.size > 2 else ZERO
        _elected_average(parts, base, (weights[0], weights[1], third), step, out)
