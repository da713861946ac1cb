"""The experiments' common frame: grids, flags, what a run leaves, a grid's resume, and RESULTS.md."""

import csv
import importlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from experiments import (
    baselines as train,
)
from experiments import experiment as frame
from experiments import (
    jwae_ablation,
    modality_balance,
    modality_dropout,
    rank_ablation,
    rank_semantics,
    reproduce,
    results_pages,
    results_summary,
)
from experiments.results_pages import Finished
from mmfusion.cli import parse
from mmfusion.data.folds import fold_datasets, only, targets
from mmfusion.data.registry import DataOptions, load_folded
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.verdicts import Cut, Difference, corrected_contrasts
from mmfusion.models.whitening import whiten_latents
from mmfusion.training import grid as grids
from mmfusion.training.grid import JWAE, PLAIN, Recipe, Setting, per_example, train_grid
from mmfusion.training.objective import predict
from mmfusion.training.recipe import REGRESSION_EPOCHS

ROOT = Path(__file__).parent.parent
SMALL = Recipe(epochs=2, latent_dim=4, hidden_dim=6, batch_size=16)


def folded(task: str = "binary", outputs: int | None = None, folds: int = 1, examples: int = 120):
    """Two modalities whose sum decides the target; `folds` of them."""
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(examples, d, generator=rng) for name, d in (("text", 5), ("audio", 3))}
    signal = features["text"][:, 0] + features["audio"][:, 0]
    target = (signal > 0).float() if task == "binary" else 3 + 2 * signal
    if outputs:
        target = torch.stack([target * (k + 1) for k in range(outputs)], dim=1)
    datasets = []
    for k in range(folds):
        rows = {"test": list(range(k, examples, max(folds, 4)))}
        rest = [i for i in range(examples) if i not in rows["test"]]
        rows |= {"dev": rest[:20], "train": rest[20:]}
        splits = {
            name: Split(
                {m: x[rows[name]] for m, x in features.items()}, target[rows[name]], [f"{i}" for i in rows[name]]
            )
            for name in ("train", "dev", "test")
        }
        datasets.append(Dataset("toy", task, splits, "dev"))
    return fold_datasets(datasets)


def write_tweets(path: Path, examples: int = 80) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"image_train": rng.normal(size=(examples, 5)), "text_train": rng.normal(size=(examples, 4))}
    np.savez(path, **arrays, target_train=(arrays["image_train"][:, 0] > 0).astype(int))
    return path


def write_mosi(path: Path, examples: int = 60) -> Path:
    """An .npz in the layout of the utterance vectors."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", examples), ("test", examples // 2)):
        label = rng.integers(0, 2, n)
        arrays |= {
            f"{m}_{split}": rng.normal(label[:, None], 2, (n, d)).astype(np.float32)
            for m, d in (("text", 6), ("audio", 4), ("video", 5))
        }
        arrays |= {f"label_{split}": label, f"transcript_{split}": np.array(["a good film"] * n)}
        arrays[f"id_{split}"] = np.array([f"{split}{i // 5}_{i % 5}" for i in range(n)])
    np.savez(path, **arrays)
    return path


# ---- grids -------------------------------------------------------------------------------------------------------


def test_member_of_a_grid_equals_the_same_setting_trained_alone():
    data = folded()
    settings = [Setting("rank 1", 1, PLAIN), Setting("rank 3", 3, JWAE), Setting("no decay", 3, JWAE, 0.0)]
    together = train_grid(data, settings, [0, 1], SMALL)
    alone = train_grid(data, settings[1:2], [1], SMALL)
    np.testing.assert_allclose(together.outputs[1, 1, 0], alone.outputs[0, 0, 0], rtol=1e-4, atol=1e-5)
    assert together.index("no decay") == 2
    assert together.outputs.shape == (3, 2, 1, 120)


def test_test_scores_come_from_the_fold_that_tests_an_example():
    data = folded(folds=4)
    grid = train_grid(data, [Setting("rank 2", 2)], [0, 1], SMALL)
    predictions, target = grid.predictions(), targets(data)
    start = 0
    for f, fold in enumerate(data.folds):
        features = {name: x[fold.test] for name, x in data.pool.features.items()}
        own = predict(grid.model(0, 1, f), features).detach().numpy()
        np.testing.assert_allclose(predictions[0, 1, start : start + len(own)], own, atol=1e-6)
        start += len(own)
    assert start == len(target) == 120
    np.testing.assert_array_equal(grid.scores()[0, 0], (predictions[0, 0] >= 0) == (target == 1))


@pytest.mark.parametrize("outputs", [None, 3])
def test_regression_scores_weigh_outputs_alike_and_predictions_are_in_the_targets_units(outputs):
    data = folded("regression", outputs, examples=300)
    recipe = Recipe(epochs=40, latent_dim=4, hidden_dim=16, batch_size=32, learning_rate=1e-2, weight_decay=0.01)
    grid = train_grid(data, [Setting("rank 2", 2, PLAIN)], [0], recipe)
    target, scale = targets(data), data.target_scale.numpy()
    errors = np.abs(grid.predictions()[0] - target) / (scale if outputs else scale[0])
    np.testing.assert_allclose(grid.scores()[0], -errors.reshape(1, len(target), -1).mean(-1), rtol=1e-5, atol=1e-6)
    assert grid.scores().mean() > -0.5  # it has learned: the training mean scores about -.8
    doubled = per_example(data, grid.predictions() * 2, "test", example_scores)
    assert doubled.mean() < grid.scores().mean()


def test_standardisation_is_fitted_on_each_folds_own_training_part():
    data = folded(folds=4)
    grid = train_grid(data, [Setting("rank 1", 1)], [0], SMALL)
    means = [grid.model(0, 0, f).standardise["text"].mean for f in range(4)]
    for mean, fold in zip(means, data.folds, strict=True):
        torch.testing.assert_close(mean, data.pool.features["text"][fold.train].mean(0), rtol=1e-4, atol=1e-5)


def test_missing_modality_changes_nothing_but_through_its_latent():
    data = folded()
    grid = train_grid(data, [Setting("rank 2", 2)], [0], SMALL)
    without = grid.without(["audio"], [0])
    noisy = folded()
    noisy.pool.features["audio"].normal_()
    grid.data = noisy
    np.testing.assert_array_equal(grid.without(["audio"], [0]), without)


def test_heads_that_cannot_afford_noise_are_trained_without_it():
    data = folded(examples=60)
    for shape, noise in (({}, "dimension"), ({"fused_dim": 3}, "none"), ({"fusion": "concatenation"}, "none")):
        grid = train_grid(data, [Setting("rank 2", 2)], [0], SMALL, **shape)
        assert grid.shape["noise"] == grid.model(0, 0).jwae.noise == noise


@pytest.mark.parametrize("task", ["regression", "multiclass"])
def test_members_at_once_are_fewer_where_variances_take_memory(task):
    shape = {"noise": "dimension", "rank": 32, "output_dim": 17, "input_dims": {"a": 3, "b": 3, "c": 3}}
    shape |= {"hidden_dim": 8, "latent_dim": 4}
    certain = grids.members_at_once(shape | {"noise": "none"}, 64, task)
    few = grids.members_at_once(shape, 64, task)
    one = grids.members_at_once(shape | {"rank": 4, "output_dim": 1}, 64, task)
    assert certain == one == grids.MEMBERS_AT_ONCE > few >= 1
    assert few < 5 if task == "multiclass" else 20 < few < 60
    of_two = grids.members_at_once(shape | {"input_dims": {"a": 3, "b": 3}}, 64, task)
    assert of_two == grids.MEMBERS_AT_ONCE if task == "regression" else few < of_two <= grids.MEMBERS_AT_ONCE


def test_latents_of_fewer_dimensions_than_the_rank_give_no_verdict_about_it():
    data = folded(folds=4)
    grid = train_grid(data, [Setting("rank 2", 2)], [0, 1], replace(SMALL, noise="none"))
    for model in grid.models:  # wide in every direction of the first fold, nearly so in the others
        whiten_latents(model, {name: x[data.folds[0].train] for name, x in data.pool.features.items()})
    found = grid.latent_dimension("rank 2")
    by_hand = []
    for model, fold in zip(grid.models, [*range(len(data.folds))] * 2, strict=True):
        rows = data.folds[fold].train
        z = model.latents({name: x[rows] for name, x in data.pool.features.items()})
        values = [torch.linalg.eigvalsh(one.detach().double().T.cov()) for one in z]
        by_hand.append([(v.sum() ** 2 / v.square().sum()).item() for v in values])
    assert found == pytest.approx(np.min(np.mean(by_hand, 0))) and found > 2
    assert frame.verdict_of_rank(grid, "rank 2", "supported")[0] == "supported"
    for model in grid.models:
        model.jwae.encoders[model.modalities[0]][-1].weight.data[1:] = 0  # a line
    verdict, said = frame.verdict_of_rank(grid, "rank 2", "supported")
    assert verdict == "not identified" and "1.0 effective dimensions" in said
    assert frame.verdict_of_rank(grid, "rank 2", "supported", over=0)[0] == "supported"
    assert frame.verdict_of_rank(grid, "rank 2", "supported", over=1)[0] == "not identified"


def test_killed_grid_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    data, settings = folded(folds=4), [Setting("rank 1", 1), Setting("rank 2", 2, PLAIN)]
    whole = train_grid(data, settings, [0, 1], SMALL)
    path = tmp_path / "grid.safetensors"
    original, seen = grids.train, []

    class Killed(BaseException):
        pass

    def killed_after_one_epoch(*args, **options):
        def on_epoch(record):
            seen.append(record["epoch"])
            raise Killed

        schedule = args[3].__class__(**{**vars(args[3]), "checkpoint_seconds": 0.0})
        return original(*args[:3], schedule, **{**options, "on_epoch": on_epoch})

    monkeypatch.setattr(grids, "train", killed_after_one_epoch)
    with pytest.raises(Killed):
        train_grid(data, settings, [0, 1], SMALL, checkpoint=path)
    assert seen == [0] and (tmp_path / "grid-1.safetensors").exists()
    monkeypatch.setattr(grids, "train", original)
    resumed = train_grid(data, settings, [0, 1], SMALL, checkpoint=path)
    np.testing.assert_array_equal(resumed.outputs, whole.outputs)


def test_blocks_change_nothing_but_rounding_and_resume_each_by_itself(tmp_path, monkeypatch):
    data, settings = folded(folds=4), [Setting("rank 1", 1), Setting("rank 2", 2, PLAIN)]
    whole = train_grid(data, settings, [0, 1], SMALL)
    monkeypatch.setattr(grids, "MEMBERS_AT_ONCE", 6)
    blocks = train_grid(data, settings, [0, 1], SMALL, checkpoint=tmp_path / "grid.safetensors")
    assert len(list(tmp_path.glob("grid-*.safetensors"))) == 4  # two of each rank
    np.testing.assert_allclose(blocks.outputs, whole.outputs, rtol=1e-4, atol=1e-5)
    (tmp_path / "grid-2.safetensors").unlink()
    again = train_grid(data, settings, [0, 1], SMALL, checkpoint=tmp_path / "grid.safetensors")
    np.testing.assert_array_equal(again.outputs, blocks.outputs)


# ---- experiments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [rank_ablation, jwae_ablation, train])
@pytest.mark.parametrize(("task", "outputs", "folds"), [("binary", None, 4), ("regression", 2, 1)])
def test_experiment_ends_in_a_verdict_and_numbers_that_are_json(module, task, outputs, folds, tmp_path):
    options = module.EXPERIMENT.options(seeds=2, epochs=1)
    (tmp_path / "run.json").write_text("{}")  # as open_run leaves it: saved models hold a copy
    outcome = module.measure(folded(task, outputs, folds), frame.Run(options, tmp_path, torch.device("cpu")))
    assert outcome.verdict in ("supported", "not supported", "cannot tell", "not identified")
    assert outcome.contrasts and all(c.p_corrected >= c.p for c in outcome.contrasts)
    json.dumps(outcome.numbers, default=lambda value: value.tolist(), allow_nan=False)
    assert len(outcome.table.splitlines()) > 5
    if module is rank_ablation:
        word, better = ("MAE / std", np.argmin) if task == "regression" else ("AUROC", np.argmax)
        means = [outcome.numbers[f"jWAE, rank {rank}"][word].mean() for rank in rank_ablation.RANKS]
        assert f"Best mean {word} at rank {rank_ablation.RANKS[better(means)]}," in outcome.answer


def test_baselines_are_trained_on_the_same_examples_and_the_constant_knows_nothing(tmp_path):
    data = folded("regression", examples=200)
    run = frame.Run(train.TrainOptions(seeds=2, epochs=1), tmp_path, torch.device("cpu"))
    (tmp_path / "run.json").write_text("{}")
    outcome = train.measure(data, run)
    assert {"MKL-SVM, learned weights", "tensor product (TFN)", "audio alone", "training mean"} <= set(outcome.numbers)
    assert np.mean(outcome.numbers["training mean"]["correlation"]["per seed and fold"]) == 0
    assert outcome.numbers["audio alone"]["parameters"] < outcome.numbers[train.MAIN]["parameters"]


def test_a_row_of_baselines_says_what_its_members_say_together():
    data = folded(examples=40)
    logits = np.random.default_rng(0).normal(size=(3, len(data.test_rows))) * 4
    together = train.ensemble_outputs(data, logits)
    np.testing.assert_allclose(1 / (1 + np.exp(-together)), (1 / (1 + np.exp(-logits))).mean(0)[None], rtol=1e-5)
    values = np.random.default_rng(1).normal(size=(3, 5, 2))
    regression = folded("regression", examples=40)
    np.testing.assert_array_equal(train.ensemble_outputs(regression, values), values.mean(0)[None])
    scores = train.fold_scores(data, logits, True)
    assert "log_loss" not in train.fold_scores(data, logits, False), "a margin is no logit"
    methods = {train.MAIN: train.MethodResult(logits, 9, 0.1), "machine": train.MethodResult(logits[:1], None, 0.1)}
    ensembles = {train.MAIN: train.fold_scores(data, together, True)}
    rows = {train.MAIN: scores, "machine": train.fold_scores(data, logits[:1], False)}
    lines = train.table(data, methods, rows, ensembles).splitlines()
    assert lines[3].startswith("  mean of its 3 members") and lines[4].endswith("-")
    loss = ensembles[train.MAIN]["log_loss"][0]
    assert loss.shape == (1, 1) and loss < scores["log_loss"][0].mean(), "convex: the mean loses less than its members"


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_module(tmp_path, monkeypatch, capfd):
    """`python -m experiments.NAME FLAGS` in tmp_path, within this process: the imports are paid for."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}.items():  # of what `reproduce` starts
        monkeypatch.setenv(name, value)

    def run_here(name: str, *arguments: object) -> Done:
        flags = list(map(str, arguments))
        module = importlib.import_module(f"experiments.{name}")
        capfd.readouterr()
        try:
            code = module.run(flags) if hasattr(module, "run") else frame.run(module.EXPERIMENT, flags)
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capfd.readouterr())

    return run_here


def test_command_leaves_table_figure_and_results_and_says_when_it_is_complete(run_module, tmp_path):
    data = write_mosi(tmp_path / "mosi.npz")
    flags = ("--dataset", "cmu_mosi", "--data", data, "--seeds", 2, "--epochs", 1)
    first = run_module("rank_ablation", *flags)
    assert first.returncode == 0, first.stderr
    assert "verdict: " in first.stdout and "no dev split" in first.stdout
    folder = tmp_path / "runs" / "rank_ablation-cmu_mosi"
    results = json.loads((folder / "results.json").read_text())
    assert results["examples"]["test"] == 30 and results["seeds"] == 2 and len(results["contrasts"]) == 24
    assert (folder / "figure.png").stat().st_size > 10_000
    assert not (folder / "checkpoints").exists()
    again = run_module("rank_ablation", *flags, "--resume")
    assert again.returncode == 0 and "complete" in again.stdout
    other = run_module("rank_ablation", *flags[:-2], "--epochs", 2, "--resume")
    assert other.returncode == 2 and "--epochs" in other.stderr and other.stderr.count("\n") == 1
    taken = run_module("jwae_ablation", *flags, "--name", folder.name, "--resume")
    assert taken.returncode == 2 and "another experiment" in taken.stderr


def test_question_about_several_modalities_is_not_put_to_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frame, "load_folded", lambda *_: only(folded(), ["text"]))
    for module in (modality_balance, modality_dropout, rank_semantics):
        with pytest.raises(InputError, match="needs 2 modalities"):
            frame.execute(module.EXPERIMENT, frame.Options(seeds=2, epochs=1))
    assert not (tmp_path / "runs").exists()


def test_flag_of_another_data_set_is_refused():
    with pytest.raises(InputError, match="--folds: has no use with --dataset pom"):
        frame.execute(rank_ablation.EXPERIMENT, frame.Options(dataset="pom", folds=Path("x")))


def finished_in_small(experiment: str, dataset: str, code: str = "abc", **changes) -> Finished:
    rng = np.random.default_rng(len(experiment))
    named = {
        "=a": Difference(rng.normal(0.02, 0.02, (1, 10)), "a", route="auroc"),
        "b": Difference(rng.normal(0, 0.02, (1, 10)), "b", decides=False),
    }
    made = corrected_contrasts(named, 0.01, cut=Cut((9,) * 10, 0.25))
    results = {"claim": "C.", "question": "Q?", "verdict": made[0].verdict, "answer": "One\nsentence.", "notes": ["n"]}
    results |= {"contrasts": [vars(c) for c in made], "table": "t", "seconds": 60.0, "threads": 2, "seeds": 3}
    results |= {"examples": {"train": 30, "dev": 6, "test": 9}, "folds": 10, "repeats": 2, "resumed": False}
    results |= {"peak_memory_gb": 1.0} | changes
    return Finished(experiment, dataset, Path("runs/x"), results, "python -m x", None, code, "cpu")


def rows_of(finished):
    return list(csv.DictReader(io.StringIO(results_pages.contrasts_csv(finished))))


def test_results_of_all_datasets_fit_into_180_lines_and_say_their_code():
    all_of_them = [
        finished_in_small(name, dataset) for dataset, corpus in reproduce.CORPORA.items() for name in corpus.asked
    ] + [finished_in_small(name, name) for name in reproduce.OF_ITS_OWN]
    text = results_summary.summary(rows_of(all_of_them), "docs/results")
    assert text.splitlines()[0] == "# Results of code abc" and len(text.splitlines()) <= 180
    assert text.count("*C* (") == len(reproduce.EXPERIMENTS) and "Over the data sets" in text
    assert text.count("](docs/results/") == len(all_of_them) + 2
    mixed = rows_of([*all_of_them, finished_in_small("baselines", "demo", "def")])
    assert results_summary.summary(mixed, "docs/results").startswith("# Results of code abc, def (MIXED")


def test_all_contrasts_are_in_one_table_that_no_spreadsheet_runs():
    rows = rows_of([finished_in_small("baselines", "demo")])
    assert [(row["contrast"], row["decides"]) for row in rows] == [("'=a", "1"), ("b", "0")]
    assert 0 < float(rows[0]["power"]) < 1 and float(rows[0]["false_support"]) < 0.05
    assert rows[0]["examples"] == "45"


def test_the_contrast_that_decides_is_the_weakest_of_the_best_route():
    row = {"decides": "1", "standard_error": "1", "route": "x", "contrast": ""}
    rows = [row | {"route": r, "estimate": e, "contrast": r + e} for r, e in (("x", "5"), ("x", "1"), ("y", "2"))]
    rows.append(row | {"decides": "0", "estimate": "9"})
    assert results_summary.deciding_row(rows)["contrast"] == "y2"


def test_power_without_folds_is_that_of_the_weakest_contrast_of_the_best_route():
    row = {"decides": "1", "power": "", "route": "x", "power_alone": "0.5"}
    rows = [row, row | {"power_alone": "0.3"}, row | {"route": "y", "power_alone": "0.4"}]
    rows.append(row | {"decides": "0", "power_alone": "0.9", "route": "z"})
    assert results_summary.power_of(rows) == "< 0.40" and results_summary.power_of(rows[3:]) == "< 0.90"
    assert results_summary.power_of([row | {"power": "0.123"}]) == "0.12"
    named = [
        one | {"experiment": "e", "dataset": f"d{k}"} for k, one in enumerate([*rows, row | {"power_alone": "0.85"}])
    ]
    assert results_summary.power_table(named)[2:] == ["| e | < 0.90 (d3) | 1 of 4 |"]


def test_answers_of_a_readme_are_counts_of_verdicts():
    kept = [finished_in_small("baselines", name, verdict=v) for name, v in (("a", "supported"), ("b", "cannot tell"))]
    kept.append(finished_in_small("robustness", "a", verdict="not identified"))
    readme = (
        "| q | `python -m` | answers |\n| is it? | `experiments.baselines` | 9/9 |\n"
        "| it? | `experiments.robustness` RUN | old |\n| what? | `experiments.wma` | 1/2/3/4 |\n| `experiments.x` |\n"
    )
    expected = readme.replace("9/9", "1/0/1/0").replace("old", "0/0/0/1").replace("1/2/3/4", "not run")
    assert results_summary.with_answers(readme, rows_of(kept)) == expected


def test_kept_results_are_what_their_contrasts_say():
    path = ROOT / "docs" / "results" / "contrasts.csv"
    if not path.exists():
        pytest.skip("docs/results/contrasts.csv is not there: RESULTS.md is not of this generator")
    text = results_summary.summary(results_summary.read_contrasts(path), "docs/results")
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dataset": "pom"}, "--data"),
        ({"data": Path("x.npz")}, "--dataset"),
        ({"dataset": "cmu_mosi", "data": Path("missing.npz")}, "missing.npz"),
    ],
)
def test_data_that_cannot_be_had_is_one_line_naming_flag_or_file(flags, said):
    with pytest.raises(InputError, match=said) as error:
        load_folded(DataOptions(**flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": 1}, "--seeds"),
        ({"cross_validate": 1}, "--cross-validate"),
        ({"repeats": 2}, "--repeats"),
        ({"epochs": 0}, "--epochs"),
        ({"weight_decay": 1e4}, "--weight-decay"),
    ],
)
def test_flags_out_of_range_are_refused_before_anything_is_loaded(change, said):
    with pytest.raises(InputError, match=said):
        frame.execute(rank_ablation.EXPERIMENT, frame.Options(**change))


def test_a_regression_is_trained_for_longer_unless_a_flag_says_how_long():
    assert frame.Options().recipe("binary") == frame.Options().recipe("multiclass") == Recipe()
    assert frame.Options().recipe("regression") == replace(Recipe(), epochs=REGRESSION_EPOCHS)
    assert frame.Options(epochs=3, hidden_dim=7).recipe("regression") == replace(Recipe(), epochs=3, hidden_dim=7)


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_the_best_of_the_baselines_is_that_of_the_primary_score():
    def scores_of(**values):
        return {name: (np.full((2, 1), value), None) for name, value in values.items()}

    data = SimpleNamespace(task="binary")
    scores = {
        train.MAIN: scores_of(accuracy=0.7, auroc=0.9),
        "more accurate": scores_of(accuracy=0.8, auroc=0.8),
    }
    assert train.answer_sentence(data, scores).endswith(f"Best mean auroc: {train.MAIN}, 0.900.")
    data.task = "regression"  # an error, and the smaller is better
    scores = {train.MAIN: scores_of(correlation=0.1, mae=0.9), "other": scores_of(correlation=0.0, mae=0.8)}
    assert train.answer_sentence(data, scores).endswith("Best mean mae: other, 0.800.")


# ---- reproduce ---------------------------------------------------------------------------------------------------


def test_reproduce_writes_what_it_found_and_goes_on_where_it_stopped(run_module, tmp_path):
    (tmp_path / "data").mkdir()
    write_tweets(tmp_path / "data" / "photo_tweets.npz")
    asked = ("rank_ablation", "jwae_ablation")
    flags = ("--data-root", "data", "--only", "photo_tweets", *asked, "--folds", 2, "--repeats", 1, "--epochs", 1)
    first = run_module("reproduce", *flags)
    assert first.returncode == 0, first.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    for job in asked:
        shown = f"experiments.{job} --dataset arrays --data photo_tweets.npz --cross-validate 2 --seeds 1 --epochs 1"
        assert shown in text
        assert (
            f"(docs/results/{job}-photo_tweets.md)" in text
            and (tmp_path / f"docs/results/{job}-photo_tweets.png").exists()
        )
    assert str(tmp_path) not in text and (tmp_path / "docs/results/forest.png").stat().st_size > 10_000
    rows = results_summary.read_contrasts(tmp_path / "docs/results/contrasts.csv")
    assert results_summary.summary(rows, "docs/results") == text
    pages = [
        (tmp_path / f"docs/results/{job}-photo_tweets.md").read_text() for job in ("rank_ablation", "jwae_ablation")
    ]
    assert all("| contrast | estimate |" in page and str(tmp_path) not in page for page in pages)
    other_code = tmp_path / "runs/reproduce-rank_ablation-photo_tweets/run.json"
    written = other_code.read_text()
    other_code.write_text(re.sub(r'"code": "\w+"', '"code": "0123"', written))
    refused = run_module("reproduce", *flags, "--resume")
    assert refused.returncode == 2 and "other code (0123" in refused.stderr and "--mix-code" in refused.stderr
    mixed = run_module("reproduce", *flags, "--resume", "--mix-code")
    assert mixed.returncode == 0 and "(MIXED" in (tmp_path / "RESULTS.md").read_text().splitlines()[0]
    other_code.write_text(written)
    refused = run_module("reproduce", *flags)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    (tmp_path / "runs/reproduce-jwae_ablation-photo_tweets/results.json").unlink()
    (tmp_path / "runs/reproduce-jwae_ablation-photo_tweets/figure.png").unlink()
    other = run_module("reproduce", *flags[:-1], 2, "--resume")
    assert other.returncode == 2 and "--epochs 1, not 2" in other.stderr.splitlines()[-1]
    resumed = run_module("reproduce", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "rank_ablation on photo_tweets" not in resumed.stdout.split("RESULTS.md")[0]
    again = (tmp_path / "docs/results/rank_ablation-photo_tweets.md").read_text()
    assert again == pages[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"only": ("nonsense",)}, "--only nonsense"),
        ({"only": ("pom", "baselines")}, "--only pom: not found"),
        ({"data_root": Path("no-such-folder")}, "--data-root no-such-folder"),
    ],
)
def test_reproduce_refuses_what_it_does_not_know(change, said):
    with pytest.raises(InputError, match=said):
        list(reproduce.find_jobs(reproduce.Config(**change)))


def test_a_choice_that_asks_nothing_is_refused():
    with pytest.raises(InputError, match="--only demo synthetic: asks of no data set"):
        reproduce.main(reproduce.Config(only=("demo", "synthetic")))


def test_folder_without_data_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no data set"):
        list(reproduce.find_jobs(reproduce.Config(data_root=tmp_path)))


def test_without_a_data_root_the_demo_alone_is_run():
    jobs = list(reproduce.find_jobs(reproduce.Config()))
    assert jobs[0].experiment == reproduce.MODELS
    assert [job.experiment for job in jobs] == [*reproduce.CORPORA["demo"].asked, *reproduce.OF_ITS_OWN]
    own = set(reproduce.OF_ITS_OWN)
    assert {job.dataset for job in jobs} == {"demo"} | own
    assert {job.experiment for job in jobs if job.dataset != "demo"} == own


@pytest.mark.parametrize(
    ("only", "datasets"), [(("demo",), {"demo"}), (("synthetic",), {"synthetic"}), (("rank_ablation",), {"demo"})]
)
def test_an_experiment_that_draws_its_own_data_is_run_once_and_not_where_data_sets_are_chosen(only, datasets):
    jobs = list(reproduce.find_jobs(reproduce.Config(only=only)))
    assert {job.dataset for job in jobs} == datasets
    assert len(jobs) == (1 if "demo" not in only else len(reproduce.CORPORA["demo"].asked))


def test_the_longest_is_begun_first_so_that_no_core_waits_for_it_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(reproduce, "run_commands", lambda commands, at_once: begun.extend(commands))
    monkeypatch.setattr(reproduce, "finished", lambda job: job.experiment)
    monkeypatch.setattr(reproduce, "write_pages", lambda found, *_: begun.append(found))
    reproduce.main(reproduce.Config())
    *commands, written = begun
    assert commands[0].name == "synthetic on synthetic" and commands[1].name == "baselines on demo"
    assert commands[0].after == commands[0].name  # it waits for nothing
    assert written[0] == "baselines" and written[-1] == "synthetic"  # the pages keep their order


def test_what_measures_a_run_brings_its_training_along():
    jobs = list(reproduce.find_jobs(reproduce.Config(only=("robustness", "uncertainty"))))
    assert [job.experiment for job in jobs] == ["baselines", "robustness", "uncertainty"]
    assert reproduce.flags(jobs[1], reproduce.Config())[0] == str(jobs[0].folder)


def test_memes_are_asked_what_their_splits_allow_with_both_encoders(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    config = reproduce.Config(data_root=tmp_path, only=("hateful_memes",), text_encoder="bert", image_encoder="r.pth")
    jobs = {job.experiment: reproduce.flags(job, config) for job in reproduce.find_jobs(config)}
    assert "uncertainty" not in jobs and {"baselines", "robustness", "temporal", "wma"} < set(jobs)
    given = parse(frame.options_of(rank_ablation.EXPERIMENT), jobs["rank_ablation"])
    assert (given.text_encoder, given.image_encoder, given.cross_validate) == ("bert", "r.pth", None)


def test_the_command_of_a_measured_run_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = (j for j in reproduce.find_jobs(reproduce.Config(only=("robustness",))) if j.experiment == "robustness")
    job.folder.mkdir(parents=True)
    settings = {"run": str(tmp_path / "runs/reproduce-baselines-demo"), "groups": ["features"]}
    (job.folder / "run.json").write_text(json.dumps({"settings": settings}))
    shown = "python -m experiments.robustness runs/reproduce-baselines-demo --groups features"
    assert reproduce.command(job) == shown


def test_digits_are_arrays_on_which_alignment_alone_is_asked_for(tmp_path):
    (tmp_path / "mfeat_digits.npz").write_bytes(b"x")
    jobs = list(reproduce.find_jobs(reproduce.Config(data_root=tmp_path, only=("digits",))))
    assert [(job.experiment, job.dataset) for job in jobs] == [("alignment", "digits"), ("modality_count", "digits")]
    first, second = (reproduce.flags(job, reproduce.Config()) for job in jobs)
    assert first[:7] == ["--dataset", "arrays", "--target", "digit", "--hold-out", "0.5", "--modalities"]
    assert "--modalities" not in second
    for job, of_job in zip(jobs, (first, second), strict=True):
        assert parse(job.options, of_job).dataset == "arrays"


@pytest.mark.parametrize(("name", "file"), [("clip", "clip_coco_pairs.npz"), ("cells", "snareseq_cells.npz")])
def test_pairs_are_aligned_and_nothing_else_and_by_few_seeds(tmp_path, name, file):
    (tmp_path / file).write_bytes(b"x")
    (job,) = reproduce.find_jobs(reproduce.Config(data_root=tmp_path, only=(name,)))
    options = parse(job.options, reproduce.flags(job, reproduce.Config()))
    assert (job.experiment, options.dataset, options.data.name, options.seeds) == ("alignment", "pairs", file, 3)
    assert len(options.modalities) == 2 and options.identity == (name == "clip")
    assert parse(job.options, reproduce.flags(job, reproduce.Config(epochs=1))).seeds == 2
