"""The gate's long lists, which four threads share: the network that sorts them, and the numbers that it sorts."""

import itertools

import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir, passmanager
from jax._src.lib.mlir.dialects import func
from jax.experimental.mosaic import gpu as mgpu

from k2jax.kernels.moba import many_best_sm90 as many
from k2jax.kernels.moba.few_best_sm90 import LOWEST

ROWS = 300
THREADS = np.arange(4)


class Ops:
    """Four threads: a register is an array [thread, row]."""

    largest, smallest = staticmethod(np.maximum), staticmethod(np.minimum)

    def of_thread(self, x, across):
        return x[THREADS ^ across]

    def keep(self, mine, other, top, falling):
        takes_larger = ((THREADS & top) == 0)[:, None] == falling
        return np.where(takes_larger, np.maximum(mine, other), np.minimum(mine, other))


def spread(x_QN):
    return list(x_QN.reshape(-1, 4, many.OF_A_THREAD).transpose(2, 1, 0))


def gathered(registers):
    return np.stack(registers).transpose(2, 1, 0).reshape(-1, many.PLACES)


def numbers(kind, seed=0):
    """Rows of numbers; a network that sorts zeros and ones sorts everything."""
    rng = np.random.default_rng(seed)
    if kind == "zeros and ones":
        return np.where(np.arange(many.PLACES) < rng.integers(0, 65, (ROWS, 1)), 1, 0)[:, rng.permutation(64)]
    return rng.integers(-(2**62), 2**62, (ROWS, many.PLACES)) if kind == "different" else rng.integers(0, 9, (ROWS, 64))


KINDS = ("different", "many equal", "zeros and ones")


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sorts(kind, falling):
    x = numbers(kind)
    right = np.sort(x, axis=1)
    np.testing.assert_array_equal(gathered(many.sort(Ops(), spread(x), falling)), right[:, ::-1] if falling else right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_and_new_numbers_become_the_list_of_the_largest(kind):
    best, new = -np.sort(-numbers(kind), axis=1), numbers(kind, seed=1)
    right = -np.sort(-np.concatenate([best, new], axis=1), axis=1)[:, : many.PLACES]
    np.testing.assert_array_equal(gathered(many.merge_sorted(Ops(), spread(best), spread(new))), right)


def folded(make):
    """The whole numbers that a kernel's arithmetic on constants becomes."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            func.FuncOp.from_py_func(name="numbers")(make)
        passmanager.PassManager.parse("builtin.module(canonicalize)").run(module.operation)
        (made,) = module.body.operations
        return [ir.IntegerAttr(x.owner.attributes["value"]).value for x in made.entry_block.operations[-1].operands]


def test_numbers_rise_with_scores_and_fall_with_blocks_of_equal_ones():
    scores, blocks = [LOWEST, -2.0, -1e-40, -0.0, 1e-40, 0.5, 2.0, 1e38], [0, 1, 31, 2**20]

    def make():
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        return [
            many._key(many._rising(mgpu.c(score, f32)), many._inverted(mgpu.c(block, i32)))
            for score, block in itertools.product(scores, blocks[::-1])
        ]

    keys = np.array(folded(make))
    assert (np.diff(keys) > 0).all()
    assert keys[0] >> 32 == many.NO_SCORE


def test_both_zeros_are_one_score():
    def make():
        return [many._rising(mgpu.c(zero, ir.F32Type.get())) for zero in (0.0, -0.0)]

    assert folded(make) == [0, 0]
