"""A diagnosis says yes where an interaction was planted, no where the modalities only add up, and reads no test."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from mmfusion.data.arrays import ArraysConfig, dataset_from_arrays
from mmfusion.diagnose import Budget, diagnose, diagnosis_page, diagnosis_text
from mmfusion.diagnose.__main__ import run
from mmfusion.diagnose.additive import emap_outputs
from mmfusion.diagnose.inner import chance_scores, inner_folds, inner_scoring
from mmfusion.models.decomposition import emap, values_by_definition
from mmfusion.training.grid import Setting, train_grid
from mmfusion.training.recipe import Recipe

TASKS = ("binary", "multiclass", "multilabel", "regression")
SMALL = Budget(inner_folds=2, inner_steps=150, ranks=(1, 4))


def arrays(kind: str, task: str, count: int = 500, modalities: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """The first coordinates of the first two modalities, multiplied or added up; further ones are noise."""
    rng = np.random.default_rng(seed)
    x = {f"view{m}": rng.normal(size=(count, 3)) for m in range(modalities)}
    a, b = x["view0"][:, 0], x["view1" if modalities > 1 else "view0"][:, 1]
    value = a * b if kind == "product" else a + b
    noisy = value + 0.2 * rng.normal(size=count)
    target = {
        "binary": (noisy > 0).astype(int),
        "multiclass": np.digitize(noisy, [-0.6, 0.6]).astype(str),
        "multilabel": np.stack([noisy > 0, noisy > -0.3], 1).astype(int),
        "regression": noisy,
    }[task]
    return x | {"target": target}


def dataset(*args, **kwargs):
    return dataset_from_arrays(arrays(*args, **kwargs), ArraysConfig(hold_out=0.2))[0]


@pytest.fixture(scope="module")
def found():
    return {(kind, task): diagnose(dataset(kind, task), SMALL) for kind in ("product", "additive") for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_a_planted_product_is_found_and_a_sum_is_not_taken_for_one(found, task):
    product, additive = found["product", task], found["additive", task]
    assert product.interaction.verdict == "supported" and product.interaction.low > 0.1
    assert product.interaction_loss > 0 and product.interacts == "supported"
    assert product.over_readout.low > 0.05 and additive.interacts != "supported"
    assert additive.interaction.verdict != "supported" and additive.interaction.estimate < 0.03
    assert product.parts["view0", "view1"] > 0.5 > additive.parts["view0", "view1"]
    assert product.full > product.chance + 0.15 and additive.full > additive.chance + 0.15


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_rank_1_suffices_for_a_product_and_not_for_a_sum(found, task):
    product, additive = found["product", task], found["additive", task]
    assert additive.rank == 4 and additive.rank_contrasts[0].matters == "yes"  # a sum of two modalities is of rank 2
    # two labels of one product: rank 4 is ahead by .02 after so few steps, seen or not
    assert product.rank == 1 or task == "multilabel"
    assert product.rank_contrasts[0].matters != "yes" and product.rank_contrasts[0].estimate < 0.03


def test_an_interaction_that_is_used_and_not_needed_is_not_called_for():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, 500)  # both modalities tell the class, with noise: products help nobody
    x = {name: np.eye(6)[label] + 0.1 * rng.normal(size=(500, 6)) for name in ("first", "second")}
    result = diagnose(dataset_from_arrays(x | {"target": label.astype(str)}, ArraysConfig(hold_out=0.2))[0], SMALL)
    assert result.over_readout.high < 0.05 and result.interacts != "supported"


def test_modalities_that_are_noise_carry_nothing():
    result = diagnose(dataset("product", "regression", modalities=3), SMALL)
    first, second, noise = result.modalities
    for needed in (first, second):
        assert needed.lost_without.verdict == "supported" and needed.share > 0.3
    assert noise.lost_without.verdict != "supported" and noise.share < 0.1
    assert "view0, view1" in diagnosis_text(result).split("Not replaced by the others: ")[1].splitlines()[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_emap_is_that_of_its_definition(task):
    data = inner_folds(dataset("product", task, count=50), SMALL)
    recipe = Recipe(latent_dim=3, epochs=2, batch_size=16)
    grid = train_grid(data, [Setting("rank 2", 2, dropout={})], [0, 1], recipe)
    fold, member = data.folds[1], grid.model(0, 1, 1).double()
    features = {name: x[fold.test].double() for name, x in data.pool.features.items()}
    latents = [z.detach() for z in member.latents(features)]
    slow = emap(values_by_definition(lambda z: member.rescale(member.fusion(z)), latents)).numpy()
    grid.model(0, 1, 1).float()
    fast = emap_outputs(grid, 0)[1, -len(fold.test) :]
    np.testing.assert_allclose(fast.reshape(slow.shape), slow, rtol=1e-4, atol=1e-4)


def test_chance_is_the_score_of_the_most_frequent_class():
    data = inner_folds(dataset("additive", "multiclass"), SMALL)
    wanted = []
    for fold in data.folds:
        values, counts = data.pool.target[fold.train].unique(return_counts=True)
        wanted += (data.pool.target[fold.test] == values[counts.argmax()]).float().tolist()
    np.testing.assert_allclose(chance_scores(data), wanted)


def rare(kind: str) -> dict[str, np.ndarray]:
    """A class of a tenth of the examples, which the features tell or do not."""
    x = arrays("additive", "regression")
    score = x["target"] if kind == "told" else np.random.default_rng(1).normal(size=len(x["target"]))
    return x | {"target": (score > np.quantile(score, 0.9)).astype(int)}


def test_a_rare_class_is_judged_by_balanced_accuracy():
    told = diagnose(dataset_from_arrays(rare("told"), ArraysConfig(hold_out=0.2))[0], SMALL)
    assert told.score == "balanced accuracy" and told.chance == pytest.approx(0.5, abs=0.01)
    assert told.learns and told.full > 0.75 and "90% are of class '0'" in told.notes[-1]
    assert "Nothing beats a constant" not in diagnosis_text(told)


def test_a_page_says_where_nothing_beats_a_constant():
    noise = diagnose(dataset_from_arrays(rare("untold"), ArraysConfig(hold_out=0.2))[0], SMALL)
    assert not noise.learns
    for words in (diagnosis_text(noise), diagnosis_page(noise)):
        assert "Nothing beats a constant beyond doubt" in words


def test_balanced_accuracy_is_that_of_its_definition():
    data = inner_folds(dataset_from_arrays(rare("told"), ArraysConfig(hold_out=0.2))[0], SMALL)
    scoring, y = inner_scoring(data), data.pool.target.numpy()
    p = np.random.default_rng(0).uniform(0.01, 0.6, len(y))
    found = scoring.of(np.log(p / (1 - p))[None], y, "binary")[0].mean()
    assert found == pytest.approx(balanced_accuracy_score(y, p >= y.mean()))


def test_no_test_example_is_looked_at():
    whole = dataset("product", "binary")
    other = replace(whole.splits["test"], features={n: x * torch.nan for n, x in whole.splits["test"].features.items()})
    quick = replace(SMALL, inner_steps=6)
    results = [diagnose(d, quick) for d in (whole, replace(whole, splits=whole.splits | {"test": other}))]
    assert diagnosis_text(results[0]).rsplit(" steps, ", 1)[0] == diagnosis_text(results[1]).rsplit(" steps, ", 1)[0]
    assert results[0].examples == len(whole.splits["train"]) + len(whole.splits["dev"])


def test_more_examples_show_smaller_effects(found):
    few = diagnose(dataset("additive", "regression", count=150), SMALL)
    assert few.detectable > found["additive", "regression"].detectable > 0
    assert few.enough_data == (few.detectable <= SMALL.effect)


def test_groups_are_kept_whole_and_resampled_as_such():
    values = arrays("product", "binary") | {"group": np.repeat(np.arange(50), 10)}
    whole = dataset_from_arrays(values, ArraysConfig(hold_out=0.2))[0]
    data = inner_folds(whole, SMALL)
    groups = np.array(data.pool.metadata["group"])
    for fold in data.folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
    assert diagnose(whole, replace(SMALL, inner_steps=6)).groups == len(set(groups))


def test_one_modality_is_diagnosed_without_an_interaction():
    result = diagnose(dataset("additive", "binary", modalities=1), SMALL)
    assert result.interaction is None and result.rank == 1 and len(result.modalities) == 1
    assert "nothing to interact" in diagnosis_text(result)


@pytest.mark.parametrize("kind, words", [("product", "Yes: without"), ("additive", "Do the modalities interact?")])
def test_text_and_page_answer_the_same_and_name_the_budget(found, kind, words):
    result = replace(found[kind, "binary"], name="<b>data</b>")
    text, page = diagnosis_text(result), diagnosis_page(result)
    assert words in text and words in page and "<b>" not in page.replace("&lt;b&gt;", "")
    assert "Budget: 16 trainings (2 inner folds x 2 seeds x settings) of 150 steps" in text
    assert all(answer in page for answer in re.findall(r"^Rank \d+: .*(?= \()", text, re.M))
    assert max(map(len, text.splitlines())) < 400 and "nan" not in page.lower()


def test_the_command_writes_one_page_of_a_file_without_splits(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", **arrays("product", "binary", count=120))
    flags = [
        "--inner-folds",
        "2",
        "--inner-steps",
        "2",
        "--ranks",
        "1",
        "2",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert run(["--data", str(tmp_path / "mine.npz"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "Diagnosis of mine" in printed and "96 examples, 2 modalities, binary" in printed
    page = (tmp_path / "diagnosis-mine.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "Which modality carries what?" in page


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--data: name the file"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--data", "nowhere.npz", "--ranks", "2", "2"], "--ranks 2 2"),
        (["--data", "nowhere.npz", "--seeds", "1"], "--seeds 1"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(run(flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
