"""What the documents promise: examples that run, links that lead somewhere, commands that exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")


def named(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def examples(path):
    """The python blocks of a document."""
    return [text for language, text in FENCE.findall(path.read_text(encoding="utf-8")) if language == "python"]


def prose(path):
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def commands(path):
    """Lines of code, inline and fenced, in which a command may stand."""
    text = path.read_text(encoding="utf-8")
    fenced = [line.strip() for _, block in FENCE.findall(text) for line in block.splitlines()]
    return [*fenced, *CODE.findall(prose(path))]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path):
    return {slug(heading) for heading in re.findall(r"^#+\s+(.*)$", prose(path), re.MULTILINE)}


# How many examples of a document run: all of the one that other people's code starts from.
RUNNABLE = {ROOT / "docs/muonclip.md": 5, ROOT / "docs/moba.md": 1} | ({README: 1} if examples(README) else {})


def test_every_example_of_muonclip_is_among_those_that_run():
    assert len(examples(ROOT / "docs/muonclip.md")) == RUNNABLE[ROOT / "docs/muonclip.md"]


@pytest.mark.parametrize("path", named(RUNNABLE))
def test_examples_run(path):
    # One process for all, since most of the time is its start; each example has names of its own.
    code = f"for text in {examples(path)[: RUNNABLE[path]]!r}: exec(text, {{'__name__': '__main__'}})"
    # Compiling is most of the time, and only numbers matter here.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_every_relative_link_leads_somewhere(path):
    broken = []
    for inline, reference in LINK.findall(prose(path)):
        target, _, anchor = (inline or reference).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(inline or reference)
    assert broken == []


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_every_make_target_that_is_named_exists(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for line in commands(path) for target in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", line)}
    assert called <= targets


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_every_module_and_config_that_is_named_exists(path):
    missing = []
    for line in commands(path):
        for module in re.findall(r"-m ((?:experiments|benchmarks|k2jax)[\w.]*)", line):
            missing += [] if (ROOT / module.replace(".", "/")).with_suffix(".py").exists() else [module]
        for config in re.findall(r"--config=([\w/]+\.py)", line):
            missing += [] if (ROOT / config).exists() else [config]
        for file in re.findall(r"^((?:k2jax|tests|configs|experiments|benchmarks|notebooks|docs)/[\w/.-]*)$", line):
            missing += [] if (ROOT / file).exists() else [file]
    assert missing == []


def test_no_file_names_a_folder_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|Users|scratch|mnt)/\w|\b[A-Z]:\\\w")
    folders = ("k2jax", "configs", "experiments", "benchmarks", "notebooks", "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    found = []
    for path in files:
        if path.suffix in {".py", ".md", ".txt", ".toml", ".json", ".ipynb", ".yml", ""}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []
