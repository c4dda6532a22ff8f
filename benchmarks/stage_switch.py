"""Does the loss jump where a run goes over from 4K full attention to 16K MoBA with YaRN?

    python -m benchmarks.stage_switch --workdir=runs/stage_switch

Trains configs/long_context.py with and without its second stage, each by its own `python -m experiments.train`; a
folder that holds a finished run is read, not trained again. Two answers. Training: the mean loss of the 131K tokens
after the switch less that of as many before it; without the switch the same tokens give what learning alone does.
Held-out: the whole held-out text under the weights of the switch, with the settings before and after it. Prints both
and writes benchmarks/results/stage_switch.json.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks import record
from k2jax import sharding
from k2jax.config import load_config
from k2jax.training.checkpoints import Checkpoints
from k2jax.training.corpus import read_corpus
from k2jax.training.metrics import read_metrics
from k2jax.training.schedules import by_step
from k2jax.training.stages import stages_of
from k2jax.training.step import init_state

CONFIG = "configs/long_context.py"
WINDOW = 131_072  # tokens on each side of the switch


def command(switch, workdir):
    return f"python -m experiments.train --config={CONFIG}:switch={switch} --workdir={workdir}"


def measure(switch, folder, switch_tokens):
    """What one arm says, as plain numbers; trains it unless its folder is finished."""
    subprocess.run([sys.executable, *command(switch, folder).split()[1:]], cwd=record.ROOT, check=True)
    lines = read_metrics(folder / "metrics.jsonl")
    tokens, loss = (np.array([line[name] for line in lines]) for name in ("tokens", "loss"))
    before = loss[(tokens > switch_tokens - WINDOW) & (tokens <= switch_tokens)]
    after = loss[(tokens > switch_tokens) & (tokens <= switch_tokens + WINDOW)]
    errors = [part.std(ddof=1) / len(part) ** 0.5 for part in (before, after)]
    return {
        "command": command(switch, "RUN_FOLDER"),
        "mean_loss_before": round(float(before.mean()), 4),
        "mean_loss_after": round(float(after.mean()), 4),
        "jump": round(float(after.mean() - before.mean()), 4),
        "standard_error_of_the_jump": round(float(np.hypot(*errors)), 4),
        "held_out_bits_per_byte_at_the_end": round(lines[-1]["eval/bits_per_byte"], 4),
        "max_logit": round(max(line["max_logit"] for line in lines), 2),
        "tokens": tokens.tolist(),
        "loss": [round(float(x), 4) for x in loss],
    }


def held_out_across(folder):
    """{stage: held-out bits per byte} of the weights at the switch under each stage's settings."""
    cfg = load_config(f"{CONFIG}:switch=on")
    mesh = sharding.make_mesh({})
    stages = stages_of(cfg, read_corpus(cfg), mesh, by_step(cfg))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_state, cfg, stages[0].tx), jax.random.key(0))
        checkpoints = Checkpoints(folder / "checkpoints", cfg.train.checkpoints_kept)
        wanted = jax.tree.map(partial(sharding.on_mesh, mesh=mesh), shapes)
        state, _ = checkpoints.restore(stages[0].stop, wanted)
        checkpoints.close()
        found = {s.name: s.evaluator.run(state["params"])["eval/bits_per_byte"] for s in stages}
    for stage in stages:
        stage.data.close()
    return {name: round(bits, 4) for name, bits in found.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="holds a run folder for each arm")
    flags = parser.parse_args(argv)
    cfg = load_config(CONFIG)
    at = cfg.tokens_after(cfg.parts[1].start)
    arms = {name: measure(name, flags.workdir.resolve() / name, at) for name in ("on", "off")}
    across = held_out_across(flags.workdir.resolve() / "on")
    data = {"switch_after_tokens": at, "window_tokens": WINDOW, "held_out_bits_per_byte_at_the_switch": across}
    data |= {"switch": arms["on"], "no_switch": arms["off"]}
    record.write("stage_switch", f"python -m benchmarks.stage_switch --workdir={flags.workdir}", data)
    for name, arm in (("with the switch", arms["on"]), ("without", arms["off"])):
        print(
            f"{name:16} loss {arm['mean_loss_before']:.4f} -> {arm['mean_loss_after']:.4f}, jump {arm['jump']:+.4f} "
            f"(standard error {arm['standard_error_of_the_jump']:.4f})"
        )
    print(f"held-out bits per byte of the weights at the switch: {across}")


if __name__ == "__main__":
    main()
