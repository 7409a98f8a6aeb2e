"""Owns the pictures of what each merge method does to weights: SVG, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from method_examples import SWEEP, Case, Values, differences, merged, polar

_MODELS = ("#2f7fe0", "#f28e2b", "#59a14f")
_RESULT = "#c2329b"
_LINES = "#8a8a8a"
"""Seen on white and on black alike."""
_ELEMENTS = 16
Drawing = Callable[[str], "tuple[list[Case], Callable[[list[Values]], str]]"]
"""(method) -> merges that the picture needs, and what draws it of their results."""


@cache
def pictures() -> dict[str, str]:
    """Return an SVG for each method on the shelf.

    Raises:
        LookupError: a method has no picture.
    """
    from moeforge import catalog

    names = catalog.names("methods")
    if missing := set(names) ^ set(_DRAWINGS):
        raise LookupError(f"methods without a picture, or pictures of none: {sorted(missing)}")
    wanted = {name: _DRAWINGS[name](name) for name in names}
    results = iter(merged([case for cases, _ in wanted.values() for case in cases]))
    return {name: draw([next(results) for _ in cases]) for name, (cases, draw) in wanted.items()}


# --- element by element --------------------------------------------------------------------------


def _elements(name: str, *, share: float = 1.0, single: bool = False, **params: Any) -> Any:
    """Draw differences from the base, those that the method drops as outlines, and the result."""
    parts = differences(1 if single else 3, 2 * _ELEMENTS if single else _ELEMENTS, share)
    base = (0.0,) * len(parts[0])
    everything = Case(name, (base, *parts), {"weight": 1.0, **params})
    cases = [everything]
    if "density" in params:
        for i in range(len(parts)):
            alone = tuple(float(j == i + 1) for j in range(len(parts) + 1))
            more = {**params, "weight": alone, "normalize": False, "rescale": False}
            cases.append(Case(name, (base, *parts), more))

    def draw(results: list[Values]) -> str:
        result, *kept = results
        if single:  # it is taken or left
            kept = [result]
        with _figure(7.2, 2.2) as (figure, axes):
            for i, part in enumerate(parts):
                alive = [bool(value) for value in kept[i]] if kept else [True] * len(part)
                _bars(axes, i, len(parts), part, alive)
            middle, half = range(len(result)), 0.42
            axes.hlines(
                result,
                [x - half for x in middle],
                [x + half for x in middle],
                colors=_RESULT,
                linewidth=2.4,
                label="result",
                zorder=3,
            )
            axes.axhline(0, color=_LINES, linewidth=0.8)
            axes.set(xlim=(-0.7, len(result) - 0.3), xticks=[], xlabel="elements of a tensor")
            axes.set_ylabel("difference from base")
            return _svg(figure, axes)

    return cases, draw


def _bars(axes: Any, index: int, count: int, part: Values, alive: list[bool]) -> None:
    width = 0.66 / count
    for x, (value, kept) in enumerate(zip(part, alive, strict=True)):
        axes.bar(
            x + (index - (count - 1) / 2) * width,
            value,
            width * 0.86,
            facecolor=_MODELS[index] if kept else "none",
            edgecolor=_MODELS[index],
            linewidth=0.7,
            label=f"model {index + 1}" if x == alive.index(True) else None,
        )


# --- tensors as vectors in a plane ---------------------------------------------------------------


def _plane(
    name: str,
    inputs: tuple[Values, ...],
    sweep: list[dict[str, Any]],
    *,
    based: bool = False,
    straight: bool = False,
    labels: tuple[str, ...] = (),
    shown: tuple[int, ...] = (0,),
) -> Any:
    """Draw inputs as arrows, the results of a sweep as a line, and some of them as arrows.

    Args:
        name: the method.
        inputs: vectors in the plane.
        sweep: parameters of each result.
        based: whether the first input is the base.
        straight: also draw where the plain averages lie.
        labels: what the results that are shown are called.
        shown: numbers of the results that are arrows.
    """

    def draw(results: list[Values]) -> str:
        with _figure(4.6, 3.1) as (figure, axes):
            others = inputs[1:] if based else inputs
            origin = inputs[0] if based and name != "slerp" else (0.0, 0.0)
            if based:
                _arrow(axes, (0.0, 0.0), inputs[0], _LINES, "base", "--")
            for i, vector in enumerate(others):
                _arrow(axes, origin, vector, _MODELS[i], f"model {i + 1}")
            if straight:
                ends = inputs if name in ("slerp", "linear") else others
                xs, ys = zip(*ends, ends[0], strict=False)
                axes.plot(xs, ys, color=_LINES, linewidth=0.9, linestyle=":", label="averages")
            if len(results) > 2:
                axes.plot(*zip(*results, strict=True), color=_RESULT, linewidth=1.6)
            for i, label in zip(shown, labels, strict=True):
                _arrow(axes, origin, results[i], _RESULT, label, "-" if i == shown[0] else "--")
            axes.set_aspect("equal", adjustable="box")
            axes.margins(0.12)
            axes.set_axis_off()
            return _svg(figure, axes)

    return [Case(name, inputs, params, based) for params in sweep], draw


def _arrow(axes: Any, start: Values, end: Values, color: str, label: str, line: str = "-") -> None:
    shaft = {"color": color, "linestyle": line}
    style = {"arrowstyle": "-|>", "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0, **shaft}
    axes.annotate("", end, start, arrowprops=style)
    axes.plot(*zip(start, end, strict=True), linewidth=1.2, label=label, **shaft)


# --- one number against another ------------------------------------------------------------------


def _curve(name: str, thresholds: tuple[float, ...]) -> Any:
    """Draw the result against the other model, element by element."""
    xs = tuple(i / 50 for i in range(-100, 101))
    base = (0.0,) * len(xs)

    def draw(results: list[Values]) -> str:
        with _figure(4.6, 2.6) as (figure, axes):
            axes.plot(xs, xs, color=_LINES, linewidth=0.9, linestyle=":", label="the other model")
            for color, t, result in zip((_RESULT, *_MODELS), thresholds, results, strict=False):
                axes.plot(xs, result, color=color, linewidth=1.6, label=f"result, t {t}")
            axes.set(xlabel="other model - base", ylabel="result - base", ylim=(-1.4, 1.4))
            return _svg(figure, axes)

    return [Case(name, (base, xs), {"t": t}) for t in thresholds], draw


# --- the shelf -----------------------------------------------------------------------------------

_PAIR = (polar(1.0, 10), polar(1.35, 110))
_THREE = (polar(1.0, 5), polar(1.3, 42), polar(1.1, 125))
_BASE = (0.55, 0.25)


def _from_base(*vectors: Values) -> tuple[Values, ...]:
    return (_BASE, *((x + _BASE[0], y + _BASE[1]) for x, y in vectors))


_HALF = {"density": 0.5}
_DRAWINGS: dict[str, Drawing] = {
    "linear": lambda name: _plane(
        name,
        _THREE,
        [{"weight": 1.0}, {"weight": (1.0, 1.0, 4.0)}],
        straight=True,
        labels=("weights 1, 1, 1", "weights 1, 1, 4"),
        shown=(0, 1),
    ),
    "slerp": lambda name: _plane(
        name,
        _PAIR,
        [{"t": t} for t in SWEEP],
        based=True,
        straight=True,
        labels=("result, t 0.5",),
        shown=(12,),
    ),
    "nuslerp": lambda name: _plane(
        name,
        _from_base(*_PAIR),
        [{"weight": (0.0, 1 - t, t)} for t in SWEEP],
        based=True,
        straight=True,
        labels=("result, weights 1, 1",),
        shown=(12,),
    ),
    "multislerp": lambda name: _plane(
        name, _THREE, [{"weight": 1.0}], straight=True, labels=("result",)
    ),
    "karcher": lambda name: _plane(name, _THREE, [{}], straight=True, labels=("result",)),
    "model_stock": lambda name: _plane(
        name,
        _from_base(polar(1.0, 20), polar(1.2, 85)),
        [{}],
        based=True,
        straight=True,
        labels=("result",),
    ),
    "passthrough": lambda name: _plane(
        name, (polar(1.2, 20),), [{"scale": 0.5}], labels=("result, scale 0.5",)
    ),
    "nearswap": lambda name: _curve(name, (1.0, 0.3)),
    "task_arithmetic": _elements,
    "ties": lambda name: _elements(name, **_HALF),
    "dare_linear": lambda name: _elements(name, **_HALF),
    "dare_ties": lambda name: _elements(name, **_HALF),
    "breadcrumbs": lambda name: _elements(name, **_HALF, gamma=0.125),
    "breadcrumbs_ties": lambda name: _elements(name, **_HALF, gamma=0.125),
    "della": lambda name: _elements(name, **_HALF, epsilon=0.4),
    "della_linear": lambda name: _elements(name, **_HALF, epsilon=0.4),
    "sce": lambda name: _elements(name, select_topk=0.5),
    "ram": lambda name: _elements(name, share=0.4),
    "ramplus_tl": lambda name: _elements(name, share=0.4),
    "arcee_fusion": lambda name: _elements(name, single=True),
}


# --- figures -------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Give a figure that depends on nobody's settings."""
    import matplotlib
    from matplotlib.figure import Figure

    from moeforge.proof.plots import plain

    ours = {
        "svg.hashsalt": "moeforge",
        "svg.fonttype": "none",
        "font.size": 9,
        "text.color": _LINES,
        "axes.labelcolor": _LINES,
        "axes.edgecolor": _LINES,
        "xtick.color": _LINES,
        "ytick.color": _LINES,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plain(), matplotlib.rc_context(ours):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def _svg(figure: Any, axes: Any) -> str:
    figure.legend(loc="outside right upper", frameon=False)
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    return file.getvalue()
