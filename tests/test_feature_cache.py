"""What is in the cache is what was put there, or it is not there at all."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
