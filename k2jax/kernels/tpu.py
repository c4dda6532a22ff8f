"""Whether the TPU kernels can run here."""

import functools

import jax


@functools.cache
def not_tpu() -> str | None:
    """Why the default device cannot run them, or None."""
    device = jax.devices()[0]
    return None if device.platform == "tpu" else f"it needs a TPU, and the default device is {device.device_kind}"


def unproven() -> str | None:
    """Where the default device is a TPU: why None does not take the kernels for it."""
    return None if not_tpu() else "the kernels for TPUs have never run on one; name 'tpu' to take them"
