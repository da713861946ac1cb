"""Errors that a user can put right; importing this module imports nothing else of the project's."""

from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(Exception):
    """Bad input: the message is one line that names the file, line or flag and the remedy.

    Command lines print it on stderr and exit with code 2, without a traceback.
    """


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names term, member, step and remedy."""


def printable(text: str) -> str:
    """The text as one line that a terminal shows and does not obey: control characters and the like are escaped.

    Names of files and texts out of them may hold escape sequences, line breaks, marks that turn the reading direction,
    and halves of surrogate pairs, which no stream can encode.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_types(config: object, names: Collection[str] | None = None) -> None:
    """Raise InputError naming the flag of the first number, switch or choice that is set to something of another kind.

    The command line refuses that itself; this is for configs from Python, which checks no type. Fields of other kinds
    (paths, texts, tuples) pass.

    Args:
        config: a dataclass whose fields are flags.
        names: of its fields; default: all.
    """
    hints = get_type_hints(type(config))
    for name in [field.name for field in fields(config)] if names is None else names:
        value, kind = getattr(config, name), hints[name]
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if value is None and type(None) in kinds:
            continue
        remedy = None
        if get_origin(kind) is Literal:
            if not isinstance(value, str) or value not in get_args(kind):
                remedy = " or ".join(get_args(kind))
        elif bool in kinds:
            remedy = None if isinstance(value, bool) else "True or False"
        elif int in kinds or float in kinds:
            is_whole = float not in kinds
            if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
                remedy = "a whole number" if is_whole else "a number"
        if remedy is not None:
            raise InputError(f"--{name.replace('_', '-')} {printable(repr(value))[:60]}: give {remedy}")


def check_numbers(config: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise InputError naming the flag of the first attribute outside its closed range, or no number; None passes.

    Args:
        config: a dataclass whose fields are flags.
        bounds: {field: (least, most)}.
    """
    check_types(config, bounds)
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # NaN too
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number from {least:g} to {most:g}")
