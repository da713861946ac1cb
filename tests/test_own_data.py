"""What a newcomer with arrays of her own meets first: each has an answer, or an error in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion import train
from mmfusion.data.arrays import ArraysConfig, dataset_from_arrays
from mmfusion.data.cmu_mosi import load_cmu_mosi
from mmfusion.errors import InputError
from mmfusion.explain import __main__ as explain
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.runs import figure
from mmfusion.train import Config, Run, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

PAGE = (Path(__file__).parent.parent / "docs" / "your_data.md").read_text(encoding="utf-8")
SMALL = TrainingConfig(seeds=2, epochs=2)
ONE = [[Method("jWAE-LMF", ("a", "b"), active_rank=2)]]
HELD_OUT = ArraysConfig(hold_out=0.3)
N = 80


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays_with(target: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(N, 4)), "b": rng.normal(size=(N, 3)), "target": target} | more


def classes(count: int) -> np.ndarray:
    return np.arange(N) % count


def fit_small(target: np.ndarray) -> Run:
    return fit(arrays_with(target), Config(HELD_OUT, SMALL), ONE)


# ---- the file ----------------------------------------------------------------------------------------------------


def test_an_own_file_is_no_cmu_mosi_and_the_message_says_where_it_belongs(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "dev", "test"):
        arrays |= {f"text_{split}": rng.normal(size=(30, 4)), f"label_{split}": np.arange(30) % 3}
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(InputError, match=r"is no .npz of CMU-MOSI.*--dataset arrays") as error:
        load_cmu_mosi(tmp_path / "mine.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named_before_anything_is_trained(bad, tmp_path):
    arrays = arrays_with(classes(2))
    arrays["b"][7, 1] = bad
    with pytest.raises(InputError, match=r"b: row 7 holds (nan|inf)"):
        fit(arrays, Config(HELD_OUT, SMALL), ONE)
    assert not (tmp_path / "runs").exists()


def test_the_command_says_so_in_one_line(tmp_path, capsys):
    arrays = arrays_with(classes(2))
    arrays["a"][3, 0] = np.nan
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(SystemExit) as end:
        train.run(["--data", "mine.npz", "--hold-out", "0.3"])
    assert end.value.code == 2
    assert re.fullmatch(r"error: mine\.npz: a: row 3 holds nan.*\n", capsys.readouterr().err)


# ---- the target --------------------------------------------------------------------------------------------------


def test_two_classes_are_trained_and_scored_alike_however_they_are_written():
    plain = classes(2)
    ways = {
        "0 and 1": plain,
        "-1 and 1": 2 * plain - 1,
        "1 and 2": plain + 1,
        "one-hot": np.eye(2)[plain],
        "texts": np.array(["no", "yes"])[plain],
        "booleans": plain.astype(bool),
    }
    datasets = {way: dataset_from_arrays(arrays_with(target), HELD_OUT)[0] for way, target in ways.items()}
    for way, dataset in datasets.items():
        assert (dataset.task, dataset.output_dim) == ("binary", 1), way
        for name, split in dataset.splits.items():
            assert torch.equal(split.target, datasets["0 and 1"].splits[name].target), way
    assert fit_small(ways["-1 and 1"]).scores == fit_small(ways["one-hot"]).scores


def test_more_classes_are_scored_alike_as_numbers_and_one_hot():
    numbered, hot = fit_small(classes(4) + 1), fit_small(np.eye(4)[classes(4)])
    assert numbered.scores == hot.scores
    assert numbered.trained.datasets[0].class_names == ("1", "2", "3", "4")


# ---- predictions -------------------------------------------------------------------------------------------------


def test_probabilities_of_four_classes_sum_to_one_and_take_numpy_or_tensors():
    run = fit_small(classes(4))
    new = {"a": np.random.default_rng(1).normal(size=(5, 4)), "b": np.ones((5, 3), np.float32)}
    p = run.predict_proba(new)
    assert p.shape == (5, 4)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    loaded = FusionEnsemble.from_pretrained(run.folder)
    of_members = loaded.predict_proba({name: torch.from_numpy(x) for name, x in new.items()})
    assert of_members.shape == (2, 5, 4)
    np.testing.assert_allclose(of_members.double().mean(0).numpy(), p, atol=1e-6)


def test_a_regression_has_no_probabilities_and_says_what_has_its_values():
    run = fit_small(np.random.default_rng(0).normal(loc=50, size=N))
    new = {"a": np.zeros((5, 4)), "b": np.zeros((5, 3))}
    for model in (run, FusionEnsemble.from_pretrained(run.folder)):
        with pytest.raises(ValueError, match="`predict` gives its values"):
            model.predict_proba(new)
    values = run.predict(new)
    assert values.shape == (5,) and np.abs(values - 50).max() < 20


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"a": np.zeros((5, 4))}, "missing: b"),
        ({"a": np.zeros((5, 9)), "b": np.zeros((5, 3))}, "width 4"),
    ],
)
def test_features_that_do_not_fit_are_named(features, said):
    with pytest.raises(ValueError, match=said):
        fit_small(classes(2)).predict_proba(features)


# ---- the run -----------------------------------------------------------------------------------------------------


def test_texts_as_objects_are_kept_so_that_they_are_read_again():
    run = fit_small(np.array(["cat", "dog"], object)[classes(2)])
    assert Run(run.folder).trained.datasets[0].class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        (TrainingConfig, {"class_weight": "balance"}, "--class-weight 'balance': give none or balanced"),
        (TrainingConfig, {"keep": None}, "--keep None: give best or last"),
        (TrainingConfig, {"seeds": "2"}, "--seeds '2': give a whole number"),
        (TrainingConfig, {"seeds": True}, "--seeds True: give a whole number"),
        (TrainingConfig, {"epochs": 2.5}, "--epochs 2.5: give a whole number"),
        (TrainingConfig, {"learning_rate": "fast"}, "--learning-rate 'fast': give a number"),
        (TrainingConfig, {"compile": "no"}, "--compile 'no': give True or False"),
        (
            ObjectiveConfig,
            {"alignment": "infonce"},
            f"--alignment 'infonce': give {' or '.join(ALIGNMENTS)}",
        ),
        (ObjectiveConfig, {"mmd_weight": "1"}, "--mmd-weight '1': give a number"),
        (ModelConfig, {"rank": "4"}, "--rank '4': give a whole number"),
    ],
)
def test_settings_of_another_kind_are_refused_from_python(section, settings, said):
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        section(**settings).check()


def test_numbers_of_numpy_are_numbers():
    TrainingConfig(seeds=np.int64(2), learning_rate=np.float32(1e-3)).check()
    ModelConfig(rank=np.int32(2), spectral_norm=1).check()


@pytest.mark.parametrize(
    ("data", "said"), [("act.npz", "'act.npz', a path: np.load"), ([1, 2], "data: is list and not a dict")]
)
def test_what_is_no_dict_of_arrays_is_said(data, said):
    with pytest.raises(InputError, match=said):
        fit(data)


def test_a_regression_says_which_label_kept_it_from_classes():
    target = np.append(classes(3)[:-1], 7)
    (dataset,) = dataset_from_arrays(arrays_with(target), HELD_OUT)
    assert dataset.task == "regression" and "as 7 occurs once and a class needs two examples" in dataset.notes[0]
    (dataset,) = dataset_from_arrays(arrays_with(np.arange(N) / 7), HELD_OUT)
    assert "occurs once" not in dataset.notes[0]


def test_a_new_loss_term_is_logged_and_drawn(monkeypatch):
    legends: list[list[str]] = []
    draw_losses = figure._draw_losses

    def spy(axis, trained, members):
        draw_losses(axis, trained, members)
        legends.append([text.get_text() for text in axis.get_legend().get_texts()])

    monkeypatch.setattr(figure, "_draw_losses", spy)
    terms = {"my size": (0.5, lambda output, batch: output.latents["a"].square().mean())}
    run = fit(arrays_with(classes(3)), Config(HELD_OUT, SMALL), ONE, terms)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(len(line["loss"]["my size"]) == 2 for line in lines)
    assert legends == [["cross_entropy", "mmd", "reconstruction", "alignment", "my size"]]


def test_a_further_term_is_minimised():
    def size(output, batch):
        return torch.stack([z.square().mean() for z in output.latents.values()]).mean()

    config = Config(HELD_OUT, TrainingConfig(seeds=2, epochs=8, learning_rate=1e-2))
    ends = {}
    for weight in (0.0, 100.0):
        run = fit(arrays_with(classes(2)), config, ONE, {"size": (weight, size)})
        ends[weight] = np.mean(json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]["size"])
    assert ends[100.0] < 0.5 * ends[0.0]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (classes(2), {"hold_out": 0.3}),
        (classes(3), {"folds": 3}),
        (np.random.default_rng(3).integers(0, 2, (N, 3)), {"hold_out": 0.3}),
        (np.random.default_rng(3).normal(size=N), {"folds": 2}),
        (np.random.default_rng(3).normal(size=(N, 2)), {"hold_out": 0.3}),
    ],
    ids=["binary", "multiclass", "multilabel", "regression", "two values"],
)
def test_what_python_trains_is_read_explained_and_certified(target, options, capsys):
    run = fit(arrays_with(target), Config(ArraysConfig(**options), SMALL), ONE)
    again = Run(run.folder)
    dataset = again.trained.datasets[0]
    test = {name: x[:4] for name, x in dataset.splits["test"].features.items()}
    np.testing.assert_array_equal(again.predict(test), run.predict(test))
    account = again.explain(test)
    np.testing.assert_allclose(sum(account.parts.values()), account.prediction, atol=1e-5)
    assert all(radius.shape == (2, 4) and (radius >= 0).all() for radius in again.robustness(test).values())
    assert explain.run([str(run.folder), "--split", "test", "--worst", "2"]) == 0
    assert explain.run([str(run.folder), "--summary"]) == 0
    printed = capsys.readouterr().out
    assert "a x b" in printed
    task = again.trained.task
    said = {
        "multiclass": "margin (likeliest class less",
        "multilabel": "logit of target_1",
        "binary": "of the logit on",
    }
    assert said.get(task, "correlation") in printed and ("correlation" in printed) == (task == "regression")


def _spoilt(**columns: np.ndarray) -> dict[str, np.ndarray]:
    return {"a": np.zeros((5, 4)), "b": np.zeros((5, 3))} | columns


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Run:
    """A run on two labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("labels"))
        target = np.random.default_rng(3).integers(0, 2, (N, 2))
        run = fit(arrays_with(target, target_names=np.array(["rain", "wind"])), Config(HELD_OUT, SMALL), ONE)
        return Run(run.folder.absolute())


@pytest.mark.parametrize("method", ["predict", "explain", "robustness"])
@pytest.mark.parametrize(
    ("features", "said"),
    [
        (_spoilt(a=np.where(np.arange(5)[:, None] == 3, np.nan, np.zeros((5, 4)))), "'a': row 3 holds nan"),
        (_spoilt(b=np.where(np.arange(5)[:, None] == 2, np.inf, np.zeros((5, 3)))), "'b': row 2 holds inf"),
        (_spoilt(b=np.zeros((3, 3))), "a has 5 rows, b has 3 rows"),
        (_spoilt(b=np.zeros((5, 7))), "'b': shape .5, 7. does not end in its width 3"),
        (_spoilt(b=np.zeros(3)), r"'b': shape .3,.; .* takes .N, 3."),
        (_spoilt(b=np.full((5, 3), "x")), "'b': is no array of numbers"),
        ({"a": np.zeros((5, 4))}, "METHOD needs every modality; missing: b"),
        ([np.zeros((5, 4))], "give a dict with a, b; got list"),
    ],
)
def test_all_that_a_run_answers_names_what_is_wrong(labels, method, features, said):
    with pytest.raises(ValueError, match=said.replace("METHOD", method)) as caught:
        getattr(labels, method)(features)
    assert ("missing=" in str(caught.value)) == (method == "predict" and ("nan" in said or "needs" in said))


@pytest.mark.parametrize("output", [2, -1, "rain", True])
def test_an_output_that_is_not_there_is_refused(labels, output):
    with pytest.raises(ValueError, match=f"output {output!r}: give a number from 0 to 1"):
        labels.explain(_spoilt(), output)


@pytest.mark.parametrize(
    ("target", "said"), [(np.full((5, 2), "rain"), "holds no numbers but <U4"), (np.full((5, 2), 2), "2 is no class")]
)
def test_a_target_that_does_not_calibrate_is_refused(labels, target, said):
    with pytest.raises(ValueError, match=said):
        labels.calibrate(_spoilt(), target)


def test_a_run_knows_the_names_of_its_classes(labels):
    assert labels.class_names == ("rain", "wind")
    run = fit_small(np.array(["x", "y", "z"])[classes(3)])
    assert run.class_names == ("x", "y", "z")
    with pytest.raises(ValueError, match="in the order of class_names: x, y, z"):
        run.calibrate(_spoilt(), np.full(5, "x"))
    with pytest.raises(ValueError, match="output 1: of more than two classes the margin"):
        run.explain(_spoilt(), 1)
    assert fit_small(np.arange(N) / 7).class_names == ()


# ---- what is refused before a run is begun


def _lmf(*modalities: str, **settings: object) -> Method:
    return Method("jWAE-LMF", modalities, **settings)


@pytest.mark.parametrize(
    ("stacks", "terms", "said"),
    [
        ([[_lmf("a", "gps")]], None, "method 'jWAE-LMF' takes gps; the data have a, b"),
        ([[_lmf("a", "b", active_rank=9)]], None, "method 'jWAE-LMF': .*rank"),
        ([[_lmf("a", "b", fusion="sum")]], None, "method 'jWAE-LMF': fusion is one of"),
        ([[_lmf("a", "b", fusion="concatenation")]], None, "first method, .* needs fusion='lmf'"),
        ([[_lmf("a", "b")], [_lmf("a")]], None, "is there twice"),
        ([[_lmf("a", "b"), Method("a only", ("a",))]], None, "'a only' has another shape than 'jWAE-LMF'"),
        ([], None, "give at least one method"),
        (None, {"size": (1.0, lambda output, batch: output.latents["a"].square())}, "'size' returns shape"),
        (None, {"size": (1.0, lambda output, batch: 1.0)}, "'size' returns a float"),
        (ONE, {"size": (1.0, lambda output, batch: output.latents["c"].mean())}, "'size' fails on 8 .*KeyError: 'c'"),
        (ONE, {"size": lambda output, batch: output.prediction.mean()}, "'size' is not .weight, term."),
    ],
)
def test_mistakes_in_stacks_and_terms_leave_nothing_behind(tmp_path, stacks, terms, said):
    with pytest.raises(ValueError, match=said):
        fit(arrays_with(classes(2)), Config(HELD_OUT, SMALL), stacks, terms)
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_by_command_and_from_python_gives_the_same_scores(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays_with(classes(3)))
    assert train.run(["--data", "mine.npz", "--hold-out", "0.3", "--seeds", "2", "--epochs", "2"]) == 0
    run = fit(arrays_with(classes(3)), Config(HELD_OUT, SMALL))
    assert run.folder.name == "arrays" and run.scores == Run(Path("runs/mine")).scores


def test_a_dataset_keeps_its_splits_and_classes():
    (dataset,) = dataset_from_arrays(arrays_with(np.array(["x", "y", "z"])[classes(3)]), HELD_OUT, "letters")
    run = fit(dataset, Config(training=SMALL), ONE)
    kept = run.trained.datasets[0]
    assert run.folder.name == "letters" and kept.class_names == ("x", "y", "z") and kept.task == "multiclass"
    for name, split in dataset.splits.items():
        assert kept.splits[name].ids == split.ids and torch.equal(kept.splits[name].target, split.target)


def test_a_selection_on_a_handful_of_a_class_is_said_to_be_noise(capsys):
    target = (np.arange(N) % 8 == 0).astype(int)  # a tenth of the rest is dev: one of class 1
    said = "note: dev has 1 of class 1: the selection is noise; give a larger dev split"
    fit(arrays_with(target), Config(HELD_OUT, SMALL), ONE)
    assert said in capsys.readouterr().out
    fit(arrays_with(target), Config(HELD_OUT, TrainingConfig(seeds=1, epochs=1, keep="last")), ONE)
    assert "the selection is noise" not in capsys.readouterr().out  # nothing is selected
    fit(arrays_with(np.arange(N) / 7), Config(HELD_OUT, SMALL), ONE)
    assert "the selection is noise" not in capsys.readouterr().out


def test_a_run_is_read_whatever_its_notes_were_called():
    run = fit_small(classes(2))
    path = run.folder / "run.json"
    begun = json.loads(path.read_text())
    begun["data"]["notes"] = ["as an earlier version put it"]
    path.write_text(json.dumps(begun))
    assert Run(run.folder).trained.task == "binary"


def test_examples_of_users_own_are_not_called_memes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(N, 4)), "text": rng.normal(size=(N, 3)), "target": classes(2)}
    fit(arrays, Config(HELD_OUT, SMALL), [[Method("jWAE-LMF", ("image", "text"))]])
    assert "memes" not in capsys.readouterr().out


def test_three_modalities_and_245_rows_train_and_report_without_a_warning(recwarn):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(245, width)) for name, width in {"a": 30, "b": 12, "c": 5}.items()}
    run = fit(arrays | {"target": rng.integers(0, 3, 245)}, Config(HELD_OUT, SMALL))
    assert [str(one.message) for one in recwarn] == []
    assert (run.folder / "report.png").stat().st_size > 10_000


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_pages_python_runs_as_printed():
    rng = np.random.default_rng(0)
    target = np.arange(120) % 3
    audio, video = (rng.normal(size=(120, width)) + target[:, None] for width in (4, 6))
    scope = {"audio": audio, "video": video, "target": target, "x": np.concatenate([audio, video], 1)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, scope)
    assert scope["run"].scores["jWAE-LMF, rank 4"]["test"]["accuracy"]["mean"] > 0.5
    assert scope["search"].best_score_ > 0.5
    assert scope["best"].predict_proba({"audio": audio, "video": video}).shape == (120, 3)
