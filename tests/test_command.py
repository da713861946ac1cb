"""A command that is interrupted keeps what it has and leaves at once; what it prints, a terminal shows and survives."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_memes import write_bert, write_memes

from mmfusion.cli import run_command
from mmfusion.errors import InputError, printable


@dataclass(frozen=True)
class _Empty:
    """A command without flags."""


ROOT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from mmfusion.cli import run_command
from mmfusion.distributed import end_process

@dataclass(frozen=True)
class Config:
    "A command."

folder = Path(sys.argv[1])
"""

EXTRACTION = """
from hateful_memes_loader import load_hateful_memes
from mmfusion.encoders import extract, frozen
from small_memes import small_encoders

extract.BATCH_CPU = 2
calls = 0
encode = frozen.ImageEncoder.__call__

def slow(self, pixels):
    global calls
    if len(pixels) > 1:  # one picture is the trial at the start
        calls += 1
        if calls > 6:
            time.sleep(1)  # the six before are done by now
            print("slow", flush=True)
            time.sleep(60)
    return encode(self, pixels)

frozen.ImageEncoder.__call__ = slow

def main(_):
    load_hateful_memes(folder, None, small_encoders(folder / "bert"), folder / "cache", workers=2)
"""

TRAINING = """
import torch

def main(_):
    print("slow", flush=True)
    weight = torch.ones(50, 50, requires_grad=True)
    while True:
        (weight @ weight).sum().backward()
"""


def _start(folder: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body) + "\nend_process(run_command(main, Config, []))\n", "utf-8")
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env=os.environ | paths | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # a shell starts what runs in its background with interrupts ignored, and children inherit it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _interrupt(process: subprocess.Popen[str], number: int) -> tuple[float, str]:
    """Send a signal once the process says that it is slow: seconds until it has left, and what it wrote on stderr."""
    while (line := process.stdout.readline()) and "slow" not in line:
        pass
    sent = time.monotonic()
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    return time.monotonic() - sent, errors


SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@SIGNALS
def test_interrupted_extraction_keeps_every_finished_batch_and_leaves_at_once(tmp_path, number, code):
    write_bert(tmp_path / "bert")
    write_memes(tmp_path)
    process = _start(tmp_path, EXTRACTION)
    seconds, errors = _interrupt(process, number)
    assert process.returncode == code, errors
    assert errors.splitlines()[-1].startswith("interrupted; what is encoded is kept") and "Traceback" not in errors
    assert seconds < 3
    shards = list((tmp_path / "cache").glob("image-*/*.safetensors"))
    assert sum(len(load_file(shard)["digests"]) for shard in shards) == 12  # six batches of two
    assert not list((tmp_path / "cache").glob("*/.*tmp"))


def test_an_interruption_ends_the_process_even_where_a_killed_decoder_makes_torch_raise(tmp_path):
    write_bert(tmp_path / "bert")
    write_memes(tmp_path)
    waits = """
        from multiprocessing.process import BaseProcess

        kill = BaseProcess.kill
        BaseProcess.kill = lambda child: (kill(child), time.sleep(0.5))  # torch hears of it before the process has left
    """
    process = _start(tmp_path, textwrap.dedent(waits) + EXTRACTION)
    seconds, errors = _interrupt(process, signal.SIGINT)
    assert process.returncode == 130 and "Traceback" not in errors and seconds < 5


@SIGNALS
def test_interrupted_training_says_the_same_words(tmp_path, number, code):
    process = _start(tmp_path, TRAINING)
    seconds, errors = _interrupt(process, number)
    assert process.returncode == code and seconds < 3
    assert errors == "interrupted; what is encoded is kept, and a run that has begun goes on with --resume\n"


def test_an_interrupted_command_puts_handlers_back_and_leaves_alone_what_others_had_begun():
    # in a process of its own, which an error here would end
    code = textwrap.dedent("""
        import multiprocessing, os, signal, threading, time
        from dataclasses import dataclass
        from mmfusion.cli import run_command

        @dataclass(frozen=True)
        class Empty:
            pass

        go_on = threading.Event()
        threading.Thread(target=go_on.wait).start()
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]
        code = run_command(lambda _: (os.kill(os.getpid(), signal.SIGTERM), sum(range(10**6))), Empty, [])
        print(code, [signal.getsignal(number) for number in numbers] == before, child.is_alive())
        go_on.set()
        child.kill()
    """)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["143", "True", "True"], done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("img/\x1b[2J\x07.png", r"img/\x1b[2J\x07.png"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("Käse, 日本 🎉 \\n", "Käse, 日本 🎉 \\n"),
    ],
)
def test_what_is_printed_is_shown_and_not_obeyed(text, shown, capsys):
    assert printable(text) == shown

    def refuse(_: object) -> None:
        raise InputError(f"{text}: no such file")

    with pytest.raises(SystemExit) as stop:
        run_command(refuse, _Empty, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {shown}: no such file\n"


def test_a_terminal_that_knows_ascii_alone_gets_every_line(tmp_path):
    body = r"""
    from mmfusion.errors import InputError
    def main(_):
        print("Käse \udcff")
        print("日本", file=sys.stderr)
        raise InputError("Käse \ud800: no such file")
    """
    process = _start(tmp_path, body, PYTHONIOENCODING="ascii")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == "K\\xe4se \\udcff\n"
    assert errors == "\\u65e5\\u672c\nerror: K\\xe4se \\ud800: no such file\n"
