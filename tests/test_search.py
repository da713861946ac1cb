"""The search: what it asks, what it keeps, how it goes on; and the command on a toy."""

import ast
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_alignment_experiment import toy

from mmfusion import search as command
from mmfusion.errors import InputError, NonFiniteLoss
from mmfusion.metrics.probes import probe_score, unique_share
from mmfusion.training import alignment_objectives
from mmfusion.training.align import AlignmentTraining, Weighting, align
from mmfusion.training.alignment_objectives import development, evaluation, objectives_of
from mmfusion.training.search import Choice, Range, Search, Trial, pareto_front, search

optuna = pytest.importorskip("optuna")

ROOT = Path(__file__).parent.parent
SPACE = {name: Range(1e-3, 10.0) for name in "abcd"}
BEST = np.array([-1.5, 0.5, -0.5, -2.0])  # log10 of the optimum
OTHER = np.array([-0.5, 0.5, 0.3, -1.0])
ONE = {"loss": "minimize"}
TWO = {"one": "minimize", "two": "maximize"}


def logs(settings) -> np.ndarray:
    return np.log10([[setting[name] for name in "abcd"] for setting in settings])


def bowl(settings) -> list[float]:
    return np.square(logs(settings) - BEST).sum(1).tolist()


def pair(settings) -> np.ndarray:
    """(n, 2): distances from two points, the second to be maximised; the front lies between them."""
    x = logs(settings)
    return np.stack([np.abs(x - BEST).mean(1), -np.abs(x - OTHER).mean(1)], 1)


def random_settings(seed: int, count: int = 48) -> list[dict]:
    draws = 10 ** np.random.default_rng(seed).uniform(-3, 1, (count, 4))
    return [dict(zip("abcd", row, strict=True)) for row in draws]


def hypervolume(losses: np.ndarray, least: float = -1.0, steps: int = 200) -> float:
    """Share of a grid on [least, 1]^2 that some row (n, 2) is at most."""
    grid = np.linspace(least, 1, steps)
    reached = (losses[:, 0, None, None] <= grid[:, None]) & (losses[:, 1, None, None] <= grid[None])
    return float(reached.any(0).mean())


# ---- what is asked -----------------------------------------------------------------------------------------------


def test_search_beats_random_draws_at_the_same_budget():
    found = [min(search(SPACE, bowl, ONE, 48, 16, seed).losses[:, 0]) for seed in range(5)]
    drawn = [min(bowl(random_settings(seed))) for seed in range(40)]
    assert np.median(found) < np.quantile(drawn, 0.1)


def test_front_covers_more_than_that_of_random_draws():
    found = [hypervolume(search(SPACE, pair, TWO, 48, 16, seed).losses, 0.0) for seed in range(5)]
    drawn = [hypervolume(pair(random_settings(seed)) * [1, -1], 0.0) for seed in range(40)]
    assert np.median(found) > np.quantile(drawn, 0.9)


def test_a_maximised_objective_is_the_same_as_its_negative_minimised():
    up = search(SPACE, lambda s: [-v for v in bowl(s)], {"x": "maximize"}, 32, 8)
    down = search(SPACE, bowl, {"x": "minimize"}, 32, 8)
    assert [t.setting for t in up.trials] == [t.setting for t in down.trials] and up.chosen == down.chosen
    assert bowl([down.trials[down.chosen].setting])[0] == min(bowl([t.setting for t in down.trials]))


def test_settings_lie_in_the_space_spread_within_a_batch_and_differ_between_seeds():
    space = {"w": Range(0.5, 2.0), "u": Range(-1.0, 1.0, log=False), "kind": Choice(("x", "y", 3))}
    sizes = []

    def evaluate(settings):
        sizes.append(len(settings))
        assert all(list(s) == ["w", "u", "kind"] for s in settings)
        assert all(0.5 <= s["w"] <= 2 and -1 <= s["u"] <= 1 and s["kind"] in ("x", "y", 3) for s in settings)
        return [(s["w"] - 1) ** 2 + s["u"] ** 2 + (s["kind"] != "y") for s in settings]

    one = search(space, evaluate, ONE, 20, 8, seed=1)
    assert sizes == [8, 8, 4]
    assert len({t.setting["w"] for t in one.trials}) == 20
    assert {t.setting["kind"] for t in one.trials[:8]} == {"x", "y", 3}
    other = search(space, evaluate, ONE, 20, 8, seed=2)
    assert not {t.setting["w"] for t in one.trials} & {t.setting["w"] for t in other.trials}


def test_logarithmic_ranges_are_drawn_uniformly_in_the_logarithm():
    draws = logs(t.setting for t in search(SPACE, lambda s: [np.nan] * len(s), ONE, 200, 50).trials).ravel()
    assert np.abs(np.histogram(draws, 4, (-3, 1))[0] / len(draws) - 0.25).max() < 0.06


def test_given_settings_come_first_even_over_several_batches():
    first = random_settings(0, 5)
    found = search(SPACE, bowl, ONE, 9, 2, first=first)
    assert [t.setting for t in found.trials[:5]] == first and found.trials[5].setting not in first
    assert [t.values[0] for t in found.trials] == bowl([t.setting for t in found.trials])


def test_callers_random_state_and_optunas_log_level_stay_as_they_were():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(SPACE, bowl, ONE, 20, 8)
    assert (np.random.get_state()[1] == before).all() and optuna.logging.get_verbosity() == optuna.logging.INFO


# ---- fronts and failures -----------------------------------------------------------------------------------------


def test_front_agrees_with_a_slow_loop_and_with_optunas():
    rng = np.random.default_rng(0)
    losses = rng.integers(0, 40, (60, 2)) // 3 * 1.0  # with ties
    losses[[3, 7]] = np.nan, np.nan
    losses[9, 1] = np.nan
    losses[10] = losses[11]
    slow = []
    for i, x in enumerate(losses):
        better = [y for y in losses if all(a <= b for a, b in zip(y, x, strict=True)) and list(y) != list(x)]
        if not np.isnan(x).any() and not better:
            slow.append(i)
    assert pareto_front(losses) == slow and len(slow) > 2
    study = optuna.create_study(directions=["minimize"] * 2)
    for x in losses[:3]:
        study.add_trial(optuna.trial.create_trial(values=list(x)))
    assert pareto_front(losses[:3]) == sorted(t.number for t in study.best_trials)


def test_front_is_ordered_by_the_first_objective_and_the_chosen_is_nearest_to_the_best_of_each():
    values = [(0.1, 10.0), (0.9, 90.0), (0.5, 80.0), None, (0.6, 20.0)]  # the first is maximised, the second minimised
    found = Search({"x": "maximize", "y": "minimize"}, [Trial({}, v) for v in values])
    assert found.front == [1, 4, 0]
    # scaled: (0, 1), (.375, .125), (1, 0)
    assert found.chosen == 4
    rescaled = [None if v is None else (v[0] * 1000, v[1] / 7) for v in values]
    assert Search({"x": "maximize", "y": "minimize"}, [Trial({}, v) for v in rescaled]).chosen == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_a_value_that_is_not_finite_fails_the_trial_which_is_never_chosen(bad):
    def evaluate(settings):
        return [bad if s["a"] < 0.1 else v for s, v in zip(settings, bowl(settings), strict=True)]

    found = search(SPACE, evaluate, ONE, 24, 8)
    failed = [i for i, t in enumerate(found.trials) if t.values is None]
    assert failed == [i for i, t in enumerate(found.trials) if t.setting["a"] < 0.1] and 0 < len(failed) < 24
    assert found.chosen not in failed and not set(found.front) & set(failed)


def test_where_every_trial_failed_none_is_chosen():
    found = search(SPACE, lambda s: [np.nan] * len(s), ONE, 4, 2)
    assert found.front == []
    with pytest.raises(ValueError, match="all of 4 trials failed"):
        _ = found.chosen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluate": lambda s: [1.0]}, r"8 settings and 1 objectives, but values of shape \(1,\)"),
        ({"evaluate": lambda s: [(1.0, 2.0)] * 8}, r"values of shape \(8, 2\)"),
        ({"directions": {"loss": "down"}}, "direction 'down' of loss: maximize or minimize"),
        ({"first": [{"a": 1.0}]}, "is not in the space"),
        ({"first": [dict.fromkeys("abcd", 11.0)]}, "is not in the space"),
        ({"trials": 0}, "no search"),
    ],
)
def test_calls_that_make_no_search_are_value_errors(change, words):
    arguments = {"space": SPACE, "evaluate": bowl, "directions": ONE, "trials": 8, "batch": 8} | change
    with pytest.raises(ValueError, match=words):
        search(**arguments)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (0.0, 1.0), (1.0, np.inf), (np.nan, 1.0)])
def test_ranges_without_numbers_or_logarithms_are_value_errors(ends):
    with pytest.raises(ValueError, match="no range"):
        Range(*ends)


# ---- the journal -------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands in for a signal."""


def interrupted(path: Path, evaluate, directions, calls: int) -> list[int]:
    """Run a search of 40 trials until `evaluate` is called once more than `calls` times; sizes of the calls."""
    sizes = []

    def counting(settings):
        if len(sizes) == calls:
            raise Killed
        sizes.append(len(settings))
        return evaluate(settings)

    try:
        search(SPACE, counting, directions, 40, 8, journal=path, first=random_settings(0, 1))
    except Killed:
        assert len(sizes) == calls
    return sizes


@pytest.mark.parametrize(("evaluate", "directions"), [(bowl, ONE), (pair, TWO)])
def test_an_interrupted_search_goes_on_to_the_trials_of_a_whole_one(tmp_path, evaluate, directions):
    interrupted(tmp_path / "whole", evaluate, directions, 99)
    interrupted(tmp_path / "part", evaluate, directions, 2)
    assert len((tmp_path / "part").read_text().splitlines()) == 1 + 16
    assert interrupted(tmp_path / "part", evaluate, directions, 99) == [8, 8, 8]
    assert (tmp_path / "part").read_text() == (tmp_path / "whole").read_text()
    assert interrupted(tmp_path / "part", evaluate, directions, 0) == []  # complete: nothing is evaluated
    # cut anywhere: within a batch the settings that are known stay, and the others are asked again
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    (tmp_path / "part").write_text("".join(lines[: 1 + 13]))
    assert interrupted(tmp_path / "part", evaluate, directions, 99) == [3, 8, 8, 8]
    assert (tmp_path / "part").read_text() == (tmp_path / "whole").read_text()


def test_a_search_is_extended_from_its_journal_and_a_failed_trial_stays_failed(tmp_path):
    def evaluate(settings):
        return [np.nan if s["a"] < 0.1 else v for s, v in zip(settings, bowl(settings), strict=True)]

    def find(trials, journal):
        return search(SPACE, evaluate, ONE, trials, 8, journal=journal).trials

    whole = find(29, tmp_path / "whole")
    for trials in (5, 13, 29):
        assert find(trials, tmp_path / "part") == whole[:trials]
    assert find(5, tmp_path / "part") == whole[:5]  # fewer than it holds: nothing is lost
    assert (tmp_path / "part").read_text() == (tmp_path / "whole").read_text()


def test_a_last_line_that_was_cut_short_is_dropped_with_a_note(tmp_path, capsys):
    path = tmp_path / "journal"
    interrupted(path, bowl, ONE, 99)
    whole = path.read_text()
    for text in (whole[:-20], whole[:-30] + "\n"):
        path.write_text(text)
        assert interrupted(path, bowl, ONE, 99) == [1]
        assert f"note: {path}: line 41, the last, is cut short" in capsys.readouterr().out
        assert path.read_text() == whole
    path.write_text(whole[:-1])  # but for its end the line is there
    assert interrupted(path, bowl, ONE, 99) == [] and "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (5, "nonsense"),
        (5, ""),
        (5, '{"number": 5, "setting": {"a": 1, "b": 1, "c": 1, "d": 1}, "values": [1.0]}'),
        (5, '{"number": 4, "setting": {"a": 1, "b": 1, "c": 1}, "values": [1.0]}'),
        (5, '{"number": 4, "setting": {"a": 1, "b": 1, "c": 1, "d": 11}, "values": [1.0]}'),
        (5, '{"number": 4, "setting": {"a": 1, "b": 1, "c": 1, "d": 1}, "values": [1.0, 2.0]}'),
        (5, '{"number": 4, "setting": {"a": 1, "b": 1, "c": 1, "d": 1}, "values": [NaN]}'),
        (5, '{"number": 4, "setting": {"a": 1, "b": 1, "c": 1, "d": 1}}'),
        (40, '{"number": 39, "setting": {"a": 1, "b": 1, "c": 1, "d": 1}, "values": [true]}'),
    ],
)
def test_other_damage_of_a_journal_is_one_line_that_names_it(tmp_path, line, text):
    path = tmp_path / "journal"
    interrupted(path, bowl, ONE, 99)
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    before = path.read_text()
    with pytest.raises(InputError, match=f"^{path}: line {line + 1} is damaged: [^\n]*$"):
        interrupted(path, bowl, ONE, 99)
    assert path.read_text() == before


@pytest.mark.parametrize("content", [b"", b"my notes\n", b"\xff\x00", b'{"search": 1}\n', b"[]\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 1 names no search"):
        interrupted(path, bowl, ONE, 99)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"space": SPACE | {"d": Range(1e-3, 9.0)}}, "space"),
        ({"space": SPACE | {"d": Range(1e-3, 10.0, log=False)}}, "space"),
        ({"directions": {"loss": "maximize"}}, "objectives"),
        ({"directions": {"other": "minimize"}}, "objectives"),
        ({"seed": 1}, "seed"),
        ({"batch": 4}, "batch"),
        ({"first": random_settings(1, 1)}, "first"),
    ],
)
def test_a_journal_of_another_search_is_refused(tmp_path, change, what):
    arguments = {"space": SPACE, "evaluate": bowl, "directions": ONE, "trials": 8, "batch": 8, "seed": 0}
    search(**arguments, journal=tmp_path / "j")
    with pytest.raises(InputError, match=f"^{tmp_path / 'j'}: is of a search with another {what}; [^\n]*$"):
        search(**(arguments | change), journal=tmp_path / "j")


def test_without_optuna_one_line_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install optuna"):
        search(SPACE, bowl, ONE, journal=tmp_path / "j")
    assert not list(tmp_path.iterdir())


def test_optuna_is_imported_inside_a_function_alone():
    for module in ("mmfusion/search.py", "mmfusion/training/search.py", "mmfusion/training/alignment_objectives.py"):
        tree = ast.parse((ROOT / module).read_text())
        names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [name for name in names if name.split()[1].startswith("optuna")], module


# ---- objectives --------------------------------------------------------------------------------------------------

NAMES = list(alignment_objectives.DIRECTIONS)
SHORT = AlignmentTraining(latent_dim=4, hidden_dim=8, seeds=2, epochs=6, batch_size=32, learning_rate=1e-2, keep="last")
SETTINGS = [
    {"transport": 1.0, "prior": 0.1, "reconstruction": 0.1},
    {"transport": 5.0, "prior": 1.0, "reconstruction": 1.0},
]


def poisoned(data):
    """The same study with NaN wherever a test part of any fold lies, in features and in targets."""
    features = {name: x.clone() for name, x in data.pool.features.items()}
    target = data.pool.target.clone()
    for values in (*features.values(), target):
        values[data.test_rows] = torch.nan
    return replace(data, pool=replace(data.pool, features=features, target=target))


def test_the_test_part_is_never_touched():
    data = toy(folds=1)
    spoiled = poisoned(data)
    assert any(x.isnan().any() for x in spoiled.pool.features.values())
    found = [evaluation(development(one), NAMES, "info_nce", SHORT, "cpu")(SETTINGS) for one in (data, spoiled)]
    assert np.isfinite(found[1]).all()
    np.testing.assert_array_equal(found[0], found[1])
    assert not set(development(data).pool.ids) & {data.pool.ids[i] for i in data.test_rows}


def test_development_keeps_train_and_dev_of_the_first_fold_in_their_places():
    data = toy(folds=2)
    cut, first = development(data), data.folds[0]
    for part in ("train", "dev"):
        rows = getattr(cut.folds[0], part)
        assert [cut.pool.ids[i] for i in rows] == [data.pool.ids[i] for i in getattr(first, part)]
        torch.testing.assert_close(cut.pool.features["b"][rows], data.pool.features["b"][getattr(first, part)])
    assert len(cut.folds) == 1 and cut.folds[0].test is None and not cut.notes


def test_where_dev_is_tested_on_one_is_cut_from_train_with_a_note():
    data = toy(folds=1)
    first = data.folds[0]
    cut = development(replace(data, folds=[first._replace(dev=first.test)]))
    ids = {part: {cut.pool.ids[i] for i in getattr(cut.folds[0], part)} for part in ("train", "dev")}
    assert ids["train"] | ids["dev"] == {data.pool.ids[i] for i in first.train} and not ids["train"] & ids["dev"]
    assert len(ids["dev"]) in (4, 5, 6) and "cut from train" in cut.notes[0]


def test_objectives_are_means_over_seeds_of_one_stack_in_the_settings_order():
    data = development(toy(folds=1))
    found = evaluation(data, NAMES, "info_nce", SHORT, "cpu")(SETTINGS)
    for setting, values in zip(SETTINGS, found, strict=True):
        alone = align(data, [Weighting("x", {"info_nce": 1.0, **setting})], SHORT)["x"].members
        expected = np.mean([slow_objectives(data, member) for member in alone], 0)
        np.testing.assert_allclose(values, expected, rtol=1e-2, atol=2e-3)
    assert not np.allclose(found[0], found[1], atol=1e-2)
    swapped = evaluation(data, NAMES[::-1], "info_nce", SHORT, "cpu")(SETTINGS)
    np.testing.assert_allclose(np.array(swapped)[:, ::-1], found, rtol=1e-5)


@torch.no_grad()
def slow_objectives(data, member) -> list[float]:
    """The four objectives of one member by loops and least squares."""
    fold, (names, x) = data.folds[0], (list("abc"), data.pool.features)
    z = {m: member.encode({m: x[m]})[m].double().numpy() for m in names}
    dev = {m: z[m][fold.dev.numpy()] for m in names}
    unit = {m: v / np.linalg.norm(v, axis=1, keepdims=True) for m, v in dev.items()}
    pairs = [(a, b) for a in names for b in names if a != b]
    recall = np.mean([[np.argmax(unit[b] @ q) == i for i, q in enumerate(unit[a])] for a, b in pairs])
    gap = np.mean([np.linalg.norm(unit[a].mean(0) - unit[b].mean(0)) for a, b in pairs])
    train = {m: z[m][fold.train.numpy()] for m in names}
    target = data.pool.target.numpy()
    probe = probe_score(train, target[fold.train.numpy()], dev, target[fold.dev.numpy()])

    def explained(m: str, sources: list[str]) -> float:
        """R^2 of ridge regression with weight 1 on columns of unit variance, by the normal equations."""
        inputs = np.concatenate([train[s] for s in sources], 1)
        mean, std = inputs.mean(0), inputs.std(0)
        a = (inputs - mean) / std
        b = (np.concatenate([dev[s] for s in sources], 1) - mean) / std
        scale = x[m][fold.train].double().numpy()
        y, y_dev = ((v - scale.mean(0)) / scale.std(0) for v in (scale, x[m][fold.dev].double().numpy()))
        w = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ y)
        return 1 - np.square(b @ w - y_dev).sum() / np.square(y_dev - y_dev.mean(0)).sum()

    unique = np.mean([explained(m, names) - explained(m, [n for n in names if n != m]) for m in names])
    return [recall, probe, gap, unique]


def test_what_is_unique_is_the_share_of_the_variance_that_no_other_modality_gives():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(4000, 2)), {m: rng.normal(size=(4000, 2)) for m in "ab"}
    features = {m: np.concatenate([shared, own[m]], 1) for m in "ab"}  # half of the columns are of one alone

    def share(latents) -> float:
        cut = [
            {m: v[part] for m, v in of.items()}
            for part in (slice(2000), slice(2000, None))
            for of in (features, latents)
        ]
        return unique_share(*cut)

    assert share(features) == pytest.approx(0.5, abs=0.01)
    assert share(dict.fromkeys("ab", shared)) == pytest.approx(0, abs=0.01)
    assert share({m: rng.normal(size=(4000, 2)) for m in "ab"}) == pytest.approx(0, abs=0.01)
    assert share({"a": features["a"], "b": shared}) == pytest.approx(0.25, abs=0.01)


def test_probe_is_auroc_of_two_classes_and_accuracy_of_more():
    rng = np.random.default_rng(0)
    target = np.arange(300) % 3
    z = {"a": np.eye(3)[target] + 0.1 * rng.normal(size=(300, 3)), "b": rng.normal(size=(300, 2))}
    assert probe_score(z, target, z, target) == 1
    wrong = (target + (np.arange(300) < 30)) % 3
    assert probe_score(z, target, z, wrong) == pytest.approx(0.9)
    two, shifted = target % 2, {"a": z["a"] + [0, 5, 0], "b": z["b"]}
    assert probe_score(z, two, z, two) == 1
    assert probe_score({"b": z["b"]}, two, {"b": rng.normal(size=(300, 2))}, two) == pytest.approx(0.5, abs=0.1)
    assert probe_score(z, two, shifted, two) > 0.9  # an order, not a threshold


def test_a_setting_that_diverges_fails_alone(monkeypatch):
    data, sizes = development(toy(folds=1)), []

    def diverging(data, rows, training, **options):
        sizes.append(len(rows))
        if any(row.weights["transport"] == 5.0 for row in rows):
            raise NonFiniteLoss("transport")
        return align(data, rows, training, **options)

    monkeypatch.setattr(alignment_objectives, "align", diverging)
    settings = [SETTINGS[0], SETTINGS[1], SETTINGS[0]]
    found = evaluation(data, ["retrieval", "alignment"], "info_nce", SHORT, "cpu")(settings)
    assert np.isnan(found[1]).all() and np.isfinite([found[0], found[2]]).all()
    assert sizes == [3, 1, 2, 1, 1]


def test_a_collapsed_member_scores_nothing():
    data = development(toy(folds=1))
    member = align(data, [Weighting("x", {"info_nce": 1.0})], SHORT)["x"].members[0]
    with torch.no_grad():
        for parameter in member.jwae.encoders.parameters():
            parameter.zero_()
    assert np.isnan(objectives_of(data, member, NAMES)).all()


# ---- the command -------------------------------------------------------------------------------------------------

FLAGS = "--dataset arrays --data toy.npz --hold-out 0.3 --trials 6 --at-once 3 --seeds 2 --epochs 2 --latent-dim 4"
FLAGS += " --hidden-dim 8 --batch-size 32 --device cpu --name trial --terms info_nce,transport"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a file of arrays."""
    pool = toy().pool
    np.savez(
        tmp_path / "toy.npz", target=pool.target.numpy().astype(int), **{m: x.numpy() for m, x in pool.features.items()}
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/trial"


def refused(capsys, flags: str) -> str:
    """Exit code 2 and one line on stderr; the line."""
    with pytest.raises(SystemExit) as stop:
        command.run(flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("objectives", ["retrieval,classification", "unique alignment", "alignment"])
def test_command_leaves_trials_front_figure_and_flags_that_can_be_pasted(here, capsys, objectives):
    assert command.run([*FLAGS.split(), "--objectives", *objectives.split()]) == 0
    printed, names = capsys.readouterr().out, objectives.replace(",", " ").split()
    kept = json.loads((here / "search.json").read_text())
    assert list(kept["objectives"]) == names and len(kept["trials"]) == 6
    assert kept["trials"][0]["weights"] == {"info_nce": 1.0, "transport": 1.0, "prior": 0.1, "reconstruction": 0.1}
    signs = [-1 if kept["objectives"][name] == "maximize" else 1 for name in names]
    losses = np.array([[s * t["values"][n] for s, n in zip(signs, names, strict=True)] for t in kept["trials"]])
    assert sorted(kept["front"]) == pareto_front(losses) and kept["chosen"] in kept["front"]
    rows = list(csv.DictReader((here / "trials.csv").open()))
    for i, (row, trial) in enumerate(zip(rows, kept["trials"], strict=True)):
        assert {name: float(row[name]) for name in trial["weights"]} == trial["weights"]
        assert float(row[names[0]]) == trial["values"][names[0]] and int(row["on_front"]) == (i in kept["front"])
    assert (here / "search.png").read_bytes()[:4] == b"\x89PNG" and (here / "results.json").exists()
    pasted = printed[printed.index("--weights") :].split("\n")[0]
    assert pasted == kept["flags"]
    chosen = kept["trials"][kept["chosen"]]["weights"]
    again = command.Config(terms=("info_nce", "transport"), weights=tuple(pasted.split()[1:])).start
    assert again == {name: pytest.approx(value, rel=5e-3) for name, value in chosen.items() if name != "info_nce"}


def test_a_killed_command_resumes_to_the_trials_of_a_whole_one(here, capsys, monkeypatch):
    assert command.run(FLAGS.replace("trial ", "whole ").split()) == 0
    calls = []

    def killing(*arguments):
        evaluate = evaluation(*arguments)

        def counted(settings):
            calls.append(len(settings))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return evaluate(settings)

        return counted

    monkeypatch.setattr(command, "evaluation", killing)
    assert command.run(FLAGS.split()) == 130 and not (here / "results.json").exists()
    assert command.run(["--resume", "--name", "trial"]) == 0
    assert calls == [3, 3, 3]
    assert (here / "trials.csv").read_text() == (here.parent / "whole/trials.csv").read_text()
    assert command.run(["--resume", "--name", "trial"]) == 0 and "is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--objectives recall", "--objectives recall: give different ones of retrieval, classification"),
        ("--objectives alignment,alignment", "--objectives alignment,alignment: give different ones"),
        ("--objectives alignment,unique,retrieval", "--objectives: give one, or two for a front"),
        ("--terms contrastive", "--terms contrastive: give different ones of margin, info_nce"),
        ("--weights coral=1", "--weights coral=1: write TERM=WEIGHT, above 0, of info_nce, transport"),
        ("--weights transport=x", "--weights transport=x: write TERM=WEIGHT"),
        ("--weights transport=0", "--weights transport=0: write TERM=WEIGHT"),
        ("--weights transport=11", "--weights transport=11: give 0.001 to 10"),
        (
            "--weights info_nce=1e5 prior=9 reconstruction=9",
            "--weights transport=1: give 0.001 to 10 times that of info_nce",
        ),
        ("--trials 0", "--trials 0: give a number from 1"),
        ("--modalities a", "has a alone; an alignment needs two"),
        ("--task regression", "--objectives classification: toy has no classes; give retrieval, alignment, unique"),
    ],
)
def test_wrong_flags_end_in_one_line_and_leave_nothing(here, capsys, flags, words):
    assert words in refused(capsys, f"{FLAGS} {flags}")
    assert not here.exists()


def test_command_without_optuna_says_how_to_install_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install optuna" in refused(capsys, FLAGS)
    assert not here.exists()


def test_weights_are_relative_to_the_first_term():
    config = command.Config(terms=("stein", "info_nce"), weights=("stein=2", "info_nce=1", "prior=.2"))
    assert config.start == {"info_nce": 0.5, "prior": 0.1, "reconstruction": 0.05}
    assert list(config.space) == ["info_nce", "prior", "reconstruction"]


def test_figure_tells_front_dominated_first_and_chosen_trials_apart():
    trials = [Trial({}, v) for v in [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9), (0.6, 0.6), None]]
    figure = Figure()
    command.draw(figure, Search({"retrieval": "maximize", "unique": "maximize"}, trials), "default weights")
    (axis,) = figure.axes
    assert axis.lines[0].get_xydata().tolist() == [[0.9, 0.1], [0.6, 0.6], [0.1, 0.9]]
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axis.collections}
    assert drawn == {"dominated": [[0.5, 0.5]], "default weights": [[0.5, 0.5]], "chosen": [[0.6, 0.6]]}
    figure = Figure()
    command.draw(figure, Search({"alignment": "minimize"}, [Trial({}, v) for v in [(0.5,), None, (0.7,), (0.2,)]]), "x")
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0.5], [2, 0.5], [3, 0.2]]
