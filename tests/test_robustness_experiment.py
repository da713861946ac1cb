"""What experiments.robustness measures of a trained run: whole runs in small, each number against a slow way to it."""

import csv
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from safetensors.torch import load_file
from small_memes import write_bert, write_memes, write_rows
from test_experiments import write_mosi
from test_robustness import model_of

import main_hateful_memes
from experiments import baselines as train
from experiments.experiment import run as run_experiment
from experiments.robustness import corrupted_inputs
from experiments.robustness import measure as robustness
from experiments.robustness.corrupted_inputs import encode_corrupted
from experiments.robustness.corruption_curves import CorruptionResult, Curve, _curve, curve_area
from experiments.robustness.corruption_grid import KERNEL_MACHINE, LATE_FUSION, Condition, Predictor, conditions
from experiments.robustness.figure import MODALITIES, panels, row_colors
from experiments.robustness.measure import OVER_LATE_FUSION, lead_over_constant
from hateful_memes_loader import load_hateful_memes
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import targets
from mmfusion.encoders import extract as feature_extraction
from mmfusion.encoders.frozen import ImageEncoder, find_image_encoder, image_preprocessing
from mmfusion.encoders.images import decode_rgb, digest_images, preprocess
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.attacks import pgd
from mmfusion.robustness.corruptions import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS, WITHOUT_CHANCE
from mmfusion.robustness.worst_case import (
    SIZES,
    Criterion,
    attacked_scores,
    change_size,
    feature_certificates,
    joint_scores,
    latent_attack_gap,
    latent_scores,
    latent_stds,
    outputs_under_change,
)
from mmfusion.runs.load import load_run
from mmfusion.training.grid import Grid, Setting, outputs_of

GROUPS = ("input", "features", "latents", "missing")
MAIN = "jWAE-LMF, rank 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a run on memes and what the experiment leaves of it."""
    folder, before = tmp_path_factory.mktemp("robust"), Path.cwd()
    os.chdir(folder)
    write_bert(folder / "bert")
    write_memes(folder / "memes", {"train": 40, "dev": 12, "test": 4, "dev_unseen": 16})
    flags = (
        "--jsonl memes/train.jsonl --image-encoder random:resnet50 --image-size 32 --text-encoder random:bert "
        "--latent-dim 4 --hidden-dim 6 --rank 2 --noise none --epochs 3 --batch-size 16 --device cpu --seeds 2 "
        "--name memes"
    )
    assert main_hateful_memes.run(flags.split()) == 0
    measured = "runs/memes --groups input features latents missing --draws 2 --pixels 2 --name measured"
    assert robustness.run(measured.split()) == 0
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def mosi(place):
    """A run of experiments.train without pictures: three modalities, an MKL-SVM beside them."""
    data = write_mosi(place / "mosi.npz")
    flags = ["--dataset", "cmu_mosi", "--data", str(data), "--seeds", "2", "--epochs", "1", "--device", "cpu"]
    assert run_experiment(train.EXPERIMENT, [*flags, "--name", "mosi"]) == 0
    return load_run(Path("runs/mosi"))


@pytest.fixture(scope="module")
def memes(place):
    return load_run(Path("runs/memes"))


@pytest.fixture(scope="module")
def predictor(memes):
    return Predictor(memes)


@pytest.fixture(scope="module")
def results(place):
    return json.loads(Path("runs/measured/results.json").read_text())


@pytest.fixture(scope="module")
def curves(place) -> dict[tuple, float]:
    """{(group, curve, row, severity, seed, draw): score} of curves.csv."""
    with Path("runs/measured/curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = {
        (r["group"], r["curve"], r["row"], float(r["severity"]), int(r["seed"]), int(r["draw"])): float(r["score"])
        for r in rows
    }
    assert len(made) == len(rows), "no line may stand twice"
    return made


def part_tested(run) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    (fold,) = run.data.folds
    return {name: x[fold.test] for name, x in run.data.pool.features.items()}, run.data.pool.target[fold.test].numpy()


def of_model(model: FusionModel, features: dict, present: dict | None = None) -> np.ndarray:
    mine = {name: features[name] for name in model.modalities}
    masks = {name: mask for name, mask in (present or {}).items() if name in mine}
    with torch.no_grad():
        return model(mine, reconstruct=False, present=masks).prediction.squeeze(-1).numpy()


def accuracy(logits: np.ndarray, target: np.ndarray) -> float:
    return float(((logits >= 0) == (target == 1)).mean())


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_run_leaves_its_files_and_every_number_is_finite(place, results):
    folder = Path("runs/measured")
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "table.txt", "figure.png", "results.json", "curves.csv", "masks.safetensors", "pixels",
    }  # fmt: skip
    assert (
        len(list((folder / "pixels").glob("*-before.png"))) == len(list((folder / "pixels").glob("*-after.png"))) == 2
    )
    with Image.open(folder / "figure.png") as figure:
        assert figure.width > 1000
    json.dumps(results, allow_nan=False)
    assert results["verdict"] in ("supported", "not supported", "cannot tell")
    assert sorted(c["name"] for c in results["contrasts"] if c["decides"]) == sorted(
        f"{OVER_LATE_FUSION}{group}, {word}" for group in GROUPS for word in ("AUROC", "log loss")
    )
    table = (folder / "table.txt").read_text()
    assert all(row in table for row in results["numbers"]["clean"]) and "late fusion" in table


def test_curves_hold_every_row_severity_seed_and_draw_and_begin_at_the_clean_score(curves, results, memes):
    clean = results["numbers"]["clean"]
    assert set(clean) == {*memes.ensembles, LATE_FUSION}
    features, target = part_tested(memes)
    for row in memes.ensembles:
        assert clean[row] == [accuracy(of_model(model, features), target) for model in memes.members(row)]
    kinds = {(group, curve) for group, curve, *_ in curves}
    assert len(kinds) == len(IMAGE_CORRUPTIONS) + len(TEXT_CORRUPTIONS) + 6 + 6 + 3
    for group, curve in kinds:
        levels = (0, 0.25, 0.5, 0.75, 1) if group == "missing" else (0, 0.25, 0.5, 0.75)
        without_chance = group == "input" and curve.removeprefix("image ") in WITHOUT_CHANCE
        draws = 1 if without_chance else 2
        for row in clean:
            expected = {(e, s, k) for e in levels for s in range(2) for k in range(draws)}
            assert {key[3:] for key in curves if key[:3] == (group, curve, row)} == expected
            for s in range(2):
                for k in range(draws):
                    assert curves[group, curve, row, 0, s, k] == pytest.approx(clean[row][s], abs=1e-6)


def test_results_hold_means_areas_and_drops_of_those_curves(curves, results):
    for label, cells in results["numbers"]["curves"].items():
        group, curve, row = label.split(" | ")
        scores = np.array(
            [[[v for k, v in curves.items() if k[:5] == (group, curve, row, e, s)] for s in range(2)]
             for e in cells["levels"]]
        )  # (E, S, draws)  # fmt: skip
        assert cells["mean"] == pytest.approx(scores.mean((1, 2)), abs=2e-6)
        assert cells["drop"] == pytest.approx((scores[0] - scores[-1]).mean(-1), abs=2e-6)
        area = np.trapezoid(scores.mean(-1), cells["levels"], axis=0) / cells["levels"][-1]
        assert cells["area"] == pytest.approx(area, abs=2e-6)


def test_contrast_of_auroc_is_the_change_of_the_tables_selection_score(results):
    by_name = {contrast["name"]: contrast["estimate"] for contrast in results["contrasts"]}
    auroc = {
        group: {row: np.mean(values) for row, values in rows.items()}
        for group, rows in results["numbers"]["selection score"].items()
    }
    for group in GROUPS:
        ours, late = (auroc[group][row] - auroc["clean"][row] for row in (MAIN, LATE_FUSION))
        assert by_name[f"{OVER_LATE_FUSION}{group}, AUROC"] == pytest.approx(ours - late, abs=1e-9)


def test_masks_that_are_kept_give_the_curve_of_missing_modalities_by_hand(memes, curves):
    kept = load_file("runs/measured/masks.safetensors")
    features, target = part_tested(memes)
    seen = set()
    for key in {key.rpartition("/")[0] for key in kept}:
        where, level, draw = key.split("/")
        masks = {name: kept[f"{key}/{name}"].float() for name in ("image", "text")}
        assert sum(int((1 - mask).sum()) for mask in masks.values()) == round(float(level) * 16)
        for row in memes.ensembles:
            for s, model in enumerate(memes.members(row)):
                score = curves["missing", f"missing, {where}", row, float(level), s, int(draw)]
                assert accuracy(of_model(model, features, masks), target) == pytest.approx(score, abs=1e-6)
                seen.add(score)
    assert len(seen) > 4


def test_complete_run_is_said_to_be_complete_and_other_flags_are_refused(place, capsys):
    flags = "runs/memes --groups input features latents missing --draws 2 --pixels 2 --name measured --resume"
    before = {path: path.stat().st_mtime_ns for path in Path("runs/measured").rglob("*")}
    assert robustness.run(flags.split()) == 0 and "complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/measured").rglob("*")}
    assert "--draws 2, not 3" in refused(capsys, flags.replace("--draws 2", "--draws 3"))


@pytest.mark.parametrize(("names", "said"), [("ab", "missing, either"), ("abc", "missing, one of them")])
def test_one_of_two_modalities_is_either_and_of_three_one_of_them(names, said):
    run = SimpleNamespace(data=SimpleNamespace(input_dims=dict.fromkeys(names, 2)), folder="runs/toy")
    made = conditions(run, ("missing",), 1)
    assert {c.curve for c in made if c.where == "either"} == {said}
    drawn = Condition("missing", "missing", "either", 0.5, 0)  # a name changes no draw
    found = next(c for c in made if c.where == "either").rng().random()
    assert found == drawn.rng().random()
    assert panels(CorruptionResult({}, {("missing", said): {}, ("missing", "missing, a"): {}}, {}, {}))[0][0] == said


# ---- predictions under a condition -----------------------------------------------------------------------------------


def test_late_fusion_is_the_mean_of_the_one_modality_rows(memes, predictor):
    features, _ = part_tested(memes)
    singles = ["image only", "text only"]
    by_hand = [[of_model(m, features) for m in memes.members(row)] for row in singles]
    np.testing.assert_allclose(predictor.clean(LATE_FUSION), np.mean(by_hand, axis=0), atol=1e-6)
    made = Condition("missing", "missing", "either", 0.5, 0)
    masks = {name: torch.from_numpy(mask) for name, mask in predictor.masks(made).items()}
    said = predictor.corrupted(LATE_FUSION, made)
    there = {name: masks[name].numpy() > 0 for name in ("image", "text")}
    assert not there["image"].all() and not there["text"].all()
    both, image_alone = there["image"] & there["text"], there["image"] & ~there["text"]
    np.testing.assert_allclose(said[:, both], np.mean(by_hand, axis=0)[:, both], atol=1e-6)
    np.testing.assert_allclose(said[:, image_alone], np.array(by_hand[0])[:, image_alone], atol=1e-6)


def test_effective_robustness_has_no_verdict_where_late_fusion_has_nothing_to_lose(memes, predictor):
    said = np.zeros((2, len(memes.data.test_rows)))
    assert lead_over_constant(memes, said) == 0
    truth = targets(memes.data)
    assert lead_over_constant(memes, said + truth) == 0.5
    assert lead_over_constant(memes, said - truth) == -0.5


def test_examples_that_lack_a_modality_at_a_low_rate_lack_it_at_every_higher_one(predictor):
    masks = [predictor.masks(Condition("missing", "missing", "either", e, 1)) for e in (0.25, 0.5, 0.75)]
    for name in ("image", "text"):
        assert (masks[0][name] >= masks[1][name]).all() and (masks[1][name] >= masks[2][name]).all()
    affected = predictor.affected(Condition("missing", "missing", "either", 0.5, 1))
    assert affected.sum() == round(0.5 * len(affected))


def test_score_where_all_lack_a_modality_is_that_of_the_grid_without_it(memes, predictor):
    models = list(memes.ensembles[MAIN].members)
    outputs = outputs_of(memes.data, models)
    grid = Grid(memes.data, [Setting(MAIN, 2)], [0, 1], models, outputs.reshape(1, 2, 1, -1), {})
    (_, target) = part_tested(memes)
    for name in ("image", "text"):
        said = predictor.corrupted(MAIN, Condition("missing", "missing", name, 1.0, 0))
        np.testing.assert_array_equal((said >= 0) == (target == 1), grid.without([name], [0])[0] == 1)
        np.testing.assert_allclose(said, outputs_of(memes.data, models, [name])[:, memes.data.test_rows], atol=1e-6)


@pytest.mark.parametrize("where", ["text", "image"])
def test_accuracy_is_linear_in_the_rate_of_missing_modalities(memes, predictor, where):
    _, target = part_tested(memes)

    def right(condition: Condition) -> np.ndarray:
        return (predictor.corrupted(MAIN, condition) >= 0) == (target == 1)

    none = (predictor.clean(MAIN)[0] >= 0) == (target == 1)
    whole = right(Condition("missing", "missing", where, 1.0, 0))[0]
    for rate in (0.25, 0.75):
        scores = [right(Condition("missing", "missing", where, rate, k))[0].mean() for k in range(300)]
        line = (1 - rate) * none.mean() + rate * whole.mean()
        error = np.std(scores) / 300**0.5
        assert np.mean(scores) == pytest.approx(line, abs=4 * error + 1e-9)


@pytest.mark.parametrize("group", ["feature", "latent"])
def test_all_coordinates_dropped_leave_the_prediction_at_the_training_mean(memes, predictor, group):
    (fold,) = memes.data.folds
    said = predictor.corrupted(MAIN, Condition(f"{group}s", f"{group} dropout", "all", 1.0, 0))
    for s, model in enumerate(memes.members(MAIN)):
        train_features = {name: x[fold.train] for name, x in memes.data.pool.features.items()}
        if group == "feature":
            expected = model({k: x.mean(0, keepdim=True) for k, x in train_features.items()}).prediction
        else:
            means = {k: z.mean(0, keepdim=True) for k, z in model.encode(train_features).items()}
            expected = model.fusion([means[name] for name in model.modalities])
        np.testing.assert_allclose(said[s], np.full(16, expected.item()), atol=1e-4)


@pytest.mark.parametrize("name", ["feature noise", "latent noise"])
def test_noise_on_one_modality_leaves_the_row_of_the_other_alone_and_is_the_same_for_all_rows(predictor, name):
    condition = Condition(f"{name.split()[0]}s", name, "image", 0.5, 1)
    np.testing.assert_array_equal(predictor.corrupted("text only", condition), predictor.clean("text only"))
    assert np.abs(predictor.corrupted("image only", condition) - predictor.clean("image only")).max() > 1e-3
    np.testing.assert_array_equal(predictor.corrupted(MAIN, condition), predictor.corrupted(MAIN, condition))
    both = condition._replace(where="all")
    assert np.abs(predictor.corrupted("text only", both) - predictor.clean("text only")).max() > 1e-4


def test_noise_of_a_latent_moves_the_logit_by_the_length_of_its_gradient(memes, predictor):
    # exact for LMF: y is affine in one latent, so noise s adds a deviation |s * dy/dz|_2
    features, _ = part_tested(memes)
    model = memes.members(MAIN)[0]
    (fold,) = memes.data.folds
    stds = latent_stds(model, {name: x[fold.train] for name, x in memes.data.pool.features.items()})
    latents = model.latents(features)
    gradient = model.fusion.modality_gradient(latents, 0)[:, 0]  # (n, L)
    expected = 0.5 * (gradient * stds["image"]).norm(dim=1)
    moved = [predictor.corrupted(MAIN, Condition("latents", "latent noise", "image", 0.5, k))[0] for k in range(800)]
    change = np.stack(moved) - predictor.clean(MAIN)[0]
    np.testing.assert_allclose(change.std(0), expected.numpy(), rtol=0.15)  # 2.5 % of sampling error each
    assert change.std(0).mean() == pytest.approx(expected.mean().item(), rel=0.03)
    assert np.abs(change.mean(0) / (change.std(0) / 800**0.5)).max() < 5


def test_random_numbers_belong_to_the_condition_alone():
    one = Condition("missing", "missing", "text", 0.5, 0)
    draws = [one, one._replace(draw=1), one._replace(name="other"), one._replace(where="image")]
    values = [condition.rng().random() for condition in draws]
    assert len(set(values)) == 4 and one.rng().random() == values[0]
    assert one._replace(level=0.25).rng().random() == values[0]  # severities share them


# ---- corrupted inputs ------------------------------------------------------------------------------------------------


def test_corrupted_inputs_are_encoded_once(memes, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("an encoder was built")

    monkeypatch.setattr(feature_extraction, "ImageEncoder", refuse)
    monkeypatch.setattr(feature_extraction, "TextEncoder", refuse)
    made = conditions(memes, ("input",), 2)
    drawn = 2 * (len(IMAGE_CORRUPTIONS) + len(TEXT_CORRUPTIONS)) - len(WITHOUT_CHANCE)
    assert len(made) == 3 * drawn
    again = Predictor(memes)
    again.prepare(made)
    for condition in made:
        again.corrupted(MAIN, condition)
    for new in (made[0]._replace(level=0.9), made[-1]._replace(level=0.9)):
        with pytest.raises(AssertionError, match="an encoder was built"):
            again.prepare([new])


def test_corrupted_memes_get_the_vectors_of_such_memes_on_disk(memes, tmp_path):
    pictures = ("image", "rotation", 0.5, 0), ("image", "noise", 0.25, 0)
    words = ("text", "typos", 0.75, 0), ("text", "word mask", 0.5, 0)
    found = encode_corrupted(memes, [*pictures, *words])
    ids = memes.datasets[0].splits["dev_unseen"].ids
    paths = memes.image_paths(ids)
    digests, _ = digest_images(list(paths.values()))
    for number, (picture, word) in enumerate(zip(pictures, words, strict=True)):
        folder = tmp_path / str(number)
        shutil.copytree("memes", folder)
        rows = [json.loads(line) for line in (folder / "dev_unseen.jsonl").read_text().splitlines()]
        for row in rows:
            key = row["img"]
            seed = int(corrupted_inputs._digest(digests[paths[key]], picture)[:16], 16)
            changed = IMAGE_CORRUPTIONS[picture[1]](decode_rgb(paths[key]), picture[2], np.random.default_rng(seed))
            changed.save(folder / key)
            seed = int(corrupted_inputs._digest(f"{key} {row['text']}", word)[:16], 16)
            row["text"] = TEXT_CORRUPTIONS[word[1]](row["text"], word[2], np.random.default_rng(seed), "[MASK]")
        write_rows(folder / "dev_unseen.jsonl", rows)
        loaded = load_hateful_memes(folder / "train.jsonl", None, memes.encoders, Path("cache"))
        split = loaded.splits["dev_unseen"]
        assert split.ids == ids
        clean = memes.datasets[0].splits["dev_unseen"].features
        for name, key in (("image", picture), ("text", word)):
            torch.testing.assert_close(found[key], split.features[name], rtol=1e-4, atol=1e-5)
            assert (found[key] - clean[name]).abs().max() > 1e-2


# ---- worst cases -----------------------------------------------------------------------------------------------------


def test_worst_scores_fall_with_size_and_attack_lies_between_certificate_and_clean(results):
    numbers = results["numbers"]
    assert numbers["sizes"] == list(SIZES)
    tables = {kind: numbers[kind] for kind in ("latent, exact", "features, certified", "features, attacked")}
    tables["joint"] = numbers["two latents, certified"]
    for table in tables.values():
        assert table
        for key, values in table.items():
            clean = np.array(numbers["clean"][key.split(" | ")[0]])
            scores = np.vstack([clean, values])  # (1 + sizes, S)
            assert (np.diff(scores, axis=0) <= 1e-6).all(), key
    for key, values in tables["features, certified"].items():
        assert (np.array(values) <= np.array(tables["features, attacked"][key]) + 1e-6).all(), key
    for key, values in tables["joint"].items():
        row = key.split(" | ")[0]
        for name in ("image", "text"):
            assert (np.array(values) <= np.array(tables["latent, exact"][f"{row} | {name} | l2"]) + 1e-6).all()
    assert {key.split(" | ")[0] for key in tables["features, attacked"]} == {
        MAIN, "jWAE-LMF, rank 1", "jWAE-LMF, no prior", "concatenation + MLP", "image only", "text only",
    }  # fmt: skip
    closed = [text for text in numbers["checks"] if "closed form" in text]
    assert len(closed) == 4 and all(numbers["checks"][text] for text in closed)


@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("norm", [2, math.inf])
def test_of_every_example_certified_attacked_and_clean_scores_are_in_this_order(norm, outputs):
    model = model_of({"a": 4, "b": 3}, 0, output_dim=outputs or 1).float()
    features = {"a": torch.randn(60, 4), "b": torch.randn(60, 3)}
    output = model(features).prediction.detach()
    if outputs is None:
        criterion = Criterion((torch.rand(60, 1) > 0.3) * (output > 0).float(), "binary", torch.ones(1))
    else:
        criterion = Criterion(output + torch.randn(60, 2), "regression", torch.tensor([1.0, 3.0]))
    clean = criterion.score(criterion.margin(output))
    for name in ("a", "b"):
        certified = feature_certificates(model, features, criterion, name, norm)
        attacked = attacked_scores(model, features, criterion, name, norm)
        assert certified.shape == attacked.shape == (len(SIZES), 60)
        assert (certified <= attacked + 1e-5).all() and (attacked <= clean + 1e-5).all()
        assert (attacked[-1] < clean - 1e-3).any() and (certified[0] > certified[-1]).any()


def test_change_that_is_found_at_one_size_is_allowed_at_every_larger_one():
    torch.manual_seed(0)
    model = model_of({"a": 4, "b": 3}, 5).float()
    features = {"a": torch.randn(200, 4), "b": torch.randn(200, 3)}
    criterion, sizes = Criterion(model(features).prediction.detach() + 1, "regression", torch.ones(1)), (0.2, 1.0, 5.0)
    outputs = outputs_under_change(model, features, "a")
    alone = [
        pgd(lambda c: criterion.margin(outputs(c))[:, 0], torch.zeros(200, 4), size * 2, 2, steps=1, restarts=1).value
        for size in sizes
    ]
    assert (alone[2] > alone[1] + 1e-3).any(), "one step must overshoot somewhere"
    found = attacked_scores(model, features, criterion, "a", 2, sizes, steps=1, restarts=1)
    torch.testing.assert_close(found, torch.stack(alone).cummin(0).values)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("outputs", [1, 2])
def test_exact_score_of_a_moved_latent_is_what_its_worst_change_leaves(norm, outputs):
    model = model_of({"a": 4, "b": 3}, 1, output_dim=outputs)
    features = {"a": torch.randn(40, 4).double(), "b": torch.randn(40, 3).double()}
    output = model(features).prediction.detach()
    criterion = Criterion((torch.rand(40, 1) > 0.5).double(), "binary", torch.ones(1).double())
    if outputs == 2:
        criterion = Criterion(output + torch.randn(40, 2), "regression", torch.tensor([1.0, 3.0]).double())
    stds = latent_stds(model, features)
    scores = latent_scores(model, features, criterion, stds, norm)
    latents = model.latents(features)
    for m, name in enumerate(model.modalities):
        gradient = model.fusion.modality_gradient(latents, m)  # (n, O, L)
        steepest = {
            1: gradient.sign() * (gradient.abs() == gradient.abs().amax(-1, keepdim=True)),
            2: gradient / gradient.norm(dim=-1, keepdim=True),
            math.inf: gradient.sign(),
        }[norm]
        for size, score in zip(SIZES, scores[name], strict=True):
            epsilon, worst = size * change_size(stds[name], norm), []
            for o in range(outputs):
                tried = []
                for sign in (-1, 1):
                    there = list(latents)
                    there[m] = there[m] + sign * epsilon * steepest[:, o]
                    tried.append(model.rescale(model.fusion(there))[:, o])
                if outputs == 1:
                    margins = [(2 * criterion.target[:, 0] - 1) * y for y in tried]
                    worst.append((torch.minimum(*margins) > 0).double())
                else:
                    errors = [(y - criterion.target[:, o]).abs() / criterion.scale[o] for y in tried]
                    worst.append(-torch.maximum(*errors))
            torch.testing.assert_close(score, torch.stack(worst).mean(0), rtol=1e-9, atol=1e-9)


def test_joint_scores_count_what_is_right_and_beyond_reach():
    model = model_of({"a": 4, "b": 3}, 2)
    model.rescale.mean.zero_()  # of a logit there is nothing to rescale
    model.rescale.std.fill_(1)
    features = {"a": torch.randn(40, 4).double(), "b": torch.randn(40, 3).double()}
    output = model(features).prediction.detach()
    criterion = Criterion((output + 5 * torch.randn(40, 1) > 0).double(), "binary", torch.ones(1))
    stds = latent_stds(model, features)
    (scores,) = joint_scores(model, features, criterion, stds, sizes=(0.0, 0.05, 0.3)).values()
    assert torch.equal(scores[0] == 1, criterion.margin(output)[:, 0] > 0) and 0 < scores[1].mean() < scores[0].mean()
    assert scores[2].mean() < scores[1].mean()


@pytest.mark.parametrize("norm", [2, math.inf])
def test_attack_on_a_latent_is_the_closed_form(norm):
    model = model_of({"a": 4, "b": 3, "c": 2}, 3, output_dim=2).float()
    features = {name: torch.randn(30, d) for name, d in (("a", 4), ("b", 3), ("c", 2))}
    criterion = Criterion(torch.zeros(30, 2), "regression", torch.ones(2))
    assert all(latent_attack_gap(model, features, criterion, name, norm) < 1e-9 for name in features)


@pytest.mark.parametrize("fusion", ["lmf", "concatenation", "tensor"])
def test_outputs_under_a_change_are_the_models_own_for_any_head(fusion):
    model = model_of({"a": 4, "b": 3}, 4, fusion=fusion, output_dim=2)
    assert isinstance(model.fusion, LowRankMultimodalFusion) == (fusion == "lmf")
    features = {"a": torch.randn(9, 4).double(), "b": torch.randn(9, 3).double()}
    change = torch.randn(9, 3).double()
    moved = features | {"b": features["b"] + change * model.standardise["b"].std}
    torch.testing.assert_close(outputs_under_change(model, features, "b")(change), model(moved).prediction)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_pictures_that_are_saved_give_the_probabilities_that_are_printed(memes, results):
    source = find_image_encoder(memes.encoders)
    how, encoder = image_preprocessing(memes.encoders, source), ImageEncoder(memes.encoders, source, "cpu")
    features, target = part_tested(memes)
    ids, model = memes.datasets[0].splits["dev_unseen"].ids, memes.members(MAIN)[0]
    right = [i for i, y in enumerate(of_model(model, features)) if (y >= 0) == (target[i] == 1)][:2]
    assert len(right) == len(results["numbers"]["pixels"]) == 2
    paths = memes.image_paths(ids)
    for i, line in zip(right, results["numbers"]["pixels"], strict=True):
        assert line.startswith(f"{ids[i]}: label {int(target[i])}, probability")
        stem = ids[i].replace("/", "_").removesuffix(".png")
        pictures = [np.asarray(Image.open(f"runs/measured/pixels/{stem}-{kind}.png")) for kind in ("before", "after")]
        assert np.array_equal(pictures[0], preprocess(decode_rgb(paths[ids[i]]), how))
        largest = np.abs(pictures[0].astype(int) - pictures[1]).max()
        assert 0 < largest <= 8 and f"no pixel moved by more than {largest} of 255" in line
        chances = []
        for pixels in pictures:
            x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
            with torch.no_grad():
                vector = {"image": encoder.features(x).float(), "text": features["text"][i : i + 1]}
            chances.append(1 / (1 + math.exp(-of_model(model, vector).item())))
        assert f"probability {chances[0]:.3f} -> {chances[1]:.3f}" in line
        assert (2 * target[i] - 1) * (chances[1] - chances[0]) < 0  # away from the label
        assert ("flipped" in line) == ((chances[0] >= 0.5) != (chances[1] >= 0.5))


# ---- a run of experiments.train --------------------------------------------------------------------------------------


def test_kernel_machine_is_that_of_the_training_and_has_no_latents(mosi):
    measured = Predictor(mosi, kernel_machine=True)
    said = json.loads((mosi.folder / "results.json").read_text())["numbers"]
    _, target = part_tested(mosi)
    assert measured.rows[-2:] == [LATE_FUSION, KERNEL_MACHINE]
    assert (
        accuracy(measured.clean(KERNEL_MACHINE)[0], target)
        == said[KERNEL_MACHINE]["accuracy"]["per seed and fold"][0][0]
    )
    assert measured.corrupted(KERNEL_MACHINE, Condition("latents", "latent noise", "all", 0.5, 0)) is None
    everywhere = [Condition("missing", "missing", name, 1.0, 0) for name in mosi.data.input_dims]
    assert all(np.ptp(measured.corrupted(KERNEL_MACHINE, c)) > 1e-6 for c in everywhere)
    with torch.no_grad():  # without the text: its features at their training mean
        features, _ = part_tested(mosi)
        mean = mosi.members(mosi.main_row)[0].standardise["text"].mean
        filled = features | {"text": mean.expand_as(features["text"])}
        expected = measured._machines[0].decision({name: x.numpy() for name, x in filled.items()})
    np.testing.assert_allclose(measured.corrupted(KERNEL_MACHINE, everywhere[1])[0], expected, rtol=1e-5, atol=1e-6)


def test_three_modalities_are_measured_to_the_end(mosi, capsys):
    flags = "runs/mosi --groups missing latents --draws 1 --attack-seeds 0 --name mosi-measured"
    assert robustness.run(flags.split()) == 0
    results = json.loads(Path("runs/mosi-measured/results.json").read_text())
    assert {KERNEL_MACHINE, LATE_FUSION, mosi.main_row} <= set(results["numbers"]["clean"])
    assert f"missing | missing, one of them | {KERNEL_MACHINE}" in results["numbers"]["curves"]
    assert not any("latents" in k and KERNEL_MACHINE in k for k in results["numbers"]["curves"])
    assert not results["numbers"]["features, attacked"] and results["numbers"]["latent, exact"]
    assert not Path("runs/mosi-measured/pixels").exists()


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_area_of_a_line_is_its_middle_and_a_point_measured_once_stands_for_all_draws():
    levels = np.array([0.0, 0.25, 1.0])
    assert curve_area(1 - 0.4 * levels, levels) == pytest.approx(0.8)
    assert curve_area(np.stack([levels, 2 * levels]), levels) == pytest.approx([0.5, 1.0])
    clean = np.array([0.9, 0.8])
    made = _curve(clean, {0.5: [np.array([0.7, 0.6]), np.array([0.5, 0.8])], 1.0: [np.array([0.1, 0.2])]})
    assert made.levels.tolist() == [0, 0.5, 1] and made.scores.shape == (3, 2, 2)
    assert made.drop == pytest.approx([0.8, 0.6])
    assert made.area == pytest.approx([0.25 * (0.9 + 2 * 0.6 + 0.1), 0.25 * (0.8 + 2 * 0.7 + 0.2)])
    assert Curve(made.levels, made.scores).losses == pytest.approx([(-0.3 - 0.8) / 2, (-0.1 - 0.6) / 2])


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        robustness.run(arguments.split())
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("runs/memes --draws 0", "--draws 0: give at least 1"),
        ("runs/memes --attack-seeds -1", "--attack-seeds -1: give at least 0"),
        ("runs/memes --pixels -1", "--pixels -1: give at least 0"),
        ("runs/memes --groups missing missing", "each once"),
        ("runs/memes --groups", "--groups"),
        ("runs/memes --groups pixels", "--groups"),
        ("runs/memes --device toaster", "--device toaster"),
        ("runs/memes --name a/b", "--name"),
        ("runs/memes --name measured", "this run exists"),
        ("runs/measured", "a run of experiments.robustness keeps no models"),
        ("runs/mosi --pixels 1", "--pixels 1: runs/mosi has no pictures"),
        ("runs/mosi --groups input", "--groups input: runs/mosi has no such thing (its features came as they are"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(mosi, capsys, flags, said):
    before = sorted(path.name for path in Path("runs").iterdir())
    assert said in refused(capsys, flags)
    assert sorted(path.name for path in Path("runs").iterdir()) == before


def test_pictures_that_are_gone_are_named(mosi, capsys):
    Path("memes/img").rename("memes/gone")
    try:
        assert "img" in refused(capsys, "runs/memes --groups input --pixels 1")
    finally:
        Path("memes/gone").rename("memes/img")


def test_colour_of_a_modality_is_that_of_no_row():
    rows = {to_hex(color) for color in row_colors(map(str, range(15))).values()}
    assert (
        len(rows) == 15
        and rows.isdisjoint(to_hex(color) for color in MODALITIES)
        and len(set(MODALITIES)) == len(MODALITIES)
    )
