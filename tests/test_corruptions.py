"""Corruptions in the units that they promise, and what they leave alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_memes import picture

from mmfusion.robustness.corruptions import (
    CUT_OFF,
    IMAGE_CORRUPTIONS,
    SEQUENCE_CORRUPTIONS,
    TEXT_CORRUPTIONS,
    add_noise,
    block_masks,
    corrupt_sequences,
    drop_coordinates,
    missing_masks,
    sequence_noise,
    text_drop,
    text_mask,
    text_shuffle,
    text_typos,
)
from mmfusion.robustness.synonyms import ARTICLES, GROUPS, SYNONYMS, text_synonyms
from mmfusion.sequences import Sequences, from_padded

corruption_property = settings(max_examples=40, deadline=None, derandomize=True)
texts = st.lists(st.text("abcdefgh?!é", min_size=1, max_size=8), min_size=1, max_size=12).map(" ".join)
severities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
seeds = st.integers(0, 999)


def corrupt(image: Image.Image, name: str, severity: float, seed: int = 0) -> np.ndarray:
    changed = IMAGE_CORRUPTIONS[name](image, severity, np.random.default_rng(seed))
    assert changed.size == image.size and changed.mode == image.mode == "RGB"
    return np.asarray(changed)


def grey(size: tuple[int, int] = (200, 160), level: int = 128) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


# ---- pictures --------------------------------------------------------------------------------------------------------


def speckled(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (5, 3)])
@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_picture_keeps_size_and_mode_and_is_unchanged_at_severity_zero(name, size):
    image = speckled(size)
    before = np.asarray(image).copy()
    unchanged = np.array_equal(corrupt(image, name, 0.0), before)
    assert unchanged == (name != "jpeg")  # JPEG has no quality without loss
    for severity in (0.25, 0.5, 0.75, 1.0):
        same = np.array_equal(corrupt(image, name, severity), before)
        assert not same or (name == "blur" and min(size) == 3)  # by .04 pixels at severity .25
    assert np.array_equal(np.asarray(image), before), "the caller's picture must not be written to"


@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_same_seed_gives_the_same_picture_and_seeds_differ_where_something_is_drawn(name):
    image = picture(1)
    assert np.array_equal(corrupt(image, name, 0.3, 5), corrupt(image, name, 0.3, 5))
    different = {corrupt(image, name, 0.3, seed).tobytes() for seed in range(8)}
    drawn = {"noise": 8, "rotation": 2, "blur": 1, "jpeg": 1, "contrast": 1}
    assert len(different) == drawn[name] if name in drawn else len(different) > 4


@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_more_severity_is_further_from_the_picture(name):
    image = picture(2, (90, 70))
    distance = [
        np.mean([np.abs(corrupt(image, name, s, seed).astype(float) - np.asarray(image)).mean() for seed in range(12)])
        for s in (0.1, 0.4, 1.0)
    ]
    assert distance[0] < distance[1] < distance[2]


@pytest.mark.parametrize("severity", [0.05, 0.2, 0.4])
def test_pixel_noise_has_the_stated_deviation_and_no_bias(severity):
    noise = corrupt(grey(), "noise", severity).astype(float) - 128
    sampling = 127.5 * severity / noise.size**0.5
    # beyond +-128 is cut: at .4, 2.5 deviations, that takes 3 % off the deviation
    assert noise.std() == pytest.approx(127.5 * severity, rel=0.04 if severity == 0.4 else 0.01)
    assert abs(noise.mean()) < 5 * sampling + (0.05 if severity == 0.4 else 0)  # the cut is not symmetric about 128


@pytest.mark.parametrize("size", [(100, 60), (33, 47)])
@pytest.mark.parametrize("severity", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_occlusion_covers_the_stated_share_in_one_rectangle_of_the_pictures_proportions(size, severity):
    white = Image.new("RGB", size, (255, 255, 255))
    places = set()
    for seed in range(10):
        covered = (corrupt(white, "occlusion", severity, seed) == 128).all(-1)
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert covered.sum() == height * width  # one full rectangle
        assert (width, height) == tuple(round(side * severity**0.5) for side in size)
        # each side is rounded to a pixel
        assert covered.mean() == pytest.approx(severity, abs=0.5 / size[0] + 0.5 / size[1] + 1e-3)
        places.add((rows[0], columns[0]))
    assert len(places) == 1 if severity == 1 else len(places) > 1


@pytest.mark.parametrize("severity", [0.25, 0.5, 1.0])
def test_contrast_shrinks_deviations_from_the_mean_grey(severity):
    image = picture(4)
    before, after = np.asarray(image).astype(float), corrupt(image, "contrast", severity).astype(float)
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    np.testing.assert_allclose(after, mean + (1 - severity) * (before - mean), atol=1)


def test_rotation_is_by_the_stated_angle_to_either_side_with_grey_corners():
    image = picture(5, (41, 41))
    turned = [corrupt(image, "rotation", 1.0, seed) for seed in range(12)]
    sides = [np.rot90(np.asarray(image), k) for k in (1, 3)]
    found = {k for x in turned for k in (0, 1) if np.abs(x.astype(int) - sides[k]).max() <= 1}
    assert found == {0, 1}
    assert (corrupt(image, "rotation", 0.5)[0, 0] == 128).all()


def test_blur_has_the_stated_deviation_in_pixels():
    image = grey((201, 101), 0)
    image.paste((255, 255, 255), (100, 0, 201, 101))  # an edge becomes the normal distribution's curve
    row = corrupt(image, "blur", 0.8)[50, :, 0].astype(float) / 255
    density, at = np.diff(row), np.arange(200)
    mean = (density * at).sum() / density.sum()
    std = ((density * (at - mean) ** 2).sum() / density.sum()) ** 0.5
    assert std == pytest.approx(0.05 * 0.8 * 101, rel=0.05)


@pytest.mark.parametrize("size", [(64, 48), (33, 21), (200, 5)])
@pytest.mark.parametrize("severity", [0.05, 0.2])
def test_high_frequency_noise_lies_above_the_cut_off_and_has_the_energy_of_pixel_noise(size, severity):
    noise = corrupt(grey(size), "high-frequency noise", severity).astype(float) - 128
    assert noise.std() == pytest.approx(127.5 * severity, rel=0.02)
    energy = np.zeros(2)
    for channel in np.moveaxis(noise, -1, 0):
        spectrum = np.abs(np.fft.fft2(channel)) ** 2
        for i, j in np.ndindex(spectrum.shape):
            y, x = (min(k, n - k) / n for k, n in zip((i, j), spectrum.shape, strict=True))
            energy[int(y * y + x * x > CUT_OFF**2)] += spectrum[i, j]
    # rounding to whole numbers has a twelfth of a level squared, at all frequencies
    assert energy[0] / energy.sum() < 1.2 / 12 / (127.5 * severity) ** 2
    channels = noise.reshape(-1, 3).T
    assert np.abs(np.corrcoef(channels)[np.triu_indices(3, 1)]).max() < 6 / channels.shape[1] ** 0.5
    ordinary = corrupt(grey(size), "noise", severity).astype(float) - 128
    low = np.abs(np.fft.fft2(ordinary[..., 0]))[0, 0:2].max()
    assert low > 10 * np.abs(np.fft.fft2(noise[..., 0]))[0, 0:2].max()  # else the test could not fail


def test_a_picture_of_one_pixel_has_no_high_frequencies():
    image = grey((1, 1))
    assert np.array_equal(corrupt(image, "high-frequency noise", 1.0), np.asarray(image))


# ---- texts -----------------------------------------------------------------------------------------------------------


@corruption_property
@given(texts, st.sampled_from(list(TEXT_CORRUPTIONS)), severities, seeds)
def test_text_is_never_empty_and_the_same_seed_gives_the_same_text(text, name, severity, seed):
    one, two = (TEXT_CORRUPTIONS[name](text, severity, np.random.default_rng(seed), "[MASK]") for _ in range(2))
    assert one == two and one.split()
    if severity == 0:
        assert one == text
    if name != "word drop":
        assert len(one.split()) == len(text.split())


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_white_space_alone_becomes_nothing_and_raises_nothing(name):
    assert TEXT_CORRUPTIONS[name](" \n ", 0.5, np.random.default_rng(0), "[MASK]") == ""


@corruption_property
@given(texts, severities, seeds)
def test_shuffle_keeps_the_words_and_moves_the_stated_share_at_most(text, severity, seed):
    shuffled = text_shuffle(text, severity, np.random.default_rng(seed), "").split()
    words = text.split()
    assert Counter(shuffled) == Counter(words)
    assert sum(a != b for a, b in zip(shuffled, words, strict=True)) <= round(severity * len(words))


@corruption_property
@given(texts, severities, seeds)
def test_drop_keeps_the_order_and_at_least_one_word(text, severity, seed):
    words = iter(text.split())
    kept = text_drop(text, severity, np.random.default_rng(seed), "").split()
    assert kept and all(word in words for word in kept)  # a subsequence: `in` consumes the iterator
    if severity == 1:
        assert kept == text.split()[:1]


LONG = " ".join(f"word{k}" for k in range(4000))


@pytest.mark.parametrize("severity", [0.1, 0.5, 0.75])
def test_words_are_hit_with_the_stated_probability(severity):
    rng = np.random.default_rng(0)
    error = 5 * (severity * (1 - severity) / 4000) ** 0.5
    masked = text_mask(LONG, severity, rng, "[MASK]").split()
    assert masked.count("[MASK]") / 4000 == pytest.approx(severity, abs=error)
    assert all(m in (w, "[MASK]") for m, w in zip(masked, LONG.split(), strict=True))
    assert len(text_drop(LONG, severity, rng, "").split()) / 4000 == pytest.approx(1 - severity, abs=error)
    changed = [a != b for a, b in zip(text_typos(LONG, severity, rng, "").split(), LONG.split(), strict=True)]
    # a letter swapped with its like (two equal digits), or replaced by itself, does not show
    assert 0.9 * severity - error < np.mean(changed) <= severity + error
    assert text_mask(LONG, 1.0, rng, "[MASK]") == " ".join(["[MASK]"] * 4000)


def distance(a: str, b: str) -> int:
    """Edits: insertion, deletion, substitution, and transposition of neighbours."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return int(table[-1, -1])


@corruption_property
@given(texts, seeds)
def test_typing_error_is_one_edit_of_a_word(text, seed):
    for before, after in zip(text.split(), text_typos(text, 1.0, np.random.default_rng(seed), "").split(), strict=True):
        assert distance(before, after) <= 1


def test_all_four_kinds_of_typing_error_occur():
    rng = np.random.default_rng(0)
    seen = text_typos(" ".join(["dear"] * 400), 1.0, rng, "").split()
    assert {"edar", "dar", "deear"} <= set(seen)  # swapped, left out, doubled
    assert any(len(w) == 4 and sorted(w) != sorted("dear") for w in seen)  # replaced


CAPTION = 'A big dog runs, "QUICKLY"; an old Man (and a child) jump over the lovely xyz rock.'


def bare(word: str) -> str:
    return word.strip('",;.()')


@pytest.mark.parametrize("severity", [0.0, 0.3, 0.5, 1.0])
def test_the_stated_share_of_replaceable_words_becomes_another_of_its_group(severity):
    words = CAPTION.split()
    known = [i for i, word in enumerate(words) if bare(word).lower() in SYNONYMS]
    counts = Counter()
    for seed in range(30):
        after = text_synonyms(CAPTION, severity, np.random.default_rng(seed), "").split()
        assert len(after) == len(words)
        changed = [i for i in known if after[i] != words[i]]
        assert len(changed) == round(severity * len(known))
        counts.update(changed)
        for i, (one, other) in enumerate(zip(words, after, strict=True)):
            if i in changed:
                assert bare(other).lower() in SYNONYMS[bare(one).lower()]
                assert one.replace(bare(one), "*") == other.replace(bare(other), "*")  # what stands around it
                assert (
                    bare(one).isupper() == bare(other).isupper() and bare(one)[0].isupper() == bare(other)[0].isupper()
                )
            elif bare(one).lower() not in ARTICLES:
                assert one == other
    assert set(counts) == (set(known) if severity else set())  # each has its turn


def test_an_article_goes_with_the_word_that_was_replaced():
    seen = {text_synonyms("A big boy, an old man", 1.0, np.random.default_rng(seed), "") for seed in range(60)}
    assert {tuple(text.split()[:2]) for text in seen} == {("A", "large"), ("A", "huge")}
    assert {tuple(text.split()[3:5]) for text in seen} == {("an", "aged"), ("an", "elderly")}
    turned = {text_synonyms("An error. AN IDEA; a fellow", 1.0, np.random.default_rng(seed), "") for seed in range(40)}
    assert {tuple(text.split()[:2]) for text in turned} == {("A", "mistake.")}
    assert {tuple(text.split()[2:4]) for text in turned} == {("A", "THOUGHT;"), ("A", "NOTION;")}


def test_lexicon_puts_every_word_into_one_group_of_two_or_more():
    words = GROUPS.split()
    assert len(words) == len(set(words)) == len(SYNONYMS) > 300
    assert all(len(group) > 1 and word in group for word, group in SYNONYMS.items())
    assert all(word.isalpha() and word.islower() for word in SYNONYMS)


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [-3.0, 0.0, 10.0, 20.0])
def test_noise_has_the_stated_ratio_in_decibels_channel_by_channel(snr):
    x = torch.randn(40_000, 3) * torch.tensor([0.1, 5.0, 0.0]) + torch.tensor([0.2, 0.0, 0.0])
    noise = sequence_noise(x, snr, np.random.default_rng(0)) - x
    ratio = 10 * torch.log10(x[:, :2].square().mean(0) / noise[:, :2].square().mean(0))
    assert ratio.numpy() == pytest.approx([snr, snr], abs=0.1)
    assert (noise[:, 2] == 0).all()
    assert torch.equal(sequence_noise(x, float("inf"), np.random.default_rng(0)), x)
    assert sequence_noise(torch.zeros(0, 3), snr, np.random.default_rng(0)).shape == (0, 3)


def runs_of(masked: np.ndarray) -> int:
    return int((np.diff(np.r_[0, masked.astype(int)]) == 1).sum())


@corruption_property
@given(st.integers(1, 30), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), seeds)
def test_masks_are_at_most_two_blocks_of_whole_steps_and_two_of_whole_channels(steps, width, time, channels, seed):
    masked = block_masks((steps, width), time, channels, np.random.default_rng(seed))
    rows, columns = masked.all(1), masked.all(0)
    if not rows.all() and not columns.all():
        assert np.array_equal(masked, rows[:, None] | columns)
        for along, share in ((rows, time), (columns, channels)):
            assert runs_of(along) <= 2 and abs(along.sum() - share * len(along)) < 1


def test_masks_cover_the_stated_share_everywhere_alike_and_blocks_vary():
    drawn = np.stack([block_masks((7, 5), 0.3, 0.5, np.random.default_rng(k)) for k in range(4000)])
    assert drawn.all(2).mean() == pytest.approx(0.3, abs=0.01) and drawn.all(1).mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.mean() == pytest.approx(1 - 0.7 * 0.5, abs=0.01)
    assert drawn.all(2).mean(0).min() > 0.15 and drawn.all(1).mean(0).min() > 0.3  # no place is spared
    assert {runs_of(one.all(0)) for one in drawn} == {0, 1, 2} or {runs_of(one.all(0)) for one in drawn} == {1, 2}


def sequences_of(lengths=(9, 0, 4, 1), width: int = 6) -> Sequences:
    return Sequences([torch.randn(n, width, generator=torch.Generator().manual_seed(n)) + 3 for n in lengths], width)


@pytest.mark.parametrize("name", SEQUENCE_CORRUPTIONS)
def test_sequences_keep_their_lengths_and_padding_changes_nothing(name):
    plain, neutral = sequences_of(), torch.full((6,), -7.0)
    changed = corrupt_sequences(plain, name, 0.6, neutral, 3)
    assert changed.lengths.tolist() == [9, 0, 4, 1] and changed.width == 6
    values, mask = plain.padded()
    padded = torch.cat([values, torch.full((4, 5, 6), 1e6)], 1)  # what stands in padding is no signal
    again = corrupt_sequences(from_padded(padded, torch.cat([mask, torch.zeros(4, 5)], 1)), name, 0.6, neutral, 3)
    assert all(torch.equal(x, y) for x, y in zip(changed, again, strict=True))
    assert not torch.equal(changed[0], plain[0])


@pytest.mark.parametrize("name", SEQUENCE_CORRUPTIONS)
def test_sequences_are_as_they_were_at_severity_zero_and_the_seed_decides_else(name):
    plain, neutral = Sequences([torch.randn(8, 6)] * 3), torch.zeros(6)
    assert all(torch.equal(x, y) for x, y in zip(corrupt_sequences(plain, name, 0.0, neutral, 3), plain, strict=True))
    one, two, other = (corrupt_sequences(plain, name, 0.5, neutral, seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])  # each example has its own
    with pytest.raises(ValueError, match="no corruption 'hiss' of sequences; known are noise, spectrogram dropout"):
        corrupt_sequences(plain, "hiss", 0.5, neutral, 3)


def test_severity_is_the_amplitude_of_noise_and_the_share_that_is_dropped():
    x, neutral = torch.randn(60, 50) + 4, torch.arange(50.0) + 100
    for severity in (0.25, 0.75, 1.0):
        many = Sequences([x] * 80)
        noise = torch.stack(list(corrupt_sequences(many, "noise", severity, neutral, 0))) - x
        assert (noise.square().mean() / x.square().mean()).sqrt() == pytest.approx(severity, rel=0.01)
        dropped = torch.stack(list(corrupt_sequences(many, "spectrogram dropout", severity, neutral, 0)))
        masked = dropped != x
        assert masked.float().mean() == pytest.approx(severity, abs=0.01)
        assert torch.equal(dropped[masked], neutral.expand_as(dropped)[masked])


# ---- features and latents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feature_noise_has_the_stated_deviation_of_each_coordinate(dtype):
    x, scale = torch.randn(20_000, 3, dtype=dtype), torch.tensor([0.5, 2.0, 0.0], dtype=dtype)
    changed = add_noise(x, 0.4, scale, np.random.default_rng(0))
    assert changed.dtype == dtype
    torch.testing.assert_close((changed - x).std(0), 0.4 * scale, rtol=0.03, atol=1e-6)
    assert ((changed - x).mean(0).abs() <= 5 * 0.4 * scale / 20_000**0.5 + 1e-7).all()
    assert torch.equal(add_noise(x, 0.0, scale, np.random.default_rng(0)), x)
    assert torch.equal(changed, add_noise(x, 0.4, scale, np.random.default_rng(0)))


@pytest.mark.parametrize("severity", [0.0, 0.3, 1.0])
def test_dropped_coordinates_become_neutral_and_the_others_stay(severity):
    x, neutral = torch.randn(10_000, 3), torch.tensor([5.0, -7.0, 11.0])
    changed = drop_coordinates(x, severity, neutral, np.random.default_rng(0))
    dropped = changed == neutral
    assert torch.equal(changed[~dropped], x[~dropped])
    assert dropped.float().mean(0).numpy() == pytest.approx([severity] * 3, abs=5 * 0.0046 if 0 < severity < 1 else 0)


# ---- missing modalities ----------------------------------------------------------------------------------------------


@corruption_property
@given(st.integers(1, 4), st.floats(0, 1), st.integers(0, 60), seeds, st.data())
def test_exactly_the_stated_number_of_examples_lacks_one_modality(modalities, rate, examples, seed, data):
    names = ["audio", "image", "text", "video"][:modalities]
    where = data.draw(st.sampled_from([*names, "either"]))
    masks = missing_masks(names, where, rate, examples, np.random.default_rng(seed))
    assert list(masks) == names and all(set(np.unique(mask)) <= {0, 1} for mask in masks.values())
    lacking = np.stack([1 - masks[name] for name in names])  # (M, N)
    assert lacking.max(initial=0) <= 1 and (lacking.sum(0) <= 1).all()
    assert lacking.sum() == round(rate * examples)
    if where == "either":  # equal parts, up to one example
        assert np.ptp(lacking.sum(1)) <= 1
    else:
        assert lacking.sum() == lacking[names.index(where)].sum()


def test_incomplete_examples_are_drawn_evenly_and_by_the_seed():
    counts = sum(1 - missing_masks(["a", "b"], "a", 0.3, 20, np.random.default_rng(k))["a"] for k in range(2000))
    assert np.abs(counts / 2000 - 0.3).max() < 5 * (0.21 / 2000) ** 0.5
    one, two, other = (missing_masks(["a", "b"], "either", 0.5, 40, np.random.default_rng(k)) for k in (1, 1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["a"], other["a"])


def test_of_one_seed_a_higher_rate_takes_more_away_and_gives_nothing_back():
    rates = (0.0, 0.25, 0.5, 0.75, 1.0)
    masks = [missing_masks(["a", "b"], "a", rate, 40, np.random.default_rng(0))["a"] for rate in rates]
    assert all((larger <= smaller).all() for smaller, larger in itertools.pairwise(masks))
    assert masks[0].all() and not masks[-1].any()


def test_unknown_modality_is_refused():
    with pytest.raises(ValueError, match=r"'audio' is neither 'either' nor one of \['image', 'text'\]"):
        missing_masks(["image", "text"], "audio", 0.5, 10, np.random.default_rng(0))
