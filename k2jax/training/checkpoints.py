"""Checkpoints: Orbax v1, written asynchronously, with everything a run needs to go on.

A checkpoint becomes visible only when it is complete, so a process killed during a save leaves the one before. Each
holds a fingerprint of its arrays and of its own text, since a flipped bit in a file need not fail to decode.
"""

import contextlib
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from k2jax.training.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one work folder."""

    def __init__(self, folder: Path, keep: int):
        """Raises CheckpointError when the folder cannot be used."""
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder. Fix: move it away, or give another --workdir.")
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        except Exception as error:
            damaged = _damaged_steps(self.folder)
            fix = f"delete {self.folder / str(damaged[-1])}" if damaged else "move it away, or give another --workdir"
            raise CheckpointError(
                f"{self.folder} cannot be used for checkpoints: {_short(error)}. Fix: {fix}."
            ) from error

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return [c.step for c in self._checkpointer.checkpoints]

    def save(self, step: int, state, meta: dict) -> None:
        """Starts writing `state` (a tree of arrays) and `meta` (JSON) and returns; `wait` or the next save ends it.

        Raises CheckpointError if this or the save before could not be written, a full disk for example.
        """
        meta = _as_json(meta) | {"fingerprint": fingerprint(state)}
        meta["checksum"] = _checksum(meta)
        with self._explained(f"the checkpoint of step {step} (or the one before it)"):
            self._checkpointer.save_async(step, state, custom_metadata=meta, force=True)

    def wait(self) -> None:
        """Blocks until what was started is complete. Raises CheckpointError if it could not be written."""
        with self._explained("the last checkpoint"):
            self._checkpointer.wait()

    def restore(self, step: int, abstract_state):
        """(state, meta) of a complete checkpoint.

        abstract_state: tree of ShapeDtypeStruct with the shardings to load into.
        Raises CheckpointError when it is damaged or does not fit, and says which checkpoint is left.
        """
        place = self.folder / str(step)
        try:
            meta = self._checkpointer.metadata(step).custom_metadata
            state = self._checkpointer.load(step, abstract_state)
        except Exception as error:
            raise CheckpointError(
                f"{place} is no checkpoint of this run, or one of its files is missing, cut short or changed. "
                f"{self._advice(step)} ({_short(error, 120)})"
            ) from error
        if not isinstance(meta, dict) or "fingerprint" not in meta:
            raise CheckpointError(f"{place} is damaged: it has no fingerprint. {self._advice(step)}")
        if meta.pop("checksum", None) != _checksum(meta):
            raise CheckpointError(
                f"{place} is damaged: its metadata changed since it was written. {self._advice(step)}"
            )
        found = fingerprint(state)
        wrong = [path for path, value in meta["fingerprint"].items() if found.get(path) != value]
        if wrong:
            raise CheckpointError(
                f"{place} is damaged: the bits of {', '.join(wrong[:3])} changed since it was written. "
                f"{self._advice(step)}"
            )
        return state, meta

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder; may be called again.

        Raises CheckpointError if the last save failed, so that no error of the saving thread is lost.
        """
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _advice(self, bad_step):
        left = [s for s in self.steps if s < bad_step]
        then = f"continues from step {left[-1]}" if left else "starts again from step 0"
        return f"Fix: delete {self.folder / str(bad_step)}; the same command then {then}."

    @contextlib.contextmanager
    def _explained(self, what):
        """Turns an error of the storage layer into a CheckpointError that names what is still good."""
        try:
            yield
        except Exception as error:
            complete = _step_folders(self.folder)
            good = f"the checkpoint of step {complete[-1]} is complete" if complete else "no checkpoint is complete yet"
            raise CheckpointError(
                f"{what} could not be written to {self.folder}: {_short(error)}. Nothing is lost: {good}. "
                "Fix: free disk space (or the quota), then run the same command again."
            ) from error


def _step_folders(folder) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def _damaged_steps(folder) -> list[int]:
    """Steps whose own description cannot be read; asked only when the whole folder could not be opened."""
    damaged = []
    for step in _step_folders(folder):
        try:
            ocp.metadata(folder / str(step))
        except Exception:
            damaged.append(step)
    return damaged


def _as_json(meta):
    # As it will be read back: tuples become lists.
    return json.loads(json.dumps(meta))


def _checksum(meta) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _short(error, length=300) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:length]}"


def fingerprint(tree) -> dict[str, int]:
    """A 32-bit sum of the bits of every leaf, by path: changed by any flipped bit, equal on every mesh."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, (int(x) for x in jax.device_get(_bit_sums(jax.tree.leaves(tree)))), strict=True))


@jax.jit
def _bit_sums(leaves):
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
    return [
        jnp.sum(jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]).astype(jnp.uint32), dtype=jnp.uint32)
        for x in leaves
    ]
