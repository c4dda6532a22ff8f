"""A disk that is really full: a small file system of memory, where this machine may mount one."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def small_disk(place, size):
    """Mounts `size` (as mount(8) writes it) at the new folder `place`; gives the way to enlarge it to 64 MB."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
