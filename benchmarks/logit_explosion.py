"""Maximum attention logits under Muon and under MuonClip: Figure 2 of the Kimi K2 report, in small.

    python -m benchmarks.logit_explosion --workdir=runs/logit_explosion

Trains both arms of configs/logit_explosion.py for each seed, every arm by its own `python -m experiments.train`; a
folder that holds a finished run is read, not trained again. Prints a table and writes
benchmarks/results/logit_explosion.json and docs/images/logit_explosion.png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import record
from k2jax.training.metrics import read_metrics

CONFIG = "configs/logit_explosion.py"
PICTURE = record.ROOT / "docs" / "images" / "logit_explosion.png"
ARMS = {"off": "Muon", "on": "MuonClip"}
COLORS = {"off": "#c0392b", "on": "#1f6fb2"}
WINDOW = 10  # steps to a point of the curves


def command(clip, seed, workdir):
    return f"python -m experiments.train --config={CONFIG}:clip={clip},seed={seed} --workdir={workdir}"


def train(clip, seed, folder):
    """Trains one arm unless its folder is finished; notes the process's own seconds beside the run."""
    cost = folder / "cost.json"
    if cost.exists():
        return
    start = time.monotonic()
    arguments = command(clip, seed, folder).split()[1:]
    process = subprocess.Popen([sys.executable, *arguments], cwd=record.ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command(clip, seed, folder)} ended with code {process.returncode}; its errors are above")
    seconds = {"wall_seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    cost.write_text(json.dumps({name: round(value) for name, value in seconds.items()}))


def summarize(clip, seed, folder):
    """What one finished run says, as plain numbers."""
    lines = read_metrics(folder / "metrics.jsonl")
    max_logit, loss = (np.array([line[name] for line in lines]) for name in ("max_logit", "loss"))
    tau = json.loads((folder / "config.json").read_text())["optimizer"]["tau"]
    steps = [line["step"] for line in lines]
    windows = range(0, len(lines), WINDOW)
    over = np.flatnonzero(max_logit > tau)
    return {
        "arm": ARMS[clip],
        "seed": seed,
        "command": command(clip, seed, "RUN_FOLDER"),
        "steps": steps[-1],
        "max_logit_highest": round(float(max_logit.max()), 2),
        "max_logit_last_50_steps_mean": round(float(max_logit[-50:].mean()), 2),
        "first_step_over_tau": steps[over[0]] if len(over) else None,
        "steps_over_tau": len(over),
        "highest_over_tau_ratio": round(float(max_logit.max() / tau), 4),
        "train_loss_last_50_steps_mean": round(float(loss[-50:].mean()), 4),
        "held_out_loss": round(lines[-1]["eval/loss"], 4),
        "held_out_bits_per_byte": round(lines[-1]["eval/bits_per_byte"], 4),
        "seconds_in_steps": round(sum(line["step_time"] for line in lines)),
        **json.loads((folder / "cost.json").read_text()),
        "curve": {
            "step": [steps[min(i + WINDOW, len(steps)) - 1] for i in windows],
            "max_logit": [round(float(max_logit[i : i + WINDOW].max()), 2) for i in windows],
            "loss": [round(float(loss[i : i + WINDOW].mean()), 4) for i in windows],
        },
    }


def report(runs, settings):
    """What the JSON file holds: settings once, then every run."""
    by_arm = {arm: [run["held_out_bits_per_byte"] for run in runs if run["arm"] == arm] for arm in ARMS.values()}
    gaps = np.subtract(by_arm["MuonClip"], by_arm["Muon"])
    return {
        "curves": f"a point for every {WINDOW} steps: the highest max logit and the mean loss (nats per token) of them",
        "settings": settings,
        "held_out_bits_per_byte_muonclip_minus_muon": {
            "by_seed": [round(float(gap), 4) for gap in gaps],
            "mean": round(float(gaps.mean()), 4),
        },
        "runs": runs,
    }


def draw(runs, tau, path):
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    logits, losses = figure.subplots(1, 2)
    for clip, arm in ARMS.items():
        for i, run in enumerate(r for r in runs if r["arm"] == arm):
            curve, label = run["curve"], arm if i == 0 else None
            logits.plot(curve["step"], curve["max_logit"], color=COLORS[clip], linewidth=1.2, label=label)
            losses.plot(curve["step"], curve["loss"], color=COLORS[clip], linewidth=1.0, label=label)
    logits.axhline(tau, color="0.35", linewidth=0.9, linestyle="--", label=f"threshold τ = {tau:g}")
    seeds = len({run["seed"] for run in runs})
    logits.set(
        yscale="log", title=f"Largest attention logit ({seeds} seeds)", ylabel="max logit over heads", xlabel="step"
    )
    losses.set(title=f"Training loss ({seeds} seeds)", ylabel="nats per token", xlabel="step")
    losses.set_ylim(top=float(np.percentile([x for run in runs for x in run["curve"]["loss"]], 95)))
    for axes in (logits, losses):
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="holds a run folder for each arm and seed")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="arms trained at the same time")
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    arms = [(clip, seed, flags.workdir.resolve() / f"{clip}-{seed}") for seed in seeds for clip in ARMS]
    with ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(lambda arm: train(*arm), arms))
    runs = [summarize(*arm) for arm in arms]
    settings = json.loads((arms[-1][2] / "config.json").read_text())
    tau = settings["optimizer"]["tau"]
    print(f"{'arm':10} {'seed':>4} {'highest logit':>14} {'held-out bits/byte':>19} {'CPU seconds':>12}")
    for run in runs:
        print(
            f"{run['arm']:10} {run['seed']:>4} {run['max_logit_highest']:14.1f} "
            f"{run['held_out_bits_per_byte']:19.4f} {run['cpu_seconds']:12}"
        )
    made_by = "python -m benchmarks.logit_explosion --workdir=runs/logit_explosion"
    result = record.write("logit_explosion", made_by, report(runs, settings))
    draw(runs, tau, PICTURE)
    print(f"{result.relative_to(record.ROOT)}\n{PICTURE.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
