"""Extraction over interruptions, caches and processes gives the same bits; a warm cache needs no model library."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_memes import small_encoders, write_bert, write_memes

from hateful_memes_loader import load_hateful_memes
from mmfusion.encoders import extract as feature_extraction
from mmfusion.encoders.extract import encode_texts
from mmfusion.encoders.frozen import TextEncoder

ROOT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import os, signal, sys
from pathlib import Path
from hateful_memes_loader import load_hateful_memes
from small_memes import small_encoders
folder = Path(sys.argv[1])
def load(cache="cache", **options):
    encoders = small_encoders(folder / "bert")
    return load_hateful_memes(folder, None, encoders, folder / cache, progress=False, **options)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    write_bert(tmp_path / "bert")
    write_memes(tmp_path)
    return tmp_path


def _python(folder: Path, body: str, *launcher: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script against `folder` in a process (or under a launcher) of its own."""
    script = folder / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, *launcher, str(script), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def _load(folder: Path, cache: str = "cache", **options: object):
    encoders = small_encoders(folder / "bert")
    return load_hateful_memes(folder, None, encoders, folder / cache, progress=False, **options)


def _assert_same_bits(a, b) -> None:
    for name, split in a.splits.items():
        for modality, features in split.features.items():
            assert torch.equal(features, b.splits[name].features[modality]), (name, modality)


def test_warm_cache_imports_no_model_library(folder):
    body = """
    load()
    print(sorted({"transformers", "torchvision", "tokenizers"} & set(sys.modules)))
    """
    cold, warm = _python(folder, body), _python(folder, body)
    assert "transformers" in cold.stdout, cold.stderr
    assert warm.stdout.strip() == "[]", warm.stderr


def test_killed_run_goes_on_where_it_stopped(folder, monkeypatch):
    killed = _python(
        folder,
        """
        from mmfusion.encoders import cache as feature_cache, frozen as frozen_encoders
        feature_cache.SHARD_ITEMS = 8
        batches = 0
        encode = frozen_encoders.ImageEncoder.__call__
        def encode_and_die(self, pixels):
            global batches
            batches += 1
            if batches == 4:  # the first is the blank picture that shows that the encoder takes pictures
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, pixels)
        frozen_encoders.ImageEncoder.__call__ = encode_and_die
        from mmfusion import distributed as torchrun_processes
        torchrun_processes.Processes.cores = 1  # one batch after the other
        load()
        """,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    encoded = []
    encode = feature_extraction.ImageEncoder.__call__
    monkeypatch.setattr(
        feature_extraction.ImageEncoder,
        "__call__",
        lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels),
    )
    resumed = _load(folder)
    assert 1 < sum(encoded) < 35  # some batches, but not those whose shards were there
    _assert_same_bits(_load(folder, "fresh"), resumed)


def test_number_of_workers_and_cores_changes_no_bit(folder, monkeypatch):
    expected = _load(folder, "a", workers=0)
    _assert_same_bits(expected, _load(folder, "b", workers=2))
    monkeypatch.setattr(feature_extraction.Processes, "cores", 1)
    _assert_same_bits(expected, _load(folder, "c"))
    monkeypatch.setattr(feature_extraction.Processes, "cores", 5)
    _assert_same_bits(expected, _load(folder, "d"))


def test_thread_count_of_the_caller_is_left_alone(folder):
    before = torch.get_num_threads()
    _load(folder)
    assert torch.get_num_threads() == before


def test_each_distinct_image_and_text_is_encoded_once(folder, monkeypatch):
    copy = folder / "img" / "00001.png"
    copy.write_bytes((folder / "img" / "00000.png").read_bytes())
    images, texts = [], []
    encode = feature_extraction.ImageEncoder.__call__
    monkeypatch.setattr(
        feature_extraction.ImageEncoder,
        "__call__",
        lambda self, pixels: images.append(len(pixels)) or encode(self, pixels),
    )
    encode_text = TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, tokens: texts.append(tokens) or encode_text(self, tokens))
    dataset = _load(folder)
    assert sum(images) == 34 + 1  # and one blank picture that shows that the encoder takes pictures
    assert torch.equal(*dataset.splits["train"].features["image"][:2])
    # sorted by length: no batch holds a text shorter than one in a batch before
    bounds = sorted((min(map(len, batch)), max(map(len, batch))) for batch in texts)
    assert all(low >= high for (_, high), (low, _) in itertools.pairwise(bounds)) and len(bounds) > 2
    images.clear()
    _load(folder)
    assert not images


def test_item_added_later_leaves_the_cached_ones_as_they_were(folder):
    before = _load(folder)
    write_memes(folder, {"train": 22, "dev": 8, "test": 7})
    after = _load(folder)
    assert len(after.splits["test"]) == 7
    for name in ("train", "dev"):
        assert torch.equal(before.splits[name].features["image"], after.splits[name].features["image"])


def test_no_text_is_no_work(folder):
    assert encode_texts({}, {}, None, None, feature_extraction.Processes()) is None


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_give_the_bits_of_one(folder):
    """With one cache folder for both, and with one each, as on nodes that share none."""
    body = """
    from mmfusion.distributed import end_process, join_processes, leave_processes
    from safetensors.torch import save_file
    processes = join_processes()
    for cache in ("shared", f"own{processes.rank}"):
        dataset = load(cache)
        features = {f"{name} {modality}": x for name, split in dataset.splits.items()
                    for modality, x in split.features.items()}
        save_file(features, folder / f"{cache}-{processes.rank}.safetensors")
    leave_processes()
    end_process(0)
    """
    alone = _load(folder, "alone")
    run = _python(folder, body, *TORCHRUN)
    assert run.returncode == 0, run.stderr
    for written in ("shared-0", "shared-1", "own0-0", "own1-1"):
        features = load_file(folder / f"{written}.safetensors")
        for name, split in alone.splits.items():
            for modality, expected in split.features.items():
                assert torch.equal(features[f"{name} {modality}"], expected), (written, name, modality)
    shards = [len(list(path.glob("*.safetensors"))) for path in folder.glob("own*/*")]
    assert len(shards) == 4 and all(shards)  # each process wrote a share of its own


@pytest.mark.parametrize("case", ["bad image", "one rank alone"])
def test_error_in_one_process_ends_all_with_code_2_and_one_line(folder, case):
    if case == "bad image":
        path = folder / "img" / "00003.png"
        path.write_bytes(path.read_bytes()[:-300])
    body = f"""
    from mmfusion.errors import InputError
    from mmfusion.distributed import join_processes
    import hateful_memes_loader
    processes = join_processes()
    if {case!r} == "one rank alone" and processes.rank == 1:
        def fail(*arguments):
            raise InputError("cannot be used: only rank 1 sees it")
        hateful_memes_loader.find_annotations = fail
    try:
        load()
    except InputError as error:
        processes.stop(error)
    """
    run = _python(folder, body, *TORCHRUN)
    lines = [line for line in run.stderr.splitlines() if "cannot be used" in line]
    assert len(lines) == 1 and not lines[0].startswith(" "), run.stderr
    assert "exitcode  : 2" in run.stderr and "Traceback" not in run.stderr.split("cannot be used")[0]


def test_of_two_runs_at_once_one_encodes_and_the_other_waits_for_it(folder, tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from hateful_memes_loader import load_hateful_memes
        from mmfusion.encoders import frozen
        from small_memes import small_encoders

        slow = frozen.ImageEncoder.__call__
        def counted(self, pixels):
            if len(pixels) > 1:
                print("encoded", len(pixels), flush=True)
                time.sleep(0.5)
            return slow(self, pixels)
        frozen.ImageEncoder.__call__ = counted
        folder, cache = map(Path, sys.argv[1:])
        encoders = small_encoders(folder / "bert")
        load_hateful_memes(folder / "train.jsonl", None, encoders, cache, workers=0, progress=False)
    """)
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    encoded = [sum(int(line.split()[1]) for line in out.splitlines() if line.startswith("encoded")) for out in outputs]
    assert sorted(map(bool, encoded)) == [False, True], outputs
