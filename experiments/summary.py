"""What a finished run prints, and the comparison of a config with its variants."""

import json
import shlex
from pathlib import Path

from experiments import common
from k2jax.data import count_models
from k2jax.data.shards import is_prepared
from k2jax.data.sources import load_documents, split_held_out
from k2jax.report.training import write_report
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics
from k2jax.training.processes import is_first

# What --ablate trains: the config as it is, and with one argument changed.
VARIANTS = {"muonclip and moba": "", "full attention": "attention=full", "adamw": "optimizer=adamw"}

COUNTED_BYTES = 2**28  # Count models hold some fifty bytes for a byte of text.


def finish(cfg, flags, overrides, result):
    """Prints the held-out result beside count models, writes the report, and says how to go on."""
    workdir = flags.workdir
    if not is_first():
        return
    if result.already_done:
        print(f"{workdir} is done: step {result.steps} of {cfg.train.steps}.")
    report = write_report([workdir])
    print(table(cfg, {"this model": result.evaluation}))
    print(
        f"report: {report}\nTo train longer: python -m experiments.train {_longer(cfg, flags, overrides)}\n"
        f"To start over, give another --workdir. To look again: python -m experiments.report --workdir={workdir}"
    )


def _longer(cfg, flags, overrides):
    """The flags of the same run with twice the steps."""
    overrides = {**overrides, "train.steps": 2 * cfg.train.steps}
    return shlex.join([f"--config={flags.config}", *common.override_flags(overrides), f"--workdir={flags.workdir}"])


def table(cfg, rows: dict[str, dict]) -> str:
    """Held-out bits per byte of runs, beside byte-count models fitted on the same training text."""
    head = f"{'':24} bits/byte  load max/mean by layer"
    if any(is_prepared(path) for path in cfg.source_paths):
        return _rows([head], rows)  # Count models are fitted on text.
    fitted, held_out = [], []
    for path in cfg.source_paths:
        documents, aside = split_held_out(load_documents(path), cfg.data.held_out_fraction)
        fitted, held_out = fitted + documents, held_out + aside
    size = sum(len(d.text) for d in held_out)
    lines = [f"held out: {len(held_out)} whole files, {size:,} bytes", head]
    if sum(len(d.text) for d in fitted) > COUNTED_BYTES:
        return _rows([*lines, f"count models: left out, the text is longer than {COUNTED_BYTES:,} bytes"], rows)
    for order in (1, 2):
        bits = count_models.bits_per_byte(fitted, held_out, order)
        lines.append(f"{f'{order}-byte-context counts':24} {bits:9.4f}")
    return _rows(lines, rows)


def _rows(lines, rows):
    for name, evaluation in rows.items():
        load = " ".join(f"{x:.2f}" for x in evaluation.get("eval/load_max_over_mean", []))
        lines.append(f"{name:24} {evaluation['eval/bits_per_byte']:9.4f}  {load}")
    return "\n".join(lines)


def ablate(config: str, overrides: dict, workdir: Path, track: str | None = None):
    """Trains the config's variants one after the other, each in its folder, and prints one table and one report."""
    file, _, arg = config.partition(":")
    rows, folders = {}, {}
    configs = {
        name: common.load(f"{file}:{','.join(filter(None, (arg, change)))}", overrides)
        for name, change in VARIANTS.items()
    }
    for name, cfg in configs.items():
        folder = workdir / name.replace(" ", "_")
        print(f"=== {name} in {folder}", flush=True)
        result = train(cfg, folder, track=track)
        if not is_first():
            continue
        seconds = sum(line["step_time"] for line in read_metrics(folder / "metrics.jsonl"))
        rows[name] = result.evaluation | {"seconds": seconds}
        folders[name] = folder
    if not is_first():
        return
    print(table(cfg, rows))
    for name, evaluation in rows.items():
        print(f"{name:24} {evaluation['seconds']:.0f} s in steps")
    relative = {name: folder.name for name, folder in folders.items()}
    (workdir / "ablation.json").write_text(json.dumps(relative, indent=2) + "\n", encoding="utf-8")
    print(f"report: {write_report(list(folders.values()), workdir / 'report.html')}")
