"""Compiled programs kept on disk, so that the next start of the same program need not compile it again.

jax's persistent compilation cache does the work. Its key covers the program, the compiler's version and flags and the
device, so a hit is the program that a compilation would have given, and the numbers of a run do not depend on it. What
can be written into the folder can be run by this user: it belongs to the user alone.
"""

import collections
import logging
import os
import re
import warnings
from pathlib import Path

import jax

from k2jax.training.errors import SetupError

_log = logging.getLogger(__name__)
_EVENT = "/jax/compilation_cache/"
_counts = collections.Counter()  # of this process: requests, hits, misses, and seconds saved
_listening = False


def enable(flag: str | None = None) -> str:
    """Switches the cache on for this process and says in one line where it is; call it before anything is compiled.

    flag: a folder, 'off', or None: what jax was told by JAX_COMPILATION_CACHE_DIR or
    JAX_ENABLE_COMPILATION_CACHE, else a folder of this user.
    Raises SetupError for a folder that cannot be used.
    """
    if flag == "off" or (flag is None and not jax.config.jax_enable_compilation_cache):
        jax.config.update("jax_enable_compilation_cache", False)
        return "off"
    jax.config.update("jax_enable_compilation_cache", True)
    told = jax.config.jax_compilation_cache_dir
    folder = Path(flag or told or default_folder()).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    except OSError as error:
        raise SetupError(_unusable(folder, error.strerror)) from error
    if not usable:
        raise SetupError(_unusable(folder, "no permission to read and write there"))
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    _listen()
    return str(folder)


def default_folder() -> Path:
    """k2jax/compiled in the user's cache folder (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "k2jax" / "compiled"


def _unusable(folder, reason):
    return f"--compile_cache={folder}: {reason}. Fix: name another folder, or give --compile_cache=off."


class Seen:
    """What the cache did from here on."""

    def __init__(self):
        self._before = _counts.copy()

    def __str__(self):
        if not _listening or not jax.config.jax_enable_compilation_cache:
            return "no compile cache"
        seen = _counts - self._before
        if seen["compile_requests_use_cache"] > seen["cache_hits"]:
            kept = "kept for the next start" if seen["cache_misses"] else "not kept: it is quick, or process 0 keeps it"
            return f"compile cache: miss, {kept}"
        return f"compile cache: hit, {seen['compile_time_saved_sec']:.0f} s saved"


def _listen():
    global _listening
    if _listening:
        return
    _listening = True
    jax.monitoring.register_event_listener(lambda event, **_: _count(event, 1))
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: _count(event, seconds))
    show = warnings.showwarning

    def heal(message, category, filename, lineno, file=None, line=None):
        # jax compiles anew, but never writes over the entry that it could not read: it would fail at every start.
        found = re.match(r"Error reading persistent compilation cache entry for '([\w.<>-]+)'", str(message))
        if not found:
            return show(message, category, filename, lineno, file, line)
        folder = Path(jax.config.jax_compilation_cache_dir)
        for entry in folder.glob(f"{found[1]}-*-cache"):
            entry.unlink(missing_ok=True)
        _log.warning("a damaged entry of the compile cache in %s is replaced: %s", folder, str(message)[:300])
        return None

    warnings.showwarning = heal


def _count(event, amount):
    if event.startswith(_EVENT):
        _counts[event.removeprefix(_EVENT)] += amount
