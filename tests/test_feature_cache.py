"""What is in the cache is what was put there, or it is not there at all."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mmfusion.encoders import cache as feature_cache
from mmfusion.encoders.cache import FeatureCache, fingerprint
from mmfusion.errors import InputError

IDENTITY = {"encoder": {"model": "some"}, "compute": "float32"}


def _digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def _filled(root, count: int = 20) -> FeatureCache:
    cache = FeatureCache(root, "image", IDENTITY)
    cache.add(_digests(count), torch.randn(count, 7, generator=torch.Generator().manual_seed(0)))
    cache.flush()
    return cache


def test_vectors_survive_bit_for_bit(tmp_path):
    written = _filled(tmp_path)
    read = FeatureCache(tmp_path, "image", IDENTITY)
    assert list(read.vectors) == _digests(20)
    assert all(torch.equal(read.vectors[digest], written.vectors[digest]) for digest in written.vectors)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_found_said_and_made_again(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("cache")
    written = _filled(root)
    (shard,) = written.folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) * 8 - 1))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    shard.write_bytes(content)
    read = FeatureCache(root, "image", IDENTITY)
    assert not read.vectors and not shard.exists()
    _filled(root)
    assert len(FeatureCache(root, "image", IDENTITY).vectors) == 20


def test_damage_is_said_in_one_line(tmp_path, capsys):
    (shard,) = _filled(tmp_path).folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    FeatureCache(tmp_path, "image", IDENTITY)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(shard) in said and "damaged" in said


def test_each_encoder_has_a_folder_of_its_own(tmp_path):
    _filled(tmp_path)
    other = IDENTITY | {"compute": "bfloat16 autocast"}
    assert not FeatureCache(tmp_path, "image", other).vectors
    assert fingerprint(IDENTITY) == fingerprint(dict(reversed(IDENTITY.items())))


@pytest.mark.parametrize("limit", ["items", "seconds"])
def test_shards_are_written_on_the_way(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(feature_cache, f"SHARD_{limit.upper()}", 8 if limit == "items" else 0)
    cache = FeatureCache(tmp_path, "text", IDENTITY)
    cache.add(_digests(8), torch.zeros(8, 3))
    assert len(list(cache.folder.glob("*.safetensors"))) == 1  # a kill from here on loses none of the eight


def test_first_value_of_an_item_stays(tmp_path):
    """A batch is encoded whole where one item is missing; the others must keep the value they were used with."""
    cache = _filled(tmp_path)
    before = cache.vectors[_digests(1)[0]].clone()
    cache.add(_digests(21), torch.zeros(21, 7))
    assert torch.equal(cache.vectors[_digests(1)[0]], before) and _digests(21)[20] in cache


def test_no_partial_file_is_left(tmp_path):
    cache = _filled(tmp_path)
    assert all(path.suffix in {".safetensors", ".json"} for path in cache.folder.iterdir())


def test_vectors_travel_alone_and_not_with_their_shard(tmp_path):
    digests = [f"{number:064x}" for number in range(100)]
    features = torch.randn(100, 64)
    cache = FeatureCache(tmp_path, "image", {"a": 1})
    cache.add(digests, features)
    cache.flush()
    for vectors in (cache.vectors, FeatureCache(tmp_path, "image", {"a": 1}).vectors):
        assert all(vector.untyped_storage().nbytes() == 64 * 4 for vector in vectors.values())


def test_features_that_are_not_finite_do_not_fill_the_cache(tmp_path):
    cache = FeatureCache(tmp_path, "image", {"a": 1})
    with pytest.raises(InputError, match="not finite"):
        cache.add(["0" * 64], torch.tensor([[1.0, float("nan")]]))
    assert "0" * 64 not in cache


def _put(folder: Path, content: bytes) -> Path:
    """A shard under the name that its content has a right to."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    path.write_bytes(content)
    return path


DIGESTS, FEATURES = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 7)
FOREIGN = {
    "no safetensors": (b"garbage", "not safetensors"),
    "nothing": (b"", "not safetensors"),
    "other keys": (save({"weights": FEATURES}), "other tensors"),
    "other digests": (save({"digests": DIGESTS.float(), "features": FEATURES}), "digests are not"),
    "short digests": (save({"digests": DIGESTS[:, :31].clone(), "features": FEATURES}), "digests are not"),
    "whole numbers": (save({"digests": DIGESTS, "features": FEATURES.long()}), "features are not"),
    "half precision": (save({"digests": DIGESTS, "features": FEATURES.bfloat16()}), "features are not"),
    "one vector": (save({"digests": DIGESTS, "features": FEATURES[0].clone()}), "features are not"),
    "no numbers": (save({"digests": DIGESTS, "features": FEATURES[:, :0].clone()}), "features are not"),
    "other count": (save({"digests": DIGESTS, "features": FEATURES[:1].clone()}), "2 digests for 1 vectors"),
    "not a number": (save({"digests": DIGESTS, "features": FEATURES + float("nan")}), "not finite"),
    "other width": (save({"digests": DIGESTS, "features": torch.zeros(2, 6)}), "vectors of 6 numbers, most have 7"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_shard_is_removed_with_one_line_even_under_its_own_hash(tmp_path, capsys, name):
    content, reason = FOREIGN[name]
    path = _put(_filled(tmp_path).folder, content)
    read = FeatureCache(tmp_path, "image", IDENTITY)
    assert list(read.vectors) == _digests(20) and not path.exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(path) in said and reason in said


def test_damage_in_a_cache_that_may_only_be_read_is_ignored(tmp_path, capsys, monkeypatch):
    path = _put(_filled(tmp_path).folder, b"garbage")

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(FeatureCache(tmp_path, "image", IDENTITY).vectors) == 20
    assert f"{path}: damaged cache file ignored" in capsys.readouterr().out


def test_a_shard_that_may_not_be_read_is_ignored_and_made_again(tmp_path, capsys, monkeypatch):
    (shard,) = _filled(tmp_path).folder.glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may read everything
        with pytest.raises(InputError, match=r"encoder\.json: cannot be read \(Permission denied\)"):
            FeatureCache(tmp_path, "image", IDENTITY)
        patch.setattr(os, "access", lambda path, _: path.suffix == ".json")
        assert not FeatureCache(tmp_path, "image", IDENTITY).vectors
        assert f"{shard}: cache file ignored (Permission denied)" in capsys.readouterr().out
        _filled(tmp_path)
    assert len(FeatureCache(tmp_path, "image", IDENTITY).vectors) == 20


def test_shards_that_are_no_files_neither_hang_nor_raise(tmp_path, capsys):
    folder = _filled(tmp_path).folder
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    (folder / "dangling.safetensors").symlink_to("gone")
    assert len(FeatureCache(tmp_path, "image", IDENTITY).vectors) == 20
    assert capsys.readouterr().out.count("cache file ignored") == 3


@pytest.mark.parametrize("name", ["0.safetensors", "encoder.json"])
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    folder = _filled(tmp_path).folder
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: .*(is a folder|Is a directory).*; remove"):
        FeatureCache(tmp_path, "image", IDENTITY)


def test_a_cache_full_of_foreign_vectors_is_one_line(tmp_path):
    cache = _filled(tmp_path)
    with pytest.raises(InputError, match="holds vectors of 7 numbers and this encoder gives 8; remove"):
        cache.add(["f" * 64], torch.zeros(1, 8))
