"""The checks that every part of a config uses: a ValueError names the field, its value and the fix."""


def positive(group, cfg, *fields):
    for field in fields:
        if not getattr(cfg, field) > 0:  # `not` also refuses NaN
            raise ValueError(f"{group}.{field}={getattr(cfg, field)}: must be positive")


def not_negative(group, cfg, *fields):
    for field in fields:
        if not getattr(cfg, field) >= 0:
            raise ValueError(f"{group}.{field}={getattr(cfg, field)}: must be 0 or more")


def one_of(group, cfg, field, known):
    if getattr(cfg, field) not in known:
        raise ValueError(f"{group}.{field}={getattr(cfg, field)!r}: use one of {', '.join(map(repr, known))}")
