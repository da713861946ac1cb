"""One run of jWAE-LMF and its baselines on one dataset (or its folds): trained, scored, accounted for, written down."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from mmfusion.data.folds import tested_split
from mmfusion.dataset import Dataset, Split, pooled
from mmfusion.distributed import current_processes
from mmfusion.errors import InputError
from mmfusion.metrics.scores import Score, binary_scores
from mmfusion.metrics.tasks import ALL_SCORES, can_score, task_scores
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble
from mmfusion.runs import figure, report
from mmfusion.runs.card import write_card
from mmfusion.runs.checks import Sections, check_stacks, check_terms
from mmfusion.runs.folder import RunFolder
from mmfusion.runs.geometry_figure import GEOMETRY, draw_of_run
from mmfusion.runs.missing import missing_report
from mmfusion.runs.outputs import MetricsLog, SilentLog, save_ensembles, write_predictions
from mmfusion.runs.prior import print_prior, prior_report
from mmfusion.runs.tokens import print_tokens, token_report
from mmfusion.sequences import concatenate
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.objective import Term
from mmfusion.training.trainer import Trained


@dataclass(frozen=True)
class Outcome:
    """What a run found."""

    ensembles: dict[str, FusionEnsemble | TokenEnsemble]
    """{method: all its members, seed-major, then fold}; jWAE-LMF first"""
    histories: dict[str, Trained]
    """{first method of a stack: what `train` returned of it}"""
    parts: dict[str, Split]
    """what is predicted: the splits, or with several folds all that is tested, under the name "out_of_fold" """
    predictions: dict[str, dict[str, Tensor]]
    """{method: {part: (S, N) or (S, N, O)}} probabilities, or a regression's values"""
    scores: dict[str, dict[str, dict[str, Score]]]
    """{method: {labelled part: {score: Score}}}, of every member"""
    ensemble_scores: dict[str, dict[str, dict[str, Score]]]
    """the same of the mean over seeds of what the members say"""
    thresholds: dict[str, object]
    """two classes: what a threshold chosen on the selection split scores (`chosen_threshold`); else empty"""

    @property
    def main_row(self) -> str:
        """jWAE-LMF at the run's rank."""
        return next(iter(self.ensembles))


def methods(modalities: Sequence[str], config: Sections) -> list[list[Method]]:
    """What is trained; the methods of one inner list have one shape, and are trained in one stack."""
    every, rank = tuple(modalities), config.model.rank
    tokens = tokens_of(config)
    if tokens.takes_tokens:
        if len(every) < 2:
            raise InputError(f"--fusion {tokens.fusion}: fuses two modalities or more, the data have {every[0]} alone")
        return token_methods(every, config)
    alone = [[Method(f"{name} only", (name,))] for name in every]
    if len(every) == 1:
        return alone
    lmf = [Method(f"jWAE-LMF, rank {rank}", every, active_rank=rank)]
    if rank > 1:
        lmf.append(Method("jWAE-LMF, rank 1", every, active_rank=1))
    if config.objective.mmd_weight > 0:
        lmf.append(Method("jWAE-LMF, no prior", every, active_rank=rank, prior=False))
    return [lmf, [Method("concatenation + MLP", every, "concatenation")], *alone]


def tokens_of(config: Sections) -> TokenConfig:
    """The section of a config that says how tokens are fused; of commands without one, its default: they are not."""
    return getattr(config, "tokens", TokenConfig())


def token_methods(every: tuple[str, ...], config: Sections) -> list[list[Method]]:
    """A model of tokens with and without the alignment of its tokens, and two of the mean tokens."""
    tokens, rank = tokens_of(config), config.model.rank
    name = "transformer" if tokens.fusion == "wma" else f"{tokens.plan}-LMF, rank {rank}"
    first = [Method(name, every, tokens.fusion, active_rank=rank, weights={"transport": 0.0})]
    if config.objective.transport_weight > 0:
        first.insert(0, Method(f"{name}, aligned tokens", every, tokens.fusion, active_rank=rank))
    pooled_lmf = Method(f"jWAE-LMF of mean tokens, rank {rank}", every, active_rank=rank)
    return [first, [pooled_lmf], [Method("concatenation of mean tokens + MLP", every, "concatenation")]]


def carry_out(
    run: RunFolder,
    description: Mapping[str, object],
    datasets: Sequence[Dataset],
    config: Sections,
    device: torch.device,
    stacks: Sequence[Sequence[Method]] | None = None,
    further_terms: Mapping[str, tuple[float, Term]] | None = None,
    before: Callable[[Path], None] | None = None,
) -> Outcome | None:
    """Begin a run, train, score, report and write everything into its folder; results.json comes last.

    Where `join_processes` has joined several processes, each trains a share of the members and the main one does the
    rest; all call with the same arguments.

    Args:
        run: the folder, claimed.
        description: of the data, for run.json.
        datasets: one, or the folds of one.
        config: with sections training, model and objective.
        device: where members are trained.
        stacks: default `methods`.
        further_terms: {name: (weight, term)} added to the objective.
        before: called with the folder once it is there.

    Raises ValueError, before anything is written, for stacks that cannot be trained and a further term that is none.

    Returns:
        what was found; None in a process that is not the main one, and where a resumed run is complete already.
    """
    if datasets[0].task == "regression" and config.training.class_weight != "none":
        raise InputError(
            f"--class-weight {config.training.class_weight}: the target has values, no classes; leave it out"
        )
    dataset = datasets[0]
    if stacks is not None:
        check_stacks(stacks, dataset, config)
    stacks = methods(tuple(dataset.input_dims), config) if stacks is None else stacks
    check_terms(further_terms or {}, stacks, dataset, config, device)
    processes, goes_on = current_processes(), False
    with processes.together():
        if processes.is_main:
            goes_on = run.begin(description, device)
    goes_on, folder = processes.gather((goes_on, run.path))[0]
    if not goes_on:
        return None
    if not processes.is_main:
        train_stacks(SilentLog(folder), datasets, stacks, config, device, further_terms)
        return None
    if before is not None:
        before(folder)
    report.print_dataset(datasets, folder, device, config.training.keep == "best")
    with MetricsLog(folder, datasets[0].task, run.writes_events) as log:
        ensembles, histories = train_stacks(log, datasets, stacks, config, device, further_terms)
    outcome = predict_and_score(datasets, ensembles, histories)
    results = report_and_save(folder, datasets, outcome)
    run.close(results)
    with_pairs = has_pairs(outcome.ensembles[outcome.main_row])
    pictures = f"report.png, {GEOMETRY}" if with_pairs else "report.png"
    print(
        f"\nkept in {folder}/: README.md, {pictures}, results.json, metrics.jsonl, predictions_*.csv, "
        "model.safetensors with config.json (README.md says how to load it)"
    )
    if with_pairs:
        print(f"more of the latents, measured and drawn: python -m mmfusion.geometry {folder}")
    return outcome


def report_and_save(folder: Path, datasets: Sequence[Dataset], outcome: Outcome) -> dict[str, object]:
    """Print what was found and leave models, card, predictions and figure in the folder; returns results.json."""
    dataset, main = datasets[0], outcome.ensembles[outcome.main_row]
    predictions, shown = outcome.predictions[outcome.main_row], shown_part(dataset, outcome)
    report.print_scores(dataset, outcome.parts, outcome.scores, outcome.ensemble_scores, outcome.thresholds)
    results: dict[str, object] = {"selection": dataset.selection, "task": dataset.task, "scores": outcome.scores}
    results |= {"ensemble_scores": outcome.ensemble_scores, "thresholds": outcome.thresholds}
    ranks = None
    if isinstance(main, TokenEnsemble):
        results["tokens"] = token_report(dataset, main.part(0, len(datasets)), dataset.selection)
        print_tokens(results["tokens"], dataset.task)
    elif len(dataset.input_dims) > 1:
        if len(main.shape["input_dims"]) > 1 and shown in outcome.scores[outcome.main_row]:
            missing = missing_report(datasets, main, shown, outcome.parts[shown], predictions[shown])
            report.print_missing(missing, dataset.task)
            results["missing"] = missing
        of_first_fold = list(main.members)[:: len(datasets)]
        ranks = report.rank_report(of_first_fold, dataset.splits[dataset.selection].features, dataset.task)
        report.print_ranks(ranks, dataset.selection, dataset.task)
        results["ranks"] = ranks
    if main.shape["fusion"] in ("lmf", "transport"):
        results["prior"] = prior_report(datasets, main)
        print_prior(results["prior"])
    save_ensembles(folder, outcome.ensembles)
    write_card(folder, dataset, main, outcome.scores, len(datasets))
    write_predictions(folder, dataset, outcome.parts, predictions)
    figure.draw(
        folder / "report.png",
        dataset,
        main,
        outcome.histories[outcome.main_row],
        figure.Shown(shown, outcome.parts[shown], predictions[shown].numpy()),
        ranks,
        len(datasets),
        outcome.main_row,
    )
    if has_pairs(main):
        part = shown if shown in dataset.splits else tested_split(dataset)
        draw_of_run(folder / GEOMETRY, dataset, part, main.members[0], outcome.main_row)
    return results


def has_pairs(ensemble: FusionEnsemble | TokenEnsemble) -> bool:
    """Whether its latents are of several modalities, one vector of each example: geometry.png is of those."""
    return isinstance(ensemble, FusionEnsemble) and len(ensemble.shape["input_dims"]) > 1


def train_stacks(
    log: MetricsLog | SilentLog,
    datasets: Sequence[Dataset],
    stacks: Sequence[Sequence[Method]],
    config: Sections,
    device: torch.device,
    further_terms: Mapping[str, tuple[float, Term]] | None = None,
) -> tuple[dict[str, FusionEnsemble | TokenEnsemble], dict[str, Trained]]:
    """Train every stack, with checkpoints beside the log: ensembles and histories of `Outcome`."""
    ensembles: dict[str, FusionEnsemble | TokenEnsemble] = {}
    histories: dict[str, Trained] = {}
    for stack in stacks:
        labels = [method.label for method in stack]
        name = re.sub(r"[^\w-]+", "-", f"{stack[0].fusion}-{'-'.join(stack[0].modalities)}")[:100]
        with log.stack(labels, config.training.seeds * len(datasets), config.training.epochs) as on_epoch:
            fitted, trained = fit_methods(
                datasets,
                stack,
                config.model,
                config.objective,
                config.training,
                tokens=tokens_of(config),
                further_terms=further_terms,
                device=device,
                checkpoint=log.folder / "checkpoints" / f"{name}.safetensors",
                on_epoch=on_epoch,
            )
        ensembles |= dict(zip(labels, fitted, strict=True))
        histories[labels[0]] = trained
    return ensembles, histories


def predict_and_score(
    datasets: Sequence[Dataset],
    ensembles: Mapping[str, FusionEnsemble | TokenEnsemble],
    histories: Mapping[str, Trained],
) -> Outcome:
    """What every method says of every part, and its scores there."""
    dataset = datasets[0]
    parts = dict(dataset.splits) if len(datasets) == 1 else {report.OUT_OF_FOLD: _tested(datasets)}
    predictions = {
        label: {
            name: ensemble.predict(taken(split, ensemble).features)
            if len(datasets) == 1
            else _predict_out_of_fold(ensemble, datasets)
            for name, split in parts.items()
        }
        for label, ensemble in ensembles.items()
    }
    labelled = [
        n for n, s in parts.items() if n != "train" and s.target is not None and can_score(s.target, dataset.task)
    ]

    def scored(of: Callable[[Tensor], Tensor]) -> dict[str, dict[str, dict[str, Score]]]:
        return {
            label: {
                name: task_scores(
                    of(p[name]).numpy(),
                    parts[name].target.numpy(),
                    dataset.task,
                    None if dataset.task == "binary" else ALL_SCORES[dataset.task],
                    dataset.label_range,
                )
                for name in labelled
            }
            for label, p in predictions.items()
        }

    main = next(iter(ensembles))
    selection = dataset.selection
    thresholds = {}
    if dataset.task == "binary" and selection in labelled:
        targets = {name: parts[name].target.numpy() for name in labelled}
        thresholds = chosen_threshold({name: predictions[main][name].numpy() for name in labelled}, targets, selection)
    several = len(ensembles[main].members) > len(datasets)
    of_mean = scored(lambda p: p.mean(0, keepdim=True)) if several else {}
    return Outcome(dict(ensembles), dict(histories), parts, predictions, scored(lambda p: p), of_mean, thresholds)


def taken(split: Split, ensemble: FusionEnsemble | TokenEnsemble) -> Split:
    """The split as an ensemble takes it: sequences, or one vector each."""
    return split if isinstance(ensemble, TokenEnsemble) else pooled(split)


def chosen_threshold(
    p: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], selection: str
) -> dict[str, object]:
    """What each member scores at the threshold that gives it the best balanced accuracy on the selection split.

    Args:
        p: {split: (S, N)} probabilities of class 1.
        targets: {split: (N,)} of 0 and 1.
        selection: the split that thresholds are chosen on; its own scores are not among the results.

    Returns:
        {"thresholds": (S,), "scores": {other split: {"accuracy" | "balanced_accuracy" | "f1": Score}}}
    """
    thresholds = []
    for member in p[selection]:
        false_positive, true_positive, values = roc_curve(targets[selection], member, drop_intermediate=False)
        thresholds.append(float(min(values[np.argmax(true_positive - false_positive)], 1.0)))
    scores = {}
    for name in p:
        if name != selection:
            # a score of labels alone: 1 where the member's own threshold is reached
            guesses = (p[name] >= np.array(thresholds)[:, None]).astype(float)
            scores[name] = binary_scores(guesses, targets[name], names=("accuracy", "balanced_accuracy", "f1"))
    return {"thresholds": thresholds, "scores": scores}


def shown_part(dataset: Dataset, outcome: Outcome) -> str:
    """The part that figures show: a test split, else another labelled one, else the one selected upon."""
    scored = [name for name in next(iter(outcome.scores.values())) if name != dataset.selection]
    # dev_unseen shares most of its memes with dev_seen, which is selected on: a test split first
    return min(scored, key=lambda name: not name.startswith("test"), default=dataset.selection)


def _tested(datasets: Sequence[Dataset]) -> Split:
    """The test examples of all folds, fold after fold."""
    splits = [dataset.splits[tested_split(dataset)] for dataset in datasets]
    columns = [column for column in splits[0].metadata if all(column in split.metadata for split in splits)]
    return Split(
        {name: concatenate([split.features[name] for split in splits]) for name in splits[0].features},
        torch.cat([split.target for split in splits]),
        [key for split in splits for key in split.ids],
        {column: [value for split in splits for value in split.metadata[column]] for column in columns},
    )


def _predict_out_of_fold(ensemble: FusionEnsemble | TokenEnsemble, datasets: Sequence[Dataset]) -> Tensor:
    """(S, N) or (S, N, O) of `_tested`: every example by the members that have not seen it."""
    of_folds = [
        ensemble.part(fold, len(datasets)).predict(taken(dataset.splits[tested_split(dataset)], ensemble).features)
        for fold, dataset in enumerate(datasets)
    ]
    return torch.cat(of_folds, 1)
