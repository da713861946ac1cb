"""ICT-MMMO (Woellmer et al., 2013): how a reviewer of a movie likes it, from audio and video, in 20 aligned steps.

    dataset = load_mmmo(Path("mmmo_sequences.npz"), "steps")
    dataset.splits["train"].features["audio"][0].shape  # (19, 74): the steps that are not all zero

Audio holds 255 and -255 where nothing was measured; such values are missing.
"""

from pathlib import Path

from mmfusion.data.aligned_steps import Manner, Release, load_release
from mmfusion.dataset import Dataset

RELEASE = Release("mmmo", "label", (1.0, 5.0), unmeasured=(("audio", (-255.0, 255.0)),))


def load_mmmo(path: Path, pooling: Manner = "mean") -> Dataset:
    """Splits train, dev and test; target (N,) from the file's label_*; as `aligned_steps.load_release`."""
    return load_release(path, RELEASE, pooling)
