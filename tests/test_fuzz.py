"""A small share of `python -m tests.fuzz`: mutated files are read, or refused with one line."""

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_mutated_files_are_read_or_refused_with_one_line(name):
    outcomes, failures = fuzz.run(name, fuzz.KINDS[name].cases // 20)
    assert not failures, failures[0][1]
    assert outcomes["read"] and outcomes["refused"]
