"""The house rules that code can break without failing: who imports whom, who names mesh axes, how long a file is."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import k2jax
from k2jax.sharding import AXES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("k2jax", "configs", "experiments", "benchmarks")

_BELOW_LAYERS = {"config", "sharding", "kernels", "moba_pallas"}
_OPTIMIZER = {
    "matrix_specs",
    "leaf_roles",
    "polar_express",
    "newton_schulz",
    "muon_plan",
    "muon_groups",
    "describe",
    "max_logits",
    "qk_clip",
    "muonclip",
}
_LIBRARY = _BELOW_LAYERS | _OPTIMIZER | {"layers", "model"}

# Room -> rooms of k2jax that its files may import. A room is a file or folder of k2jax; '' is k2jax/__init__.py.
ROOMS = {
    "": set(),
    "kernels": {"kernels"},
    "matrix_specs": set(),
    "leaf_roles": {"matrix_specs"},
    "polar_express": set(),
    "newton_schulz": {"polar_express", "kernels"},
    "muon_plan": {"matrix_specs", "newton_schulz"},
    "muon_groups": {"matrix_specs", "newton_schulz", "muon_plan", "kernels"},
    "describe": {"leaf_roles", "matrix_specs", "newton_schulz", "muon_plan"},
    "max_logits": set(),
    "qk_clip": {"leaf_roles"},
    "moba_pallas": {"kernels"},
    "muonclip": _OPTIMIZER | {"kernels"},
    "config": {"config"},
    "sharding": {"config"},
    "layers": _BELOW_LAYERS | {"layers"},
    "model": {"layers", "sharding", "config", "kernels"},
    "data": {"data"},
    "inference": {"inference", "model", "config", "sharding"},
    "diagnostics": _LIBRARY | {"training", "diagnostics"},
    "training": _LIBRARY | {"data", "inference", "training"},
    "report": {"report"},
}

# Rooms that somebody may want alone, and the packages that is allowed to cost.
PACKAGES = {
    "": set(),
    "kernels": {"jax", "numpy"},
    "matrix_specs": {"jax", "numpy"},
    "leaf_roles": {"jax", "numpy"},
    "polar_express": {"numpy"},
    "newton_schulz": {"jax", "numpy"},
    "muon_plan": {"jax"},
    "muon_groups": {"jax", "numpy"},
    "describe": set(),
    "max_logits": {"jax", "numpy"},
    "qk_clip": {"jax", "numpy", "optax"},
    "moba_pallas": {"jax", "numpy"},
    "muonclip": {"jax", "numpy", "optax"},
    "config": set(),
    "sharding": {"jax", "numpy"},
    "data": {"grain", "numpy", "array_record", "etils", "pyarrow", "datasets", "tiktoken", "splintr", "tokenizers"},
    "report": {"matplotlib", "numpy"},
    "configs": {"ml_collections"},
}

# What takes the name of a mesh axis. 'data' is an everyday word, so it counts as an axis only among their arguments.
TAKES_AXES = {
    *("P", "PartitionSpec", "NamedSharding", "Mesh", "AbstractMesh", "make_mesh", "reshard", "shard_map"),
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "ppermute", "all_gather", "all_to_all", "ragged_all_to_all"),
    *("axis_index", "axis_size"),
}


@cache
def sources():
    """{dotted module name: source} of everything but the tests."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {module_name(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """'kernels' of k2jax.kernels.moba.xla, '' of k2jax, 'configs' of configs.nano."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "k2jax" else top


def imports(source, known):
    """Dotted names of the modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from k2jax import sharding` imports a module, `from k2jax.sharding import spec` a name out of one.
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found


def import_faults(module, source, known):
    faults = []
    mine = room(module)
    for name in sorted(imports(source, known)):
        top = name.partition(".")[0]
        if name.startswith("."):
            faults.append(f"{module}: relative import {name}; write the full name")
        elif top == "k2jax":
            if module.startswith("k2jax") and room(name) not in ROOMS.get(mine, set()):
                faults.append(f"{module} imports {name}")
            if mine == "configs":
                faults.append(f"{module} imports {name}; a config file describes a run and runs nothing")
        elif top in FOLDERS:
            allowed = mine in ("experiments", "benchmarks") or (name == "configs.common" and mine == "configs")
            if not allowed:
                faults.append(f"{module} imports {name}, which is not in the wheel")
        elif mine in PACKAGES and top not in PACKAGES[mine] | sys.stdlib_module_names:
            faults.append(f"{module} imports the package {top}")
    return faults


def axis_faults(module, source):
    """Mesh axes named outside k2jax.sharding, in files that use JAX at all."""
    tree = ast.parse(source)
    if module == "k2jax.sharding" or "jax" not in {name.partition(".")[0] for name in imports(source, set())}:
        return []
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & set(AXES) - {"data"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_name(node.func) in TAKES_AXES:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            inside = {c.value for a in arguments for c in ast.walk(a) if isinstance(c, ast.Constant)}
            found |= inside & set(AXES)
    return [f"{module} names the mesh axis {axis!r}; ask k2jax/sharding.py" for axis in sorted(found)]


def last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def idiom_faults(module, source):
    """What JAX has deprecated or what costs too much, and a shard_map outside the one seam."""
    faults = []
    if any(name.startswith("jax.experimental.shard_map") for name in imports(source, {"jax.experimental.shard_map"})):
        faults.append(f"{module} imports jax.experimental.shard_map; use jax.shard_map")
    for node in ast.walk(ast.parse(source)):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if dotted == "nnx.jit":
            faults.append(f"{module} uses nnx.jit, 100 times the dispatch of jax.jit over the split state")
        if dotted == "jax.experimental.shard_map":
            faults.append(f"{module} uses {dotted}; use jax.shard_map")
        if dotted == "jax.shard_map" and module != "k2jax.kernels.partition":
            faults.append(f"{module} calls jax.shard_map; go through k2jax/kernels/partition.py")
        if isinstance(node, ast.With) and any("mesh" in last_name(item.context_expr) for item in node.items):
            faults.append(f"{module} enters a mesh as a context; use jax.set_mesh")
    return faults


def size_faults(module, source):
    faults = []
    lines = len(source.splitlines())
    if lines > 500 and room(module) != "kernels":
        faults.append(f"{module} has {lines} lines: two ideas live there")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > 80:
                faults.append(f"{module}.{node.name} has {length} lines")
    return faults


def every(check, *arguments):
    return [fault for module, source in sources().items() for fault in check(module, source, *arguments)]


# --- the tree -----------------------------------------------------------------------------------------------------


def test_every_room_has_a_rule():
    rooms = {room(module) for module in sources() if module.partition(".")[0] == "k2jax"}
    assert rooms == set(ROOMS), "give every room of k2jax its line in ROOMS, and only those"


def test_imports_point_one_way():
    assert every(import_faults, frozenset(sources())) == []


def test_no_two_files_import_each_other():
    known = frozenset(sources())
    graph = {module: (imports(source, known) & known) - {module} for module, source in sources().items()}
    while ends := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in ends}
    assert sorted(graph) == []


def test_only_the_sharding_file_names_mesh_axes():
    assert every(axis_faults) == []


def test_no_deprecated_or_costly_idiom():
    assert every(idiom_faults) == []


def test_files_and_functions_stay_small():
    assert every(size_faults) == []


# --- the rules themselves -----------------------------------------------------------------------------------------

KNOWN = frozenset({"k2jax", "k2jax.sharding", "k2jax.model", "k2jax.config", "configs.common", "configs.nano"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("k2jax.kernels.moba.xla", "from k2jax.config import ModelConfig"),
        ("k2jax.kernels.moba.xla", "def f():\n    from k2jax import sharding"),
        ("k2jax.muonclip", "import k2jax.model"),
        ("k2jax.muonclip", "import chex"),
        ("k2jax.model", "from k2jax.training.step import train_step"),
        ("k2jax.model", "from .config import ModelConfig"),
        ("k2jax.training.loop", "from k2jax.report.training import write_report"),
        ("k2jax.training.loop", "from configs import nano"),
        ("k2jax.report.page", "import jax"),
        ("configs.nano", "from k2jax.config import ModelConfig"),
        ("configs.nano", "from configs import kimi_k2\nfrom configs import nano"),
        ("configs.nano", "import numpy"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert import_faults(module, source, KNOWN)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("k2jax.model", "from k2jax import sharding\nfrom k2jax.config import ModelConfig\nfrom flax import nnx"),
        ("configs.nano", "import ml_collections\nfrom configs import common"),
        ("experiments.train", "from configs import nano\nimport k2jax.model"),
    ],
)
def test_an_allowed_import_is_left_alone(module, source):
    assert import_faults(module, source, KNOWN) == []


@pytest.mark.parametrize(
    "line",
    ["axes = ('expert', None)", "jax.lax.psum(x, 'data')", "P(('slice', 'data'))", "f(x, axis_name='fsdp')"],
)
def test_a_named_mesh_axis_is_found(line):
    assert axis_faults("k2jax.layers.moe", f"import jax\n{line}")
    assert axis_faults("k2jax.sharding", f"import jax\n{line}") == []


@pytest.mark.parametrize("source", ["import jax\nmeta = {'data': 1}", "label = 'expert'"], ids=["key", "no jax"])
def test_an_everyday_word_is_no_axis(source):
    assert axis_faults("k2jax.report.maps", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from jax.experimental.shard_map import shard_map",
        "from jax.experimental import shard_map",
        "jax.experimental.shard_map.shard_map(f)",
        "jax.shard_map(f, in_specs=())",
        "with mesh:\n    pass",
        "with self.mesh:\n    pass",
        "step = nnx.jit(step)",
        "@nnx.jit\ndef f(): pass",
    ],
)
def test_a_forbidden_idiom_is_found(source):
    assert idiom_faults("k2jax.model", source)


def test_allowed_idioms_are_left_alone():
    source = "with jax.set_mesh(mesh):\n    f = jax.jit(f)"
    assert idiom_faults("k2jax.model", source) == []
    assert idiom_faults("k2jax.kernels.partition", "jax.shard_map(f)") == []


def test_long_files_and_functions_are_found():
    function = "def f():\n" + "    x = 1\n" * 80
    assert size_faults("k2jax.model", function) == ["k2jax.model.f has 81 lines"]
    assert size_faults("k2jax.kernels.moba.xla", function)
    assert size_faults("k2jax.model", "x = 1\n" * 501)
    assert size_faults("k2jax.kernels.moba.xla", "x = 1\n" * 501) == []


# --- what importing costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["k2jax", "k2jax.muonclip", "k2jax.moba_pallas"])
def test_what_is_useful_alone_loads_nothing_heavy(module):
    heavy = ["flax", "orbax", "grain", "tensorstore", "ml_collections", "chex", "matplotlib"]
    heavy += ["optax"] if module != "k2jax.muonclip" else []
    code = f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve_and_none_hides_a_module():
    for name in k2jax.__all__:
        assert getattr(k2jax, name).__name__ == name
    assert not set(k2jax.__all__) & set(ROOMS)
    assert set(k2jax.__all__) <= set(dir(k2jax))
    with pytest.raises(AttributeError, match="no attribute 'muon'; public names: "):
        k2jax.muon  # noqa: B018
