"""The wheel as a stranger gets it: built, installed without extras into a clean environment, used from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.check


def run(*command, cwd):
    """Output of a command that must succeed, with nothing of this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy, because setuptools leaves build folders in the tree that it builds.
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    hidden = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=hidden)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return python


def test_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"k2jax", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    modules = {name for name in names if name.startswith("k2jax/")}
    assert modules == {path.relative_to(ROOT).as_posix() for path in (ROOT / "k2jax").rglob("*.py")}
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_depends_on_no_extra_without_being_asked(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        required = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    always = {re.match(r"[\w-]+", line).group() for line in required if "extra ==" not in line}
    assert always == {
        *("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "ml-collections", "chex"),
        *("numpy", "matplotlib", "tensorboardX", "array-record", "etils"),
    }


@pytest.mark.parametrize("module", ["k2jax.muonclip", "k2jax.moba_pallas"])
def test_installed_module_loads_nothing_heavy(python, tmp_path, module):
    code = (
        f"import sys, {module} as module\n"
        "heavy = {'flax', 'orbax', 'grain', 'tensorstore', 'ml_collections'}\n"
        "print(module.__file__)\nprint(sorted(heavy & set(sys.modules)))"
    )
    file, loaded = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parent.parent)
    assert loaded == "[]"


@pytest.mark.parametrize("page", ["muonclip", "moba"])
def test_first_example_of_the_page_runs_elsewhere(python, tmp_path, page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL).group(1)
    assert run(python, "-c", example, cwd=tmp_path)


def test_every_public_name_is_there(python, tmp_path):
    code = "import k2jax; print([getattr(k2jax, name).__name__ for name in k2jax.__all__])"
    assert "load_config" in run(python, "-c", code, cwd=tmp_path)
