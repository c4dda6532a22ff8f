"""experiments.prepare as a process: killed, two workers, a full disk, and training runs on its shards."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.prepare import main
from k2jax.training.errors import RunError
from tests import tiny
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.check

# Runs the program and kills its process at the n-th file that is given its name; prints its workers first.
KILLED = """
import multiprocessing, os, signal, sys
from experiments import common, prepare
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    left, real = [int(sys.argv.pop(1))], os.replace
    def replace(*paths):
        left[0] -= 1
        if left[0] < 0:
            print("workers", *[p.pid for p in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        real(*paths)
    os.replace = replace
    common.run_main(prepare.main)
"""


def arguments(text, out, *more):
    flags = [f"--source={text}", f"--out={out}", "--held-out-fraction=0.3", "--shards=3", "--workers=2", *more]
    return flags if any(flag.startswith(("--tokenizer", "--train")) for flag in more) else [*flags, "--tokenizer=bytes"]


def prepare(text, out, *more, program=("-m", "experiments.prepare"), **options):
    """(status, stdout, stderr)"""
    command = [sys.executable, *program, *arguments(text, out, *more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, **options)
    return result.returncode, result.stdout, result.stderr


def told(stderr):
    """The one line of an error that needs no traceback."""
    [line] = stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def contents(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.*")) if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """24 pages of 100 kB."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / f"page{i:02}.txt").write_bytes(rng.integers(97, 123, 100_000, np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    status, printed, err = prepare(text, out, "--workers=1")
    assert status == 0, err
    assert re.search(
        r"^train: \d+ documents, [\d,]+ bytes of text, [\d,]+ tokens \(1\.00 bytes a token\) in 3 shards", printed
    )
    assert f"--config.data.source={out} --config.data.tokenizer=bytes" in printed
    return contents(out)


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_shards(text, undisturbed, tmp_path):
    out, program = tmp_path / "out", tmp_path / "killed.py"
    program.write_text(KILLED)
    for n in (0, 2, 3, 4, 1):  # The plan; then the tokens, the starts, the record of a shard; then an index.
        status, printed, _ = prepare(text, out, program=(program, str(n)))
        assert status == -signal.SIGKILL
        workers = [int(pid) for pid in printed.split("workers")[1].split()]
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    status, printed, err = prepare(text, out)
    assert status == 0, err
    assert contents(out) == undisturbed
    status, printed, _ = prepare(text, out)
    assert (status, "complete already; every shard was read" in printed) == (0, True)
    assert contents(out) == undisturbed


def is_running(pid):
    try:
        # A killed process that nobody waited for is still listed, as a zombie.
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_interrupted_by_the_keyboard_it_says_what_is_kept(text, undisturbed, tmp_path):
    out, program = tmp_path / "out", tmp_path / "killed.py"
    program.write_text(KILLED.replace("SIGKILL", "SIGINT"))
    status, _, err = prepare(text, out, program=(program, "4"))
    assert (status, err.strip()) == (
        128 + signal.SIGINT,
        "stopped by SIGINT; finished shards are kept, the same command continues",
    )
    assert prepare(text, out)[0] == 0
    assert contents(out) == undisturbed


def test_a_worker_that_dies_is_told(text, tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(
        "import os\nfrom experiments import common, prepare\nfrom k2jax.data import prepare as preparing\n"
        "def die(texts):\n    os._exit(9)\npreparing._encode_in_worker = die\n"
        "if __name__ == '__main__':\n    common.run_main(prepare.main)\n"
    )
    status, _, err = prepare(text, tmp_path / "out", program=(program,))
    assert (status, "a worker process ended, perhaps killed for memory. Fix: give fewer" in told(err)) == (2, True)


def test_a_full_disk_is_told_and_the_same_command_goes_on(text, undisturbed, tmp_path):
    out = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", "1500k") as enlarge:
        status, _, err = prepare(text, out)
        assert status == 2, err
        assert re.search(r"No space left on device.*Fix: free disk space", told(err))
        enlarge()
        assert prepare(text, out)[0] == 0
        assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-tokenizer=300", "--tokenizer=bytes"], "give one of --tokenizer=NAME and --train-tokenizer=IDS"),
        (["--workers=0"], "--workers=0 must be at least 1"),
        (["--source=nowhere"], "data.source: nowhere does not exist. Fix: "),
        (["--tokenizer=bpe"], "data.tokenizer='bpe' is not known. Fix: "),
        (["--shards=0"], "shards=0 must be at least 1"),
        (["--held-out-fraction=0.0001"], "leaves no held-out file of 24. Fix: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(text, tmp_path, flags, message):
    with pytest.raises(RunError, match=re.escape(message)):
        main(arguments(text, tmp_path / "out", *flags))


# --- training on shards -------------------------------------------------------------------------------------------


def train(source, workdir, *more):
    """(status, stderr) of six steps of the tiny model."""
    flags = [f"--config=tests/tiny.py:source={source}", f"--workdir={workdir}", *more]
    command = [sys.executable, "-m", "experiments.train", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stderr


def losses(workdir):
    return re.findall(r'"(?:loss|eval/loss|eval/bits_per_byte)": ([\d.]+)', (workdir / "metrics.jsonl").read_text())


def test_training_on_shards_equals_training_on_the_text(tmp_path):
    text, out = tiny.write_text(tmp_path / "text"), tmp_path / "out"
    assert prepare(text, out)[0] == 0
    for source in (text, out):
        status, err = train(source, tmp_path / f"on_{source.name}")
        assert status == 0, err
    assert losses(tmp_path / "on_out") == losses(tmp_path / "on_text")
    assert len(losses(tmp_path / "on_out")) >= 8

    status, err = train(out, tmp_path / "other", "--config.data.held_out_fraction=0.2")
    assert (status, "was prepared with 0.3. Fix: " in told(err)) == (2, True)
    pytest.importorskip("tokenizers")
    trained = tmp_path / "trained"
    assert prepare(text, trained, "--train-tokenizer=262")[0] == 0
    status, err = train(trained, tmp_path / "wrong")
    assert (status, "Fix: name that tokenizer, or prepare the text again" in told(err)) == (2, True)
    # The checkpoint of one tokenizer is not continued with another one.
    status, err = train(trained, tmp_path / "on_out", f"--config.data.tokenizer=hf:{trained}/tokenizer")
    assert (status, "belongs to another config" in told(err)) == (2, True)


def test_a_shard_that_is_damaged_while_training_is_named(tmp_path):
    text, out = tiny.write_text(tmp_path / "text", files=40), tmp_path / "out"
    assert prepare(text, out)[0] == 0
    path = sorted((out / "train").glob("*.array_record"))[1]
    content = bytearray(path.read_bytes())
    for at in range(200, 1500, 7):
        content[at] ^= 255
    path.write_bytes(content)
    status, err = train(out, tmp_path / "run")
    assert status == 2, err
    assert re.search(rf"{path.name} is (cut off or )?damaged: .*Nothing is lost: the last complete checkpoint", err)
