"""MoBA: both implementations against a per-row oracle in NumPy float64, written from the definition alone.

Legend: B batch, T queries, S keys, H query heads, G key heads, J = top_k, K query/key size, V value size.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import k2jax.moba_pallas as moba_pallas
from k2jax.kernels.attention import attention
from k2jax.kernels.moba import routing, streams
from k2jax.moba_pallas import moba_attention, moba_attention_plan

IMPLEMENTATIONS = ["reference", "xla"]
# Tiny inputs spend their time in the compiler, so it is asked for less.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_inputs(B=2, T=40, S=40, H=4, G=2, K=12, V=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def cut_blocks(segment_ids_S, S, block_size):
    """[(first, end)] of every block along one row, and the index of each block's segment."""
    ids = np.zeros(S, int) if segment_ids_S is None else np.asarray(segment_ids_S)
    blocks, owners, segment = [], [], 0
    start = 0
    while start < S:
        end = start
        while end < S and ids[end] == ids[start]:
            end += 1
        for first in range(start, end, block_size):
            blocks.append((first, min(first + block_size, end)))
            owners.append(segment)
        start, segment = end, segment + 1
    return blocks, owners


def oracle(q, k, v, *, block_size, top_k, scale, segment_ids=None, q_offset=0):
    """out, max_logit_BH, lse_BHT, selected_BHTJ and the boolean mask_BHTS, one row at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    offset_B = np.broadcast_to(np.asarray(q_offset), (B,))
    out, lse = np.zeros((B, T, H, v.shape[-1])), np.zeros((B, H, T))
    max_logit, mask = np.full((B, H), -np.inf), np.zeros((B, H, T, S), bool)
    selected = np.full((B, H, T, top_k), -1)
    for b in range(B):
        blocks, owners = cut_blocks(None if segment_ids is None else segment_ids[b], S, block_size)
        for t, h in np.ndindex(T, H):
            position, g = t + offset_B[b], h // (H // G)
            own = next(i for i, (first, end) in enumerate(blocks) if first <= position < end)
            earlier = [i for i in range(own) if owners[i] == owners[own]]
            score = {i: q[b, t, h] @ k[b, slice(*blocks[i]), g].mean(axis=0) for i in earlier}
            chosen = [own, *sorted(earlier, key=lambda i: (-score[i], i))[: top_k - 1]]
            selected[b, h, t, : len(chosen)] = chosen
            seen = [s for i in chosen for s in range(*blocks[i]) if s <= position]
            logits = scale * k[b, seen, g] @ q[b, t, h]
            weights = np.exp(logits - logits.max())
            out[b, t, h] = weights @ v[b, seen, g] / weights.sum()
            lse[b, h, t] = logits.max() + np.log(weights.sum())
            max_logit[b, h] = max(max_logit[b, h], logits.max())
            mask[b, h, t, seen] = True
    return out, max_logit, lse, selected, mask


def masked_softmax_attention(q, k, v, mask_BHTS, scale):
    """Plain attention under a given mask: differentiating it gives the gradients to compare with."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits_BHTS = jnp.where(mask_BHTS, scale * jnp.einsum("bthk,bshk->bhts", q, k), -jnp.inf)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits_BHTS, axis=-1), v)


def packed(B, S, seed=3):
    """Segments of uneven lengths, some shorter than a block, their ids repeating."""
    breaks = np.random.default_rng(seed).random((B, S)) < 0.08
    return jnp.asarray(np.cumsum(breaks, axis=1) % 5, jnp.int32)


CASES = {
    "three of five blocks": {"block_size": 8, "top_k": 3},
    "k = 1 is block-diagonal": {"block_size": 8, "top_k": 1},
    "ragged last block, mla sizes": {
        "S": 43,
        "T": 43,
        "K": 192,
        "V": 128,
        "G": 4,
        "block_size": 8,
        "top_k": 2,
    },
    "packed segments": {"block_size": 4, "top_k": 3, "packed": True},
    "packed, k = 1": {"block_size": 4, "top_k": 1, "packed": True},
    "packed, one token per block": {"block_size": 1, "top_k": 4, "packed": True},
    "prefill from a block edge, one key head": {"T": 16, "G": 1, "q_offset": 16, "block_size": 8, "top_k": 3},
    "one query inside a block": {"T": 1, "q_offset": 37, "block_size": 8, "top_k": 3},
    "offset per row, packed": {"T": 11, "q_offset": [2, 29], "block_size": 4, "top_k": 3, "packed": True},
    "block longer than the row": {"block_size": 64, "top_k": 2},
    "more blocks asked than exist": {"block_size": 8, "top_k": 9},
}


def build(case):
    sizes = dict(CASES[case])
    arguments = {"block_size": sizes.pop("block_size"), "top_k": sizes.pop("top_k"), "scale": 0.3}
    q_offset = sizes.pop("q_offset", 0)
    arguments["q_offset"] = q_offset if isinstance(q_offset, int) else np.array(q_offset, np.int32)
    is_packed = sizes.pop("packed", False)
    q, k, v = make_inputs(**sizes)
    arguments["segment_ids"] = packed(*k.shape[:2]) if is_packed else None
    return (q, k, v), arguments


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_residuals_match_the_oracle(case, implementation):
    inputs, arguments = build(case)
    want, want_max_logit, want_lse, want_selected, mask_BHTS = oracle(*inputs, **arguments)
    weight = make_inputs(T=want.shape[1], H=want.shape[2], K=want.shape[3], seed=1)[0]

    def run(q, k, v):
        attend = functools.partial(moba_attention, return_residuals=True, implementation=implementation)
        out, residuals = attend(q, k, v, **arguments)
        return jnp.sum(weight * out), (out, residuals)

    def plain(q, k, v):
        return jnp.sum(weight * masked_softmax_attention(q, k, v, mask_BHTS, 0.3))

    (_, (out, residuals)), gradients = jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_array_equal(residuals.selected_BHTJ, want_selected)
    np.testing.assert_allclose(residuals.lse_BHT, want_lse, atol=1e-4)
    np.testing.assert_allclose(residuals.max_logit_BH, want_max_logit, atol=1e-4)
    for got, want in zip(gradients, jit(jax.grad(plain, (0, 1, 2)))(*inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_small_steps_give_the_same_result(monkeypatch):
    """The loops over heads, chunks and tiles, which tiny inputs would not enter."""
    q, k, v = make_inputs(S=70, T=70)
    segment_ids = packed(2, 70)

    def run(q, k, v):
        arguments = {"block_size": 4, "top_k": 3, "segment_ids": segment_ids}
        out, residuals = moba_attention(q, k, v, **arguments, return_residuals=True, implementation="xla")
        return jnp.sum(jnp.sin(out)), (out, residuals)

    whole = jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    monkeypatch.setattr(streams, "STEP_PARTIALS", 3 * 8 * 400)
    monkeypatch.setattr(streams, "STEP_LOGITS", 600)
    monkeypatch.setattr(routing, "GATE_SCORES", 1)
    monkeypatch.setattr(routing, "MIN_CHUNK", 24)
    stepped = jit(jax.value_and_grad(lambda *x: run(*x), (0, 1, 2), has_aux=True))(q, k, v)
    for got, want in zip(jax.tree.leaves(stepped), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_block(implementation):
    q, k, v = make_inputs(B=1, H=2, G=2)
    k = jnp.ones_like(k)
    arguments = {"block_size": 8, "top_k": 3, "return_residuals": True, "implementation": implementation}
    _, residuals = jit(functools.partial(moba_attention, **arguments))(q, k, v)
    np.testing.assert_array_equal(residuals.selected_BHTJ[0, 0, -1], [4, 0, 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_keys_are_rounded_to_the_keys_dtype(implementation):
    """Block 1's mean is 1 + 2**-9, which bfloat16 rounds to 1: a tie with block 0, and the lower block wins."""
    k = np.ones((1, 12, 1, 1), np.float32)
    k[0, 4:8] = [[[1.0]], [[1.0]], [[1.0]], [[1.0 + 2.0**-7]]]
    k = jnp.asarray(k, jnp.bfloat16)
    assert float(k.astype(jnp.float32)[:, 4:8].mean()) > 1.0
    q = jnp.ones((1, 12, 1, 1), jnp.bfloat16)
    arguments = {"block_size": 4, "top_k": 2, "return_residuals": True, "implementation": implementation}
    run = functools.partial(moba_attention, **arguments)
    _, rounded = jit(run)(q, k, k)
    _, exact = jit(run)(q, k.astype(jnp.float32), k)
    assert rounded.selected_BHTJ[0, 0, -1].tolist() == [2, 0]
    assert exact.selected_BHTJ[0, 0, -1].tolist() == [2, 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_close_to_float32(implementation):
    inputs = make_inputs(dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]
    weight = make_inputs(K=8, seed=1)[0]

    def run(q, k, v):
        arguments = {"block_size": 8, "top_k": 3, "return_residuals": True, "implementation": implementation}
        out, residuals = moba_attention(q, k, v, **arguments)
        return jnp.sum(weight * out), (out, residuals.selected_BHTJ)

    def plain(q, k, v):
        out = masked_softmax_attention(q, k, v, mask_BHTS, 12**-0.5)
        return jnp.sum(weight * out), out

    (_, (out, selected)), gradients = jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*inputs)
    assert {x.dtype.name for x in (out, *gradients)} == {"bfloat16"}
    in_selected = (np.asarray(selected)[..., None] == np.arange(40) // 8).any(axis=3)
    mask_BHTS = in_selected & np.tri(40, dtype=bool)
    (_, want), wanted = jit(jax.value_and_grad(plain, (0, 1, 2), has_aux=True))(*exact)
    for got, exact in zip((out, *gradients), (want, *wanted), strict=True):
        error = np.abs(np.asarray(got, np.float32) - np.asarray(exact))
        assert error.max() < 0.1
        assert error.mean() < 6e-3


def test_two_runs_agree_bit_by_bit():
    inputs = make_inputs(S=96, T=96)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(moba_attention(q, k, v, block_size=8, top_k=3, implementation="xla")))

    run = jit(jax.value_and_grad(loss, (0, 1, 2)))
    for first, second in zip(jax.tree.leaves(run(*inputs)), jax.tree.leaves(run(*inputs)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_flows_to_later_or_unselected_keys(implementation):
    q, k, v = make_inputs(B=1, H=1, G=1)
    arguments = {"block_size": 8, "top_k": 2, "implementation": implementation}

    def loss(k, v):
        out, residuals = moba_attention(q, k, v, **arguments, return_residuals=True)
        return out[:, 29].sum(), residuals

    gradients, residuals = jit(jax.grad(loss, (0, 1), has_aux=True))(k, v)
    selected = residuals.selected_BHTJ[0, 0, 29].tolist()
    visible = [s for s in range(30) if s // 8 in selected]
    for gradient in gradients:
        np.testing.assert_array_equal(np.flatnonzero(np.any(gradient != 0, axis=(0, 2, 3))), visible)


def test_prefill_in_chunks_equals_one_pass_over_a_longer_cache():
    q, k, v = make_inputs(S=48, T=40)
    k, v = k.at[:, 40:].set(1e4), v.at[:, 40:].set(1e4)  # not filled yet: must never be read
    arguments = {"block_size": 8, "top_k": 3}

    @jit
    def run(q, offset):
        return moba_attention(q, k, v, **arguments, q_offset=offset, implementation="xla")

    whole = jit(functools.partial(moba_attention, **arguments, implementation="reference"))(q, k, v)
    parts = [run(q[:, start : start + 10], start) for start in range(0, 40, 10)]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_enough_blocks_give_full_attention_and_the_same_residuals():
    q, k, v = make_inputs()
    arguments = {"block_size": 16, "top_k": 3, "segment_ids": packed(2, 40), "return_residuals": True}
    run = functools.partial(moba_attention, **arguments)
    out, residuals = jit(run)(q, k, v)
    named, named_residuals = jit(functools.partial(run, implementation="xla"))(q, k, v)
    full = attention(q, k, v, scale=12**-0.5, segment_ids=packed(2, 40), implementation="reference")
    np.testing.assert_allclose(out, full, atol=1e-6)
    np.testing.assert_allclose(out, named, atol=1e-5)
    for got, want in zip(residuals, named_residuals, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def temporary_bytes(S):
    def loss(q, k, v):
        return jnp.sum(moba_attention(q, k, v, block_size=128, top_k=3, implementation="xla"))

    shape = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
    compiled = jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_the_sequence(monkeypatch):
    monkeypatch.setattr(streams, "STEP_LOGITS", 2**20)  # below which a whole short sequence is one step
    monkeypatch.setattr(routing, "GATE_SCORES", 2**16)
    small, large = temporary_bytes(4096), temporary_bytes(16384)
    assert large < 4.4 * small, (small, large)  # 4 times the keys; an S x S array would be 16 times
    assert large < 16384**2 * 4 / 4, "an S x S array of one head is four times this"


def test_plan_names_the_implementation_the_reason_and_the_memory():
    def plan(S, **arguments):
        shape = jax.ShapeDtypeStruct((1, S, 4, 64), jnp.bfloat16)
        return moba_attention_plan(shape, shape, shape, block_size=512, top_k=3, **arguments)

    assert "implementation: xla" in plan(65536)
    assert "the same function" in plan(1536)
    assert "implementation: reference" in plan(4096, implementation="reference")
    assert float(plan(65536).split("about ")[1].split()[0]) < float(
        plan(65536, implementation="reference").split("about ")[1].split()[0]
    )


def test_choice_is_logged_once(caplog):
    moba_pallas._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "k2jax.moba_pallas"):
        for _ in range(2):
            jax.eval_shape(functools.partial(moba_attention, block_size=8, top_k=2), *make_inputs())
    assert len(caplog.records) == 1
    assert "'xla'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k=0 must be at least 1"),
        ({"block_size": 0}, ValueError, "block_size=0 must be at least 1"),
        ({"q_offset": 1}, ValueError, "leaves the 40 keys"),
        ({"implementation": "flash"}, ValueError, "'reference', 'sm90', 'tpu', 'xla'"),
        ({"implementation": "sm90"}, ValueError, "'sm90' cannot run: it needs a Hopper GPU"),
        ({"implementation": "tpu"}, ValueError, "'tpu' cannot run: it needs a TPU"),
    ],
)
def test_errors_name_the_argument_and_the_fix(arguments, error, message):
    with pytest.raises(error, match=message):
        moba_attention(*make_inputs(), **{"block_size": 8, "top_k": 2, **arguments})
