"""The points of a sweep: what a config file's get_sweep(add) adds, named and checked before anything runs."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass

from k2jax.config import RunConfig, load_config, load_config_module

LONGEST = 60  # characters of a name


@dataclass(frozen=True)
class Point:
    """One run: its folder's name, what get_sweep gave, and the command line's form of it."""

    name: str
    settings: dict[str, object]
    config: str  # path.py:name=value,...
    overrides: dict[str, object]  # by dotted path
    cfg: RunConfig


def points(file_and_arg: str, overrides: dict[str, object]) -> list[Point]:
    """Every point of the file's get_sweep, in its order.

    get_sweep calls add(name=value, **{'a.b': value}): a plain name is an argument of get_config, a dotted one a field.
    file_and_arg and overrides hold for every point. Raises ValueError for a file without get_sweep, a point that cannot
    work, something set twice, and two points with the same settings.
    """
    module, arg = load_config_module(file_and_arg)
    if not hasattr(module, "get_sweep"):
        raise ValueError(
            f"--config={file_and_arg}: the file has no get_sweep(add). Fix: write one, for example\n"
            "def get_sweep(add):\n    for lr in (0.005, 0.01):\n        add(lr=lr)"
        )
    given: list[dict] = []
    module.get_sweep(lambda **settings: given.append(settings))
    if not given:
        raise ValueError(f"--config={file_and_arg}: get_sweep added no point")
    made = [_point(file_and_arg, arg, overrides, settings) for settings in given]
    by_config, by_name = {}, {}
    for point in made:
        same = by_config.setdefault(point.cfg, point)
        if same is not point:
            raise ValueError(f"points {same.settings} and {point.settings} are the same run: drop one of them")
        # Some file systems do not tell capitals apart.
        same = by_name.setdefault(point.name.lower(), point)
        if same is not point:
            raise ValueError(f"points {same.settings} and {point.settings} would share the folder {point.name}")
    return made


def _point(file_and_arg, arg, overrides, settings):
    arguments = {k: v for k, v in settings.items() if "." not in k}
    fields = {k: v for k, v in settings.items() if "." in k}
    common = {item.partition("=")[0] for item in arg.split(",")} & arguments.keys() | overrides.keys() & fields.keys()
    if common:
        raise ValueError(f"{min(common)} is set by the command line and by the point {settings}: drop one of them")
    file = file_and_arg.partition(":")[0]
    words = [arg] if arg else []
    for key, value in arguments.items():
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        if "," in text:
            raise ValueError(f"point {settings}: {key}={text} holds a comma; set the field by its dotted path")
        words.append(f"{key}={text}")
    config = f"{file}:{','.join(words)}" if words else file
    try:
        cfg = load_config(config, {**overrides, **fields})
    except ValueError as error:
        raise ValueError(f"point {settings}: {error}") from error
    return Point(name(settings), settings, config, {**overrides, **fields}, cfg)


def name(settings: dict[str, object]) -> str:
    """A folder's name that follows from the settings alone, so that points added later rename none."""
    raw = "_".join(f"{key}={value}" for key, value in settings.items()) or "base"
    safe = re.sub(r"[^A-Za-z0-9._=+-]", "-", raw)
    if safe == raw and len(raw) <= LONGEST:
        return raw
    return f"{safe[: LONGEST - 9]}-{hashlib.sha256(raw.encode()).hexdigest()[:8]}"


def devices(point: Point) -> int:
    """How many devices the point's mesh spans."""
    size = 1
    for parts in dataclasses.astuple(point.cfg.mesh):
        size *= parts
    return size
