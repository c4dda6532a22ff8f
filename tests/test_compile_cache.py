"""The compile cache in processes of its own: where it is, what it says, and damaged entries."""

import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from k2jax.training import compile_cache
from k2jax.training.errors import SetupError

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
from k2jax.training import compile_cache
from k2jax.training.errors import SetupError
try:
    print(compile_cache.enable(sys.argv[1] if len(sys.argv) > 1 else None))
except SetupError as error:
    sys.exit(f"error: {error}")
import jax, numpy as np
seen = compile_cache.Seen()
x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
print(jax.jit(lambda x: x @ x)(x).tobytes().hex())
print(seen)
"""
QUICK = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}


def start(*flags, **env):
    """(lines of stdout, stderr) of a process that compiles something small."""
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_COMPILATION_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, flags)], env=clean | QUICK | env, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return done.stdout.splitlines(), done.stderr


def entries(folder):
    return sorted(folder.glob("*-cache"))


def test_the_second_start_hits_gives_the_same_bits_and_the_folder_is_the_users_own(tmp_path):
    folder = tmp_path / "x" / "k2jax" / "compiled"
    first, _ = start(XDG_CACHE_HOME=str(tmp_path / "x"))
    assert first[0] == str(folder)
    assert first[2] == "compile cache: miss, kept for the next start"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    second, _ = start(XDG_CACHE_HOME=str(tmp_path / "x"))
    assert second[2] == "compile cache: hit, 0 s saved"
    assert second[1] == first[1]


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * 20,
    "a flipped bit": lambda data: data[:200] + bytes([data[200] ^ 4]) + data[201:],
    "well packed garbage": lambda data: zlib.compress(bytes(range(256)) * 20),
    "a packed half": lambda data: zlib.compress(zlib.decompress(data)[:1000]),
}


def test_damaged_entries_are_told_replaced_and_change_no_number(tmp_path):
    good, _ = start(tmp_path)
    (entry,) = entries(tmp_path)
    data = entry.read_bytes()
    for name, damage in DAMAGE.items():
        broken = damage(data)
        entry.write_bytes(broken)
        (tmp_path / "no entry-cache").write_bytes(b"x")
        out, err = start(tmp_path)
        assert out[1:] == [good[1], "compile cache: miss, kept for the next start"], (name, err)
        assert "a damaged entry of the compile cache" in err, name
        assert entry.read_bytes() != broken, name
    assert start(tmp_path)[0][2] == "compile cache: hit, 0 s saved"


def test_switched_off_by_flag_or_by_jax_itself(tmp_path):
    for flags, env in ((["off"], {}), ([], {"JAX_ENABLE_COMPILATION_CACHE": "false"})):
        out, _ = start(*flags, XDG_CACHE_HOME=str(tmp_path), **env)
        assert (out[0], out[2]) == ("off", "no compile cache")
    assert list(tmp_path.iterdir()) == []


def test_jax_own_setting_holds_where_no_flag_is_given(tmp_path):
    out, _ = start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "told"))
    assert out[0] == str(tmp_path / "told")
    assert entries(tmp_path / "told")


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    _, err = start(tmp_path / "file" / "below")
    assert f"--compile_cache={tmp_path / 'file' / 'below'}: Not a directory" in err
    assert "Fix: name another folder, or give --compile_cache=off" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SetupError, match=r"Permission denied|no permission"):
        compile_cache.enable(str(tmp_path))


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.default_folder() == tmp_path / "k2jax" / "compiled"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert compile_cache.default_folder() == Path.home() / ".cache" / "k2jax" / "compiled"
