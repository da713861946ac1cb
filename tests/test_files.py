"""Files exist whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfusion.errors import InputError
from mmfusion.files import write_atomically, write_json, write_safetensors, write_text


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
