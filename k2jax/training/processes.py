"""Several processes as one run: what one decides, all do; what ends one, ends all.

Every process runs the same program over its own devices. The first alone writes what people read; Orbax lets each
write its part of a checkpoint.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial

import jax
import numpy as np

from k2jax.training.errors import Interrupted, NonFiniteError, RunError

# The only holder of the coordination service's key-value store, and the only one that knows the number of processes
# before a backend is started; JAX has no public name for it.
_WORLD = jax._src.distributed.global_state

_KEY = "k2jax/failed"
_LOOK_EVERY = 1.0  # seconds


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _WORLD.process_id == 0


class Agreement:
    """Lets all processes act on the same number: the largest that any of them has.

    With several processes each question is a reduction over the mesh, which they must ask in the same order.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._alone = _WORLD.num_processes == 1
        self._place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(lambda numbers: numbers.max())
        self._asked = None

    def now(self, number: int) -> int:
        """The largest number; waits for what the devices were given before."""
        return number if self._alone else int(self._ask(number))

    def soon(self, number: int) -> int:
        """The largest number of the call before this one (0 at first), so that no device is waited for.

        A lone process gets its own number back at once.
        """
        if self._alone:
            return number
        before, self._asked = self._asked, self._ask(number)
        return 0 if before is None else int(before)

    def _ask(self, number):
        one = np.array([number], np.int32)
        return self._largest(jax.make_array_from_callback((self._size,), self._place, lambda _: one))


@contextlib.contextmanager
def ending_together():
    """If one process fails inside, the others print why and end with status 2, wherever they wait.

    A process that waits for another inside a collective cannot be woken, so it ends as if it were killed; the last
    complete checkpoint is untouched. A process that is killed tells nobody: the others' next collective fails, or
    JAX's heartbeat ends them.
    """
    if _WORLD.num_processes == 1:
        yield
        return
    done = threading.Event()
    threading.Thread(target=partial(_watch, done), daemon=True).start()
    try:
        yield
    except (Interrupted, NonFiniteError):  # All processes meet them at the same step.
        raise
    except jax.errors.JaxRuntimeError as error:
        lost = RunError(
            f"process {_WORLD.process_id} could not go on: {' '.join(str(error).split())[:300]}. The last complete "
            "checkpoint is untouched. Fix: if another process ended before, its last lines say why; then run the same "
            "command again on all of them."
        )
        _fail(lost)
        raise lost from error
    except BaseException as error:
        _fail(error)
        raise
    finally:
        done.set()


def _watch(done):
    while not done.wait(_LOOK_EVERY):
        try:
            failed = _WORLD.client.key_value_dir_get(_KEY)
        except jax.errors.JaxRuntimeError:
            return  # The first process is gone, or busy ending: JAX's heartbeat judges that.
        for _, text in failed:
            other, message = json.loads(text)
            if other != _WORLD.process_id and not done.is_set():
                print(f"error: process {other} failed: {message}", file=sys.stderr)
                _leave(2)


def _fail(error):
    """Tells the others, and lets this process end without waiting for them, as JAX would at exit."""
    status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, RunError) else 1
    atexit.register(_leave, status)
    message = json.dumps([_WORLD.process_id, f"{type(error).__name__}: {error}"])
    try:
        _WORLD.client.key_value_set(f"{_KEY}/{_WORLD.process_id}", message)
    except jax.errors.JaxRuntimeError as unreachable:
        error.add_note(f"(the other processes could not be told: {unreachable})")


def _leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():  # The store is in this process: the others must have read it.
        time.sleep(3 * _LOOK_EVERY)
    os._exit(status)
