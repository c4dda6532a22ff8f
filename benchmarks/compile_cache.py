"""What the compile cache saves: seconds from the start of the process to nano's first finished step.

    python -m benchmarks.compile_cache

Without a cache, with an empty one, and with the one that the start before has filled. Processor seconds of the whole
process, all threads, stand beside the clock's: on a machine with other work they are the steadier number.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record

CONFIG = "configs/nano.py"


def start(cache: str, workdir: Path) -> dict:
    """Starts nano and kills it after its first step."""
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    log, begun = workdir.with_suffix(".log"), time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([*command, f"--compile_cache={cache}"], cwd=record.ROOT, stdout=file, stderr=file)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and b"\n" in metrics.read_bytes()):
        if process.poll() is not None:
            raise RuntimeError(f"nano ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    process.kill()
    _, _, used = os.wait4(process.pid, 0)
    said = next(line for line in log.read_text().splitlines() if line.startswith("compiled the train step"))
    return {"seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime, "said": said}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    flags = parser.parse_args(argv)
    starts = {"off": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(flags.repeats):
            cache = folder / f"cache{i}"
            for kind, where in (("off", "off"), ("cold", str(cache)), ("warm", str(cache))):
                starts[kind].append(start(where, folder / f"{kind}{i}"))
                print(kind, starts[kind][-1], flush=True)
        size = sum(entry.stat().st_size for entry in cache.iterdir())
    data = {
        kind: {key: statistics.median(s[key] for s in found) for key in ("seconds", "processor_seconds")}
        | {"all_seconds": [s["seconds"] for s in found], "said": found[-1]["said"]}
        for kind, found in starts.items()
    }
    load = {"other_load": os.getloadavg()[1], "repeats": flags.repeats, "cache_bytes": size}
    path = record.write("compile_cache", f"python -m benchmarks.compile_cache --repeats={flags.repeats}", data | load)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
