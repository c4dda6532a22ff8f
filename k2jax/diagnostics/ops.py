"""Every op in every implementation against its definition: values, gradients, and the error that was measured.

An error is the largest difference over the largest value of the reference, the worst of all results and gradients.
References run on the host's CPU where there is one, in float32 with full products, from the same rounded inputs.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.kernels.hopper import CannotRun

# Of results in this type. Right implementations stay below a tenth of it in float32 and near a half in bfloat16, where
# float32 is what tells a small mistake from rounding.
TOLERANCE = {"float32": 3e-5, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Case:
    """One op in one implementation and type.

    inputs: float32 or integer numpy arrays; floating ones are rounded to dtype first, and a gradient is taken of them.
    run, reference: functions of the inputs with equal results, a tree of arrays; both are traced. Where the reference
    is `exact` it is numpy in float64, the inputs stay float32, and no gradients are compared.
    """

    op: str
    implementation: str
    dtype: str
    inputs: tuple
    run: Callable
    reference: Callable
    tolerance: float
    exact: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a case: 'pass', 'fail', or 'absent' for an implementation that cannot run it here.

    error: None where none could be measured; message: why, or which result is wrong.
    """

    op: str
    implementation: str
    dtype: str
    state: str
    error: float | None
    tolerance: float
    message: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.op} {self.implementation} {self.dtype}"

    def line(self) -> str:
        error = "" if self.error is None else f"error {self.error:.1e} (at most {self.tolerance:.0e})"
        return f"{self.state.upper():6} {self.name:44} {error:32} {self.message}".rstrip()


def reference_device():
    """The host's CPU; where JAX was told to use no CPU, the device that is being checked."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def check(case: Case) -> Outcome:
    """Runs a case. An exception inside is that case's failure; it stops nothing else."""
    start = time.monotonic()

    def outcome(state, error, message):
        seconds = time.monotonic() - start
        return Outcome(case.op, case.implementation, case.dtype, state, error, case.tolerance, message, seconds)

    try:
        got, want = _results(case)
        errors = _errors(got, want)
    except (NotImplementedError, CannotRun) as error:
        return outcome("absent", None, _first_line(error))
    except Exception as error:  # Whatever a kernel may raise is what its line has to say.
        return outcome("fail", None, f"{type(error).__name__}: {_first_line(error)}")
    worst = max(errors, key=errors.get)
    if errors[worst] <= case.tolerance:
        return outcome("pass", errors[worst], "")
    if not np.isfinite(errors[worst]):
        return outcome("fail", None, f"wrong: {worst} (not finite, or integers that differ)")
    return outcome("fail", errors[worst], f"wrong: {worst}")


def _first_line(error):
    return (str(error).strip().splitlines() or [""])[0][:200]


def _results(case):
    inputs = case.inputs if case.exact else tuple(_rounded(x, case.dtype) for x in case.inputs)
    precise = jax.default_matmul_precision("highest")
    with precise if case.dtype == "float32" else contextlib.nullcontext():
        got = jax.device_get(jax.jit(_with_gradients(case.run, case.exact))(*inputs))
    if case.exact:
        return got, {"value": case.reference(*inputs)}
    wide = tuple(_rounded(x, "float32") for x in inputs)
    with jax.default_device(reference_device()), jax.default_matmul_precision("highest"):
        return got, jax.device_get(jax.jit(_with_gradients(case.reference, False))(*wide))


def _rounded(x, dtype):
    return x.astype(jnp.dtype(dtype)) if _is_floating(x) else x


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _with_gradients(fn, values_only):
    """{'value': fn(...), 'gradient': of its floating inputs}, under a cotangent that is no constant."""
    if values_only:
        return lambda *inputs: {"value": fn(*inputs)}

    def both(*inputs):
        moved = [i for i, x in enumerate(inputs) if _is_floating(x)]

        def floating_part(*xs):
            result = fn(*(xs[moved.index(i)] if i in moved else x for i, x in enumerate(inputs)))
            leaves = [leaf for leaf in jax.tree.leaves(result) if _is_floating(leaf)]
            return leaves, result

        leaves, pull, result = jax.vjp(floating_part, *(inputs[i] for i in moved), has_aux=True)
        return {"value": result, "gradient": pull([_cotangent(leaf) for leaf in leaves])}

    return both


def _cotangent(x):
    wave = jnp.cos(3.0 * jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return wave.astype(jnp.bfloat16).astype(x.dtype)  # the same number on both sides


def _errors(got, want) -> dict[str, float]:
    """{path of a result: its error}; integers must be equal, and what is not a number is infinitely wrong."""
    errors = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True)
    for (path, right), left in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        left, right = np.asarray(left), np.asarray(right)
        if left.shape != right.shape:
            raise ValueError(f"{name} has shape {left.shape}, not {right.shape}")
        if not _is_floating(right):
            errors[name] = 0.0 if np.array_equal(left, right) else np.inf
            continue
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0)
        size = np.abs(right.astype(np.float64)).max(initial=0.0)
        errors[name] = float(difference / (size or 1.0)) if np.isfinite(difference) else np.inf
    return errors
