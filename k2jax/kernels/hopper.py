"""Whether the Hopper kernels can run here."""

import functools

import jax


class CannotRun(ValueError):
    """An implementation that was asked for by name cannot compute this call on this device; it says why."""


@functools.cache
def not_hopper() -> str | None:
    """Why the default device cannot run them, or None."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return None if capability == "9.0" else f"it needs a Hopper GPU, and the default device is {device.device_kind}"
