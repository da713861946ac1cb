"""Errors that a user can put right; importing this module imports nothing else."""


class InputError(Exception):
    """Bad input: the message is one line that names the file, line or flag and the remedy.

    Command lines print it on stderr and exit with code 2, without a traceback.
    """


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names term, member, step and remedy."""


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
