"""Files exist whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfusion.errors import InputError
from mmfusion.files import (
    check_regular_file,
    in_units,
    read_regular_file,
    write_atomically,
    write_json,
    write_safetensors,
    write_text,
)


def full(path: Path) -> None:
    path.write_text("half of the")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_is_one_line_and_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(InputError, match=r"results\.json: cannot be written \(No space left on device\)") as error:
        write_atomically(path, full)
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "a.txt", "text")


def test_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "runs/demo/a.txt", "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to stand for a full disk")
def test_safetensors_onto_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self: None)
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(100_000)})


def test_interruption_leaves_no_partial_file(tmp_path):
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "sub/folder/a.json", {"a": [1, 2.5, "ä"]})
    assert json.loads((tmp_path / "sub/folder/a.json").read_text()) == {"a": [1, 2.5, "ä"]}
    write_safetensors(tmp_path / "a.safetensors", {"t": torch.arange(6).view(2, 3).T}, {"k": "v"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], torch.arange(6).view(2, 3).T)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()


def test_only_regular_files_of_bearable_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    reasons = {
        "fifo": "not a regular file",
        "endless": "not a regular file",
        "dangling": "a link to nowhere, which does not exist",
        "large": "5 bytes, more than the 4 bytes",
        "folder": "Is a directory",
        "missing": "no such file",
        "zero\0byte": "no name that a file can have",
        "half a pair \ud800": "no name that a file can have",
    }
    for name, reason in reasons.items():
        for read in (check_regular_file, read_regular_file):
            with pytest.raises(InputError, match=f"--flag .*{name[:4]}.*: cannot be read .*{reason}.*; give another"):
                read(tmp_path / name, 4, "give another", "--flag")


def test_links_to_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "link", 4) == b"1234"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, whose files say that they are empty")
def test_a_file_that_hides_its_size_is_not_read_without_bound():
    with pytest.raises(InputError, match="more than 9 bytes"):
        read_regular_file(Path("/proc/self/status"), 9)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_one_line(tmp_path):
    (tmp_path / "a").touch(0)
    with pytest.raises(InputError, match="Permission denied"):
        check_regular_file(tmp_path / "a", 4)


def test_sizes_are_said_in_units():
    assert [in_units(n) for n in (12, 1_234, 12_345, 34 << 30)] == ["12 bytes", "1.2 kB", "12 kB", "37 GB"]


def test_safetensors_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
