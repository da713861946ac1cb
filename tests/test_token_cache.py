"""Tokens in the cache: what was encoded to half precision, read from disk when looked at, or not there at all."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from small_memes import small_encoders, write_bert, write_memes, write_rows

from hateful_memes_loader import load_hateful_memes
from mmfusion.distributed import Processes
from mmfusion.encoders import cache as feature_cache
from mmfusion.encoders import extract as feature_extraction
from mmfusion.encoders.cache import FeatureCache, StoredTokens
from mmfusion.encoders.extract import encode_text_groups
from mmfusion.encoders.frozen import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    find_image_encoder,
    find_text_encoder,
    token_identity,
)
from mmfusion.encoders.tokens import ImageTokenEncoder, TextTokenEncoder
from mmfusion.errors import InputError
from mmfusion.sequences import Sequences

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = token_identity({"encoder": {"model": "some"}, "pooling": "mean", "compute": "float32"})
COUNT, WIDTH = 20, 7


def _digests(count: int = COUNT) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def _tokens(count: int = COUNT) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1 + number % 5, WIDTH, generator=generator) for number in range(count)]


def _filled(root: Path, count: int = COUNT) -> FeatureCache:
    cache = FeatureCache(root, "image", IDENTITY)
    cache.add(_digests(count), _tokens(count))
    cache.flush()
    return cache


def _open(root: Path) -> FeatureCache:
    return FeatureCache(root, "image", IDENTITY)


def _put(folder: Path, content: bytes) -> Path:
    """A shard under the name that its content has a right to."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    path.write_bytes(content)
    return path


# ---- what was put in -------------------------------------------------------------------------------------------------


def test_tokens_come_back_bit_for_bit_in_half_precision(tmp_path):
    written = _filled(tmp_path)
    for cache in (written, _open(tmp_path)):
        assert list(cache.vectors) == _digests()
        assert all(isinstance(x, StoredTokens) for x in cache.vectors.values()), "none is kept in memory"
        for given_tokens, found in zip(_tokens(), Sequences(list(cache.vectors.values())), strict=True):
            assert found.dtype == torch.float16 and torch.equal(found, given_tokens.half())


def test_what_is_not_yet_on_disk_can_be_read_too(tmp_path):
    cache = _open(tmp_path)
    cache.add(_digests(3), _tokens(3))
    before = Sequences([cache.vectors[digest] for digest in _digests(3)])
    cache.flush()
    after = Sequences([cache.vectors[digest] for digest in _digests(3)])
    assert before.lengths.tolist() == after.lengths.tolist() == [1, 2, 3]
    torch.testing.assert_close(before.padded().values, after.padded().values, rtol=0, atol=0)


@pytest.mark.parametrize("limit", ["SHARD_ITEMS", "SHARD_SECONDS", "PENDING_BYTES"])
def test_shards_are_written_on_the_way(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(feature_cache, limit, {"SHARD_ITEMS": 8, "SHARD_SECONDS": 0, "PENDING_BYTES": 100}[limit])
    cache = _open(tmp_path)
    cache.add(_digests(8), _tokens(8))
    assert len(_open(tmp_path).vectors) == 8  # a kill from here on loses none of the eight


def test_first_value_of_an_item_stays(tmp_path):
    cache = _filled(tmp_path)
    cache.add(_digests(21), [torch.zeros(2, WIDTH)] * 21)
    assert torch.equal(cache.vectors[_digests()[0]].read(), _tokens()[0].half()) and _digests(21)[20] in cache


def test_a_cache_of_vectors_is_none_of_tokens(tmp_path):
    vectors = FeatureCache(tmp_path, "image", {"encoder": {"model": "some"}, "compute": "float32"})
    vectors.add(_digests(), torch.zeros(COUNT, WIDTH))
    vectors.flush()
    tokens = _filled(tmp_path)
    assert tokens.folder != vectors.folder and "tokens" in tokens.folder.name
    (shard,), (other,) = vectors.folder.glob("*.safetensors"), tokens.folder.glob("*.safetensors")
    _put(tokens.folder, shard.read_bytes())  # nor where their shards are mixed up
    _put(vectors.folder, other.read_bytes())
    assert all(isinstance(x, StoredTokens) for x in _open(tmp_path).vectors.values())
    again = FeatureCache(tmp_path, "image", {"encoder": {"model": "some"}, "compute": "float32"})
    assert [x.ndim for x in again.vectors.values()] == [1] * COUNT
    assert token_identity({"pooling": "cls", "a": 1}) == token_identity({"pooling": "mean", "a": 1})


# ---- damage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_found_said_and_made_again(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("cache")
    (shard,) = _filled(root).folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) * 8 - 1))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    shard.write_bytes(content)
    assert not _open(root).vectors and not shard.exists()
    _filled(root)
    assert len(_open(root).vectors) == COUNT


DIGESTS = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
LENGTHS, FEATURES = torch.tensor([1, 2]), torch.zeros(3, WIDTH, dtype=torch.float16)
HUGE = 2**63 - 1
LENGTH_WORDS = "lengths are not n positive numbers"


def _shard(digests=DIGESTS, lengths=LENGTHS, features=FEATURES, **further: torch.Tensor) -> bytes:
    return save({"digests": digests, "lengths": lengths, "features": features, **further})


FOREIGN = {
    "no safetensors": (b"garbage", "not safetensors"),
    "nothing": (b"", "not safetensors"),
    "other keys": (save({"weights": FEATURES}), "other tensors"),
    "vectors": (save({"digests": DIGESTS, "features": FEATURES[:2].float()}), "other tensors"),
    "one key too many": (_shard(more=FEATURES.clone()), "other tensors"),
    "other digests": (_shard(DIGESTS.float()), "digests are not"),
    "short digests": (_shard(DIGESTS[:, :31].clone()), "digests are not"),
    "the same digest twice": (_shard(torch.zeros_like(DIGESTS)), "digests that occur twice"),
    "whole numbers": (_shard(features=FEATURES.long()), "features are not"),
    "single precision": (_shard(features=FEATURES.float()), "features are not"),
    "another half precision": (_shard(features=FEATURES.bfloat16()), "features are not"),
    "one token": (_shard(features=FEATURES[0].clone()), "features are not"),
    "no numbers": (_shard(features=FEATURES[:, :0].clone()), "features are not"),
    "no tokens": (_shard(features=FEATURES[:0].clone()), "features are not"),
    "not a number": (_shard(features=FEATURES + float("nan")), "not finite"),
    "infinite": (_shard(features=FEATURES + float("inf")), "not finite"),
    "other count": (_shard(lengths=torch.tensor([1, 1, 1])), LENGTH_WORDS),
    "lengths in a table": (_shard(lengths=LENGTHS[None]), LENGTH_WORDS),
    "lengths of another type": (_shard(lengths=LENGTHS.int()), LENGTH_WORDS),
    "lengths in fractions": (_shard(lengths=torch.tensor([1.5, 1.5], dtype=torch.double)), LENGTH_WORDS),
    "length 0": (_shard(lengths=torch.tensor([0, 3])), LENGTH_WORDS),
    "negative length": (_shard(lengths=torch.tensor([-1, 4])), LENGTH_WORDS),
    "too short": (_shard(lengths=torch.tensor([1, 1])), "lengths that do not sum to its 3 tokens"),
    "too long": (_shard(lengths=torch.tensor([2, 2])), "lengths that do not sum to its 3 tokens"),
    "huge lengths": (_shard(lengths=torch.tensor([HUGE, HUGE])), "lengths that do not sum to its 3 tokens"),
    "other width": (_shard(features=FEATURES[:, :6].clone()), "vectors of 6 numbers, most have 7"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_shard_is_removed_with_one_line_even_under_its_own_hash(tmp_path, capsys, name):
    content, reason = FOREIGN[name]
    path = _put(_filled(tmp_path).folder, content)
    assert list(_open(tmp_path).vectors) == _digests() and not path.exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(path) in said and reason in said


def test_lengths_whose_sum_wraps_around_are_no_lengths(tmp_path, capsys):
    # 2 * (2^63 - 1) + 2 + 3 = 2^64 + 3: the sum of int64 is 3
    lengths = torch.tensor([HUGE, HUGE, 2, 3])
    assert int(lengths.sum()) == 3
    digests = torch.arange(128, dtype=torch.uint8).reshape(4, 32)
    path = _put(_filled(tmp_path).folder, _shard(digests, lengths))
    assert list(_open(tmp_path).vectors) == _digests() and not path.exists()
    assert "lengths that do not sum" in capsys.readouterr().out


def test_a_good_shard_of_another_hand_is_read(tmp_path):
    """Else the table of foreign ones would show nothing."""
    _put(_filled(tmp_path).folder, _shard())
    assert len(_open(tmp_path).vectors) == COUNT + 2


def test_shards_that_are_no_files_neither_hang_nor_raise(tmp_path, capsys):
    folder = _filled(tmp_path).folder
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    (folder / "dangling.safetensors").symlink_to("gone")
    assert len(_open(tmp_path).vectors) == COUNT
    assert capsys.readouterr().out.count("cache file ignored") == 3


def test_a_folder_in_the_place_of_a_shard_is_one_line(tmp_path):
    (_filled(tmp_path).folder / "0.safetensors").mkdir()
    with pytest.raises(InputError, match=r"0\.safetensors: is a folder in the place of a cache file; remove it"):
        _open(tmp_path)


def test_a_shard_beyond_what_is_read_is_ignored(tmp_path, capsys, monkeypatch):
    _filled(tmp_path)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 100)
    assert not _open(tmp_path).vectors
    assert "cache file ignored (has " in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["gone", "cut"])
def test_a_shard_that_is_spoiled_after_it_was_checked_is_one_line_and_no_signal(tmp_path, spoil):
    cache = _filled(tmp_path)
    (shard,) = cache.folder.glob("*.safetensors")
    features = Sequences(list(cache.vectors.values()))
    if spoil == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:200])
    words = "cannot be read any more" if spoil == "gone" else "has been cut short"
    with pytest.raises(InputError, match=words) as caught:
        features.padded()
    assert str(shard) in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_cache_that_may_only_be_read_is_of_use(tmp_path, monkeypatch):
    config = EncoderConfig(text_encoder=f"random:{write_bert(tmp_path / 'bert')}")
    groups = {"train": ["a dog", "cat"]}
    before, _ = encode_text_groups(groups, tmp_path / "cache", config, Processes(), progress=False, tokens=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    for where, name in ((feature_cache, "write_atomically"), (feature_cache, "write_json"), (FileLock, "acquire")):
        monkeypatch.setattr(where, name, refuse)
    after, _ = encode_text_groups(groups, tmp_path / "cache", config, Processes(), progress=False, tokens=True)
    assert all(torch.equal(a, b) for a, b in zip(before["train"], after["train"], strict=True))


def test_damage_in_a_cache_that_may_only_be_read_is_ignored(tmp_path, capsys, monkeypatch):
    path = _put(_filled(tmp_path).folder, _shard(lengths=torch.tensor([0, 3])))

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(_open(tmp_path).vectors) == COUNT
    assert f"{path}: damaged cache file ignored" in capsys.readouterr().out


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [70_000.0, -1e30, float("nan"), float("inf")])
def test_tokens_beyond_half_precision_do_not_fill_the_cache(tmp_path, value):
    cache, good = _open(tmp_path), torch.zeros(1, WIDTH)
    with pytest.raises(InputError, match=r"not finite in half precision, which ends at 65504; use another"):
        cache.add(_digests(2), [good, torch.tensor([[value] + [0.0] * (WIDTH - 1)])])
    assert not cache.vectors
    cache.flush()
    assert not _open(tmp_path).vectors
    cache.add(_digests(1), [torch.full((1, WIDTH), 65504.0)])  # the last of them is one
    assert cache.vectors[_digests(1)[0]].isfinite().all()


def test_an_encoder_of_large_numbers_gives_vectors_and_no_tokens(tmp_path):
    from transformers import AutoModel, BertConfig

    folder = write_bert(tmp_path / "bert")
    model = AutoModel.from_config(BertConfig.from_pretrained(folder))
    model.encoder.layer[-1].output.LayerNorm.weight.data.fill_(1e6)
    model.save_pretrained(folder)
    config, groups = EncoderConfig(text_encoder=str(folder)), {"train": ["a dog"]}
    vectors, _ = encode_text_groups(groups, tmp_path / "cache", config, Processes(), progress=False)
    assert vectors["train"].isfinite().all() and vectors["train"].abs().max() > 65504
    with pytest.raises(InputError, match="not finite in half precision"):
        encode_text_groups(groups, tmp_path / "cache", config, Processes(), progress=False, tokens=True)


# ---- what the encoders' tokens are -----------------------------------------------------------------------------------


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _of_images(name: object, kind: type = ImageTokenEncoder, size: int | None = None) -> ImageEncoder:
    config = EncoderConfig(image_encoder=str(name), image_size=size)
    return kind(config, find_image_encoder(config), "cpu")


def _of_texts(folder: Path, kind: type = TextTokenEncoder) -> TextEncoder:
    config = EncoderConfig(text_encoder=str(folder))
    return kind(config, find_text_encoder(config), "cpu")


def _normalised(encoder: ImageEncoder, pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - encoder.mean) / encoder.std


def _assert_half_of(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Half precision has 11 bits: 2^-11 of the value, and of what was summed on the way to a small one."""
    assert found.dtype == torch.float16 and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2**-10, atol=2**-11)


def test_cells_of_resnet50_average_to_its_pooled_vector():
    tokens = _of_images("random:resnet50", size=64)(PIXELS)
    pooled = _of_images("random:resnet50", ImageEncoder, size=64)(PIXELS)
    assert [tuple(x.shape) for x in tokens] == [(4, 2048)] * 3
    for cells, vector in zip(tokens, pooled, strict=True):
        bound = 2**-11 * cells.float().abs().mean(0) + 2**-25  # of the mean of four rounded values
        assert ((cells.float().mean(0) - vector).abs() <= 1.1 * bound + 1e-6).all()
        assert (cells[0] != cells[3]).any(), "cells, and not four times the mean"


def test_cells_of_resnet50_are_in_the_order_of_rows():
    """A picture black on its right: the left cells of both rows are as in the whole one, far more than the right."""
    encoder = _of_images("random:resnet50", size=224)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    right = pixels.copy()
    right[:, :, 112:] = 0
    change = (encoder(pixels)[0].float() - encoder(right)[0].float()).norm(dim=1).reshape(7, 7)
    below = pixels.copy()
    below[:, 112:] = 0
    change_below = (encoder(pixels)[0].float() - encoder(below)[0].float()).norm(dim=1).reshape(7, 7)
    assert change[:, 5:].mean() > 2 * change[:, :2].mean() and change_below[5:].mean() > 2 * change_below[:2].mean()


def test_vit_gives_its_patches_without_the_class_token(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**SMALL, image_size=64, patch_size=16)).save_pretrained(tmp_path)
    encoder = _of_images(tmp_path)
    tokens = encoder(PIXELS)
    with torch.inference_mode():
        hidden = ViTModel.from_pretrained(tmp_path).eval()(_normalised(encoder, PIXELS)).last_hidden_state
    assert hidden.shape[1] == 17
    for found, expected in zip(tokens, hidden, strict=True):
        _assert_half_of(found, expected[1:])


def test_clip_gives_its_patches_and_its_words(tmp_path):
    from test_frozen_encoders import _save_clip
    from transformers import CLIPModel

    encoder = _of_images(_save_clip(tmp_path))
    pixels = PIXELS[:, :30, :30].copy()
    tokens = encoder(pixels)
    with torch.inference_mode():
        model = CLIPModel.from_pretrained(tmp_path).eval()
        hidden = model.vision_model(_normalised(encoder, pixels)).last_hidden_state
    assert hidden.shape[1] == 10
    for found, expected in zip(tokens, hidden, strict=True):
        _assert_half_of(found, expected[1:])


def test_convolutional_model_gives_its_cells_row_by_row(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path)
    encoder = _of_images(tmp_path, size=64)
    tokens = encoder(PIXELS)
    with torch.inference_mode():
        maps = ResNetModel.from_pretrained(tmp_path).eval()(_normalised(encoder, PIXELS)).last_hidden_state
    for found, expected in zip(tokens, maps, strict=True):
        _assert_half_of(found, expected.permute(1, 2, 0).reshape(-1, 16))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_models_give_their_patches_or_cells(tmp_path, name):
    pytest.importorskip("timm", reason="needs timm, the extra [timm]")
    from test_timm_encoder import PIXELS as pixels
    from test_timm_encoder import save_as_hub

    model = save_as_hub(tmp_path, name)
    encoder = _of_images(tmp_path)
    tokens = encoder(pixels)
    with torch.inference_mode():
        hidden = model.forward_features(_normalised(encoder, pixels))
    if name == "test_vit":
        expected = hidden[:, model.num_prefix_tokens :]
        assert model.num_prefix_tokens == 1
    else:
        expected = hidden.flatten(2).transpose(1, 2)
    for found, own in zip(tokens, expected, strict=True):
        _assert_half_of(found, own)


def test_words_of_bert_are_its_tokens_without_the_special_ones(tmp_path):
    folder = write_bert(tmp_path)
    encoder = _of_texts(f"random:{folder}")
    texts = ["", "dog", "people love the big red house on the hill"]
    together = encoder(encoder.tokenize(texts))
    assert [len(words) for words in together] == [1, 1, 9]
    for text, words in zip(texts, together, strict=True):
        ids = torch.tensor(encoder.tokenize([text]))
        with torch.inference_mode():
            hidden = encoder.model(input_ids=ids).last_hidden_state[0]  # [CLS], the words, [SEP]
        assert encoder.tokenizer.convert_ids_to_tokens([ids[0, 0], ids[0, -1]]) == ["[CLS]", "[SEP]"]
        _assert_half_of(words, hidden[1:-1] if text else hidden[:1])


# ---- through the loader ----------------------------------------------------------------------------------------------


PREAMBLE = """
import os, signal, sys
from pathlib import Path
from hateful_memes_loader import load_hateful_memes
from small_memes import small_encoders
folder = Path(sys.argv[1])
def load(cache="cache", **options):
    encoders = small_encoders(folder / "bert", image_size=64)
    return load_hateful_memes(folder, None, encoders, folder / cache, progress=False, tokens=True, **options)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    write_bert(tmp_path / "bert")
    write_memes(tmp_path)
    return tmp_path


def _load(folder: Path, cache: str = "cache", **options: object):
    encoders = small_encoders(folder / "bert", image_size=64)
    options = {"progress": False, "tokens": True} | options
    return load_hateful_memes(folder, None, encoders, folder / cache, **options)


def _python(folder: Path, body: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run a script against `folder` in a process (or under a launcher) of its own."""
    script = folder / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, *launcher, str(script), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _assert_same_tokens(a, b) -> None:
    for name, split in a.splits.items():
        for modality, x in split.features.items():
            y = b.splits[name].features[modality]
            assert x.lengths.tolist() == y.lengths.tolist()
            assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True)), (name, modality)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Pictures that each call of the image encoder takes."""
    calls: list[int] = []
    encode = feature_extraction.ImageTokenEncoder.__call__
    monkeypatch.setattr(
        feature_extraction.ImageTokenEncoder,
        "__call__",
        lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels),
    )
    return calls


def test_memes_are_cells_and_words_and_one_picture_is_kept_once(folder, counted):
    copy = folder / "img" / "00001.png"
    copy.write_bytes((folder / "img" / "00000.png").read_bytes())  # two captions, one picture
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["text"] = rows[2]["text"]
    write_rows(folder / "train.jsonl", rows)
    dataset = _load(folder)
    assert sum(counted) == 34 + 1  # and one blank picture that shows that the encoder takes pictures
    image, text = (dataset.splits["train"].features[name] for name in ("image", "text"))
    assert image.parts[0] is image.parts[1] and text.parts[2] is text.parts[3]
    assert image.parts[0] is not image.parts[2]
    assert image.shape == (22, 4, 2048) and text.shape[2] == 32
    assert text.lengths.tolist() == [len(row["text"].split()) for row in rows]
    assert dataset.provenance["encoders"]["image"]["tokens"] == "float16"
    counted.clear()
    _assert_same_tokens(dataset, _load(folder))
    assert not counted


def test_tokens_and_vectors_of_the_same_memes_lie_side_by_side(folder):
    vectors, tokens = _load(folder, tokens=False), _load(folder)
    for name, split in tokens.splits.items():
        pooled = split.features["image"].pooled()
        torch.testing.assert_close(pooled, vectors.splits[name].features["image"], rtol=1e-2, atol=1e-3)
    assert len(list((folder / "cache").iterdir())) == 4
    _assert_same_tokens(tokens, _load(folder))
    assert isinstance(_load(folder, tokens=False).splits["train"].features["image"], torch.Tensor)


def test_killed_run_goes_on_where_it_stopped(folder, counted):
    killed = _python(
        folder,
        """
        from mmfusion.encoders import cache as feature_cache, tokens
        feature_cache.PENDING_BYTES = 200_000  # of a batch of 16 pictures
        batches = 0
        encode = tokens.ImageTokenEncoder.__call__
        def encode_and_die(self, pixels):
            global batches
            batches += 1
            if batches == 4:  # the first is the blank picture that shows that the encoder takes pictures
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, pixels)
        tokens.ImageTokenEncoder.__call__ = encode_and_die
        from mmfusion import distributed as torchrun_processes
        torchrun_processes.Processes.cores = 1  # one batch after the other
        load()
        """,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = _load(folder)
    assert 1 < sum(counted) < 35  # some batches, but not those whose shards were there
    _assert_same_tokens(_load(folder, "fresh"), resumed)


def test_what_was_encoded_before_ctrl_c_is_kept(folder, monkeypatch, counted):
    encode, calls = TextTokenEncoder.__call__, []

    def encode_and_stop(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 3:  # the first is the empty text that shows that the encoder takes texts
            raise KeyboardInterrupt
        return encode(self, tokens)

    monkeypatch.setattr(feature_extraction.Processes, "cores", 1)
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenEncoder, "__call__", encode_and_stop)
        with pytest.raises(KeyboardInterrupt):
            _load(folder)
    assert sum(counted) == 36
    kept = sum(len(load_file(path)["lengths"]) for path in (folder / "cache").glob("text-tokens-*/*.safetensors"))
    assert kept == calls[1] == 16
    counted.clear()
    _assert_same_tokens(_load(folder), _load(folder, "fresh", workers=0))
    assert sum(counted) == 36, "of the fresh one alone: all pictures had been encoded"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_have_the_tokens_of_one(folder):
    """With one cache folder for both, and with one each, as on nodes that share none: on disk, never in memory."""
    body = """
    from mmfusion.distributed import end_process, join_processes, leave_processes
    from mmfusion.encoders.cache import StoredTokens
    from safetensors.torch import save_file
    processes = join_processes()
    for cache in ("shared", f"own{processes.rank}"):
        dataset = load(cache)
        sequences = {f"{name} {modality}": x for name, split in dataset.splits.items()
                     for modality, x in split.features.items()}
        tensors = {f"{key} {i}": own.clone() for key, x in sequences.items() for i, own in enumerate(x)}
        save_file(tensors, folder / f"{cache}-{processes.rank}.safetensors")
        stored = [part for x in sequences.values() for part in x.parts]
        assert all(isinstance(part, StoredTokens) for part in stored), "in memory"
        assert {part.path.parents[1].name for part in stored} == {cache}
    leave_processes()
    end_process(0)
    """
    alone = _load(folder, "alone")
    run = _python(folder, body, *TORCHRUN)
    assert run.returncode == 0, run.stderr
    for written in ("shared-0", "shared-1", "own0-0", "own1-1"):
        found = load_file(folder / f"{written}.safetensors")
        for name, split in alone.splits.items():
            for modality, x in split.features.items():
                for i, expected in enumerate(x):
                    assert torch.equal(found[f"{name} {modality} {i}"], expected), (written, name, modality, i)
    assert all(list(path.glob("*.safetensors")) for path in folder.glob("own*/*-tokens-*"))
