"""Optional packages: imported where they are used, and missed with the name of the extra that brings them."""

import contextlib


@contextlib.contextmanager
def needs(extra: str, what: str):
    """Around the import of an optional package: ImportError becomes a ValueError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs a package that cannot be imported here ({error}). Fix: pip install 'k2jax[{extra}]'."
        ) from error
