"""Runs a Python program in a process with devices of its own; what it prints last is JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def told_by(program: str, devices: int, timeout: int = 600, arguments=()):
    """The last line that `program` prints, as JSON, with so many CPU devices."""
    simulated = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return told_in(simulated, program, timeout, arguments)


def told_in(env: dict[str, str], program: str, timeout: int = 600, arguments=()):
    """The last line that `program` prints, as JSON, with these additions to the environment."""
    environment = os.environ | env
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
