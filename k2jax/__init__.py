"""k2jax: Kimi K2, MuonClip and Mixture of Block Attention in JAX.

Public names are resolved on first use, so `import k2jax.muonclip` and `import k2jax.moba_pallas` load JAX and
optax only, never Flax, Orbax or Grain.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Aux": "k2jax.model",
    "Transformer": "k2jax.model",
    "apply": "k2jax.model",
    "count_params": "k2jax.model",
    "flops_per_token": "k2jax.model",
    "hidden": "k2jax.model",
    "init_params": "k2jax.model",
    "token_logprobs": "k2jax.model",
    "ModelConfig": "k2jax.config",
    "RunConfig": "k2jax.config",
    "load_config": "k2jax.config",
    "MatrixSpec": "k2jax.matrix_specs",
    "NS": "k2jax.newton_schulz",
    "moba_attention": "k2jax.moba_pallas",
    "scale_by_muon": "k2jax.muonclip",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'k2jax' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return [*globals(), *__all__]
