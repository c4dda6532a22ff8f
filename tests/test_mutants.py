"""Do the tests see a bug? Each mutant is planted in a copy of the tree and must turn its named test red."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED = 0, 1  # pytest's exit status; a test that cannot be collected has another one.


def run_tests(tree, nodes, seconds):
    # No bytecode: a mutant may have the size and the second of the file it replaces. Wide, so that no line is cut.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "250"}
    # Under CI pytest works out the whole difference of two long lists: for some tests longer than the time limit.
    for name in ("PYTEST_ADDOPTS", "CI", "BUILD_NUMBER"):
        environment.pop(name, None)
    if not any(node.startswith("tests/test_compile_cache.py") for node in nodes):  # which looks at these settings
        # A mutant changes little: what it leaves alone is compiled once for all of them.
        environment |= {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(tree.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    copy = tmp_path_factory.mktemp("mutants") / "tree"
    copy.mkdir()
    for folder in ("k2jax", "configs", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def test_there_are_enough_mutants_with_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, f"mend {mutant.name!r}"
    file, _, name = mutant.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), f"mend {mutant.name!r}"


@pytest.mark.check
@pytest.mark.parametrize("file", sorted({mutant.test.partition("::")[0] for mutant in MUTANTS}))
def test_every_named_test_passes_without_a_mutant(tree, file):
    nodes = sorted({mutant.test for mutant in MUTANTS if mutant.test.startswith(f"{file}::")})
    result = run_tests(tree, nodes, seconds=900)
    assert result.returncode == PASSED, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(rf"^{len(nodes)} passed", result.stdout, re.MULTILINE), result.stdout[-500:]


@pytest.mark.check
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_turns_its_test_red(tree, mutant):
    file = tree / mutant.file
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        result = run_tests(tree, [mutant.test], seconds=300)
    finally:
        file.write_text(original, encoding="utf-8")
    assert result.returncode == FAILED, f"{mutant.test} saw nothing of it:\n{result.stdout[-3000:]}{result.stderr}"
    # A crash would turn any test red; the named one has to see the difference.
    seen = rf"^FAILED {re.escape(mutant.test)} - (AssertionError|assert |Failed: DID NOT RAISE)"
    assert re.search(seen, result.stdout, re.MULTILINE), result.stdout[-3000:]
