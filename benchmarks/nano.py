"""Records a finished nano run, so that README's numbers have a file behind them.

    make train && python -m benchmarks.nano --workdir=runs/nano --name=nano_cpu
    python -m experiments.train --config=configs/nano.py --workdir=runs/ablate --ablate
    python -m benchmarks.nano --workdir=runs/ablate --name=nano_ablation

A folder with an ablation.json is recorded as a comparison of its runs.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks import record
from k2jax.training.metrics import read_metrics


def summary(workdir: Path) -> dict:
    """What one run folder says, as plain numbers."""
    lines = read_metrics(workdir / "metrics.jsonl")
    last = next(line for line in reversed(lines) if "eval/loss" in line)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "optimizer": config["optimizer"]["name"],
        "learning_rate": config["optimizer"]["learning_rate"],
        "attention": config["model"]["attention"],
        "held_out_bits_per_byte": last["eval/bits_per_byte"],
        "held_out_loss": last["eval/loss"],
        "load_max_over_mean_by_layer": last.get("eval/load_max_over_mean"),
        "max_logit": max(line["max_logit"] for line in lines),
        "median_step_seconds": statistics.median(line["step_time"] for line in lines[1:]),
        "seconds_in_steps": sum(line["step_time"] for line in lines),
        "skipped": sum(line["skipped"] for line in lines),
        "spikes": sum(line["spike"] for line in lines),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the result file")
    flags = parser.parse_args(argv)
    train = f"python -m experiments.train --config=configs/nano.py --workdir={flags.workdir}"
    comparison = flags.workdir / "ablation.json"
    if comparison.exists():
        rows = json.loads(comparison.read_text(encoding="utf-8"))
        data = {"runs": {name: summary(flags.workdir / folder) for name, folder in rows.items()}}
        path = record.write(flags.name, f"{train} --ablate", data)
    else:
        path = record.write(flags.name, train, summary(flags.workdir))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
