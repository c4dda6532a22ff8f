"""Figures with one row per head, layer or expert: max logits and expert load over the steps of one run.

Legend: N records, C columns of a heat map, R rows of a heat map, L layers, H heads, M MoE layers, E experts.
"""

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from k2jax.report.curves import threshold_lines
from k2jax.report.page import Panel, Table
from k2jax.report.run_folder import Run
from k2jax.report.svg import (
    GRID,
    INK,
    MAX_POINTS,
    draw,
    equal_groups,
    layer_colors,
    run_letter,
    spread,
    style_axes,
    thin,
)

MAX_COLUMNS = 120
MAX_ROWS = 192
MAX_LAYER_MAPS = 8  # over all runs of the page, so that the page stays small
OVER = "#d55e00"


def logit_panels(run: Run, index: int) -> list[Panel]:
    """Per-layer maxima as lines and every head as a row of a heat map; nothing where the run logged none."""
    if not run.max_logits:
        return []
    who = f"Run {run_letter(index)}: "
    names = [f"{group} {layer}" for group, stack in run.max_logits.items() for layer in range(stack.shape[1])]
    per_layer_NL = np.concatenate([_max(stack, axis=2) for stack in run.max_logits.values()], axis=1)
    title = f"{who}the largest max logit of each layer"
    caption = (
        "One line per layer, its largest head; layers are numbered within their group. A layer that keeps "
        "climbing is what QK-Clip is there to stop."
    )
    thresholds = {run.tau} if run.tau is not None else set()
    lines = _layer_lines(title, caption, run.logits_step_N, per_layer_NL, names, "max logit", thresholds)
    return [Panel(title, caption, lines, _logit_table(run, names)), _logit_map(run, who, names, per_layer_NL)]


def load_panels(run: Run, index: int, runs: int) -> list[Panel]:
    """Max/mean load of each MoE layer as lines, then a heat map a layer; nothing where none was logged."""
    if not run.expert_load_NME.size:
        return []
    who = f"Run {run_letter(index)}: "
    ratio_NME = run.expert_load_NME * run.expert_load_NME.shape[2]
    names = [f"moe {layer}" for layer in range(ratio_NME.shape[1])]
    title = f"{who}the busiest expert of each MoE layer"
    caption = (
        "Load of the busiest expert divided by an even share, one line per MoE layer. 1 is perfect balance; "
        "the step time of an expert-parallel run follows the highest line."
    )
    svg = _layer_lines(title, caption, run.load_step_N, _max(ratio_NME, axis=2), names, "max / mean load", set())
    panels = [Panel(title, caption, svg, _load_table(ratio_NME, names))]
    shown = spread(len(names), max(1, MAX_LAYER_MAPS // runs))
    high = float(np.clip(np.nanquantile(ratio_NME, 0.99), 2, 8)) if np.isfinite(ratio_NME).any() else 2.0
    for layer in shown:
        title = f"{who}load of every expert, {names[layer]}"
        caption = (
            f"One row per expert, one column per logged step (or group of steps, averaged). Dark for long is "
            f"an expert that learns nothing; above {high:.2g} times an even share is marked orange."
        )
        if len(shown) < len(names):
            caption += f" {len(shown)} of {len(names)} MoE layers are drawn."
        svg = _heat_map(title, ratio_NME[:, layer], run.load_step_N, "expert", "load / even share", 0.0, high, "mean")
        panels.append(Panel(title, caption, svg))
    return panels


def _logit_map(run: Run, who: str, names: list[str], per_layer_NL: np.ndarray) -> Panel:
    rows_NR = np.concatenate([s.reshape(len(s), -1) for s in run.max_logits.values()], axis=1)
    heads = [stack.shape[2] for stack in run.max_logits.values() for _ in range(stack.shape[1])]
    starts = np.cumsum([0, *heads])
    title = f"{who}max logit of every layer and head"
    caption = "One row per head, layers separated by lines, one column per logged step (or group, its maximum)."
    if rows_NR.shape[1] > MAX_ROWS:
        rows_NR, starts = per_layer_NL, np.arange(len(names) + 1)
        title, caption = f"{who}max logit of every layer", "One row per layer: the maximum over its heads."
    finite = rows_NR[np.isfinite(rows_NR)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if run.tau is not None and high > run.tau > low:
        high = run.tau
        caption += f" Above the threshold τ = {run.tau:g} is marked orange: QK-Clip rescales those heads."
    else:
        caption += " A few bright rows alone are heads whose logits run away."
    svg = _heat_map(title, rows_NR, run.logits_step_N, "", "max logit", low, high, "max", rows=(names, starts))
    return Panel(title, caption, svg)


def _layer_lines(title, caption, step_N, value_NL, names, y_name, thresholds) -> str:
    limit = max(40, min(MAX_POINTS, 6000 // len(names)))

    def plot(fig):
        ax = fig.add_subplot()
        style_axes(ax, "step", y_name)
        few = len(names) <= 8
        for layer, color in enumerate(layer_colors(len(names))):
            x, _, _, high = thin(step_N, value_NL[:, layer], limit)
            ax.plot(
                x,
                high,
                color=color,
                linewidth=1.2,
                label=names[layer],
                marker="o" if len(x) == 1 else None,
                markersize=3,
            )
        threshold_lines(ax, thresholds)
        if few:
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
        else:
            _depth_bar(fig, ax, names)

    return draw(plot, label=f"{title}. {caption}")


def _depth_bar(fig, ax, names) -> None:
    """Too many layers for a legend: a bar from the first layer to the last."""
    bar = fig.colorbar(_mappable("viridis", 0, len(names) - 1, (0.32, 0.86)), ax=ax, pad=0.02)
    bar.set_ticks([0, len(names) - 1], labels=[names[0], names[-1]])
    bar.outline.set_visible(False)


def _heat_map(title, value_NR, step_N, y_name, scale_name, low, high, reduce, rows=None) -> str:
    """Rows over steps as one embedded image, a cell per pixel; `rows` = (names, first row of each name)."""
    groups = equal_groups(len(step_N), MAX_COLUMNS)
    over = _max if reduce == "max" else _mean
    image_RC = np.stack([over(value_NR[group], axis=0) for group in groups], axis=1)
    first_C = np.asarray([step_N[group][0] for group in groups])
    mappable = _mappable("cividis", low, high)

    def plot(fig):
        ax = fig.add_subplot()
        ax.imshow(
            mappable.to_rgba(image_RC),
            aspect="auto",
            interpolation="none",
            extent=(-0.5, len(first_C) - 0.5, len(image_RC) - 0.5, -0.5),
        )
        columns = np.unique(np.linspace(0, len(first_C) - 1, 6).astype(int))
        ax.xaxis.set_major_locator(FixedLocator(columns))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{first_C[int(c)]:.0f}"))
        ax.set_xlabel("step")
        ax.set_ylabel(y_name)
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        if rows is not None:
            names, starts = rows
            if len(image_RC) > len(names):
                ax.hlines(starts[1:-1] - 0.5, -0.5, len(first_C) - 0.5, color=GRID, linewidth=0.6)
            shown = range(0, len(names), -(-len(names) // 16))
            ax.set_yticks([(starts[n] + starts[n + 1] - 1) / 2 for n in shown], [names[n] for n in shown])
            ax.tick_params(axis="y", length=0)
        bar = fig.colorbar(mappable, ax=ax, pad=0.02, extend="max" if (image_RC > high).any() else "neither")
        bar.set_label(scale_name, color=INK)
        bar.outline.set_visible(False)

    return draw(plot, label=f"Heat map. {title}.", height=3.1)


def _mappable(name: str, low: float, high: float, part: tuple[float, float] = (0.0, 1.0)):
    cmap = ListedColormap(colormaps[name](np.linspace(*part, 256))).with_extremes(over=OVER, bad=(0, 0, 0, 0))
    return ScalarMappable(Normalize(low, high if high > low else low + 1), cmap)


def _max(x: np.ndarray, axis: int) -> np.ndarray:
    """Maximum over the finite values; nan where there is none."""
    top = np.where(np.isnan(x), -np.inf, x).max(axis)
    return np.where(np.isfinite(top), top, np.nan)


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the finite values; nan where there is none."""
    seen = (~np.isnan(x)).sum(axis)
    return np.where(seen > 0, np.nansum(x, axis) / np.maximum(seen, 1), np.nan)


def _logit_table(run: Run, names: list[str]) -> Table:
    last = [head_H for stack in run.max_logits.values() for head_H in stack[-1]]
    heads = max(len(row) for row in last)
    rows = [
        (name, f"{_max(row, 0):.4g}", *(f"{value:.4g}" for value in row), *[""] * (heads - len(row)))
        for name, row in zip(names, last, strict=True)
    ]
    head = ("Layer", "Largest", *(f"head {h}" for h in range(heads)))
    return Table(f"Max logit by layer and head at step {run.logits_step_N[-1]:.0f}", head, rows)


def _load_table(ratio_NME: np.ndarray, names: list[str]) -> Table:
    rows = []
    for name, load_E in zip(names, ratio_NME[-1], strict=True):
        if np.isnan(load_E).all():
            rows.append((name, *["nan"] * 5))
            continue
        top, bottom = int(np.nanargmax(load_E)), int(np.nanargmin(load_E))
        rows.append(
            (
                name,
                f"{load_E[top]:.3f}",
                str(top),
                f"{load_E[bottom]:.3f}",
                str(bottom),
                str(int((load_E == 0).sum())),
            )
        )
    head = ("Layer", "Max / mean", "Busiest expert", "Min / mean", "Idlest expert", "Experts with no token")
    return Table("Expert load at the last record", head, rows)
