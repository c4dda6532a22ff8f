"""Reading a run folder: config.json, metrics.jsonl, selections.npz and sample.txt, all of them untrusted.

Legend: N records, L layers of one group, H heads, M MoE layers, E experts, T queries, J selection slots,
S layers whose selection was saved.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TRAIN_COMMAND = "python -m experiments.train --config=configs/nano.py --workdir=..."

SCALARS = (
    "tokens",
    "loss",
    "balance_loss",
    "lr",
    "grad_norm",
    "update_norm",
    "max_logit",
    "clipped_fraction",
    "load_max_over_mean",
    "skipped",
    "spike",
    "step_time",
    "tokens_per_second",
    "mfu",
    "goodput",
    "eval/loss",
    "eval/bits_per_byte",
)
GROUPS = ("dense", "moe")


class RunFolderError(ValueError):
    """A run folder that cannot be read; the message names the file, the line if any, and the fix."""


@dataclass(frozen=True)
class Curve:
    """One scalar of the log, at the lines that carry it: `step`, `tokens` (nan where not logged), `value`."""

    step: np.ndarray
    tokens: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Selections:
    """The blocks MoBA chose in a held-out document: block index, -1 for none, slot 0 the current block."""

    selected_SHTJ: np.ndarray
    layers_S: np.ndarray
    text_C: np.ndarray  # how each block starts
    block_size: int


@dataclass(frozen=True)
class Run:
    """What a run folder says. `max_logits` maps a group to [N, L, H]; `expert_load_NME` is token shares."""

    path: Path
    config: dict
    curves: dict[str, Curve]
    last_step: int
    logits_step_N: np.ndarray
    max_logits: dict[str, np.ndarray]
    load_step_N: np.ndarray
    expert_load_NME: np.ndarray
    selections: Selections | None
    sample: str | None
    notes: tuple[str, ...] = field(default=())

    @property
    def tau(self) -> float | None:
        """The QK-Clip threshold, or None where the run's optimizer has none."""
        optimizer = self.config.get("optimizer")
        if not isinstance(optimizer, dict) or optimizer.get("name") != "muonclip":
            return None
        tau = optimizer.get("tau")
        return float(tau) if isinstance(tau, int | float) else None

    @property
    def stages(self) -> list[tuple[int, str]]:
        """(steps before it, name) of every later stage of the run that has begun."""
        stages = self.config.get("stages")
        found = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
        starts = [(stage.get("start"), str(stage.get("name"))) for stage in found]
        return [(start, name) for start, name in starts if isinstance(start, int) and start < self.last_step]


def load_run(path: Path) -> Run:
    """Read one run folder.

    Raises RunFolderError for a folder, a metrics.jsonl or records that are missing, for a corrupt line that
    is not the last one, and for a config.json or selections.npz that does not hold what it should. What can
    be reported without stopping (a last line cut short, no config.json, lines without a step) becomes a note.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunFolderError(f"workdir {path} is not a folder. Make a run with: {TRAIN_COMMAND}")
    notes: list[str] = []
    records = _ordered(_read_lines(path / "metrics.jsonl", notes), notes)
    if not records:
        raise RunFolderError(f"{path / 'metrics.jsonl'} holds no complete record. Make a run with: {TRAIN_COMMAND}")
    log = path / "metrics.jsonl"
    logits_step_N, max_logits = _max_logits(records, log)
    load_step_N, expert_load_NME = _expert_load(records, log)
    return Run(
        path=path,
        config=_read_config(path / "config.json", notes),
        curves=_curves(records, log),
        last_step=records[-1][1]["step"],
        logits_step_N=logits_step_N,
        max_logits=max_logits,
        load_step_N=load_step_N,
        expert_load_NME=expert_load_NME,
        selections=_read_selections(path / "selections.npz"),
        sample=_read_sample(path / "sample.txt"),
        notes=tuple(notes),
    )


def _read_lines(log: Path, notes: list[str]) -> list[tuple[int, dict]]:
    """(line number, record) of every complete line; a last line cut short by a kill becomes a note."""
    if not log.is_file():
        raise RunFolderError(f"{log} does not exist. Make a run with: {TRAIN_COMMAND}")
    lines = log.read_bytes().rstrip(b"\n").split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {type(record).__name__}")
        except (ValueError, RecursionError) as error:  # covers JSON and UTF-8 decoding errors
            if number == len(lines):
                if line:
                    notes.append(
                        f"The last line of metrics.jsonl (line {number}) is incomplete, as a killed run "
                        f"leaves it. It is left out."
                    )
                break
            raise RunFolderError(
                f"{log}, line {number}: not a JSON object ({error}). Repair or delete that line; only the "
                f"last line of a run may be incomplete."
            ) from error
        records.append((number, record))
    return records


def _ordered(records: list[tuple[int, dict]], notes: list[str]) -> list[tuple[int, dict]]:
    """Records by step. Without a step: left out. Of a repeated step: the later line. Both are noted."""
    by_step: dict[int, tuple[int, dict]] = {}
    repeated = []
    without = 0
    for number, record in records:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            without += 1
            continue
        if step in by_step:
            repeated.append(step)
        by_step[step] = (number, record)
    if without:
        notes.append(f'{without} line(s) of metrics.jsonl carry no integer "step". They are left out.')
    if repeated:
        notes.append(
            f"{len(repeated)} step(s) are logged twice (first: step {repeated[0]}), which a resumed run "
            f"should never do. The later line is shown."
        )
    return [by_step[step] for step in sorted(by_step)]


def _number(value, log: Path, line: int, key: str) -> float:
    if value is None:  # what writers of strict JSON put for nan
        return np.nan
    if not isinstance(value, int | float):
        raise RunFolderError(f'{log}, line {line}: "{key}" is {value!r:.60}, expected a number or null.')
    try:
        return float(value)
    except OverflowError as error:
        raise RunFolderError(f'{log}, line {line}: "{key}" has more digits than a number can hold.') from error


def _curves(records, log: Path) -> dict[str, Curve]:
    curves = {}
    for key in SCALARS:
        rows = [
            (
                record["step"],
                _number(record.get("tokens"), log, line, "tokens"),
                _number(record[key], log, line, key),
            )
            for line, record in records
            if key in record
        ]
        if rows:
            curves[key] = Curve(*np.asarray(rows, np.float64).T)
    return curves


def _stack(rows: list[tuple[int, int, list]], log: Path, key: str, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """Nested lists of every record as one array with a leading axis of records; -inf and inf read as nan."""
    if not rows:
        return np.zeros(0), np.zeros((0,) * (ndim + 1))
    arrays = []
    for line, _, value in rows:
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise RunFolderError(f'{log}, line {line}: "{key}" is not a {ndim}-d list of numbers.') from error
        if array.ndim != ndim or (arrays and array.shape != arrays[0].shape):
            expected = arrays[0].shape if arrays else f"{ndim} dimensions"
            raise RunFolderError(f'{log}, line {line}: "{key}" has shape {array.shape}, expected {expected}.')
        arrays.append(np.where(np.isfinite(array), array, np.nan))
    return np.asarray([step for _, step, _ in rows], np.float64), np.stack(arrays)


def _max_logits(records, log: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    lines = [(line, record) for line, record in records if "max_logits" in record]
    for line, record in lines:
        groups = record["max_logits"]
        if not isinstance(groups, dict) or set(groups) != set(lines[0][1]["max_logits"]):
            raise RunFolderError(f'{log}, line {line}: "max_logits" must map the same groups on every line.')
    stacks = {}
    steps = np.zeros(0)
    for group in GROUPS:
        rows = [(line, r["step"], r["max_logits"][group]) for line, r in lines if r["max_logits"].get(group)]
        if rows:
            steps, stacks[group] = _stack(rows, log, f"max_logits.{group}", 2)
    return steps, stacks


def _expert_load(records, log: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [(line, r["step"], r["expert_load"]) for line, r in records if r.get("expert_load")]
    return _stack(rows, log, "expert_load", 2)


def _read_config(path: Path, notes: list[str]) -> dict:
    if not path.is_file():
        notes.append("There is no config.json, so the settings and the QK-Clip threshold are not known.")
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: not valid JSON ({error}). Restore it or delete it.") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path}: expected an object, got {type(config).__name__}. Restore it or delete it.")
    return config


def _read_selections(path: Path) -> Selections | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            saved = Selections(
                selected_SHTJ=np.asarray(arrays["selected"]),
                layers_S=np.asarray(arrays["layers"]),
                text_C=np.asarray(arrays["text"]),
                block_size=int(arrays["block_size"]),
            )
    except Exception as error:  # A wrong byte can make zipfile, zlib, tokenize or NumPy raise what they please.
        raise RunFolderError(f"{path}: cannot be read as selections ({error}). Delete it or save it again.") from error
    _check_selections(saved, path)
    return saved


def _check_selections(saved: Selections, path: Path) -> None:
    shape = saved.selected_SHTJ.shape
    wrong = None
    if saved.selected_SHTJ.dtype.kind != "i" or saved.layers_S.dtype.kind != "i":
        wrong = f'"selected" and "layers" are {saved.selected_SHTJ.dtype} and {saved.layers_S.dtype}, expected integers'
    elif len(shape) != 4 or 0 in shape:
        wrong = f'"selected" has shape {shape}, expected [layers, heads, queries, slots]'
    elif saved.layers_S.shape != shape[:1]:
        wrong = f'"layers" has shape {saved.layers_S.shape}, expected {shape[:1]}'
    elif saved.block_size < 1:
        wrong = f'"block_size" is {saved.block_size}, expected at least 1'
    elif saved.text_C.shape != (blocks := -(-shape[2] // saved.block_size),) or saved.text_C.dtype.kind != "U":
        wrong = f'"text" is {saved.text_C.dtype} {saved.text_C.shape}, expected the text of {blocks} blocks'
    elif not -1 <= saved.selected_SHTJ.min() <= saved.selected_SHTJ.max() < -(-shape[2] // saved.block_size):
        wrong = (
            f'"selected" spans {saved.selected_SHTJ.min()} to {saved.selected_SHTJ.max()}, but {shape[2]} '
            f"queries in blocks of {saved.block_size} have blocks 0 to {-(-shape[2] // saved.block_size) - 1}"
        )
    if wrong:
        raise RunFolderError(f"{path}: {wrong}. Delete it or save it again.")


def _read_sample(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
