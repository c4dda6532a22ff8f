"""Muon, MuonClip and AdamW at equal tokens: the sweep of configs/optimizers.py as numbers and a picture.

    python -m experiments.sweep --config=configs/optimizers.py --workdir=runs/optimizers --jobs=6
    python -m benchmarks.optimizers --workdir=runs/optimizers

Reads a finished sweep, prints the held-out bits per byte of every learning rate at each scale, and writes
benchmarks/results/optimizers.json and docs/images/optimizers.png.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import record
from k2jax.config import load_config
from k2jax.model import count_params
from k2jax.training.metrics import read_metrics

CONFIG = "configs/optimizers.py"
PICTURE = record.ROOT / "docs" / "images" / "optimizers.png"
NAMES = {"muonclip": "MuonClip", "muon": "Muon", "adamw": "AdamW"}
COLORS = {"muonclip": "#1f6fb2", "muon": "#e08a1e", "adamw": "#c0392b"}
WINDOW = 10  # steps to a point of the curves


def read_sweep(folder: Path) -> list[dict]:
    """[{'scale', 'parameters', 'runs', ...}] for each scale, runs the best first.

    Raises ValueError where a point is not finished.
    """
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    unfinished = [point["point"] for point in sweep["points"] if point["status"] != "finished"]
    if unfinished:
        raise ValueError(f"--workdir={folder}: {unfinished[0]} is not finished; run the sweep again")
    runs = [_run(folder, point) for point in sweep["points"]]
    return [
        {
            "scale": scale,
            "parameters": _parameters(f"{CONFIG}:scale={scale}"),
            "share_of_adamw_tokens": share_of_tokens(mine),
            "runs": mine,
        }
        for scale in dict.fromkeys(run["scale"] for run in runs)
        if (mine := [run for run in runs if run["scale"] == scale])
    ]


def _run(folder, point):
    lines = read_metrics(folder / point["point"] / "metrics.jsonl")
    windows = range(0, len(lines), WINDOW)
    return {
        "scale": "small",  # the config's default
        **point["settings"],
        "steps": point["steps"],
        "tokens": lines[-1]["tokens"],
        "held_out_bits_per_byte": round(point["bits_per_byte"], 4),
        "held_out_loss": round(point["held_out_loss"], 4),
        "max_logit": round(point["max_logit"], 1),
        "curve": {
            "tokens": [lines[min(i + WINDOW, len(lines)) - 1]["tokens"] for i in windows],
            "loss": [round(float(np.mean([x["loss"] for x in lines[i : i + WINDOW]])), 4) for i in windows],
        },
    }


def best(runs: list[dict]) -> dict[str, dict]:
    """{optimizer: its run with the lowest held-out loss at the most steps}."""
    longest = max(run["steps"] for run in runs)
    found = {}
    for run in sorted(runs, key=lambda run: run["held_out_loss"]):
        if run["steps"] == longest:
            found.setdefault(run["optimizer"], run)
    return found


def share_of_tokens(runs: list[dict]) -> float | None:
    """Share of AdamW's tokens that the shortest MuonClip run needs to be at least as good as the best AdamW run.

    None where no shorter run was made.
    """
    adamw = best(runs)["adamw"]
    enough = [
        r["tokens"] for r in runs if r["optimizer"] == "muonclip" and r["held_out_loss"] <= adamw["held_out_loss"]
    ]
    shortest = min(enough, default=adamw["tokens"])
    return shortest / adamw["tokens"] if shortest < adamw["tokens"] else None


def draw(scales: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6 * len(scales)), layout="constrained", dpi=110)
    for row, sweep in zip(figure.subplots(len(scales), 2, squeeze=False), scales, strict=True):
        curves, rates = row
        for name, run in best(sweep["runs"]).items():
            curve, label = run["curve"], f"{NAMES[name]}, rate {run['lr']:g}: {run['held_out_bits_per_byte']:.3f}"
            curves.plot(np.array(curve["tokens"]) / 1e6, curve["loss"], color=COLORS[name], linewidth=1.2, label=label)
            same = sorted(
                (r["lr"], r["held_out_bits_per_byte"])
                for r in sweep["runs"]
                if r["optimizer"] == name and r["steps"] == run["steps"]
            )
            rates.plot(*zip(*same, strict=True), color=COLORS[name], marker="o", linewidth=1.2, label=NAMES[name])
        losses = [x for run in best(sweep["runs"]).values() for x in run["curve"]["loss"]]
        curves.set_ylim(min(losses) - 0.1, float(np.percentile(losses, 85)))
        curves.set(title=f"{sweep['parameters']}: best rate of each", xlabel="million tokens", ylabel="training loss")
        tried = sorted({run["lr"] for run in sweep["runs"]})
        rates.set(title="Every rate tried", xscale="log", xlabel="learning rate", ylabel="held-out bits per byte")
        rates.set_xticks(tried, [f"{rate:g}" for rate in tried])
        rates.minorticks_off()
        for axes in row:
            axes.grid(color="0.9", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _devices(folder: Path) -> set[str]:
    logs = (log.read_text(encoding="utf-8", errors="replace") for log in folder.glob("*/log.txt"))
    return set(re.findall(r"^devices: (.*); peak", "\n".join(logs), re.MULTILINE))


def _parameters(config: str) -> str:
    counts = count_params(load_config(config).model)
    return f"{counts.total / 1e6:.0f}M parameters, {counts.active / 1e6:.0f}M active"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of the sweep")
    flags = parser.parse_args(argv)
    scales = read_sweep(flags.workdir)
    for sweep in scales:
        print(f"{sweep['scale']}: {sweep['parameters']}")
        for run in sweep["runs"]:
            print(
                f"  {NAMES[run['optimizer']]:10} rate {run['lr']:<8g}{run['steps']:>6} steps "
                f"{run['held_out_bits_per_byte']:8.4f} bits per byte, max logit {run['max_logit']:.0f}"
            )
    # The sweep's machine, which need not be the one that reads it.
    trained_on = "; ".join(sorted(_devices(flags.workdir)))
    command = "python -m experiments.sweep --config=configs/optimizers.py --workdir=SWEEP --jobs=6"
    path = record.write("optimizers", command, {"hardware": trained_on, "scales": scales})
    draw(scales, PICTURE)
    print(f"{path.relative_to(record.ROOT)}\n{PICTURE.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
