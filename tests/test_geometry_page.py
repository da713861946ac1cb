"""The geometry page of a run: its coordinates and maps against slow references, and the command as a user meets it."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_explain import small_run

from mmfusion import geometry
from mmfusion.dataset import Dataset, Split, take
from mmfusion.metrics.cross_decoding import measure_cross_decoding, r_squared
from mmfusion.metrics.geometry import foscttm, measure_alignment
from mmfusion.models.fusion import FusionModel
from mmfusion.models.whitening import whiten_latents
from mmfusion.runs import geometry_figure
from mmfusion.runs.geometry_figure import (
    LINES,
    at_most,
    colours_of,
    draw_geometry,
    planar_map,
    principal_plane,
    rotation,
)
from mmfusion.runs.load import TrainedRun
from mmfusion.runs.shared_space import PairLatents, cross_decoded, latent_pairs

N = 120


def partners(n: int = N, modalities: tuple[str, ...] = ("a", "b")) -> Split:
    """Features whose modalities are one another's, but for noise and a rotation."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(n, 6, generator=rng)
    features = {
        name: z @ torch.linalg.qr(torch.randn(6, 6, generator=rng))[0] + 0.1 * torch.randn(n, 6, generator=rng)
        for name in modalities
    }
    return Split(features, torch.arange(n) % 3.0, [str(i) for i in range(n)])


def cut(modalities: tuple[str, ...] = ("a", "b")) -> tuple[Split, Split]:
    """Train and test of one draw."""
    whole = partners(N + 40, modalities)
    return take(whole, range(N)), take(whole, range(N, N + 40))


def aligned_member(split: Split) -> FusionModel:
    """A member whose latents of both modalities are the same but for noise; its decoders undo its encoders."""
    names = list(split.features)
    member = FusionModel(dict.fromkeys(names, 6), latent_dim=6, hidden_dim=0, rank=2).eval().requires_grad_(False)
    member.fit_standardisation(split.features)
    # decoders and encoders of whitening have layers: a Linear stands for a Sequential of one
    for modules in (member.jwae.encoders, member.jwae.decoders):
        for name in names:
            modules[name] = torch.nn.Sequential(torch.nn.Linear(6, 6).requires_grad_(False))
    first = member.standardise[names[0]](split.features[names[0]])
    for name in names:
        x = member.standardise[name](split.features[name])
        weight = torch.linalg.lstsq(x, first).solution  # x @ weight is the first modality, nearly
        member.jwae.encoders[name][0].weight.copy_(weight.T)
        member.jwae.encoders[name][0].bias.fill_(0.3)
        member.jwae.decoders[name][0].weight.copy_(torch.linalg.inv(weight).T)
        member.jwae.decoders[name][0].bias.copy_(-0.3 * torch.linalg.inv(weight).sum(0))
    return member


# ---- common coordinates ------------------------------------------------------------------------------------------


def test_whitening_parts_partners_and_pairs_are_those_of_training():
    train, test = cut()
    member = aligned_member(train)
    before = member.encode(test.features)
    assert foscttm(before["a"], before["b"]) < 0.01
    whiten_latents(member, train.features)
    apart = member.encode(test.features)
    assert foscttm(apart["a"], apart["b"]) > 0.1, "else no frame is needed"
    (pair,) = latent_pairs(member, test)
    assert pair.names == ("a", "b")
    np.testing.assert_allclose(pair.x, before["a"], atol=1e-5)
    np.testing.assert_allclose(pair.y, before["b"], atol=1e-5)


def test_latents_that_were_not_whitened_are_taken_as_they_are():
    train = partners()
    member = aligned_member(train)
    (pair,) = latent_pairs(member, train)
    np.testing.assert_array_equal(pair.x, member.encode(train.features)["a"].double())
    np.testing.assert_array_equal(pair.y, member.encode(train.features)["b"].double())


def test_features_cross_decoded_by_a_whitened_member_are_those_before_in_every_direction():
    train, test = cut(("a", "b", "c"))
    member = aligned_member(train)
    z = member.encode(test.features)
    direct = {(a, b): member.jwae.decoders[b](z[a]) for a in "abc" for b in "abc"}
    whiten_latents(member, train.features)
    features, decoded = cross_decoded(member, test)
    assert set(decoded) == set(direct)
    for (source, name), x in decoded.items():
        expected = (test.features[name] - train.features[name].mean(0)) / train.features[name].std(0, correction=0)
        np.testing.assert_allclose(features[name], expected, atol=1e-4)
        np.testing.assert_allclose(x, direct[source, name], atol=1e-4)
        assert r_squared(features[name], x, np.zeros(6)) > (0.999 if source == name else 0.9)


# ---- maps --------------------------------------------------------------------------------------------------------


def test_rotation_is_found_from_turned_rows_and_is_orthogonal():
    rng = np.random.default_rng(0)
    x, turn = rng.normal(size=(30, 4)), np.linalg.qr(rng.normal(size=(4, 4)))[0]
    found = rotation(x @ turn, x)
    np.testing.assert_allclose(found, turn.T, atol=1e-12)
    noisy = rotation(rng.normal(size=(30, 4)), x)
    np.testing.assert_allclose(noisy @ noisy.T, np.eye(4), atol=1e-12)


def test_principal_plane_holds_the_largest_share_and_equals_an_eigendecomposition():
    z = np.random.default_rng(0).normal(size=(50, 5)) * [1, 4, 2, 1, 0.5] + 3
    plane, shares = principal_plane(z)
    values, vectors = np.linalg.eigh(np.cov(z.T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    np.testing.assert_allclose(np.abs(plane), np.abs((z - z.mean(0)) @ vectors[:, ::-1][:, :2]))
    assert plane[:, 0] @ z[:, 1] > 0 and principal_plane(z * [1, -1, 1, 1, 1])[0][:, 0] @ z[:, 1] < 0
    single, share = principal_plane(z[:, :1])
    assert share.tolist() == [1, 0] and not single[:, 1].any()


@pytest.mark.parametrize("kind", ["pca", "tsne"])
@pytest.mark.parametrize(("n", "width"), [(3, 4), (20, 1), (40, 5)])
def test_maps_are_finite_and_the_same_for_the_same_seed(kind, n, width):
    x, y = np.random.default_rng(0).normal(size=(2, n, width))
    maps = [planar_map(x, y, kind, seed=3) for _ in range(2)]
    for a, b in zip(maps[0].together + maps[0].apart, maps[1].together + maps[1].apart, strict=True):
        assert a.shape == (n, 2) and np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_umap_is_seeded_and_looks_at_no_more_neighbours_than_there_are(monkeypatch):
    asked = []

    class Umap:
        """Of the package that few have: the first two coordinates."""

        def __init__(self, **settings):
            asked.append(settings)

        def fit_transform(self, z):
            return z[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    x, y = np.random.default_rng(0).normal(size=(2, 9, 4))
    found = planar_map(x, y, "umap", seed=3)
    np.testing.assert_allclose(np.concatenate(found.together), np.concatenate([x, y])[:, :2], rtol=1e-6)
    # with a seed and more jobs than one umap warns
    assert asked == [{"n_neighbors": k, "random_state": 3, "n_jobs": 1} for k in (15, 8, 8)]


def test_maps_side_by_side_are_turned_such_that_partners_lie_at_like_places():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) * [4, 2, 1, 1]
    found = planar_map(x, -x + 7, "pca")
    np.testing.assert_allclose(found.apart[0], found.apart[1], atol=1e-9)
    gap = found.together[1].mean(0) - found.together[0].mean(0)
    assert np.linalg.norm(gap) > 5, "the one map of both shows how far they lie apart"


def figure_of(monkeypatch, tmp_path: Path, *arguments, **options) -> Figure:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    draw_geometry(tmp_path / "x.png", *arguments, **options)
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 1000
    return figures[0]


def latents(n: int, names: tuple[str, str] = ("a", "b")) -> PairLatents:
    return PairLatents(names, *np.random.default_rng(0).normal(size=(2, n, 4)))


def test_lines_join_partners_and_their_number_is_said(monkeypatch, tmp_path):
    pair = latents(200)
    figure = figure_of(monkeypatch, tmp_path, [pair], "title", seed=1)
    axis = figure.axes[0]
    x, y = (points.get_offsets() for points in axis.collections)
    assert len(axis.lines) == LINES and len(x) == len(y) == 200
    for line in axis.lines:
        ends = np.stack(line.get_data(), 1)
        row = int(np.flatnonzero((x == ends[0]).all(1))[0])
        np.testing.assert_array_equal(ends[1], y[row])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["partners (60 of 200)", "a", "b"]


def test_a_row_of_three_panels_for_each_pair_and_map_and_no_more_than_three_pairs(monkeypatch, tmp_path):
    pairs = [latents(12, names) for names in (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"))]
    titles = [axis.get_title() for axis in figure_of(monkeypatch, tmp_path, pairs, "title").axes]
    assert len(titles) == 9 and titles[:3] == ["a and b in one map, PCA", "a alone, PCA", "b alone, PCA"]
    assert titles[-1] == "d alone, PCA"


def test_each_kind_of_map_has_a_row(monkeypatch, tmp_path):
    figure = figure_of(monkeypatch, tmp_path, [latents(12)], "title", None, ("pca", "tsne"))
    assert [axis.get_title() for axis in figure.axes[1::3]] == ["a alone, PCA", "a alone, t-SNE"]


def test_examples_are_coloured_by_class_value_label_or_not_at_all(monkeypatch, tmp_path):
    target = torch.arange(30) % 3.0
    split = Split({}, target, [str(i) for i in range(30)])
    classes = colours_of(Dataset("x", "multiclass", {}, "dev", class_names=("p", "q", "class r")), split)
    assert classes.names == ["p", "q", "r"] and classes.values.tolist() == target.tolist()
    figure = figure_of(monkeypatch, tmp_path, [latents(30)], "title", classes)
    shades = figure.axes[1].collections[0].get_facecolors()
    assert len({tuple(shade) for shade in shades}) == 3 and len(figure.axes) == 3
    assert (shades[0] == shades[3]).all() and (shades[0] != shades[1]).any()
    values = replace(split, target=torch.randn(30, 2))
    regression = colours_of(Dataset("x", "regression", {}, "dev", target_names=["t", "u"]), values)
    assert regression.title == "t" and not regression.names
    assert len(figure_of(monkeypatch, tmp_path, [latents(30)], "title", regression).axes) == 5  # with colour bars
    labels = colours_of(Dataset("x", "multilabel", {}, "dev", target_names=["t", "u"]), values)
    assert labels.names == ["not t", "t"]
    assert colours_of(Dataset("x", "regression", {}, "dev", labelled=False), split) is None
    assert colours_of(Dataset("x", "binary", {}, "dev"), replace(split, target=None)) is None
    assert len(figure_of(monkeypatch, tmp_path, [latents(30)], "title").axes) == 3


def test_more_classes_than_colours_are_shaded(monkeypatch, tmp_path):
    many = geometry_figure.Colours(np.arange(30) % 15, [str(k) for k in range(15)], "class")
    assert len(figure_of(monkeypatch, tmp_path, [latents(30)], "title", many).axes) == 5


def test_a_subset_is_drawn_once_and_keeps_its_order():
    split = partners(50)
    some = at_most(split, 10, seed=2)
    assert len(some) == 10 and some.ids == at_most(split, 10, seed=2).ids != at_most(split, 10, seed=3).ids
    assert [int(i) for i in some.ids] == sorted(int(i) for i in some.ids)
    assert at_most(split, 50) is split


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Lets the command find a small run in place of one on disk."""
    monkeypatch.chdir(tmp_path)

    def use(**shape) -> TrainedRun:
        made = small_run(**shape)
        monkeypatch.setattr("mmfusion.geometry.load_run", lambda folder, device: made)
        return made

    return use


def refused(capsys, *arguments: str) -> str:
    """Exit code 2, one line on stderr, nothing written; the line."""
    with pytest.raises(SystemExit) as stop:
        geometry.run(["runs/toy", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not any(Path().rglob("*.png"))
    return lines[0]


def test_command_prints_the_metrics_own_numbers_and_draws_into_the_runs_folder(toy, capsys):
    run = toy(modalities=("a", "b"), task="binary", outputs=1)
    arguments = ["runs/toy", "--split", "train", "--permutations", "5", "--map", "pca"]
    assert geometry.run(arguments) == 0
    said = capsys.readouterr().out
    split = run.datasets[0].splits["train"]
    member = run.members(run.main_row)[0]
    for (a, b), one in measure_cross_decoding(*cross_decoded(member, split), permutations=5).items():
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", said[said.index(f"{a} to {b}") :].splitlines()[0])]
        null = (one.r2.null_mean, one.r2.null_low, one.r2.null_high)
        assert numbers == pytest.approx([one.r2.value, *null, *one[1:]], abs=6e-4)
    (pair,) = latent_pairs(member, split)
    expected = measure_alignment(pair.x, pair.y, split.target.numpy().astype(int), 5, 0)
    for name in ("centroid gap", "MMD", "CKA", "FOSCTTM", "mutual kNN", "silhouette", "V-measure"):
        value, mean = re.search(rf"^{name} +(-?\d+\.\d+) +(-?\d+\.\d+) \[", said, re.MULTILINE).groups()
        assert float(value) == pytest.approx(expected[name].value, abs=6e-4)
        assert float(mean) == pytest.approx(expected[name].null_mean, abs=6e-4)
    assert "jWAE-LMF, seed 0, train, n = 40" in said
    assert re.search(r"^a +-?\d+\.\d+ ", said, re.MULTILINE) and "a to b" in said and "b to a" in said
    assert Path("runs/toy/geometry.png").stat().st_size > 20_000
    assert geometry.run(arguments) == 0 and capsys.readouterr().out == said, "the same for the same seed"


def test_three_modalities_values_and_few_examples_are_measured_by_the_default_flags(toy, capsys):
    toy()
    assert geometry.run(["runs/toy", "--permutations", "3"]) == 0
    said = capsys.readouterr().out
    assert "audio and text" in said and "audio and video" in said and "text and video" in said
    assert "test, n = 9" in said and "few examples: 4 neighbours, 8 of the curvature" in said
    assert said.count(" to ") == 6 and "V-measure" not in said
    assert Path("runs/toy/geometry.png").exists()


def test_other_member_fold_subset_and_file_are_taken_and_said(toy, capsys):
    run = toy(folds=2, modalities=("a", "b"))
    flags = ["--member", "1", "--split", "train", "--max-examples", "25", "--out", "new/x.png", "--map", "tsne"]
    assert geometry.run(["runs/toy", *flags, "--permutations", "0"]) == 0
    said = capsys.readouterr().out
    split = at_most(run.datasets[0].splits["train"], 25)
    (pair,) = latent_pairs(run.members(run.main_row)[1], split)
    assert f"{foscttm(pair.x, pair.y):.3f}\n" in said[said.index("FOSCTTM") :].splitlines(keepends=True)[0]
    assert "seed 1, fold 1 of 2, train, n = 25 of 40, drawn at random" in said and Path("new/x.png").exists()


def test_decoders_that_were_not_trained_are_not_measured(toy, capsys):
    run = toy(modalities=("a", "b"))
    run.settings["reconstruction_weight"] = 0.0
    assert geometry.run(["runs/toy", "--map", "pca", "--permutations", "2"]) == 0
    said = capsys.readouterr().out
    assert "decoders were not trained" in said and "a to b" not in said


def test_what_makes_no_sense_ends_in_one_line(toy, capsys, monkeypatch):
    toy()
    assert "--split dev2: runs/toy has train, dev, test" in refused(capsys, "--split", "dev2")
    assert "--member 2: the run has 2 seeds" in refused(capsys, "--member", "2")
    assert "--max-examples 3" in refused(capsys, "--max-examples", "3")
    assert "--out x.pdf" in refused(capsys, "--out", "x.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--map umap: needs the package umap-learn" in refused(capsys, "--map", "umap")


def test_one_modality_few_examples_and_collapsed_latents_end_in_one_line(toy, capsys):
    toy(modalities=("a",))
    assert "latents of one modality alone" in refused(capsys)
    run = toy(modalities=("a", "b"))
    run.datasets[0].splits["test"] = at_most(run.datasets[0].splits["test"], 5)
    assert "split test has 5 examples; 8 are needed" in refused(capsys)
    run = toy(modalities=("a", "b"))
    for split in run.datasets[0].splits.values():
        split.features["b"].fill_(1.0)
    assert "latents of a and b cannot be measured" in refused(capsys)
