"""The learning rate, counted in tokens."""

import jax.numpy as jnp

from k2jax.config import RunConfig


def learning_rate(tokens, *, peak, final, warmup, constant, total, decay="cosine"):
    """Linear warm-up, constant, then a decay to `final` at `total` (Kimi K2 report, section 2.5).

    tokens: seen before the step, a number or array; warmup, constant: lengths in tokens; decay: 'cosine' or 'linear'.
    The first step of a warm-up has the rate of one step, not zero, when tokens counts the step's own tokens.
    """
    tokens = jnp.asarray(tokens, jnp.float32)
    # Floats, because JAX takes a Python int as int32 and a schedule may have more tokens than that holds.
    warmup, constant, decay_length = float(warmup), float(constant), float(max(total - warmup - constant, 1))
    progress = jnp.clip((tokens - warmup - constant) / decay_length, 0.0, 1.0)
    left = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(tokens < warmup, peak * tokens / max(warmup, 1), final + (peak - final) * left)


def by_step(cfg: RunConfig):
    """The schedule as a function of the number of finished steps, as optax wants it; every stage has its own."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        result = jnp.zeros_like(step)
        for part in cfg.parts:
            opt, per_step = part.run.optimizer, part.run.tokens_per_step
            of_part = learning_rate(
                (step - part.start + 1.0) * per_step,
                peak=opt.learning_rate, final=opt.final_learning_rate, warmup=opt.warmup_tokens,
                constant=opt.constant_tokens, total=part.run.total_tokens, decay=opt.decay,
            )  # fmt: skip
            result = jnp.where(step >= part.start, of_part, result)
        return result

    return rate
