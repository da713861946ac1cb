"""Errors that a user can put right; importing this module imports nothing else."""


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


def check_numbers(config: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise InputError naming the flag of the first attribute that lies outside its closed range; None passes.

    Args:
        config: a dataclass whose fields are flags.
        bounds: {field: (least, most)}.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # NaN too
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number from {least:g} to {most:g}")
