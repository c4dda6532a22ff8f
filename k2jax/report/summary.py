"""The numbers of the page: a summary of each run, what differs between the configs, the whole configs."""

import json
from collections.abc import Sequence

import numpy as np

from k2jax.report.page import Table
from k2jax.report.run_folder import Run
from k2jax.report.svg import count_text, run_letter

ABSENT = "–"


def summary_table(runs: Sequence[Run]) -> Table:
    """One column per run; a quantity that a run did not log is a dash."""
    columns = [_summary(run) for run in runs]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table("Summary of the runs", ("Quantity", *(run_letter(i) for i in range(len(runs)))), rows)


def difference_table(runs: Sequence[Run]) -> Table | None:
    """The config fields that are not the same in every run; None where all agree."""
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        values = [_text(config, key) for config in configs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    head = ("Field", *(run_letter(i) for i in range(len(runs))))
    return Table("Config fields that differ between the runs", head, rows) if rows else None


def config_table(run: Run, index: int) -> Table:
    """Every field of one run's config."""
    config = flatten(run.config)
    return Table(
        f"Run {run_letter(index)}: config.json",
        ("Field", "Value"),
        [(key, _text(config, key)) for key in config],
        prose=True,
    )


def flatten(config: dict, prefix: str = "") -> dict:
    """{'model': {'dim': 64}} -> {'model.dim': 64}; lists stay values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(config: dict, key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False, sort_keys=True) if key in config else ABSENT


def _summary(run: Run) -> dict[str, str]:
    return {
        "Held-out bits per byte, last": _pick(run, "eval/bits_per_byte", "last", "{:.4f}"),
        "Held-out bits per byte, best": _pick(run, "eval/bits_per_byte", "best", "{:.4f}"),
        "Held-out loss, last (nats per token)": _pick(run, "eval/loss", "last", "{:.4f}"),
        "Training loss, last (nats per token)": _pick(run, "loss", "last", "{:.4f}"),
        "Last step": str(run.last_step),
        "Tokens": _tokens(run),
        "Wall time in steps": _wall(run),
        "Tokens per second, median": _median(run, "tokens_per_second", count_text),
        "Model FLOPs utilisation, median": _median(run, "mfu", lambda v: f"{100 * v:.2f}%"),
        "Largest max logit (at step)": _pick(run, "max_logit", "highest", "{:.4g}"),
        "QK-Clip threshold τ": ABSENT if run.tau is None else f"{run.tau:g}",
        "Max / mean expert load, last": _pick(run, "load_max_over_mean", "last", "{:.3f}"),
        "Steps skipped": _total(run, "skipped"),
        "Spikes": _total(run, "spike"),
        "Losses not finite": _not_finite(run),
    }


def _pick(run: Run, key: str, which: str, form: str) -> str:
    """The last (possibly nan), lowest or highest value; the latter two with their step."""
    curve = run.curves.get(key)
    if curve is None:
        return ABSENT
    if which == "last":
        return form.format(curve.value[-1])
    finite = np.flatnonzero(np.isfinite(curve.value))
    if not finite.size:
        return ABSENT
    values = curve.value[finite]
    at = finite[values.argmin() if which == "best" else values.argmax()]
    return f"{form.format(curve.value[at])} (step {curve.step[at]:.0f})"


def _median(run: Run, key: str, text) -> str:
    curve = run.curves.get(key)
    if curve is None or not np.isfinite(curve.value).any():
        return ABSENT
    return text(np.median(curve.value[np.isfinite(curve.value)]))


def _total(run: Run, key: str) -> str:
    curve = run.curves.get(key)
    return ABSENT if curve is None else f"{np.nansum(curve.value):.0f}"


def _not_finite(run: Run) -> str:
    curve = run.curves.get("loss")
    return ABSENT if curve is None else str(int((~np.isfinite(curve.value)).sum()))


def _tokens(run: Run) -> str:
    curve = run.curves.get("tokens")
    return ABSENT if curve is None or not np.isfinite(curve.value).any() else count_text(np.nanmax(curve.value))


def _wall(run: Run) -> str:
    """Time spent in steps; a step time logged every n steps stands for the n steps before it."""
    curve = run.curves.get("step_time")
    if curve is None:
        return ABSENT
    # What the first line stands for is not known where a log starts in the middle of a run.
    gaps = np.diff(curve.step)
    seconds = float(np.nansum(curve.value * np.concatenate([gaps[:1] if gaps.size else [1.0], gaps])))
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
