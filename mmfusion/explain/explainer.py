"""Explainer: a trained run with its data and encoders, applied to a new meme, named examples or a split."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Dataset, Split, take
from mmfusion.encoders.images import decode_rgb, reason_unreadable
from mmfusion.errors import InputError
from mmfusion.explain.account import (
    Examples,
    Explanation,
    Maps,
    account_for,
    account_for_margins,
    latent_radii,
    margin_weights,
)
from mmfusion.explain.ranks import RankAccount, RankComponents, join_rank_accounts
from mmfusion.explain.saliency import Box, RegionMap, region_map, seen_box, word_map
from mmfusion.explain.summary import Summary, summarise
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.tasks import probabilities
from mmfusion.models.fusion import FusionModel
from mmfusion.models.heads import ConcatenationHead
from mmfusion.runs.encode import RunEncoders
from mmfusion.runs.load import TrainedRun

Place = tuple[str, int]  # split, row


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which of a run's models explain, and what of it is shown; flags of `python -m mmfusion.explain`."""

    rank: int | None = None
    """map this canonical component (two modalities) or rank of --seed, from 1; default: the mean over seeds"""
    seed: int | None = None
    """the seed whose rank terms are shown; default: the run's first"""
    output: int = 0
    """which output of a regression with several, from 0"""
    fold: int = 0
    """which fold's models and splits, from 0 (MUStARD)"""
    neighbours: int = 3
    """training examples shown for each rank"""
    maps: bool = False
    """on the page too: which regions and words feed each prediction (runs the encoders)"""


class Explainer:
    """A run's members of one fold, with what its explanations are measured against."""

    def __init__(self, run: TrainedRun, choices: Choices, device: str) -> None:
        """Raises InputError naming the flag of a choice that the run does not offer."""
        self.run, self.choices, self.encoders = run, choices, RunEncoders(run, device)
        if choices.fold >= len(run.datasets):
            raise InputError(f"--fold {choices.fold}: this run has folds 0 to {len(run.datasets) - 1}")
        if choices.maps and run.encoders is None:
            raise InputError(f"--maps: {run.folder} has no encoders, its features came from a file; leave it out")
        self.dataset: Dataset = run.datasets[choices.fold]
        self.train: Split = self.dataset.splits["train"]
        self.members: list[FusionModel] = run.members(run.main_row, choices.fold)
        self.seeds = run.seeds
        if choices.seed is not None and choices.seed not in self.seeds:
            raise InputError(f"--seed {choices.seed}: this run's seeds are {', '.join(map(str, self.seeds))}")
        self.seed = self.seeds[0] if choices.seed is None else choices.seed
        outputs = len(self.members[0].rescale.std)
        if choices.output >= outputs:
            raise InputError(f"--output {choices.output}: this run's outputs are 0 to {outputs - 1}")
        self.output = output_name(self.dataset, choices.output)
        self.own = self.members[self.seeds.index(self.seed)]
        """the member whose rank terms are shown"""
        self.ranks = RankComponents(self.own, self.train.features, choices.output)
        if run.task == "multiclass" and (choices.output or choices.rank is not None or choices.maps):
            raise InputError(
                "--output, --rank, --maps: choose between two classes or values; this run has more classes"
            )
        if choices.rank is not None and choices.rank > self.ranks.rank:
            raise InputError(f"--rank {choices.rank}: this run has ranks 1 to {self.ranks.rank}")

    # ---- what is explained

    def meme(self, image: Path, text: str) -> Explanation:
        """One meme that need not be of the run's data, with its maps."""
        if self.encoders.lacking is not None:
            raise InputError(f"--image {image}: {self.encoders.lacking}; give --ids or --split")
        features = self.encoders.encode([image], [text], flag="--image ")
        examples = Examples([str(image)], {"text": [text]}, [None], {str(image): image})
        return self.explain(features, examples, [None], maps=True)

    def known_split(self, name: str) -> str:
        """The name of a split that is there and has examples."""
        return known_split(self.dataset.splits, name, self.dataset.name)

    def named(self, ids: Sequence[str]) -> list[Place]:
        """(split, row) of each id; of an id in several splits, in the first of them."""
        return named(self.dataset.splits, ids, self.dataset.name)

    def rows(self, name: str, worst: int | None) -> list[Place]:
        """A whole split, or the `worst` of it: those with the largest loss of the mean over members, worst first."""
        split = self.dataset.splits[name]
        order = range(len(split))
        if worst is not None:
            if split.target is None:
                raise InputError(
                    f"--worst: {name} has no labels to be wrong about; leave it out, or name another split"
                )
            losses = self.losses(split)
            order = np.argsort(-losses, kind="stable")[:worst].tolist()
        return [(name, row) for row in order]

    def losses(self, split: Split) -> np.ndarray:
        """(N,) loss of the mean over members, of a labelled split."""
        if self.run.task == "multiclass":
            chances = self.predict(split.features).mean(0).double()  # (N, C)
            return -chances.gather(1, split.target.long()[:, None])[:, 0].log().numpy()
        account = account_for(self.members, split.features, self.train.features, self.choices.output)
        target = split.target.reshape(len(split), -1)[:, self.choices.output].double().numpy()
        return account.losses(target, self.run.task)

    @torch.inference_mode()
    def predict(self, features: Mapping[str, Tensor]) -> Tensor:
        """(S, N, C) probabilities of this fold's members."""
        joint = self.run.task == "multiclass"
        outputs = [member(features, reconstruct=False, joint=joint) for member in self.members]
        logits = torch.stack([moderated_logits(x.prediction, x.covariance, self.run.task) for x in outputs])
        return probabilities(logits, self.run.task)

    def explain_places(self, places: Sequence[Place]) -> Explanation:
        """Examples of the run's own data, from their cached features."""
        features = {
            name: torch.stack([self.dataset.splits[split].features[name][row] for split, row in places])
            for name in self.train.features
        }
        parts = [self.examples(split, [row]) for split, row in places]
        examples = Examples(
            [key for part in parts for key in part.ids],
            {name: [text for part in parts for text in part.texts[name]] for name in parts[0].texts},
            [target for part in parts for target in part.targets],
            {key: path for part in parts for key, path in part.pictures.items()},
        )
        rows = {key: row for row, key in enumerate(self.train.ids)}
        # ids may begin anew in every split: an example is its own row of train only where it comes from there
        own = [rows[key] if split == "train" else None for key, (split, _) in zip(examples.ids, places, strict=True)]
        return self.explain(features, examples, own, self.choices.maps)

    def summary(self, name: str, baselines: bool = False) -> Summary:
        """What each modality contributes on one split; with `baselines`, scores and EMAP of concatenation beside."""
        others = {
            row: self.run.members(row, self.choices.fold)
            for row, ensemble in self.run.ensembles.items()
            if isinstance(ensemble.members[0].fusion, ConcatenationHead)
        }
        label = self.class_names[1] if self.run.task == "multilabel" else ""
        kinds = {"multiclass": "margin (likeliest class less the runner-up)", "multilabel": f"logit of {label}"}
        return summarise(
            self.members,
            self.dataset.splits[name],
            name if len(self.run.datasets) == 1 else f"{name} of fold {self.choices.fold}",
            self.run.task,
            self.choices.output,
            kinds.get(self.run.task, self.output),
            others if baselines else None,
            self.notes(name),
            label,
        )

    def notes(self, split: str | None = None) -> list[str]:
        """What the data set's own notes say, and whether the models have seen the labels of `split`."""
        notes = list(self.dataset.notes)
        if split in ("train", self.dataset.selection):
            seen = "trained on" if split == "train" or self.run.trained_on_dev else "selected upon"
            notes.append(f"{split} is {seen}: its scores are optimistic")
        return notes

    def explain(
        self, features: Mapping[str, Tensor], examples: Examples, own_rows: Sequence[int | None], maps: bool
    ) -> Explanation:
        """Account for raw features (N, d_m); `own_rows` (N,) are their own rows of train, if any."""
        chances = None
        if self.run.task == "multiclass":
            predicted = self.predict(features)
            account = account_for_margins(self.members, features, self.train.features, predicted.mean(0))
            account = replace(account, radius=latent_radii(self.members, features, self.run.task))  # to any class
            ranks = self.ranks_of_margins(features, margin_weights(predicted.mean(0)), own_rows)
            chances = predicted.double().numpy()
        else:
            account = account_for(self.members, features, self.train.features, self.choices.output)
            ranks = self.ranks.account(features, self.choices.neighbours, own_rows)
        kind = "component" if ranks.canonical else "rank"
        mapped = f"the {self.output}"
        if self.choices.rank is not None:
            mapped = f"{kind} {self.choices.rank} of seed {self.seed}"
        mappings: list[Maps | None] = [None] * len(examples)
        if maps:
            mappings = [
                self.map({name: x[i : i + 1] for name, x in features.items()}, examples, i)
                for i in range(len(examples))
            ]
        return Explanation(
            run=str(self.run.folder),
            row=self.run.main_row,
            task="binary" if self.run.task == "multilabel" else self.run.task,
            output=self.output,
            seeds=self.seeds,
            seed=self.seed,
            mapped=mapped,
            examples=examples,
            train=self.examples("train", range(len(self.train))),
            account=account,
            ranks=ranks,
            maps=mappings,
            class_names=self.class_names,
            chances=chances,
            notes=self.notes(),
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """In words: the classes, or a label that is absent or present."""
        if self.run.task == "multilabel":
            name = self.dataset.target_names[self.choices.output]
            return f"no {name}", name
        return self.dataset.class_names

    def ranks_of_margins(
        self, features: Mapping[str, Tensor], weights: Tensor, own_rows: Sequence[int | None]
    ) -> RankAccount:
        """Rank terms of each example's own margin (N, C): examples of one pair of classes share their terms."""
        pairs, place = weights.unique(dim=0, return_inverse=True)
        parts = {}
        for k, contrast in enumerate(pairs):
            rows = (place == k).nonzero().flatten()
            components = RankComponents(self.own, self.train.features, contrast)
            chosen = {name: x[rows] for name, x in features.items()}
            parts[k] = components.account(chosen, self.choices.neighbours, [own_rows[row] for row in rows.tolist()])
        return join_rank_accounts(parts, place.numpy())

    def examples(self, split: str, rows: Sequence[int]) -> Examples:
        """What the given rows of a split look like."""
        chosen = take(self.dataset.splits[split], rows)
        texts = {name: [several[i] for i in rows] for name, several in self.run.texts(self.dataset, split).items()}
        if not texts and "transcript" in chosen.metadata:
            texts = {"transcript": chosen.metadata["transcript"]}
        targets: list[float | None] = [None] * len(chosen)
        if chosen.target is not None:
            targets = chosen.target.reshape(len(chosen), -1)[:, self.choices.output].tolist()
        pictures = self.run.image_paths(chosen.ids) if self.run.memes else {}
        return Examples(chosen.ids, texts, targets, pictures)

    # ---- maps

    def score(self, features: Mapping[str, Tensor], name: str, vector: Tensor) -> Tensor:
        """What is mapped (b,), as a function of one modality's vector (b, d); the others are held at `features`."""
        features = {**features, name: vector.to("cpu")}
        if self.choices.rank is not None:
            latents = [z.double() for z in self.ranks.member.latents(features)]
            return self.ranks.terms(latents)[:, self.choices.rank - 1]
        outputs = [member(features, reconstruct=False).prediction for member in self.members]
        return torch.stack(outputs).mean(0)[:, self.choices.output]

    def regions(self, path: Path, features: Mapping[str, Tensor]) -> tuple[RegionMap, Box]:
        """The map of one picture and the part of it that the encoder sees; or ValueError with why there is none."""
        try:
            pixels, size = self.encoders.read(path), decode_rgb(path).size
        except Exception as error:  # a hostile file may raise nearly anything inside Pillow
            raise ValueError(f"the picture cannot be read ({reason_unreadable(error)})") from error
        reference = self.members[0].standardise["image"].mean  # of train, as that of the account
        mapped = region_map(self.encoders.image, pixels, partial(self.score, features, "image"), reference)
        if mapped is None:
            raise ValueError("this image encoder's vector is not the average of a feature map")
        if not _is_same(torch.from_numpy(mapped.feature), features["image"][0]):
            raise ValueError("on this --device the picture's vector is not the one that the run has of it")
        return mapped, seen_box(size, self.encoders.preprocessing)

    def map(self, features: Mapping[str, Tensor], examples: Examples, row: int) -> Maps:
        """Regions and words that feed the score of one example, features (1, d_m)."""
        regions, box, words, notes = None, (0.0, 0.0, 1.0, 1.0), {}, []
        is_encoded = self.run.memes and "image" not in self.run.memes.given
        if examples.ids[row] in examples.pictures and is_encoded:
            try:
                regions, box = self.regions(examples.pictures[examples.ids[row]], features)
            except ValueError as error:
                notes.append(f"no region map: {error}")
        for name, texts in examples.texts.items():
            if name not in features or self.run.encoders is None:
                continue
            if _is_same(self.encoders.text([self.encoders.tokens(texts[row])])[0], features[name][0]):
                words[name] = word_map(self.encoders.text, texts[row], partial(self.score, features, name))
            else:
                notes.append(f"no words of {name}: on this --device their vector is not the one that the run has")
        return Maps(regions, box, words, notes)


def known_split(splits: Mapping[str, Split], name: str, dataset: str) -> str:
    """The name of a split that is there and has examples. Raises InputError."""
    if not len(splits.get(name, ())):
        known = ", ".join(key for key, split in splits.items() if len(split))
        raise InputError(f"--split {name}: {dataset} has {known}")
    return name


def named(splits: Mapping[str, Split], ids: Sequence[str], dataset: str) -> list[Place]:
    """(split, row) of each id; of an id in several splits, in the first of them. Raises InputError."""
    places: dict[str, Place] = {}
    for name, split in splits.items():
        for row, key in enumerate(split.ids):
            places.setdefault(key, (name, row))
    for key in ids:
        if key not in places:
            close = difflib.get_close_matches(key, list(places), 1, cutoff=0.0)
            raise InputError(f"--ids {key}: {dataset} has no example of that id; the nearest is {close[0]}")
    return [places[key] for key in ids]


def _is_same(vector: Tensor, known: Tensor) -> bool:
    """True where two encodings are of one input: batching alone changes the last digits."""
    return bool((vector - known).norm() <= 1e-2 * known.norm())


def output_name(dataset: Dataset, output: int) -> str:
    """What is taken apart: "logit" of a label, "margin" between two of several classes, else the target's name."""
    if dataset.task == "multiclass":
        return "margin"
    if dataset.task in ("binary", "multilabel"):
        return "logit"
    return dataset.target_names[output] if dataset.target_names else "value"
