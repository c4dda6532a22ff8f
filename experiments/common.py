"""What the entry points share: flags of configs, and errors without tracebacks."""

import argparse
import ast
import errno
import logging
import signal
import sys

from k2jax.config import RunConfig, load_config
from k2jax.training.errors import Interrupted, RunError, SetupError


def parse_flags(parser: argparse.ArgumentParser, argv=None):
    """(flags, overrides): the parser's flags, and `--config.a.b=value` as {'a.b': value}.

    Anything else that is unknown ends the program with the parser's message.
    """
    flags, rest = parser.parse_known_args(argv)
    overrides = {}
    for item in rest:
        name, equals, text = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            parser.error(f"unknown argument {item!r}; config fields are set as --config.optimizer.learning_rate=0.01")
        overrides[name] = _value(text)
    return flags, overrides


def load(config: str, overrides: dict) -> RunConfig:
    """`load_config` for a command line: what a person got wrong is a SetupError."""
    try:
        return load_config(config, overrides)
    except (ValueError, FileNotFoundError) as error:
        raise SetupError(error) from error


def override_flags(overrides: dict) -> list[str]:
    """The words of a command line that `parse_flags` reads as these overrides."""
    return [f"--config.{name}={value if isinstance(value, str) else repr(value)}" for name, value in overrides.items()]


def _value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # A word, such as muonclip.


# What the owner of a disk can mend; any other OSError is our bug and keeps its traceback.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _is_told_once(record):
    # Orbax logs the traceback of an error that it then raises, and asyncio those that followed from it.
    return record.levelno < logging.ERROR or record.name not in ("absl", "asyncio")


def run_main(main):
    """Calls main() and exits: 0, 2 for what the user can mend, 128 + n after signal n, a traceback for our bugs."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("k2jax").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_told_once)
    try:
        main()
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        print("stopped at once by SIGINT; the last complete checkpoint is untouched", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error}. Fix: free disk space or give write access, then run again.", file=sys.stderr)
        sys.exit(2)
