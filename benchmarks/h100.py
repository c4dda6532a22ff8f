"""The baseline on one H100: configs/h100.py for 300 micro-steps of 16,384 tokens.

    python -m experiments.prepare --source=packages --tokenizer=k2 --out=data/packages
    python -m benchmarks.h100 --source=data/packages --workdir=runs/h100

Trains with the command of the config, traces two steps near the end, and writes benchmarks/results/NAME.json: loss,
tokens a second, MFU (active weights with the head, the causal half of attention, no recomputation, against the data
sheet's 989 TFLOP/s), peak memory, and where the time of a step goes. --read takes a folder as it is, also
one whose run was stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import record, step_profile
from k2jax.training.metrics import read_metrics

STEPS, PROFILED = 75, (66, 67)
WARM = 10  # steps left out of the medians
FLAGS = "--xla_dump_hlo_module_re=jit_train_step --xla_dump_hlo_as_text --xla_gpu_enable_command_buffer="


def command(flags) -> list[str]:
    return [
        "python", "-m", "experiments.train", f"--config=configs/h100.py:steps={STEPS}", f"--workdir={flags.workdir}",
        f"--config.data.source={flags.source}", f"--profile={PROFILED[0]}:{PROFILED[1]}", *flags.override,
    ]  # fmt: skip


def train(flags):
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={flags.workdir}/hlo {FLAGS}",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"),
    }
    subprocess.run([sys.executable, *command(flags)[1:]], cwd=record.ROOT, env=env, check=True)


def summary(workdir: Path) -> dict:
    """What the run folder says, as plain numbers."""
    rows = read_metrics(workdir / "metrics.jsonl")
    steady = [row for row in rows[WARM:] if not PROFILED[0] - 1 <= row["step"] <= PROFILED[1] + 1]
    memory = json.loads((workdir / "memory.json").read_text(encoding="utf-8"))
    evaluated = next((row for row in reversed(rows) if "eval/loss" in row), {})
    return {
        "steps": rows[-1]["step"],
        "tokens_per_step": rows[0]["tokens"],
        "median_step_seconds": statistics.median(row["step_time"] for row in steady),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steady),
        "mfu": statistics.median(row["mfu"] for row in steady),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "held_out_loss": evaluated.get("eval/loss"),
        "held_out_bits_per_byte": evaluated.get("eval/bits_per_byte"),
        "max_logit": max(row["max_logit"] for row in rows),
        "skipped": sum(row["skipped"] for row in rows),
        "peak_memory_bytes": max((row["peak_memory"] for row in rows if "peak_memory" in row), default=None),
        "compiled_memory": memory,
        "loss": [round(row["loss"], 4) for row in rows],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--source", help="shards of installed packages in K2's tokens")
    parser.add_argument("--read", action="store_true", help="train nothing")
    parser.add_argument("--name", default="h100_baseline", help="of the result file")
    parser.add_argument("--override", action="append", default=[], metavar="--config.a.b=VALUE")
    flags = parser.parse_args(argv)
    flags.workdir = flags.workdir.resolve()
    if not flags.read:
        train(flags)
    profile = step_profile.table(flags.workdir / "profile", flags.workdir / "hlo", PROFILED[1] - PROFILED[0] + 1)
    data = summary(flags.workdir) | {"time_of_a_step_ms": profile}
    path = record.write(flags.name, " ".join(command(flags)), data)
    print("\n".join(step_profile.lines(profile)))
    print({name: value for name, value in data.items() if not isinstance(value, (dict, list))})
    print(path)


if __name__ == "__main__":
    main()
