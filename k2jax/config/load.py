"""From a config file to a RunConfig: unknown fields, wrong types and what cannot work raise ValueError."""

import dataclasses
import difflib
import importlib.util
import types
import typing
from pathlib import Path

from k2jax.config.run import RunConfig


def load_config(file_and_arg: str, overrides: dict[str, object] | None = None) -> RunConfig:
    """The run described by `path/to/config.py:arg`, for example `configs/nano.py:steps=50,attention=full`.

    overrides: values by dotted path, for example {'optimizer.learning_rate': 1e-3}.
    Raises FileNotFoundError for a missing file and ValueError for whatever cannot work.
    """
    return run_config(apply_overrides(config_dict(file_and_arg), overrides or {}))


def config_dict(file_and_arg: str):
    """The ConfigDict that the file's `get_config(arg)` returns."""
    module, arg = load_config_module(file_and_arg)
    return module.get_config(arg)


def load_config_module(file_and_arg: str):
    """The config file as a module, and the argument after the colon."""
    name, _, arg = file_and_arg.partition(":")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"config file {name!r} does not exist; run from the clone's root, or give its full path"
        )
    spec = importlib.util.spec_from_file_location(f"k2jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, arg


def apply_overrides(config, overrides: dict[str, object]):
    """Sets dotted paths in a ConfigDict, also those of fields that the config file leaves at their defaults.

    Raises ValueError for a path through a value that has no fields; run_config refuses names that do not exist.
    """
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node, where = config, "config"
        for name in parents:
            if name not in node:
                with node.unlocked():
                    node[name] = {}
            node, where = node[name], f"{where}.{name}"
            if not hasattr(node, "keys"):
                raise ValueError(f"--config.{path}: {where}={node!r} has no fields; set --{where} instead")
        with node.unlocked(), node.ignore_type():  # run_config checks names and types
            node[leaf] = value
    return config


def run_config(config) -> RunConfig:
    """A ConfigDict (or nested dict) as a RunConfig; unknown and missing fields raise ValueError.

    An entry of `stages` holds name, start and what differs from the stage before it, nested as the run itself.
    """
    tree = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(tree, dict) and tree.get("stages"):
        tree = tree | {"stages": _complete_stages(tree)}
    return _build(RunConfig, tree, "config")


def _complete_stages(tree):
    current = {name: tree.get(name, {}) for name in ("model", "optimizer", "data")}
    current["accumulation"] = tree.get("train", {}).get("accumulation", 1)
    complete = []
    for stage in tree["stages"]:
        stage = stage.to_dict() if hasattr(stage, "to_dict") else stage
        current = _merge(current, stage)
        complete.append(current)
    return complete


def _merge(old, new):
    """`new` over `old`, dict by dict."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {name: _merge(old[name], value) if name in old else value for name, value in new.items()}


def _build(cls, tree, where):
    if not isinstance(tree, dict):
        raise ValueError(f"{where}={tree!r}: expected the fields of {cls.__name__}, as a dict")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in fields:
            raise ValueError(f"{where}: {cls.__name__} has no field {name!r}{_closest(name, sorted(fields))}")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in tree and not optional:
            raise ValueError(f"{where}.{name} is missing: {cls.__name__} needs it")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in tree.items()})


def _convert(hint, value, where):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    classes = [c for c in options if dataclasses.is_dataclass(c)]
    if isinstance(value, dict) and classes:
        # A union of dataclasses is told apart by its fields: MLA and GQA share none.
        best = max(classes, key=lambda c: len(value.keys() & {f.name for f in dataclasses.fields(c)}))
        return _build(best, value, where)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_convert(typing.get_args(option)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (bool, str) and isinstance(value, option):
            return value
    expected = " or ".join(o.__name__ if isinstance(o, type) else str(o) for o in options)
    raise ValueError(f"{where}={value!r}: expected {expected}, got {type(value).__name__}")


def _closest(name, known):
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
