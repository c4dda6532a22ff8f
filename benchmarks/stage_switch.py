"""Does the loss jump where a run goes over from 4K full attention to 16K MoBA with YaRN?

    python -m benchmarks.stage_switch --workdir=runs/stage_switch

Trains configs/long_context.py with and without its second stage for three seeds, each by its own
`python -m experiments.train`; a folder that holds a finished run is read, not trained again. Both arms of a seed are
one run up to the switch. Three answers, of which the first two have little noise: the whole held-out text under the
weights of the switch, with the settings before and after it; the same text 164K tokens later, with the switch and
without; the mean training loss of the 131K tokens after the switch less that of as many before it, where one long
document can make all the difference. Prints them and writes benchmarks/results/stage_switch.json.
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
SEEDS = (0, 1, 2)


def command(switch, seed, workdir):
    return f"python -m experiments.train --config={CONFIG}:switch={switch},seed={seed} --workdir={workdir}"


def measure(switch, seed, folder, switch_tokens):
    """What one arm says, as plain numbers; trains it unless its folder is finished."""
    subprocess.run([sys.executable, *command(switch, seed, folder).split()[1:]], cwd=record.ROOT, check=True)
    lines = read_metrics(folder / "metrics.jsonl")
    tokens, loss = (np.array([line[name] for line in lines]) for name in ("tokens", "loss"))
    before = loss[(tokens > switch_tokens - WINDOW) & (tokens <= switch_tokens)]
    after = loss[(tokens > switch_tokens) & (tokens <= switch_tokens + WINDOW)]
    held_out = {line["tokens"]: round(line["eval/bits_per_byte"], 4) for line in lines if "eval/bits_per_byte" in line}
    return {
        "command": command(switch, seed, "RUN_FOLDER"),
        "held_out_bits_per_byte_by_tokens": {t: bits for t, bits in held_out.items() if t >= switch_tokens},
        "training_loss_before": round(float(before.mean()), 4),
        "training_loss_after": round(float(after.mean()), 4),
        "max_logit": round(max(line["max_logit"] for line in lines), 2),
        "tokens": tokens.tolist(),
        "loss": [round(float(x), 4) for x in loss],
    }


def held_out_across(seed, folder):
    """Held-out bits per byte of the weights at the switch under the settings (before, after) it."""
    cfg = load_config(f"{CONFIG}:switch=on,seed={seed}")
    mesh = sharding.make_mesh({})
    stages = stages_of(cfg, read_corpus(cfg), mesh, by_step(cfg))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_state, cfg, stages[0].tx), jax.random.key(0))
        checkpoints = Checkpoints(folder / "checkpoints", cfg.train.checkpoints_kept)
        wanted = jax.tree.map(partial(sharding.on_mesh, mesh=mesh), shapes)
        state, _ = checkpoints.restore(stages[0].stop, wanted)
        checkpoints.close()
        found = [stage.evaluator.run(state["params"])["eval/bits_per_byte"] for stage in stages]
    for stage in stages:
        stage.data.close()
    return [round(bits, 4) for bits in found]


def mean_and_error(values):
    """The mean over seeds and its standard error."""
    values = np.array(values)
    return {
        "mean": round(float(values.mean()), 4),
        "standard_error": round(float(values.std(ddof=1) / len(values) ** 0.5), 4),
    }


def summary(seeds, at):
    """What the switch changed, over the seeds."""

    def later(arm):
        return min((int(t), bits) for t, bits in arm["held_out_bits_per_byte_by_tokens"].items() if int(t) > at)

    assert all(later(seed["on"])[0] == later(seed["off"])[0] for seed in seeds.values())
    by_arm = {
        arm: {
            "held_out_later": mean_and_error([later(seed[arm])[1] - seed["across"][0] for seed in seeds.values()]),
            "training_loss": mean_and_error(
                [seed[arm]["training_loss_after"] - seed[arm]["training_loss_before"] for seed in seeds.values()]
            ),
        }
        for arm in ("on", "off")
    }
    at_once = mean_and_error([seed["across"][1] - seed["across"][0] for seed in seeds.values()])
    return {"held_out_at_once": at_once, "tokens_later": later(seeds[SEEDS[0]]["on"])[0] - at, **by_arm}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="holds a run folder for each arm and seed")
    flags = parser.parse_args(argv)
    cfg = load_config(CONFIG)
    at = cfg.tokens_after(cfg.parts[1].start)
    seeds = {}
    for seed in SEEDS:
        folders = {arm: flags.workdir.resolve() / f"{arm}-{seed}" for arm in ("on", "off")}
        seeds[seed] = {arm: measure(arm, seed, folder, at) for arm, folder in folders.items()}
        seeds[seed]["across"] = held_out_across(seed, folders["on"])
    found = summary(seeds, at)
    data = {"switch_after_tokens": at, "window_tokens": WINDOW, "changes": found, "seeds": seeds}
    record.write("stage_switch", f"python -m benchmarks.stage_switch --workdir={flags.workdir}", data)
    at_once = found["held_out_at_once"]
    print(
        f"held-out bits per byte, same weights: {at_once['mean']:+.4f} (standard error {at_once['standard_error']:.4f})"
    )
    for name, arm in (("with the switch", found["on"]), ("without", found["off"])):
        later, training = arm["held_out_later"], arm["training_loss"]
        print(
            f"{name:16} held-out after {found['tokens_later']} tokens {later['mean']:+.4f} "
            f"({later['standard_error']:.4f}), training loss {training['mean']:+.4f} ({training['standard_error']:.4f})"
        )


if __name__ == "__main__":
    main()
