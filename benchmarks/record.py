"""Where a number comes from: hardware, versions, commit; and the one place that writes result files."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, command: str, data: dict) -> Path:
    """Writes results/NAME.json: the data under its command and circumstances."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, **circumstances(), **data}, indent=2) + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict | None:
    """A result file's content, or None where nothing has been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def circumstances() -> dict:
    """Hardware, versions, commit and day of a measurement made now."""
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def hardware() -> str:
    """The devices that jax sees; a CPU by its model and cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} CPU cores"


def _commit() -> str:
    # An exported tree has no history; the result then says so instead of naming a commit.
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "git is not installed"
    return git.stdout.strip() or "not a git checkout"
