r"""Is this machine all right? Runs every op against its reference, measures rates, takes twenty steps of a config.

python -m experiments.doctor
python -m experiments.doctor --config=configs/nano.py:batch=16 --workdir=runs/doctor
python -m experiments.doctor --quick

Writes WORKDIR/doctor.json; the disk that is measured is WORKDIR's. The exit status is 0 if everything is right, 1 if
an op, a collective or a step is wrong, 2 if the doctor could not start.
"""

import argparse
import dataclasses
import json
import logging
import shlex
import sys
import time
from pathlib import Path

from experiments import common
from k2jax.training.errors import WorkdirError


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/nano.py", help="config file and argument, path.py:name=value,...")
    parser.add_argument("--workdir", type=Path, default=Path("runs/doctor"), help="where doctor.json goes")
    parser.add_argument("--quick", action="store_true", help="one shape of every op, fewer runs, five steps")
    return common.parse_flags(parser, argv)


def main(argv=None):
    flags, overrides = parse(argv)
    cfg = common.load(flags.config, overrides)
    try:
        flags.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"--workdir={flags.workdir} cannot be written: {error}. Fix: give another.") from error
    logging.getLogger("k2jax").setLevel(logging.WARNING)  # Which implementation is chosen is what the lines say.
    from k2jax.diagnostics import examination  # starts the device

    start = time.monotonic()
    found = examination.examine(cfg, flags.workdir, quick=flags.quick, say=lambda line: print(line, flush=True))
    found["seconds"] = time.monotonic() - start
    path = flags.workdir / "doctor.json"
    path.write_text(
        json.dumps(record(flags, overrides, cfg) | found, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    print(f"{found['verdict']} ({found['seconds']:.0f} s; all of it in {path})")
    sys.exit(1 if found["wrong"] else 0)


def record(flags, overrides, cfg) -> dict:
    """Under which circumstances the rest was found."""
    from benchmarks.record import circumstances

    words = ["python", "-m", "experiments.doctor", f"--config={flags.config}", *["--quick"][: flags.quick]]
    return {
        "command": shlex.join([*words, *common.override_flags(overrides)]),
        **circumstances(),
        "config": dataclasses.asdict(cfg),
    }


if __name__ == "__main__":
    common.run_main(main)
