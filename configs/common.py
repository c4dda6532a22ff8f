"""Arguments of config files, in the manner of big_vision: `configs/nano.py:steps=50,attention=full`."""

import difflib


def parse_arg(arg: str | None, **defaults):
    """The argument string as a dict, each value of its default's type.

    `name=value` pairs are separated by commas; a bare `name` switches a boolean on. The defaults define which names
    exist. Raises ValueError for an unknown name or a value of another type, and names what exists.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            match = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(defaults))}"
            raise ValueError(f"config argument {item!r}: no argument is named {name!r}; {hint}")
        values[name] = _parse(name, text if equals else "on", defaults[name])
    return values


def _parse(name, text, default):
    if isinstance(default, bool):
        words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"config argument {name}={text}: use on or off")
        return words[text.lower()]
    try:
        return type(default)(text)
    except ValueError:
        kind = type(default).__name__
        raise ValueError(f"config argument {name}={text}: expected a value of type {kind}, like {default!r}") from None


def attention_list(kind: str, num_layers: int, full_last: int) -> tuple[str, ...]:
    """The attention of every layer: `kind`, with the last `full_last` layers full (MoBA paper, section 3.2)."""
    if kind not in ("full", "moba"):
        raise ValueError(f"config argument attention={kind}: use full or moba")
    return (kind,) * (num_layers - full_last) + ("full",) * full_last
