"""A picture of a run: losses, scores and learning rates over the steps."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# What the library measures of an evaluation besides the model.
SPEED = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(history: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """What a log tells, by the axis it belongs to: `"loss"`, `"learning rate"`, and each score by its name.

    Args:
        history: `log_history` of a `trainer_state.json`.

    Returns:
        For each axis, (steps, values) by the name of the curve.
    """
    axes: dict[str, Curves] = {"loss": {}}
    for entry in history:
        for name, value in entry.items():
            axis = _axis_of(name)
            if axis is not None and isinstance(value, (int, float)):
                steps, values = axes.setdefault(axis, {}).setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    rates = axes.pop("learning rate", {})
    if len(rates) > 1:  # one for each part; the first says nothing more
        rates.pop("learning_rate", None)
    return {axis: curves for axis, curves in (axes | {"learning rate": rates}).items() if curves}


def _axis_of(name: str) -> str | None:
    if name == "loss" or (name.startswith("eval_") and name.endswith("_loss")):
        return "loss"
    if name.endswith("learning_rate"):
        return "learning rate"
    if name.startswith("eval_") and not any(name.endswith(f"_{speed}") for speed in SPEED):
        return name.removeprefix("eval_")
    return None


def save_curves(history: Sequence[dict[str, Any]], path: str | os.PathLike, *, stages: Sequence[int] = ()) -> None:
    """Write a picture with an axis for the losses, for each score and for the learning rates.

    Args:
        history: `log_history` of a `trainer_state.json`.
        path: a `.png`, `.svg` or `.pdf` file.
        stages: steps at which a stage begins, marked by lines.

    Raises:
        ValueError: if the history holds no curve.
    """
    axes = read_curves(history)
    if not axes:
        raise ValueError("There is nothing to draw: no loss was logged. Lower `logging_steps`.")
    columns = min(len(axes), 3)
    rows = -(-len(axes) // columns)
    # A canvas of its own: no global state, no display.
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (axis, curves), panel in zip(axes.items(), panels, strict=False):
        for name, (steps, values) in curves.items():
            marker = "o" if len(steps) < 30 else None
            panel.plot(steps, values, label="training loss" if name == "loss" else name, marker=marker, markersize=3)
        for step in stages:
            panel.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=axis, xlabel="step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        if len(curves) > 1:
            panel.legend(fontsize=8)
    for panel in panels:  # those that are left over
        panel.axis("off")
    figure.savefig(path)
