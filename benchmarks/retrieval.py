"""Time and memory of retrieval scores: 25,000 captions and 5,000 images, as of COCO's test set, 512 dimensions.

    python -m benchmarks.retrieval

Each image has five captions, which are noisy copies of it. Both directions are scored; the peak is that of the whole
process (imports and embeddings included), in GB of 10^9 bytes.
"""

import argparse
import resource
import sys
import time

import numpy as np
import torch

from mmfusion.metrics.retrieval import cross_retrieval, retrieval_scores


def peak() -> float:
    """Most memory ever resident in this process, in GB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--noise", type=float, default=10.0, help="standard deviation; that of an image is 1")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    images = rng.standard_normal((options.images, options.width), dtype=np.float32)
    labels = {"image": np.arange(options.images), "text": np.repeat(np.arange(options.images), options.captions)}
    noise = rng.standard_normal((len(labels["text"]), options.width), dtype=np.float32)
    latents = {"image": images, "text": images[labels["text"]] + options.noise * noise}
    del noise

    print(f"numpy {np.__version__}, {torch.get_num_threads()} threads; {options.images} images, {options.captions} "
          f"captions each, width {options.width}; {peak():.2f} GB before")  # fmt: skip
    for queries, gallery in (("text", "image"), ("image", "text")):
        start = time.perf_counter()
        scores = retrieval_scores(latents[queries], latents[gallery], labels[queries], labels[gallery])
        seconds = time.perf_counter() - start
        recall = "  ".join(f"R@{k} {value:.4f}" for k, value in scores.recall.items())
        print(
            f"{queries:>5} -> {gallery:5}  n {scores.queries:6}  {recall}  median rank {scores.median_rank:g}  "
            f"mAP {scores.mean_average_precision:.4f}  {seconds:5.1f} s  peak {peak():.2f} GB"
        )
    collapsed = cross_retrieval({name: np.ones((len(x), 1)) for name, x in latents.items()}, labels)
    for (queries, gallery), scores in collapsed.items():
        print(f"{queries:>5} -> {gallery:5}  all vectors equal, that is chance: R@1 {scores.recall[1]:.6f}")


if __name__ == "__main__":
    main()
