"""One update and several against every published Muon: torch's, Keller Jordan's, Moonlight's, optax's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from k2jax.muonclip import (
    NS,
    AdamW,
    MatrixSpec,
    from_optax_state,
    muonclip,
    scale_by_muon,
    to_optax_state,
)
from tests.oracles import algorithm1, muon

GOLDEN = Path(__file__).parent / "golden" / "torch_muon.npz"
TORCH = MatrixSpec(-1, -2)  # a torch weight is [out, in]
F32 = NS.k2(dtype="float32")


def relative(got, want):
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def run(tx, start, grads, state=None):
    """The parameters after every step, in float64: what float32 weights lose beside a small update is not the point."""
    step = jax.jit(tx.update)
    exact, state, after = jax.tree.map(lambda x: np.asarray(x, np.float64), start), state or tx.init(start), []
    for grad in grads:
        updates, state = step(grad, state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), exact))
        exact = jax.tree.map(lambda x, u: x + np.asarray(u, np.float64), exact, updates)
        after.append(exact)
    return after, state


def normal(seed, *shape):
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


# --- torch.optim.Muon -----------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3), ids=["wide", "tall", "square"])
def test_steps_equal_those_of_torch(i):
    golden = np.load(GOLDEN)
    start, grads = (golden[f"{name}_{i}"].astype(np.float32) / 8 for name in ("start", "grads"))
    w, momentum = start.astype(np.float64), np.zeros(start.shape)
    for grad in grads:
        w, momentum = muon.torch_step(w, grad.astype(np.float64), momentum, lr=0.02)
    # How far the weights moved is compared; the double numbers are torch's own code without its rounding.
    exact, rounded = (golden[f"{kind}_{i}"] - start for kind in ("double", "bfloat16"))
    assert relative(w - start, exact) <= 1e-12
    for ns, want, bound in ((F32, exact, 5e-6), (NS.k2(), rounded, 2e-2)):
        ours, _ = run(muonclip(0.02, nesterov=True, weight_decay=0.1, matrix_specs=TORCH, ns=ns), start, grads)
        assert relative(ours[-1] - start, want) <= bound


# --- Keller Jordan and Moonlight ------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_those_of_keller_jordan(nesterov):
    start, grads = normal(0, 40, 16), normal(1, 4, 40, 16)
    w, momentum = start.astype(np.float64), np.zeros(start.shape)
    rms = max(1, 40 / 16) ** 0.5 / 40**0.5  # the scale of the original in ours, which multiplies by sqrt(max(n, m))
    tx = muonclip(0.02, nesterov=nesterov, weight_decay=0.01, consistent_rms=rms, matrix_specs=TORCH, ns=F32)
    ours, _ = run(tx, jnp.asarray(start), grads)
    for grad, got in zip(grads, ours, strict=True):
        w, momentum = muon.keller_step(w, grad, momentum, lr=0.02, weight_decay=0.01, nesterov=nesterov)
        assert relative(got - start, w - start) <= 5e-6


def test_steps_equal_those_of_moonlights_toy_train():
    start = {"w": normal(0, 24, 40), "norm": normal(1, 40), "embed": normal(2, 9, 8)}
    grads = [{name: normal(10 * t + i, *x.shape) for i, (name, x) in enumerate(start.items())} for t in range(1, 6)]
    roles = {"w": TORCH, "norm": None, "embed": None}
    tx = muonclip(1e-3, nesterov=True, weight_decay=0.1, matrix_specs=roles, ns=F32, adam=AdamW(0.9, 0.95, 1e-8))
    ours, _ = run(tx, start, grads)
    oracle = {name: x.astype(np.float64) for name, x in start.items()}
    state = {name: np.zeros(x.shape) if name == "w" else (np.zeros(x.shape),) * 2 for name, x in start.items()}
    for t, (grad, got) in enumerate(zip(grads, ours, strict=True), start=1):
        for name, w in oracle.items():
            if name == "w":
                oracle[name], state[name] = muon.moonlight_muon_step(w, grad[name], state[name], lr=1e-3)
            else:
                oracle[name], state[name] = muon.moonlight_adam_step(w, grad[name], state[name], t, lr=1e-3)
            moved = oracle[name] - start[name]
            assert relative(got[name] - start[name], moved) <= 5e-6, name


def test_heavy_ball_and_average_are_the_same_algorithm():
    """In float64, where nothing but the normalisation's epsilon tells them apart."""
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((20, 12)), rng.standard_normal((10, 20, 12))
    for nesterov in (False, True):
        ball, average = (start, np.zeros_like(start)), (start, np.zeros_like(start))
        for grad in grads:
            ball = muon.moonlight_muon_step(ball[0], 1e3 * grad, ball[1], lr=0.02, nesterov=nesterov)
            average = muon.torch_step(average[0], 1e3 * grad, average[1], lr=0.02, nesterov=nesterov)
        # The heavy ball's epsilon of 1e-7 is relative to a norm of 1e4.
        assert relative(ball[0], average[0]) <= 1e-10


def test_oracles_agree_on_one_direction():
    g = normal(0, 12, 20).astype(np.float64)
    np.testing.assert_array_equal(muon.newton_schulz(g), algorithm1.newton_schulz(g))


# --- optax.contrib.muon ---------------------------------------------------------------------------


def optax_run(nesterov, start, grads, **kwargs):
    tx = optax.contrib.muon(0.02, nesterov=nesterov, weight_decay=0.1, consistent_rms=0.2, **kwargs)
    return run(tx, start, grads)


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_step_equals_optax_without_its_bias_terms(nesterov, monkeypatch):
    start, grads = jnp.asarray(normal(0, 24, 40)), normal(1, 8, 24, 40)
    # Without Nesterov the correction is a factor, which orthogonalisation ignores.
    if nesterov:
        monkeypatch.setattr(optax.tree, "bias_correction", lambda moment, decay, count: moment)
    theirs, _ = optax_run(nesterov, start, grads)
    ours, _ = run(muonclip(0.02, nesterov=nesterov, matrix_specs=MatrixSpec(), ns=F32), start, grads)
    for got, want in zip(ours, theirs, strict=True):
        assert relative(got - start, want - start) <= 1e-5


def mixed(seed):
    return {"w": jnp.asarray(normal(seed, 12, 20)), "layer": {"b": jnp.asarray(normal(seed + 1, 20))}}


ROLES = {"w": MatrixSpec(), "layer": {"b": None}}


def optax_muon(lr=0.02):
    return optax.contrib.muon(lr, nesterov=False, weight_decay=0.1, consistent_rms=0.2, adam_b2=0.95,
                              adam_weight_decay=0.1)  # fmt: skip


def test_training_goes_on_from_a_state_of_optax_and_back():
    """Three steps there and three here equal six there; the state that comes back equals the one that left."""
    start, grads = mixed(0), [mixed(10 * t) for t in range(1, 7)]
    theirs, tx = optax_muon(), muonclip(0.02, matrix_specs=ROLES, ns=F32)
    halfway, their_state = run(theirs, start, grads[:3])
    whole, _ = run(theirs, start, grads)
    # Inside chains on both sides, as people have it.
    state = from_optax_state((optax.EmptyState(), their_state), (tx.init(start), optax.EmptyState()))[0]
    params, state = run(tx, halfway[-1], grads[3:], state)
    params = params[-1]
    for path in (("w",), ("layer", "b")):
        got, want, origin = (jax.tree.leaves(tree[path[0]])[0] for tree in (params, whole[-1], start))
        assert relative(got - origin, want - origin) <= 1e-5
    back = to_optax_state(state, theirs.init(start))
    _, after = run(theirs, start, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, after)


def test_a_schedule_goes_on_where_it_was_in_either_direction():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    start, grads = mixed(0), [mixed(10 * t) for t in range(1, 4)]
    tx = muonclip(schedule, matrix_specs=ROLES, ns=F32)
    _, state = run(tx, start, grads)
    _, their_state = run(optax_muon(schedule), start, grads)
    back = to_optax_state(state, optax_muon(schedule).init(start))
    counts = [int(x) for x in jax.tree.leaves(back) if x.shape == () and x.dtype == jnp.int32]
    assert counts == [int(x) for x in jax.tree.leaves(their_state) if x.shape == () and x.dtype == jnp.int32]
    assert int(from_optax_state(their_state, tx.init(start)).count) == 3


def test_states_that_do_not_match_are_refused_by_leaf():
    start = mixed(0)
    their_state = optax_muon().init(start)
    ours = muonclip(0.02, matrix_specs={"w": None, "layer": {"b": None}}).init(start)
    with pytest.raises(ValueError, match=r"\(12, 20\) for leaf 'w'.*muon_weight_dimension_numbers"):
        from_optax_state(their_state, ours)
    with pytest.raises(ValueError, match=r"expected one .*MuonState in the optimizer's state, found 0"):
        from_optax_state(optax.adam(0.1).init(start), ours)
    with pytest.raises(ValueError, match=r"expected one .*MuonAdamWState in the optimizer's state, found 0"):
        to_optax_state(scale_by_muon(matrix_specs=ROLES).init(start), their_state)
