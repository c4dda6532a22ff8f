"""From this process's rows to arrays over all devices.

Legend: A micro-batches, B sequences of a micro-batch, R rows that this process feeds, T tokens.
"""

import jax
import numpy as np


class Feed:
    """What this process contributes to batches of one shape: the rows that its own devices hold."""

    def __init__(self, place: jax.sharding.NamedSharding, shape: tuple[int, ...]):
        """place: where a batch lies; shape: of the whole batch, [A, B, T] or [B, T].

        Raises ValueError where this process has no device of the mesh.
        """
        self._place, self._shape = place, shape
        parts = place.addressable_devices_indices_map(shape).values()
        if not parts:
            raise ValueError(
                f"mesh: process {jax.process_index()} of {jax.process_count()} has none of its "
                f"{place.mesh.size} devices. Fix: make the mesh as large as all {jax.device_count()} devices."
            )
        # A process whose devices cut the tokens of the same rows reads each row once.
        self._sequences = sorted({b for part in parts for b in range(*part[-2].indices(shape[-2]))})
        micro_batches = range(shape[0] if len(shape) == 3 else 1)
        self.rows = [a * shape[-2] + b for a in micro_batches for b in self._sequences]

    def arrays(self, batch: dict) -> dict:
        """Arrays over the whole mesh from this process's rows of a batch, [R, T] each."""
        return {name: self._array(x) for name, x in batch.items()}

    def _array(self, x_RT):
        local = x_RT.reshape(*self._shape[:-2], len(self._sequences), self._shape[-1])

        def part(index):
            *micro, of_batch, of_length = index
            first, end, _ = of_batch.indices(self._shape[-2])
            # The rows of one device stand next to each other in the whole batch, so here as well.
            at = int(np.searchsorted(self._sequences, first))
            return local[*micro, at : at + end - first, of_length]

        return jax.make_array_from_callback(self._shape, self._place, part)
