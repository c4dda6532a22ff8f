"""The command line: every mistake ends with status 2 and one line that names the thing and the fix."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.train import parse, steps_to_trace
from k2jax.training.workdir import claim
from tests import tiny

ROOT = Path(__file__).parents[1]

# Runs each command line in one process on a platform that does not exist: a message that came after device work
# would be another one. Prints what each gave.
COMMANDS = """
import contextlib, io, json, sys
from experiments import common, train
for argv in json.load(sys.stdin):
    sys.argv = ["train", *argv]
    err, status = io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            common.run_main(train.main)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, err.getvalue()]))
"""


def folders(root):
    """Sources that cannot work, by name."""
    for name in ("empty", "blank", "latin", "short", "one"):
        (root / name).mkdir()
    (root / "blank" / "a.txt").write_text("")
    (root / "latin" / "a.txt").write_bytes(b"caf\xe9 and more")
    for i in range(12):
        (root / "short" / f"page{i:02}.txt").write_text("x")
    (root / "one" / "a.txt").write_text("the only file")
    (root / "file").write_text("not a folder")
    tiny.write_text(root / "text")


# (argument, overrides and flags, what the message must hold)
MISTAKES = [
    ("", ["--config.optimizer.learnin_rate=1"], "no field 'learnin_rate'; did you mean 'learning_rate'"),
    ("", ["--config.nothing=1"], "no field 'nothing'"),
    ("", ["--config.model.dim"], "unknown argument '--config.model.dim'"),
    ("", ["--wrokdir=x"], "unknown argument '--wrokdir=x'"),
    ("", ["extra"], "unknown argument 'extra'"),
    ("stesp=3", [], "no argument is named 'stesp'; did you mean 'steps'"),
    ("steps=many", [], "steps=many: expected a value of type int"),
    ("", ["--config.train.steps=0"], "train.steps=0: must be positive"),
    ("", ["--config.train.steps='six'"], "config.train.steps='six': expected int"),
    ("", ["--config.optimizer.name=sgd"], "optimizer.name='sgd': use one of 'muonclip'"),
    ("", ["--config.model.attention=('full','moba')"], "2 entries for model.num_layers=3"),
    ("", ["--config.model.attention=('full','moba','swa')"], "model.attention[2]='swa'"),
    ("", ["--config.model.attn={'num_kv_heads':3,'head_dim':8}"], "num_kv_heads=3 does not divide model.num_heads=2"),
    ("", ["--config.model.moba.block_size=0"], "model.moba.block_size=0"),
    ("", ["--config.model.moe.num_groups=3"], "num_groups=3 does not divide model.moe.num_experts=4"),
    ("", ["--config.model.moe.experts_per_token=5"], "experts_per_token=5 exceeds the 4 experts"),
    ("accumulation=3", [], "data.batch_size=4 is not a multiple of train.accumulation=3"),
    ("data=3", [], "mesh.data=3 does not divide the micro-batch of 4"),
    ("", ["--config.mesh.tensor=4"], "mesh.tensor=4 does not divide model.num_heads=2"),
    ("", ["--config.optimizer.warmup_tokens=100000"], "exceed the run's 768 tokens"),
    ("", ["--config.model.vocab_size=100"], "model.vocab_size=100 is smaller than the tokenizer's 264"),
    ("source=ROOT/absent", [], "ROOT/absent does not exist"),
    ("source=ROOT/empty", [], "ROOT/empty has no text"),
    ("source=ROOT/blank", [], "ROOT/blank has no text"),
    ("source=ROOT/latin", [], "ROOT/latin/a.txt is not UTF-8: byte 0xe9 at offset 3"),
    ("source=ROOT/short", [], "data.batch_size"),
    ("source=ROOT/one", [], "file of 1. Fix: add files"),
    ("", ["--workdir=ROOT/file"], "--workdir=ROOT/file cannot be written"),
    ("", ["--workdir=ROOT/file/below"], "--workdir=ROOT/file/below cannot be written"),
    ("", ["--workdir=ROOT/other"], "data.batch_size: 8 -> 4 (there -> here)"),
    ("", ["--profile=3"], "--profile=3: expected FIRST:LAST"),
    ("", ["--profile=5:3"], "--profile=5:3: expected FIRST:LAST"),
    ("", ["--profile=1:2", "--ablate"], "--profile traces one run: give it without --ablate"),
    ("", ["--ablate"], "no argument is named 'attention'"),
    ("", ["--distributed=host:1234,2,2"], "id 2 of 2 processes; ids run from 0 to 1"),
    ("", ["--track=mlflow:lab"], "--track=mlflow:lab: expected wandb:PROJECT or trackio:PROJECT"),
    ("", ["--compile_cache=ROOT/file/below"], "--compile_cache=ROOT/file/below: Not a directory"),
    ("", [], "no device can be used"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{number of the mistake: (exit status, stderr)}, and the folder ROOT."""
    root = tmp_path_factory.mktemp("mistakes")
    folders(root)
    (root / "other").mkdir()
    claim(root / "other", tiny.config(root / "text", batch=8))
    commands = []
    for number, (arg, flags, _) in enumerate(MISTAKES):
        arg = arg if "source=" in arg else ",".join(filter(None, (f"source={root}/text", arg)))
        flags = [f"--workdir={root}/run{number}", *flags]
        commands.append([x.replace("ROOT", str(root)) for x in (f"--config=tests/tiny.py:{arg}", *flags)])
    commands += [["--workdir=x"], ["--config=absent.py", "--workdir=x"], ["--config=tests/tiny.py"]]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), env=os.environ | {"JAX_PLATFORMS": "absent"},
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, [json.loads(text) for text in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "number", range(len(MISTAKES)), ids=lambda n: " ".join([MISTAKES[n][0], *MISTAKES[n][1]]) or "-"
)
def test_a_mistake_ends_with_status_2_and_a_message_before_device_work(answers, number):
    root, given = answers
    status, err = given[number]
    expected = MISTAKES[number][2].replace("ROOT", str(root))
    assert status == 2, err
    message = err.splitlines()[-1]
    assert expected in message
    assert re.match(r"(train: )?error: ", message)
    assert "Traceback" not in err
    assert not (root / f"run{number}" / "config.json").exists()


def test_what_a_command_must_name(answers):
    missing_config, absent_config, missing_workdir = answers[1][-3:]
    assert missing_config[0] == absent_config[0] == missing_workdir[0] == 2
    assert "--config" in missing_config[1].splitlines()[-1]
    assert "'absent.py' does not exist" in absent_config[1]
    assert "--workdir is missing" in missing_workdir[1]


def test_flags_are_not_abbreviated_and_values_are_read():
    flags, overrides = parse(["--config=a.py", "--config.optimizer.tau=50", "--config.data.source=/x", "--profile=2:3"])
    assert overrides == {"optimizer.tau": 50, "data.source": "/x"}
    assert steps_to_trace(flags.profile) == (2, 3)
    with pytest.raises(SystemExit):
        parse(["--config=a.py", "--work=x"])
