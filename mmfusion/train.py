"""Train jWAE-LMF and its baselines on your own arrays: one command, or one call from Python.

python -m mmfusion.train --data my_arrays.npz                     image_train, text_train, target_train, ...
python -m mmfusion.train --data digits.npz --target digit --folds 5

run = fit({"audio": x, "video": z, "target": y}, Config(ArraysConfig(hold_out=0.2)))
run.scores["jWAE-LMF, rank 4"]["test"]["auroc"]["mean"]

run = fit(MemesConfig(jsonl=Path("hm/train.jsonl")))                             or Run("runs/demo")
run.predict_proba(run.encode(["a.png", "b.png"], ["their words", "and theirs"]))
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.cli import pick_device, run_command
from mmfusion.data.array_values import plain_array
from mmfusion.data.arrays import (
    ArraysConfig,
    arrays_of,
    beyond_arrays,
    dataset_from_arrays,
    describe_arrays,
    load_arrays,
    with_kept,
)
from mmfusion.data.folds import tested_split
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.dataset import Dataset
from mmfusion.distributed import current_processes, end_process, join_processes, leave_processes
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError
from mmfusion.explain.account import Account, account_for, account_for_margins, latent_radii
from mmfusion.files import write_atomically
from mmfusion.metrics.conformal import Conformal, Intervals, LabelSets
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.models.missing import Missing, MissingPrediction
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble, check_compiler_use
from mmfusion.robustness.certificates import Norm
from mmfusion.runs.encode import RunEncoders
from mmfusion.runs.folder import MARK_OF_COMPLETION, RunConfig, RunFolder, defaults_for
from mmfusion.runs.load import ARRAYS, TrainedRun, load_run
from mmfusion.runs.run import carry_out
from mmfusion.sequences import Sequences
from mmfusion.training.fit import Method
from mmfusion.training.objective import FIT_TERM, Term
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig


@dataclass(frozen=True)
class Config:
    """Train jWAE-LMF and its baselines on arrays of your own (docs/your_data.md)."""

    data: ArraysConfig = field(default_factory=ArraysConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)

    def check(self) -> None:
        """Raise InputError naming the first flag whose value makes no sense."""
        for section in (self.training, self.model, self.tokens, self.objective):
            section.check()
        check_compiler_use(self.tokens, self.training.compile)


@dataclass(frozen=True)
class MemesRun:
    """Settings of a run on memes, under the names that the main script's flags have: by them its data are found."""

    data: MemesConfig
    training: TrainingConfig
    model: ModelConfig
    tokens: TokenConfig
    objective: ObjectiveConfig
    run: RunConfig
    encoders: EncoderConfig

    @classmethod
    def of(cls, data: MemesConfig, config: Config, encoders: EncoderConfig | None) -> "MemesRun":
        """Those of `config` but for how arrays are cut. Raises InputError for an encoder that does not exist."""
        encoders = encoders or EncoderConfig()
        encoders.check()
        return cls(data, config.training, config.model, config.tokens, config.objective, config.run, encoders)


class Run:
    """A finished run: what it scored, its models, and what can be asked of them."""

    def __init__(self, folder: Path | str, device: str = "cpu") -> None:
        """Read a run from its folder. Raises InputError where there is none that is whole, or its data have changed."""
        self.folder = Path(folder)
        self.trained: TrainedRun = load_run(self.folder, device, with_tokens=True)
        self._conformal: Conformal | None = None
        self._encoders = RunEncoders(self.trained, device)
        self.results: dict[str, object] = json.loads((self.folder / MARK_OF_COMPLETION).read_text(encoding="utf-8"))

    @property
    def scores(self) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
        """{method: {part: {score: {"mean", "std", "low", "high", "members"}}}}."""
        return self.results["scores"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers, or of the labels; none of a regression."""
        dataset, task = self.trained.datasets[0], self.trained.task
        if task == "regression":
            return ()
        return tuple(dataset.target_names) if task == "multilabel" else dataset.class_names

    @property
    def ensemble(self) -> FusionEnsemble | TokenEnsemble:
        """All members of jWAE-LMF, or of the model of tokens that the run is of."""
        return self.trained.ensembles[self.trained.main_row]

    def _of_vectors(self, what: str) -> FusionEnsemble:
        """The ensemble, where it takes vectors. Raises ValueError."""
        if isinstance(self.ensemble, TokenEnsemble):
            raise ValueError(
                f"{what}: is of runs of vectors, this one takes tokens (python -m mmfusion.explain does too)"
            )
        return self.ensemble

    def encode(
        self, images: Sequence[Path | str] | None = None, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Features of N memes by the run's own encoders: what all other methods take. Encoded once, asked often.

        Args:
            images: N files; left out, the modality is missing, and `predict(..., missing="prior")` goes without it.
            texts: N texts, likewise.

        Returns:
            "image" and "text", (N, d_m) each.

        Raises InputError naming a file that is missing or no picture, and for a run that encoded no memes; ValueError
        where the numbers differ.
        """
        return self._encoders.encode(images, texts)

    def predict(
        self,
        features: Mapping[str, Tensor | np.ndarray],
        missing: Missing = "error",
        coverage: float | None = None,
    ) -> np.ndarray | LabelSets | Intervals:
        """Mean over members of probabilities, or of a regression's values, of raw features (N, d_m): (N,) or (N, O).

        Args:
            features: of a run of tokens N sequences (T_i, d_m) of each modality, as a list of arrays or `Sequences`.
            missing: as for `predict_missing`, whose expected probabilities or values these then are; "error" refuses.
            coverage: for instance .9: sets of labels with abstention, or intervals, that hold the target with that
                probability; `calibrate` says what that rests on.
        """
        if coverage is not None and missing != "error":
            raise ValueError(
                "coverage is promised for whole examples, like those it was calibrated on: leave missing out"
            )
        if missing == "error":
            p = self.ensemble.predict(features).double().mean(0).numpy()
        else:
            given = self._of_vectors(f"missing={missing!r}")
            p = given.predict(features, missing, self._train(missing)).double().mean(0).numpy()
        if coverage is None:
            return p
        conformal = self._conformal or self._calibration()
        return (
            conformal.intervals(p, coverage) if self.trained.task == "regression" else conformal.label_sets(p, coverage)
        )

    def predict_missing(
        self, features: Mapping[str, Tensor | np.ndarray], missing: Missing = "prior"
    ) -> MissingPrediction:
        """Predictions (N, ...) where modalities are missing, and the exact std that this adds to logits or values.

        Args:
            features: raw (N, d_m); a modality is missing where its key is absent or its row NaN throughout.
            missing: what its latent follows: the "prior" N(0, I), or its distribution in "training" (with several
                folds: in the first fold's training part).

        Of classes the logit is integrated exactly; `prediction` is the expected probability, which is not that of the
        expected logit. See `mmfusion.models.missing`.
        """
        return (
            self._of_vectors("predict_missing").predict_missing(features, missing, self._train(missing)).over_members()
        )

    def calibrate(self, features: Mapping[str, Tensor | np.ndarray], target: np.ndarray) -> "Run":
        """Take labelled examples that took no part in the run for what `predict(..., coverage=)` promises.

        The promise: of new examples that are exchangeable with these (drawn alike, in any order equally likely: no
        shift, no groups shared by some alone), a share `coverage` has its target in the set, on average over draws of
        both (`mmfusion.metrics.conformal`). Without this call the split is taken that epochs were selected on: with
        keep="best" it looks a little easier than new examples, and the coverage may fall a little short. With several
        folds it is the tested examples, each predicted by the members that have not seen it, which selects nothing; but
        it is the mean of all folds' members that predicts what is new, so the promise then holds about, not exactly.

        Args:
            features: raw (n, d_m).
            target: (n,) or (n, O), as in `mmfusion.dataset.Split`: class numbers, not names.

        Raises ValueError for a target that does not fit, or holds what is no class number.
        """
        target, task = np.asarray(target), self.trained.task
        if target.dtype.kind not in "biuf":
            order = f", in the order of class_names: {', '.join(self.class_names[:9])}" if task == "multiclass" else ""
            raise ValueError(f"target: holds no numbers but {target.dtype}; give numbers of classes or values{order}")
        count = len(self.class_names) if task == "multiclass" else 2  # of labels: absent, present
        if task != "regression" and not (known := np.isin(target, range(count))).all():
            raise ValueError(f"target: {target[~known][0]:g} is no class number; they are 0 to {count - 1}")
        p = self.ensemble.predict(features).double().mean(0).numpy()
        self._conformal = Conformal.fit(p, target, self.trained.task)
        return self

    def _calibration(self) -> Conformal:
        datasets = self.trained.datasets
        splits = [datasets[0].splits[datasets[0].selection]]
        if len(datasets) > 1:
            splits = [dataset.splits[tested_split(dataset)] for dataset in datasets]
        p = [
            self.ensemble.part(fold, len(datasets)).predict(split.features).double().mean(0)
            for fold, split in enumerate(splits)
        ]
        target = torch.cat([split.target for split in splits]).numpy()
        return Conformal.fit(torch.cat(p).numpy(), target, self.trained.task)

    def _train(self, missing: Missing) -> dict[str, Tensor] | None:
        return self.trained.datasets[0].splits["train"].features if missing == "training" else None

    def predict_proba(self, features: Mapping[str, Tensor | np.ndarray], missing: Missing = "error") -> np.ndarray:
        """Mean over members of the probabilities of raw features (N, d_m): (N,) of class 1 of two, else (N, O).

        `missing` as for `predict`. Raises ValueError for a regression.
        """
        if self.trained.task == "regression":
            raise ValueError("a regression has no probabilities; `predict` gives its values")
        return self.predict(features, missing)

    def explain(self, features: Mapping[str, Tensor | np.ndarray], output: int = 0) -> Account:
        """Exact account of predictions on raw features (N, d_m); with several folds, by the members of the first.

        Of more than two classes: the logit of the likeliest class, by these members' mean probability, less that of the
        runner-up (`Account.pairs`); where their mean says otherwise, `Account.seeds_disagree` is True of that row.
        """
        members = self.trained.members(self.trained.main_row)
        tensors = self._of_vectors("explain")._tensors(features, caller="explain")
        train = self.trained.datasets[0].splits["train"].features
        if self.trained.task == "multiclass":
            if output != 0:
                raise ValueError(f"output {output!r}: of more than two classes the margin is explained; leave it out")
            p = self.ensemble.part(0, len(self.trained.datasets)).predict(tensors).mean(0)  # (N, C)
            return account_for_margins(members, tensors, train, p)
        return account_for(members, tensors, train, output)

    def robustness(self, features: Mapping[str, Tensor | np.ndarray], norm: Norm = 2) -> dict[str, np.ndarray]:
        """Exact certified radii of each modality's latent, (S, N) each (`mmfusion.explain.account.latent_radii`)."""
        tensors = self._of_vectors("robustness")._tensors(features, caller="robustness")
        return latent_radii(self.trained.members(self.trained.main_row), tensors, self.trained.task, norm)


def fit(
    data: Mapping[str, np.ndarray] | Dataset | MemesConfig,
    config: Config | None = None,
    stacks: Sequence[Sequence[Method]] | None = None,
    further_terms: Mapping[str, tuple[float, Term]] | None = None,
    encoders: EncoderConfig | None = None,
) -> Run:
    """Train and leave the same folder as the command line, runs/NAME: `mmfusion.train`'s, of memes the main script's.

    Args:
        data: arrays under the keys of docs/your_data.md; a dataset with splits of its own (of its metadata the run
            keeps id, group and transcript; of its sequences no token that is all zero, as of arrays); or where memes
            lie, `MemesConfig()` being the drawn demo.
        config: with `data` saying how arrays are cut; default: all defaults.
        stacks: methods to train, those of one shape together; default: jWAE-LMF and its baselines.
        further_terms: {name: (weight, term)} added to the objective.
        encoders: of memes; default: the main script's.

    Raises InputError naming key, setting, file or folder, ValueError for a further term by the name of one there is,
    and for encoders of what is encoded already.
    """
    config = config or Config()
    config.check()
    for name, entry in (further_terms or {}).items():
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and callable(entry[1])):
            raise ValueError(f"further_terms: {name!r} is not (weight, term), such as (0.1, my_term)")
    known = {*FIT_TERM.values(), *config.objective.loss_weights("binary", ("two", "modalities"))}
    if taken := sorted(known & set(further_terms or {})):
        raise ValueError(f"further_terms: the objective has a term {taken[0]!r} of its own; choose another name")
    if not isinstance(data, Mapping | Dataset | MemesConfig):
        given = (
            f"{str(data)!r:.100}, a path: np.load reads it," if isinstance(data, str | Path) else type(data).__name__
        )
        raise InputError(f"data: is {given} and not a dict of arrays such as {{'image': x, 'text': z, 'target': y}}")
    if encoders is not None and not isinstance(data, MemesConfig):
        raise ValueError("encoders: are of memes; arrays and datasets hold features already")
    device = pick_device(config.training.device)
    processes, keep = current_processes(str(device)), None
    if isinstance(data, MemesConfig):
        config = MemesRun.of(data, config, encoders)
        with processes.together():  # all know the folder before one begins it
            run = RunFolder.claim(config, data.run_name)
        datasets = [load_memes(data, config.encoders, processes, tokens=config.tokens.takes_tokens)]
        description = datasets[0].description | _terms_described(further_terms)
    else:
        name, given = "arrays", None
        if isinstance(data, Dataset):
            name, given = data.name, data
            if not config.tokens.takes_tokens and any(
                isinstance(x, Sequences) for x in data.splits["train"].features.values()
            ):
                remedy = (
                    "fuse them (TokenConfig('wma') or ('transport')), or give their means (mmfusion.dataset.pooled)"
                )
                raise InputError(f"data: holds sequences; {remedy}")
            data, config = arrays_of(data), replace(config, data=ArraysConfig(task=data.task))
        datasets = dataset_from_arrays(data, config.data, name, tokens=config.tokens.takes_tokens)
        datasets = datasets if given is None else with_kept(datasets, beyond_arrays(given))
        with processes.together():
            run = RunFolder.claim(config, name)
        description, keep = describe(datasets, further_terms), partial(_save, arrays=data)
    carry_out(run, description, datasets, config, device, stacks, further_terms, keep)
    (path, *_) = processes.gather(run.path)  # and by then the main process has written it
    return Run(path, str(device))


def _save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays that were given from Python in their run's folder: no objects, which could not be read again."""
    plain = {str(key): plain_array(value, str(key)) for key, value in arrays.items()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **plain)

    write_atomically(folder / ARRAYS, write)


def main(config: Config) -> None:
    """Everything from the file to the report. Raises InputError for what the user can put right."""
    config.check()
    device = pick_device(config.training.device)
    processes = join_processes(str(device))
    with processes.together():
        run = RunFolder.claim(config, default_name(config))
        datasets = load_arrays(config.data, config.tokens.takes_tokens)
    carry_out(run, describe(datasets), datasets, config, torch.device(processes.device))
    leave_processes()


def describe(
    datasets: Sequence[Dataset], further_terms: Mapping[str, tuple[float, Term]] | None = None
) -> dict[str, object]:
    """What run.json says of the data, and of what no flag says: a resumed run must agree in it."""
    return describe_arrays(datasets) | _terms_described(further_terms)


def _terms_described(further_terms: Mapping[str, tuple[float, Term]] | None) -> dict[str, object]:
    return {"further_terms": {name: weight for name, (weight, _) in further_terms.items()}} if further_terms else {}


def default_name(config: Config) -> str:
    """The run's name where none is given: the file's."""
    if config.data.data is None:
        raise InputError("--data: name the file of your arrays; docs/your_data.md has the keys")
    return re.sub(r"[^\w.-]+", "-", config.data.data.stem).strip(".-") or "arrays"


def begun(config: Config) -> Config | None:
    """With --resume or --config the settings of that run, so that no flag need be given again."""
    return defaults_for(Config, config.run, lambda: default_name(config))


def run(arguments: list[str]) -> int:
    """`python -m mmfusion.train FLAGS`; returns the exit code."""
    return run_command(main, Config, arguments, begun)


if __name__ == "__main__":
    end_process(run(sys.argv[1:]))
