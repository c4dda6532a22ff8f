r"""Trains a model and leaves a run folder with its report.

python -m experiments.train --config=configs/nano.py --workdir=runs/nano
python -m experiments.train --config=configs/nano.py:steps=50,attention=full --workdir=runs/short
python -m experiments.train --config=configs/nano.py --workdir=runs/nano --config.optimizer.tau=50

The same command again continues from the last complete checkpoint.
"""

import argparse
from pathlib import Path

from experiments import common
from k2jax.training.errors import SetupError


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="config file and argument, path.py:name=value,...")
    parser.add_argument("--workdir", type=Path, help="run folder; made if absent, continued if it holds this run")
    parser.add_argument("--count", action="store_true", help="print parameter counts and predicted memory, and stop")
    parser.add_argument("--ablate", action="store_true", help="train the config and its variants, print a table")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile")
    parser.add_argument("--distributed", metavar="auto|off|HOST:PORT,NUM,ID", help="join several processes")
    parser.add_argument(
        "--compile_cache", metavar="DIR|off", help="where compiled programs are kept for the next start"
    )
    parser.add_argument("--track", metavar="wandb:PROJECT|trackio:PROJECT", help="have a tracker follow the metrics")
    return common.parse_flags(parser, argv)


def main(argv=None):
    flags, overrides = parse(argv)
    cfg = common.load(flags.config, overrides)
    profile = steps_to_trace(flags.profile) if flags.profile else None
    if flags.ablate and profile:
        raise SetupError("--profile traces one run: give it without --ablate")
    if flags.count:
        return count(cfg)
    if flags.workdir is None:
        raise SetupError("--workdir is missing: name the run folder, for example --workdir=runs/nano")
    # What only training needs is imported late: counting the 1T model must not start a device.
    from experiments import summary
    from k2jax.training import compile_cache, distributed
    from k2jax.training.loop import train

    # First: a host that cannot write its cache ends before the others count on it.
    cache = compile_cache.enable(flags.compile_cache)
    print(f"processes: {distributed.initialize(flags.distributed)}")
    print(f"compile cache: {cache}")
    if flags.ablate:
        return summary.ablate(flags.config, overrides, flags.workdir, flags.track)
    result = train(cfg, flags.workdir, profile=profile, track=flags.track)
    return summary.finish(cfg, flags, overrides, result)


def steps_to_trace(text: str) -> tuple[int, int]:
    """(first, last) of "FIRST:LAST", counted from 1. Raises SetupError for anything else."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise SetupError(f"--profile={text}: expected FIRST:LAST, two steps from 1 on, for example --profile=10:12")
    return int(first), int(last)


def count(cfg):
    """Prints the counts, and what a step needs on each device of the config's mesh, without allocating a parameter."""
    from k2jax.model import count_params
    from k2jax.training import memory

    counts = count_params(cfg.model)
    print(f"total {counts.total:,}\nactive {counts.active:,}\nembedding {counts.embedding:,}")
    for stage in cfg.parts:
        print(f"{stage.name}: {' '.join(memory.describe(memory.predict_memory(stage.run), None))}")


if __name__ == "__main__":
    common.run_main(main)
