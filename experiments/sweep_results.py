"""What a sweep has found so far: read from the points' folders, as a table, JSON, CSV and one overlay report."""

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path

from experiments.sweep_points import Point
from k2jax.training.errors import RunError, WorkdirError
from k2jax.training.metrics import read_metrics

NUMBERS = ("bits_per_byte", "held_out_loss", "max_logit", "steps", "seconds", "skipped")


def is_finished(point: Point, folder: Path) -> bool:
    """Whether the folder holds all of this point: its config, last evaluation, last checkpoint and page."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, WorkdirError):
        return False  # The trainer will say what is wrong there.
    steps = point.cfg.train.steps
    return (
        config == json.loads(json.dumps(dataclasses.asdict(point.cfg)))
        and bool(lines)
        and lines[-1]["step"] == steps
        and "eval/bits_per_byte" in lines[-1]
        and (folder / "checkpoints" / str(steps)).is_dir()
        and (folder / "report.html").exists()
    )


def steps_done(folder: Path) -> int:
    """Steps in the folder's log; one line each."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def row(point: Point, folder: Path, status: str) -> dict:
    """One point's result; bits per byte and held-out loss of finished points only, which alone compare."""
    found = {"point": point.name, "status": status, **dict.fromkeys(NUMBERS), "settings": point.settings}
    try:
        lines = read_metrics(folder / "metrics.jsonl")
    except WorkdirError as error:
        return found | {"status": f"{status}: {error}"}
    if not lines:
        return found | {"steps": 0}
    last = lines[-1] if status == "finished" else {}
    numbers = {
        "bits_per_byte": last.get("eval/bits_per_byte"),
        "held_out_loss": last.get("eval/loss"),
        "max_logit": max((line["max_logit"] for line in lines if "max_logit" in line), default=None),
        "steps": lines[-1]["step"],
        "seconds": sum(line.get("step_time", 0.0) for line in lines),
        "skipped": sum(line.get("skipped", 0) for line in lines),
    }
    # JSON has no NaN.
    return found | {n: v if v is None or math.isfinite(v) else None for n, v in numbers.items()}


def rank(rows: list[dict]) -> list[dict]:
    """Best first; what has no held-out result comes last, in the sweep's order."""
    return sorted(rows, key=lambda r: math.inf if r["bits_per_byte"] is None else r["bits_per_byte"])


def table(rows: list[dict]) -> str:
    """The ranked rows as text."""
    width = max(len("point"), *(len(r["point"]) for r in rows))
    head = f"{'point':{width}}  bits/byte  held out  max logit   steps  in steps  status"
    forms = {"bits_per_byte": "9.4f", "held_out_loss": "8.4f", "max_logit": "9.1f", "steps": "6d", "seconds": "6.0f"}
    lines = [head]
    for r in rank(rows):
        cells = ["-".rjust(int(form.split(".")[0].rstrip("df"))) if r[n] is None else f"{r[n]:{form}}"
                 for n, form in forms.items()]  # fmt: skip
        lines.append(f"{r['point']:{width}}  {'  '.join(cells)} s  {r['status']}")
    return "\n".join(lines)


def write(workdir: Path, config: str, overrides: dict, rows: list[dict]) -> None:
    """sweep.json and sweep.csv, each whole or as it was. Raises RunError for a disk that is full."""
    ranked = rank(rows)
    content = {"config": config, "overrides": overrides, "points": ranked}
    keys = list(dict.fromkeys(key for r in ranked for key in r["settings"]))
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["point", "status", *NUMBERS, *keys])
    for r in ranked:
        cells = [*(r[n] for n in NUMBERS), *(r["settings"].get(k) for k in keys)]
        writer.writerow([r["point"], r["status"], *("" if cell is None else cell for cell in cells)])
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    for name, body in (("sweep.json", text), ("sweep.csv", sheet.getvalue())):
        scratch = workdir / f"{name}.tmp"
        try:
            scratch.write_text(body, encoding="utf-8")
            os.replace(scratch, workdir / name)
        except OSError as error:
            raise RunError(f"{workdir / name} cannot be written: {error}. Fix: free disk space, run again.") from error


def write_overlay(workdir: Path, rows: list[dict]) -> str:
    """The report of the best finished points on one page; says which are on it."""
    from k2jax.report.svg import MAX_RUNS
    from k2jax.report.training import write_report

    finished = [r for r in rank(rows) if r["status"] == "finished"]
    if not finished:
        return "no report: no point is finished"
    page = write_report([workdir / r["point"] for r in finished[:MAX_RUNS]], workdir / "report.html")
    shown = f" (the best {MAX_RUNS} of {len(finished)})" if len(finished) > MAX_RUNS else ""
    return f"report: {page}{shown}"
