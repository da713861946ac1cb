"""The data sets of the study: where each is found, how it is read, and which experiments are asked of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OF_A_RUN = ("robustness", "uncertainty")  # they measure a run of experiments.baselines, which was trained before
LABELLED = (
    "baselines",
    "rank_ablation",
    "jwae_ablation",
    "modality_dropout",
    "modality_balance",
    "weak_modalities",
    "rank_semantics",
    "robustness",
    "rank_robustness",
    "latent_linearity",
    "uncertainty",
)


@dataclass(frozen=True)
class Corpus:
    """A data set of the study: where it is found, how it is read, and what is asked of it."""

    patterns: tuple[str, ...]
    """of its file; the first that fits is taken"""
    asked: tuple[str, ...]
    """experiments"""
    dataset: str | None = None
    """name in the registry; default: its own"""
    flags: tuple[str, ...] = ()
    """of its loader"""
    own_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """further ones, by experiment"""
    encodes_text: bool = False
    """takes --text-encoder"""
    encodes_images: bool = False
    """takes --image-encoder"""
    hidden_dim: int | None = None
    """narrower than the recipe's, where features are so wide that nothing else would be computed for half an hour"""
    is_split: bool = False
    """it has a test part that others report on: it is not cut anew"""


CORPORA = {
    "demo": Corpus((), (*LABELLED, "temporal", "wma", "alignment"), hidden_dim=64),
    "cmu_mosi": Corpus(
        ("cmu_mosi*.npz", "mosi*.npz", "*mosi*.pkl", "aligned_50.pkl", "unaligned_50.pkl"), LABELLED, encodes_text=True
    ),
    "mustard": Corpus(
        ("sarcasm_data.json", "*sarcasm_data.json"),
        (*LABELLED, "alignment"),
        encodes_text=True,
    ),
    # 17 targets with a variance each: the other four of LABELLED would take an hour of it alone
    "pom": Corpus(
        ("pom*.npz",),
        (
            "baselines",
            "rank_ablation",
            "jwae_ablation",
            "modality_dropout",
            "weak_modalities",
            "robustness",
            "uncertainty",
            "temporal",
            "wma",
            "alignment",
        ),
    ),
    "mmmo": Corpus(("mmmo*.npz",), (*LABELLED, "temporal")),
    "photo_tweets": Corpus(("photo_tweets*.npz",), LABELLED, "arrays", hidden_dim=64),
    "digits": Corpus(
        ("mfeat_digits*.npz",),
        ("alignment", "modality_count"),
        "arrays",
        ("--target", "digit", "--hold-out", "0.5"),
        {"alignment": ("--modalities", "fou", "kar")},
    ),
    "clip": Corpus(
        ("clip_coco_pairs*.npz",),
        ("alignment",),
        "pairs",
        ("--modalities", "image", "text"),
        {"alignment": ("--identity", "--width", "512", "--rate", "1e-4")},
    ),
    "cells": Corpus(
        ("snareseq*.npz",), ("alignment",), "pairs", ("--modalities", "chromatin", "expression", "--folds", "2")
    ),
    "hateful_memes": Corpus(
        ("train.jsonl", "*/train.jsonl"),
        # without labels on test, dev is tested on, and nothing is left to calibrate on
        (*(name for name in LABELLED if name != "uncertainty"), "temporal", "wma"),
        encodes_text=True,
        encodes_images=True,
        is_split=True,
    ),
}
