"""The search for a recipe: its design, its inner folds, its units, and the choice over data sets."""

import json

import numpy as np
import pytest
import torch

from experiments.recipe_search import (
    RANK,
    SPACE,
    choose,
    combinations,
    design,
    differences,
    inner,
    judged,
    setting,
    uninformed_loss,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.errors import InputError
from mmfusion.training.grid import Recipe, train_grid


def folded(task: str = "binary", count: int = 60, folds: int = 1, group: bool = False) -> FoldedDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    target = (x[:, 0] > 0).float() if task == "binary" else x[:, 0]
    target = torch.arange(count).float() % 3 if task == "multiclass" else target
    metadata = {"group": [str(i // 4) for i in range(count)]} if group else {}
    pool = Split({"a": x, "b": x.flip(1)}, target, [f"id{i}" for i in range(count)], metadata)
    rows = torch.arange(count)
    tests = [rows[k::5] for k in range(folds)]
    parts = [rows[~torch.isin(rows, test)] for test in tests]
    names = ("x", "y", "z") if task == "multiclass" else ("class 0", "class 1")
    cuts = [Fold(part[8:], part[:8], test) for part, test in zip(parts, tests, strict=True)]
    return FoldedDataset("small", task, pool, cuts, [], {}, class_names=names)


def test_every_value_of_an_axis_is_drawn_equally_often_and_the_present_recipe_is_first():
    candidates = design(41)
    assert candidates[0] == {name: getattr(Recipe(), name) for name in SPACE}
    for name, values in SPACE.items():
        counts = [sum(one[name] == value for one in candidates[1:]) for value in values]
        assert max(counts) - min(counts) <= 1 and sum(counts) == 40
    assert design(41) == candidates and design(41, seed=1) != candidates


def test_all_combinations_of_some_values_stand_beside_the_present_recipe():
    present = {name: getattr(Recipe(), name) for name in SPACE}
    candidates = combinations(["epochs=15,80", "feature_dropout=.3,0.6"], "binary")
    changes = [{"epochs": 15, "feature_dropout": 0.3}, {"epochs": 80, "feature_dropout": 0.3}, {"epochs": 80}]
    assert candidates == [present, *(present | change for change in changes)]
    of_values = combinations(["epochs=15"], "regression")
    assert [one["epochs"] for one in of_values] == [Recipe.of("regression").epochs, 15]
    for wrong, words in {
        "rank=2": "an axis is one of noise, keep",
        "epochs": "write for instance epochs=15,40",
        "epochs=0": "epochs goes from 1",
        "mmd_weight=nan": "mmd_weight goes from 0",
        "noise=some": "noise is one of none, dimension",
    }.items():
        with pytest.raises(InputError, match=words):
            combinations([wrong], "binary")


def test_every_combination_is_held_against_the_present_recipe_seed_by_seed():
    candidates = combinations(["epochs=15,80"], "binary")
    found = [
        {"loss": 0.9, "score": -0.8, "dimension": 4.0, "losses": [0.8, 1.0], "scores": [-0.9, -0.7]},
        {"loss": 0.7, "score": -0.6, "dimension": 5.0, "losses": [0.6, 0.8], "scores": [-0.8, -0.4]},
    ]
    _, first, last = differences(candidates, found).splitlines()
    assert first == "0.7000  -0.6000    5.0   -0.2000 +- 0.0000   +0.2000 +- 0.1414  epochs 80"
    assert last.startswith("0.9000") and last.endswith("the present recipe")


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("with_dev", [False, True])
def test_inner_folds_never_hold_what_the_first_fold_tests(group, with_dev):
    data = folded(group=group)
    cut = inner(data, 3, with_dev)
    tested = torch.cat([fold.test for fold in cut.folds])
    known = torch.cat([data.folds[0].train, data.folds[0].dev])
    assert sorted(tested.tolist()) == sorted(known.tolist()), "each known example is tested once"
    for fold in cut.folds:
        used = torch.cat([fold.train, fold.dev])
        assert not torch.isin(used, fold.test).any() and not torch.isin(used, data.folds[0].test).any()
        assert torch.isin(fold.dev, fold.train).all() != with_dev
        if group:
            groups = [{data.pool.metadata["group"][row] for row in part} for part in (used, fold.test)]
            assert not groups[0] & groups[1]


def test_dev_that_another_fold_tests_is_left_out():
    data = folded(folds=5)
    known = torch.cat([fold.test for fold in inner(data, 3, False).folds])
    assert sorted(known.tolist()) == sorted(data.folds[0].train.tolist())


@pytest.mark.parametrize(("task", "expected"), [("binary", np.log(2)), ("multiclass", np.log(3)), ("regression", 1.0)])
def test_the_unit_is_the_loss_of_knowing_nothing(task, expected):
    assert uninformed_loss(inner(folded(task, 300), 3, False)) == pytest.approx(expected, rel=0.05)


def test_a_model_that_learns_costs_less_than_the_unit_and_its_loss_is_that_of_the_test_examples():
    data = inner(folded(count=200), 2, False)
    candidate = {name: values[0] for name, values in SPACE.items()} | {"weight_decay": 0.1, "feature_dropout": 0.3}
    recipe = Recipe(latent_dim=4, hidden_dim=8, epochs=30, batch_size=16, learning_rate=1e-2)
    grid = train_grid(data, [setting("0", candidate, data)], [0, 1], recipe)
    found = judged(grid, 0)
    assert found["loss"] < 0.7 and found["score"] > 0.9
    logits = grid.predictions()[0]
    target = data.pool.target[data.test_rows].numpy()
    losses = np.logaddexp(0, (1 - 2 * target) * logits).mean(1) / uninformed_loss(data)
    assert found["loss"] == pytest.approx(losses.mean()) and found["loss_std"] == pytest.approx(losses.std(ddof=1))


def test_a_setting_trains_by_the_candidate():
    data = folded()
    candidate = design(6)[3]
    made = setting("3", candidate, data)
    assert made.dropout == dict.fromkeys("ab", candidate["modality_dropout"]) and made.rank == RANK
    names = ("weight_decay", "mmd_weight", "feature_dropout")
    assert [getattr(made, name) for name in names] == [candidate[name] for name in names]


def write(path, losses, dimensions, name="x"):
    rows = [{"loss": loss, "dimension": d} for loss, d in zip(losses, dimensions, strict=True)]
    path.write_text(json.dumps({"dataset": name, "candidates": design(6)[: len(rows)], "found": rows}))
    return path


def test_the_choice_is_the_least_mean_loss_of_those_whose_latents_bear_the_rank(tmp_path):
    one = write(tmp_path / "a.json", [1.0, 0.5, 0.7, 0.8], [9, 9, 9, 9], "a")
    two = write(tmp_path / "b.json", [1.0, 0.5, 0.7, 0.5], [9, 3, 9, 9], "b")
    assert choose([one, two])[0]["recipe"] == design(6)[1]
    result, text = choose([one, two], RANK)
    assert result["recipe"] == design(6)[3] and result["loss"] == pytest.approx(0.65) and result["present"] == 1.0
    assert "chosen: 0.6500" in text and "b: 0.5000, present recipe 1.0000, its own best 0.5000" in text


def test_files_that_are_no_search_of_one_design_are_refused(tmp_path):
    good = write(tmp_path / "a.json", [1.0, 0.5], [9, 9])
    for name, text in {
        "no": "{",
        "list": "[]",
        "keys": json.dumps({"candidates": [{}], "found": [{"loss": 1}]}),
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="is no finished search"):
            choose([good, tmp_path / name])
    with pytest.raises(InputError, match="scored other candidates"):
        choose([good, write(tmp_path / "b.json", [1.0, 0.5, 0.4], [9, 9, 9])])
    with pytest.raises(InputError, match=r"--least-dimension 4: no candidate reaches it; the best has 3\.9"):
        choose([write(tmp_path / "c.json", [1.0, 0.5], [3, 9]), write(tmp_path / "d.json", [1.0, 0.5], [9, 3.9])], 4)
    with pytest.raises(InputError, match="missing"):
        choose([tmp_path / "missing"])
