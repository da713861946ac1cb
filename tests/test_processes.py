"""Experiments side by side: what waits for what, what is kept of their output, failures and interruptions."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments.processes import LOG, Command, run_commands
from mmfusion.errors import InputError

ROOT = Path(__file__).parent.parent
# FOLDER SECONDS CODE: leaves the folder of a run, and its beginning and end
BODY = """
    import json, os, sys, time
    from pathlib import Path
    folder, seconds, code = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text("{}")
    print("arguments", *sys.argv[4:], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
    begun = time.time()
    time.sleep(seconds)
    (folder / "times.json").write_text(json.dumps([begun, time.time()]))
    if code:
        print("error: --flag 3: is wrong", file=sys.stderr)
        sys.exit(code)
    (folder / "results.json").write_text("{}")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(textwrap.dedent(BODY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name: str, seconds: float = 0.0, code: int = 0, after: str | None = None) -> Command:
    return Command(name, Path(name), "job", [name, str(seconds), str(code)], after or name)


def times(name: str) -> list[float]:
    return list(map(float, (Path(name) / "times.json").read_text().strip("[]").split(",")))


def test_commands_run_side_by_side_and_wait_for_what_they_need(here, capfd):
    run_commands([command("a", 1.0), command("b", after="a"), command("c", 1.0), command("d", after="gone")], 2)
    (a, b, c, d), said = map(times, "abcd"), capfd.readouterr().out.splitlines()
    assert a[0] < c[1] and c[0] < a[1], "two at once"
    assert b[0] >= a[1] and d[0] >= min(a[1], c[1]), "no more than two; what is done before is not waited for"
    assert len(said) == 4 and said[-1].startswith("[4/4] ") and said[-1].endswith("about 0 left")
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert (here / "a" / LOG).read_text() == f"arguments threads {threads}\n"


def test_one_that_was_begun_goes_on_and_one_that_had_not_begun_is_done_anew(here):
    for name in "ab":
        (here / name).mkdir()
        (here / name / LOG).write_text("before\n")
    (here / "a" / "run.json").write_text("{}")
    run_commands([command("a"), command("b")], 1)
    assert (here / "a" / LOG).read_text().startswith("before\narguments --resume ")
    assert (here / "b" / LOG).read_text().startswith("arguments threads ")


def test_a_failure_is_one_line_and_ends_the_others(here):
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^a stopped with exit code 2: --flag 3: is wrong; put that right,.*--resume"):
        run_commands([command("b", 60.0), command("a", 0.5, 2), command("c")], 2)
    assert time.monotonic() - begun < 20 and not (here / "b/results.json").exists() and not (here / "c").exists()
    assert "is wrong" in (here / "a" / LOG).read_text() and "arguments" in (here / "b" / LOG).read_text()


def test_an_interruption_leaves_no_process_behind(here):
    code = (
        "import sys; from pathlib import Path; from experiments.processes import Command, run_commands\n"
        "run_commands([Command('a', Path('a'), 'job', ['a', '60', '0'], 'a')], 1)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    while not (here / "a/run.json").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=30)
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists()
