"""Steps of audio and video, corrupted before they are pooled into what a trained run takes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.robustness.corrupted_inputs import _digest, _pool, corruptions_of, encode_corrupted, stepped
from mmfusion.data.folds import fold_datasets
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.robustness.corruptions import SEQUENCE_CORRUPTIONS
from mmfusion.runs.settings import settings_of
from mmfusion.sequences import Sequences

COUNTS = {"train": 12, "dev": 5, "test": 7}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """20 steps, of which the first ones are padding."""
    rng, found = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        for name, width in (("audio", 4), ("video", 3)):
            x = rng.normal(2, 1, (count, 20, width)).astype(np.float32)
            x[np.arange(20) < rng.integers(0, 15, count)[:, None]] = 0
            found[f"{name}_{split}"] = x
        found[f"label_{split}"] = (rng.integers(2, 11, count) / 2).astype(np.float32)
    return found


def run_on(options: DataOptions) -> SimpleNamespace:
    """What of a trained run is looked at: its settings, its data, no memes, no texts."""
    datasets = load_datasets(options)
    data, texts = fold_datasets(datasets), lambda dataset, split: {}
    settings = settings_of(options)
    return SimpleNamespace(settings=settings, folder=Path(), datasets=datasets, data=data, memes=None, texts=texts)


def write(folder: Path, arrays: dict[str, np.ndarray]) -> DataOptions:
    np.savez(folder / "mmmo.npz", **arrays)
    return DataOptions("mmmo", folder / "mmmo.npz")


@pytest.mark.parametrize("name", SEQUENCE_CORRUPTIONS)
def test_corrupted_steps_are_pooled_as_the_run_pools_them(tmp_path, arrays, name):
    run = run_on(write(tmp_path, arrays))
    assert corruptions_of(run) == {"audio": ["noise", "spectrogram dropout"], "video": ["noise", "spectrogram dropout"]}
    keys = [("audio", name, 0.5, 0), ("audio", name, 0.5, 1), ("video", name, 0.75, 0), ("audio", name, 0.0, 0)]
    found, test = encode_corrupted(run, keys), run.datasets[0].splits["test"]
    for key in keys:
        modality, _, severity, _ = key
        steps = [x[(x != 0).any(1)] for x in arrays[f"{modality}_test"]]
        neutral = np.mean([x[(x != 0).any(1)].mean(0) for x in arrays[f"{modality}_train"]], 0)
        seed = int(_digest(" ".join(test.ids), key)[:16], 16)
        for row, x in enumerate(steps):
            change, rng = SEQUENCE_CORRUPTIONS[name], np.random.default_rng([seed, row])
            changed = change(torch.from_numpy(x), severity, torch.from_numpy(neutral), rng).numpy()
            expected = np.r_[changed.mean(0), changed.std(0)]
            np.testing.assert_allclose(found[key][row], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[keys[0]], found[keys[1]])
    torch.testing.assert_close(found[keys[3]], test.features["audio"], rtol=1e-4, atol=1e-5)


def test_steps_that_do_not_pool_to_the_runs_vectors_are_not_offered(tmp_path, arrays):
    options = write(tmp_path, arrays)
    run = run_on(options)
    arrays["video_test"][3] += 0.1
    write(tmp_path, arrays)
    assert list(corruptions_of(run)) == ["audio"]
    assert stepped(SimpleNamespace(settings={"dataset": "arrays"})) == ([], [])


def test_a_step_that_was_set_to_zero_counts_in_the_mean():
    sequences = Sequences([torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.zeros(0, 2)])
    assert _pool(sequences, 4).tolist() == [[1, 2, 1, 2], [0, 0, 0, 0]] and _pool(sequences, 2).tolist()[0] == [1, 2]
