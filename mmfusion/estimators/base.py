"""What classifier and regressor share: settings, fit, calibration, certificates, explanations.

N examples, M modalities, d_m width of modality m, S members, C classes, O outputs.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d
from torch import Tensor

from mmfusion.cli import pick_device
from mmfusion.data.modalities import Modalities, read_modalities
from mmfusion.dataset import Dataset, Split, Task
from mmfusion.errors import InputError
from mmfusion.explain.account import Account, account_for, account_for_margins, latent_radii
from mmfusion.metrics.conformal import Conformal
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.models.missing import Missing, MissingPrediction
from mmfusion.robustness.certificates import Norm
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

# chosen on inner folds by benchmarks/estimator_defaults.py
EPOCHS, PATIENCE, VALIDATION_FRACTION = 60, 10, 0.1
SMALLEST_BATCH, STEPS = 8, 16


class FusionEstimator(BaseEstimator):
    """What classifier and regressor share.

    Args:
        modalities: for one array X (N, d): {name: columns}, columns a slice or a list of numbers; default: one modality
            of all columns. A dict of arrays names its modalities itself; those of a list are "m0", "m1", ...
        latent_dim, hidden_dim, rank, noise: of the model (`mmfusion.models.fusion.ModelConfig`).
        n_members: S, seeds trained at once.
        epochs: at most; see `patience`.
        patience: epochs without a better score on the validation examples after which a member stops.
        batch_size: examples per step; "auto": as many as leave 16 steps to an epoch, from 8 to 64.
        learning_rate, weight_decay, modality_dropout, feature_dropout, annealing: of the training (`TrainingConfig`).
        keep: "last" epoch, or "best" one on the validation examples, which are then cut from those given.
        mmd_weight, reconstruction_weight, alignment_weight, alignment: of the objective (`ObjectiveConfig`).
        validation_fraction: with keep="best", share of the examples that epochs are selected on; 0, or too few
            examples for it: the training examples themselves select.
        random_state: int, RandomState or None; seeds of members, initial values, batches and the validation examples.
        device: "cpu", "cuda" or "auto".
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, slice | Sequence[int]] | None = None,
        latent_dim: int = ModelConfig.latent_dim,
        hidden_dim: int = ModelConfig.hidden_dim,
        rank: int = ModelConfig.rank,
        noise: str = ModelConfig.noise,
        n_members: int = TrainingConfig.seeds,
        epochs: int = EPOCHS,
        patience: int = PATIENCE,
        batch_size: int | str = "auto",
        learning_rate: float = TrainingConfig.learning_rate,
        weight_decay: float = TrainingConfig.weight_decay,
        modality_dropout: float = TrainingConfig.modality_dropout,
        feature_dropout: float = TrainingConfig.feature_dropout,
        annealing: str = TrainingConfig.annealing,
        keep: str = TrainingConfig.keep,
        mmd_weight: float = ObjectiveConfig.mmd_weight,
        reconstruction_weight: float = ObjectiveConfig.reconstruction_weight,
        alignment_weight: float = ObjectiveConfig.alignment_weight,
        alignment: str = ObjectiveConfig.alignment,
        validation_fraction: float = VALIDATION_FRACTION,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
    ) -> None:
        self.modalities = modalities
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        self.rank = rank
        self.noise = noise
        self.n_members = n_members
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.modality_dropout = modality_dropout
        self.feature_dropout = feature_dropout
        self.annealing = annealing
        self.keep = keep
        self.mmd_weight = mmd_weight
        self.reconstruction_weight = reconstruction_weight
        self.alignment_weight = alignment_weight
        self.alignment = alignment
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    # ---- X

    def _features(self, X: Modalities, *, reset: bool, missing: Missing = "error") -> dict[str, Tensor]:
        """float32 (N, d_m) per modality. Raises ValueError as scikit-learn does."""
        known = None if reset else self._widths
        features = read_modalities(self, X, self.modalities, known, allow_missing=missing != "error")
        if reset:
            self._widths = {name: x.shape[1] for name, x in features.items()}
        return features

    # ---- fit

    def _checked(self, X: Modalities, y: np.ndarray, numeric: bool = False) -> tuple[dict[str, Tensor], np.ndarray]:
        """Features, and y (N,) or (N, O). Raises ValueError as scikit-learn does."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        features = self._features(X, reset=True)
        if numeric:
            y = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        else:
            y = check_array(y, dtype=None, ensure_2d=False, ensure_all_finite=np.asarray(y).dtype.kind == "f")
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        examples = len(next(iter(features.values())))
        if examples < 2:
            raise ValueError("X has 1 sample; 2 are the least that a prior can be compared with")
        if len(y) != examples:
            raise ValueError(f"y has {len(y)} examples, X has {examples}")
        return features, y

    def _fit(
        self,
        features: dict[str, Tensor],
        target: Tensor,
        task: Task,
        class_names: tuple[str, ...],
        balanced: bool = False,
        class_weights: Tensor | None = None,
    ) -> None:
        """Train the ensemble; `target` as in `mmfusion.dataset.Split`."""
        random = check_random_state(self.random_state)
        is_fixed = isinstance(self.random_state, Integral)
        first_seed = int(self.random_state) % 2**30 if is_fixed else int(random.randint(2**30))
        splits, selection = self._cut(features, target, task, first_seed)
        self.modalities_ = tuple(features)
        dataset = Dataset("arrays", task, splits, selection, class_names=class_names)
        rank = int(self.rank) if isinstance(self.rank, Integral) else self.rank  # NumPy's in a search
        rank = rank if len(features) > 1 else 1
        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = max(SMALLEST_BATCH, min(TrainingConfig.batch_size, len(splits["train"]) // STEPS))
        training = TrainingConfig(
            seeds=self.n_members,
            first_seed=first_seed,
            epochs=self.epochs,
            patience=self.patience,
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            modality_dropout=self.modality_dropout,
            feature_dropout=self.feature_dropout,
            annealing=self.annealing,
            keep=self.keep,
            class_weight="balanced" if balanced else "none",
            select_by="log_loss",
        )
        model = ModelConfig(self.latent_dim, self.hidden_dim, rank, self.noise)
        objective = ObjectiveConfig(
            mmd_weight=self.mmd_weight,
            reconstruction_weight=self.reconstruction_weight,
            alignment_weight=self.alignment_weight,
            alignment=self.alignment,
        )
        try:
            for section in (training, model, objective):
                section.check()
        except InputError as error:
            raise ValueError(_without_flag(str(error))) from error
        method = Method("jWAE-LMF", self.modalities_, active_rank=rank)
        device = pick_device(self.device)
        with torch.random.fork_rng(devices=[]):  # a new model draws values, which the members' seeds then overwrite
            (ensemble,), trained = fit_methods(
                dataset, [method], model, objective, training, class_weights=class_weights, device=device
            )
        self.ensemble_: FusionEnsemble = ensemble
        self.history_ = trained.history
        self.n_iter_ = len(trained.history)
        self._reference = {name: splits["train"].features[name] for name in self.modalities_}
        self._conformal = None
        if selection != "train":
            held_out = splits[selection]
            said = self.ensemble_.predict(held_out.features).double().mean(0).numpy()
            self._conformal = Conformal.fit(said, held_out.target.numpy(), task)

    def _cut(self, features: dict[str, Tensor], target: Tensor, task: Task, seed: int) -> tuple[dict[str, Split], str]:
        """Splits of training and validation examples, and the name of the one that selects."""
        rows = np.arange(len(target))
        classes = target.numpy() if task in ("binary", "multiclass") else None
        held_out = round(self.validation_fraction * len(rows))
        needed = 2 if classes is None else len(np.unique(classes))
        enough = classes is None or np.unique(classes, return_counts=True)[1].min() >= 2
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction}: give a share from 0 up to 1")
        if self.keep == "last" or held_out < max(needed, 2) or len(rows) - held_out < max(needed, 2) or not enough:
            return {"train": _split(features, target, rows)}, "train"
        train, validation = train_test_split(rows, test_size=held_out, stratify=classes, random_state=seed % 2**32)
        parts = {"train": np.sort(train), "validation": np.sort(validation)}
        return {name: _split(features, target, rows) for name, rows in parts.items()}, "validation"

    # ---- predictions

    def _predict(self, X: Modalities, missing: Missing = "error") -> Tensor:
        """(S, N) or (S, N, O): what every member says."""
        check_is_fitted(self, "ensemble_")
        train = self._reference if missing == "training" else None
        return self.ensemble_.predict(self._features(X, reset=False, missing=missing), missing, train)

    def predict_missing(self, X: Modalities, missing: Missing = "prior") -> MissingPrediction:
        """Predictions (N, ...) where modalities are missing, and the exact std that this adds to logits or values.

        Args:
            X: a modality is missing where its key is absent (None in a list) or its row NaN throughout.
            missing: what its latent follows: the "prior" N(0, I), or its distribution in "training".

        Of classes the logit is integrated exactly; `prediction` is the expected probability (of two classes: of the
        second), which is not that of the expected logit. See `mmfusion.models.missing`.
        """
        check_is_fitted(self, "ensemble_")
        train = self._reference if missing == "training" else None
        features = self._features(X, reset=False, missing=missing)
        return self.ensemble_.predict_missing(features, missing, train).over_members()

    def calibrate(self, X: Modalities, y: np.ndarray) -> "FusionEstimator":
        """Take labelled examples that took no part in `fit` for what `predict(..., coverage=)` promises.

        The promise: of new examples that are exchangeable with these (drawn alike, in any order equally likely: no
        shift, no groups shared by some alone), a share `coverage` has its target in the set, on average over draws of
        both (`mmfusion.metrics.conformal`). Without this call the validation examples of `fit` are taken, where there
        are such. With keep="best" epochs were selected on them: they look a little easier than new ones are, the
        coverage may fall a little short, and this method is the remedy. Raises ValueError for labels unknown to `fit`.
        """
        said = self._predict(X).double().mean(0).numpy()
        self._conformal = Conformal.fit(said, self._target_numbers(y), self.ensemble_.task)
        return self

    def _calibrated(self, missing: Missing) -> Conformal:
        check_is_fitted(self, "ensemble_")
        if missing != "error":
            raise ValueError(
                "coverage is promised for whole examples, like those it was calibrated on: leave missing out"
            )
        if self._conformal is None:
            raise ValueError("coverage: fit kept no validation examples; call calibrate(X, y) with labelled new ones")
        return self._conformal

    def member_predictions(self, X: Modalities) -> np.ndarray:
        """What every member says, (S, N) for two classes or one value, else (S, N, O): probabilities or values."""
        return self._predict(X).numpy()

    def certified_radius(self, X: Modalities, norm: Norm = 2) -> dict[str, np.ndarray]:
        """Least l_p change of one modality's latent that changes what a member says, exact: (S, N) per modality.

        `norm` is p, one of 1, 2 and infinity; see `mmfusion.explain.account.latent_radii`.
        """
        check_is_fitted(self, "ensemble_")
        return latent_radii(self.ensemble_.members, self._features(X, reset=False), self.ensemble_.task, norm)

    def explain(self, X: Modalities, output: int = 0) -> "Explained":
        """Take each prediction apart into bias, modalities and sets of modalities, exactly (`Account`).

        Two classes: the logit of the second. More: for each example the logit of the likeliest class less that of the
        runner-up, by the mean over members. Labels or values: those of `output`.
        """
        check_is_fitted(self, "ensemble_")
        features = self._features(X, reset=False)
        members = self.ensemble_.members
        if self.ensemble_.task != "multiclass":
            return Explained(account_for(members, features, self._reference, output), None)
        p = self.ensemble_.predict(features).mean(0)  # (N, C)
        account = account_for_margins(members, features, self._reference, p)
        return Explained(account, self.classes_[account.pairs])


class Explained(NamedTuple):
    """An exact account of N predictions."""

    account: Account
    pairs: np.ndarray | None
    """(N, 2) of a choice between classes: the likeliest and the runner-up, whose logits' difference is accounted for"""


def _without_flag(message: str) -> str:
    """A message about a flag as one about an argument: "--batch-size 1: ..." -> "batch_size 1: ..."."""
    found = re.match(r"--([\w-]+)", message)
    if found is None:
        return message
    name = found[1].replace("-", "_")
    return {"seeds": "n_members"}.get(name, name) + message[found.end() :]


def _split(features: Mapping[str, Tensor], target: Tensor, rows: np.ndarray) -> Split:
    index = torch.from_numpy(rows)
    return Split({name: x[index] for name, x in features.items()}, target[index], [str(row) for row in rows])
