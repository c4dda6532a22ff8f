"""Line figures in which every run is one colour: loss, schedule, norms, clipping, throughput."""

from collections.abc import Sequence

import numpy as np

from k2jax.report.page import Panel, Table
from k2jax.report.run_folder import Curve, Run
from k2jax.report.svg import (
    ALERT,
    INK,
    MUTED,
    count_text,
    draw,
    label_ends,
    log_scale,
    run_color,
    run_letter,
    style_axes,
    thin,
)

TABLE_POINTS = 8


def x_axis(runs: Sequence[Run]) -> str:
    """'tokens' if every run logs them with every loss, else 'step', so that all runs share one axis."""
    curves = [run.curves["loss"] for run in runs if "loss" in run.curves]
    return "tokens" if all(np.isfinite(curve.tokens).all() for curve in curves) else "step"


def loss_panel(runs: Sequence[Run], x: str) -> Panel:
    """Training loss and held-out loss (nats per token) with spikes, skipped steps and non-finite losses."""
    series = [(i, "training", run.curves.get("loss")) for i, run in enumerate(runs)]
    series += [(i, "held-out", run.curves.get("eval/loss")) for i, run in enumerate(runs)]
    events = [event for i, run in enumerate(runs) for event in _events(i, run)]
    caption = (
        "Thin line: training loss, with the range of the steps that one point stands for shaded. Dots: "
        "held-out loss. A held-out curve that rises while training falls is overfitting."
    )
    if events:
        caption += " Marks along the top show where a step spiked, was skipped, or had a loss that is not finite ("
        caption += "; ".join(f"run {run_letter(i)} {kind}: {len(xs['step'])}" for i, kind, xs in events) + ")."
    caption += _without_eval(runs, "eval/loss")
    return _loss_like(
        runs,
        "Loss: should fall, with the held-out dots close by",
        "loss (nats per token)",
        series,
        events,
        x,
        caption,
    )


def bits_panel(runs: Sequence[Run], x: str) -> Panel:
    """Bits per byte: held-out as logged, training converted by the held-out text's tokens per byte."""
    series = []
    for i, run in enumerate(runs):
        ratio = _tokens_per_byte(run)
        if ratio is not None and "loss" in run.curves:
            loss = run.curves["loss"]
            converted = Curve(loss.step, loss.tokens, loss.value / np.log(2) * ratio)
            series.append((i, "training", converted))
    series += [(i, "held-out", run.curves.get("eval/bits_per_byte")) for i, run in enumerate(runs)]
    caption = (
        "Bits needed to code one byte of text: comparable between tokenizers. The training line is converted "
        "with the number of tokens per byte of the held-out text."
    ) + _without_eval(runs, "eval/bits_per_byte")
    return _loss_like(runs, "Bits per byte: should fall", "bits per byte", series, [], x, caption)


def overlay_panel(
    runs: Sequence[Run],
    key: str,
    *,
    title: str,
    caption: str,
    y_name: str,
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    thresholds: bool = False,
) -> Panel:
    """One scalar of every run against steps; with `thresholds`, its peaks and each run's tau."""
    scale = 100 if percent else 1
    series = [
        (i, key, Curve(c.step, c.tokens, c.value * scale)) for i, run in enumerate(runs) if (c := run.curves.get(key))
    ]
    if not any(np.isfinite(curve.value).any() for _, _, curve in series):
        return Panel(title, f"No run logged a finite value of {key}.")
    missing = [run_letter(i) for i, run in enumerate(runs) if key not in run.curves]
    if missing:
        caption += f" Not logged by {', '.join(missing)}."

    def plot(fig):
        ax = fig.add_subplot()
        style_axes(ax, "step", y_name)
        for i, _, curve in series:
            _line(ax, i, curve.step, curve.value, band=not thresholds, width=1.3, peak=thresholds)
        if log:
            log_scale(ax, np.concatenate([curve.value for _, _, curve in series]))
        if from_zero:
            ax.set_ylim(0, max(ax.get_ylim()[1], 1e-9))
        if thresholds:
            threshold_lines(ax, {run.tau for run in runs if run.tau is not None})
        _mark_stages(ax, runs, "step")
        label_ends(ax, _ends(series))

    return Panel(title, caption, draw(plot, label=f"{title}. {caption}"), _table(series, y_name))


def threshold_lines(ax, thresholds: set[float]) -> None:
    """A dashed line at each tau, or a note where it lies so far above the data that it would flatten it."""
    low, high = ax.get_ylim()
    for tau in sorted(thresholds):
        if tau <= 5 * max(high, 1e-9):
            ax.axhline(tau, color=ALERT, linewidth=1, linestyle=(0, (5, 3)))
            ax.annotate(
                f"threshold τ = {tau:g}",
                (0.01, tau),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                color=ALERT,
            )
            ax.set_ylim(min(ax.get_ylim()[0], low, 0.95 * tau), max(ax.get_ylim()[1], high, 1.12 * tau))
        else:
            ax.annotate(
                f"threshold τ = {tau:g} is above this view ↑",
                (0.99, 0.99),
                xycoords="axes fraction",
                ha="right",
                va="top",
                color=ALERT,
            )


def _loss_like(runs, title, y_name, series, events, x, caption) -> Panel:
    series = [(i, name, curve) for i, name, curve in series if curve is not None]
    if not any(np.isfinite(curve.value).any() for _, _, curve in series):
        return Panel(title, f"No finite value to draw. {caption}", table=_table(series, y_name))

    def plot(fig):
        ax = fig.add_subplot()
        style_axes(ax, "tokens trained on" if x == "tokens" else "step", y_name)
        for i, name, curve in series:
            held_out = name == "held-out"
            _line(
                ax,
                i,
                getattr(curve, x),
                curve.value,
                band=not held_out,
                width=1.5 if held_out else 0.8,
                marker="o" if held_out else None,
            )
        ax.plot([], [], color=INK, linewidth=0.8, label="training")
        ax.plot([], [], color=INK, linewidth=1.5, marker="o", markersize=3, label="held-out")
        _mark_events(ax, events, x)
        _mark_stages(ax, runs, x)
        ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9 if events else 1))
        last = {i: curve for i, _, curve in series}
        label_ends(ax, _ends([(i, "", curve) for i, curve in last.items()]))

    return Panel(title, caption, draw(plot, label=f"{title}. {caption}", height=3.3), _table(series, y_name))


def _line(ax, index, x_N, y_N, *, band, width, marker=None, peak=False) -> None:
    """`peak`: a point that stands for several steps is their maximum, not their mean."""
    x, mean, low, high = thin(x_N, y_N)
    marker = marker or ("o" if len(x) == 1 else None)  # a line through one point would be invisible
    ax.plot(x, high if peak else mean, color=run_color(index), linewidth=width, marker=marker, markersize=3)
    if band and len(x) < len(x_N):
        ax.fill_between(x, low, high, color=run_color(index), alpha=0.22, linewidth=0)


def _events(index: int, run: Run) -> list[tuple[int, str, dict[str, np.ndarray]]]:
    """(run, kind, {'step', 'tokens'}) of the kinds of trouble that the run had."""
    found = []
    for key, kind in (("spike", "spikes"), ("skipped", "skipped steps"), ("loss", "losses not finite")):
        if (curve := run.curves.get(key)) is not None:
            hit = ~np.isfinite(curve.value) if key == "loss" else curve.value > 0
            if hit.any():
                found.append((index, kind, {"step": curve.step[hit], "tokens": curve.tokens[hit]}))
    return found


def _mark_events(ax, events, x: str) -> None:
    if not events:
        return
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.16 * (high - low))
    marks = {"spikes": ("v", 0.975), "skipped steps": ("x", 0.935), "losses not finite": ("D", 0.895)}
    for kind in dict.fromkeys(kind for _, kind, _ in events):
        marker, height = marks[kind]
        ax.plot([], [], color=MUTED, linestyle="", marker=marker, markersize=4, label=kind)
        for index, its_kind, at in events:
            if its_kind == kind:
                places = at[x][np.linspace(0, len(at[x]) - 1, min(len(at[x]), 150)).astype(int)]
                ax.plot(
                    places,
                    np.full(len(places), height),
                    transform=ax.get_xaxis_transform(),
                    linestyle="",
                    color=run_color(index),
                    marker=marker,
                    markersize=4,
                )


def _mark_stages(ax, runs: Sequence[Run], x: str) -> None:
    """A dotted line with its name where a stage of a run begins."""
    for i, run in enumerate(runs):
        loss = run.curves.get("loss")
        for start, name in run.stages if loss is not None else []:
            place = float(np.interp(start, loss.step, getattr(loss, x)))
            ax.axvline(place, color=run_color(i), linewidth=0.9, linestyle=":")
            ax.annotate(
                name,
                (place, 0.02 + 0.06 * i),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                color=run_color(i),
                fontsize="small",
            )


def _tokens_per_byte(run: Run) -> float | None:
    """Tokens per byte of the held-out text, from a line that has the loss both per token and per byte."""
    nats, bits = run.curves.get("eval/loss"), run.curves.get("eval/bits_per_byte")
    if nats is None or bits is None:
        return None
    _, a, b = np.intersect1d(nats.step, bits.step, return_indices=True)
    ratio = bits.value[b] * np.log(2) / np.where(nats.value[a] > 0, nats.value[a], np.nan)
    ratio = ratio[np.isfinite(ratio)]
    return float(ratio[-1]) if ratio.size else None


def _without_eval(runs, key: str) -> str:
    missing = [run_letter(i) for i, run in enumerate(runs) if key not in run.curves]
    return f" No evaluation logged yet by {', '.join(missing)}." if missing else ""


def _ends(series) -> list[tuple[int, float]]:
    ends = []
    for i, _, curve in series:
        finite = curve.value[np.isfinite(curve.value)]
        if finite.size:
            ends.append((i, finite[-1]))
    return ends


def _table(series, y_name: str) -> Table:
    rows = []
    for i, name, curve in series:
        for n in np.unique(np.linspace(0, len(curve.step) - 1, TABLE_POINTS).astype(int)):
            tokens = curve.tokens[n]
            rows.append(
                (
                    run_letter(i),
                    name,
                    f"{curve.step[n]:.0f}",
                    count_text(tokens) if np.isfinite(tokens) else "",
                    f"{curve.value[n]:.5g}",
                )
            )
    return Table(
        f"{y_name}, at {TABLE_POINTS} evenly spaced records or fewer",
        ("Run", "Series", "Step", "Tokens", y_name),
        rows,
    )
