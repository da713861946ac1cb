"""POM (Park et al., 2014): how 17 traits of a movie reviewer were rated, from audio and video, in 20 aligned steps.

    dataset = load_pom(Path("pom_audio_video.npz"))
    dataset.splits["train"].target.shape  # (600, 17), in 1 .. 7

The names of the traits are not recorded in the release.
"""

from pathlib import Path

from mmfusion.data.aligned_steps import Manner, Release, load_release
from mmfusion.dataset import Dataset

TRAITS = tuple(f"trait_{number}" for number in range(1, 18))
# one released mean of raters is 2/3
RELEASE = Release("pom", "traits", (1.0, 7.0), TRAITS, slack=1.0)


def load_pom(path: Path, pooling: Manner = "mean") -> Dataset:
    """Splits train, dev and test; target (N, 17) from the file's traits_*; as `aligned_steps.load_release`."""
    return load_release(path, RELEASE, pooling)
