"""Measures of two modalities' latents against slow references, identities, invariances, and their nulls."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, directed_hausdorff
from sklearn.cluster import KMeans
from sklearn.metrics import homogeneity_completeness_v_measure, silhouette_score
from sklearn.neighbors import NearestNeighbors

from mmfusion.losses.token_alignment import mmd_between
from mmfusion.metrics import clusters, geometry, neighbourhoods
from mmfusion.metrics.clusters import cluster_scores
from mmfusion.metrics.geometry import (
    alignment,
    centroid_gap,
    foscttm,
    measure_alignment,
    mmd,
    unbiased_cka,
    uniformity,
)
from mmfusion.metrics.neighbourhoods import NeighbourGraphs, graph_hausdorff, local_curvature, mutual_knn_overlap

DATA = Path(os.environ.get("FUSION_DATA", ""))
PAIRED = {
    "gap": centroid_gap,
    "alignment": alignment,
    "mmd": mmd,
    "cka": unbiased_cka,
    "foscttm": foscttm,
    "knn": mutual_knn_overlap,
    "hausdorff": graph_hausdorff,
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rotation(width: int, seed: int = 5) -> np.ndarray:
    return np.linalg.qr(normal(width, width, seed=seed))[0]


def related(n: int = 60, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Paired rows, off the origin."""
    x = normal(n, width) + 0.5
    return x, x + 0.7 * normal(n, width, seed=1) + 0.3


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (geometry, neighbourhoods):
        monkeypatch.setattr(module, "CHUNK", 700)  # several chunks, the last not full


# ---- slow references ---------------------------------------------------------------------------------------------


def test_gap_alignment_and_uniformity_are_their_formulas(small_chunks):
    x, y = related()
    u, v = unit(x), unit(y)
    assert centroid_gap(x, y) == pytest.approx(np.linalg.norm(u.mean(0) - v.mean(0)))
    assert alignment(x, y) == pytest.approx(np.mean([((a - b) ** 2).sum() for a, b in zip(u, v, strict=True)]))
    pairs = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    assert uniformity(x) == pytest.approx(np.log(np.mean(pairs)))


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_mmd_is_that_of_the_loss(small_chunks, shift):
    x, y = related()
    expected = mmd_between(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert mmd(x + shift, y + shift) == pytest.approx(expected, rel=1e-9)


def test_mmds_of_halves_are_those_of_the_points_in_them(small_chunks):
    points, rng = normal(40, 3), np.random.default_rng(1)
    halves = np.array([rng.permutation(40) < 20 for _ in range(5)])
    np.testing.assert_allclose(geometry._mmds(points, halves), [mmd(points[h], points[~h]) for h in halves])
    np.testing.assert_allclose(geometry._gaps(points, halves), [
        np.linalg.norm(points[h].mean(0) - points[~h].mean(0)) for h in halves
    ])  # fmt: skip


def test_unbiased_cka_is_the_product_of_u_centred_kernels():
    x, y = related(12, 4)
    y = y[:, :3]  # widths may differ

    def u_centred(z):
        n, kernel = len(z), z @ z.T
        np.fill_diagonal(kernel, 0)
        rows = kernel.sum(1) / (n - 2)
        kernel = kernel - rows[:, None] - rows + kernel.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(kernel, 0)
        return kernel

    a, b = u_centred(x), u_centred(y)
    assert unbiased_cka(x, y) == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), rel=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_foscttm_is_the_brute_force_count(small_chunks, ties):
    x, y = related(30, 2)
    if ties:
        x, y = x.round(), y.round()
    d = cdist(x, y)
    shares = []
    for i in range(30):
        for row in (d[i], d[:, i]):
            equal = np.isclose(row, d[i, i], atol=1e-9)
            shares.append(((row < d[i, i]) & ~equal).sum() / 29 + (equal.sum() - 1) / 2 / 29)
    assert ties == any(np.isclose(d[i], d[i, i]).sum() > 1 for i in range(30))
    assert foscttm(x, y) == pytest.approx(np.mean(shares), abs=1e-12)


def test_neighbour_graphs_are_compared_as_by_a_slow_loop(small_chunks):
    x, y = related(50, 4)
    found = [NearestNeighbors(n_neighbors=6, metric="cosine").fit(z).kneighbors(return_distance=False) for z in (x, y)]
    shares, distances = [], []
    for of_x, of_y in zip(*found, strict=True):
        shares.append(len(set(of_x) & set(of_y)) / 6)
        for u in (unit(x), unit(y)):
            a, b = u[of_x], u[of_y]
            distances.append(max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]))
    assert mutual_knn_overlap(x, y, 6) == pytest.approx(np.mean(shares))
    assert graph_hausdorff(x, y, 6) == pytest.approx(np.mean(distances))


def test_other_orders_of_rows_are_measured_as_if_the_rows_were_in_them():
    x, y = related(40, 4)
    orders = np.stack([np.random.default_rng(s).permutation(40) for s in range(3)])
    graphs = NeighbourGraphs(x, y, 5, 0)
    for i, order in enumerate(orders):
        assert graphs.overlap(order) == pytest.approx(mutual_knn_overlap(x, y[order], 5))
        assert graphs.hausdorff(order) == pytest.approx(graph_hausdorff(x, y[order], 5))
        assert geometry._ckas(x, y, orders)[i] == pytest.approx(unbiased_cka(x, y[order]))
        assert geometry._foscttms(x, y, orders)[i] == pytest.approx(foscttm(x, y[order]))


def test_curvature_is_a_principal_component_analysis_of_each_neighbourhood(monkeypatch):
    monkeypatch.setattr(neighbourhoods, "CHUNK", 300)
    x = normal(70, 4) * [3, 2, 1, 0.5]
    nearest = NearestNeighbors(n_neighbors=8).fit(x).kneighbors()
    shares = []
    for i, rows in enumerate(nearest[1]):
        cloud = x[[i, *rows]]
        values = np.linalg.svd(cloud - cloud.mean(0), compute_uv=False) ** 2
        shares.append(values[2:].sum() / values.sum())
    found = local_curvature(x, 8, dimension=2)
    assert found.share == pytest.approx(np.mean(shares)) and found.dimension == 2
    expected = 1 / np.log(nearest[0][:, -1:] / nearest[0][:, :-1]).mean()
    assert found.intrinsic_dimension == pytest.approx(expected)
    assert local_curvature(x, 8).dimension == round(expected)


def test_clusters_are_scored_as_scikit_learn_does_for_the_rows_of_each_order():
    labels = np.repeat(["a", "b", "c"], [35, 18, 7])
    centres = {"a": [3, 0], "b": [0, 3], "c": [-3, 0]}
    x = np.array([centres[name] for name in labels]) + normal(60, 2)
    y = np.array([centres[name] for name in labels]) + normal(60, 2, seed=1)
    orders = np.stack([np.arange(60), np.random.default_rng(0).permutation(60)])
    found = cluster_scores(x, y, labels, orders)
    assert all(0.95 > values[0] > values[1] + 0.2 for values in found.values()), found
    for i, order in enumerate(orders):
        points, twice = np.concatenate([x, y[order]]), np.r_[labels, labels]
        assert found["silhouette"][i] == pytest.approx(silhouette_score(points, twice))
        fitted = KMeans(3, n_init=10, random_state=3).fit_predict(points)
        h, c, v = homogeneity_completeness_v_measure(twice, fitted)
        assert found["V-measure"][i] == pytest.approx(v) and found["NMI"][i] == pytest.approx(np.sqrt(h * c))
    assert found["NMI"][0] != pytest.approx(found["V-measure"][0], rel=1e-5)


def test_a_sample_of_pairs_has_about_the_silhouette_of_all(monkeypatch):
    x, y = np.repeat([[2.0, 0], [-2, 0]], 200, 0), np.repeat([[2.0, 1], [-2, 1]], 200, 0)
    x, y, labels = x + normal(400, 2), y + normal(400, 2, seed=1), np.repeat([0, 1], 200)
    orders = np.stack([np.arange(400), np.random.default_rng(0).permutation(400)])
    everything = cluster_scores(x, y, labels, orders)["silhouette"]
    monkeypatch.setattr(clusters, "SILHOUETTE_PAIRS", 150)
    sample = cluster_scores(x, y, labels, orders)["silhouette"]
    assert everything[0] > 0.15 and abs(sample[0] - everything[0]) < 0.05 and sample[0] != everything[0]
    assert abs(sample[1] - everything[1]) < 0.05 and everything[1] < everything[0] - 0.05
    monkeypatch.setattr(clusters, "SILHOUETTE_PAIRS", 5)
    rare = np.r_[1, np.zeros(399, int)]  # in every sample, or there would be one label and no silhouette
    assert np.isfinite(cluster_scores(x, y, rare, orders)["silhouette"]).all()


# ---- identities and invariances ----------------------------------------------------------------------------------


def test_equal_modalities_are_aligned_by_every_measure():
    x = normal(100, 6)
    found = {name: measure(x, x) for name, measure in PAIRED.items()}
    expected = {"gap": 0, "alignment": 0, "cka": 1, "foscttm": 0, "knn": 1, "hausdorff": 0}
    assert {name: pytest.approx(found[name], abs=1e-7) for name in expected} == expected
    assert found["mmd"] < 0  # unbiased: equal points are nearer to each other than draws of one distribution


def test_unrelated_modalities_are_at_chance():
    found = {name: [] for name in PAIRED}
    for seed in range(20):
        x, y = normal(200, 8, seed=seed), normal(200, 8, seed=100 + seed)
        for name, values in found.items():
            values.append(PAIRED[name](x, y))
    means = {name: np.mean(values) for name, values in found.items()}
    for name, expected, tolerance in (
        ("cka", 0, 0.003),  # the biased estimate would have .04
        ("foscttm", 0.5, 0.01),
        ("knn", 10 / 199, 0.005),
        ("mmd", 0, 0.001),
        ("alignment", 2, 0.03),
    ):
        assert abs(means[name] - expected) < tolerance, name


@pytest.mark.parametrize("name", PAIRED)
def test_a_common_rotation_and_scale_change_no_measure(name):
    x, y = related()
    turn = 7.0 * rotation(5)
    assert PAIRED[name](x @ turn, y @ turn) == pytest.approx(PAIRED[name](x, y), rel=1e-9)


def test_what_a_transformation_of_one_modality_leaves_alone():
    x, y = related()
    turned = y @ rotation(5) * 0.2
    for name in ("cka", "knn", "hausdorff"):  # these compare relations inside each modality
        assert PAIRED[name](x, turned) == pytest.approx(PAIRED[name](x, y), rel=1e-9)
    assert unbiased_cka(x, x @ rotation(5) * 3 + 10) == pytest.approx(1, abs=1e-12)
    for name in ("gap", "alignment"):  # these see directions alone
        assert PAIRED[name](x, 9 * y) == pytest.approx(PAIRED[name](x, y))
        assert PAIRED[name](x, -y) > 2 * PAIRED[name](x, y)
    assert foscttm(x, -y) > 0.4 > 0.2 > foscttm(x, y)
    assert abs(foscttm(x, x + 100) - 0.5) < 0.1  # far away the order of the others' distances is as good as drawn


def test_uniformity_is_0_for_one_direction_and_least_for_vectors_all_around():
    assert uniformity(np.outer(np.arange(1, 20), [1.0, 2.0])) == pytest.approx(0, abs=1e-12)
    assert uniformity(normal(500, 200)) == pytest.approx(-4, abs=0.05)
    assert uniformity(normal(500, 200) + 0.5) > -3.5


def test_a_collapsed_space_scores_chance_and_not_agreement():
    one = np.ones((200, 3))
    assert foscttm(one, one) == 0.5 and foscttm(one, 2 * one) == 0.5
    assert mmd(one, one) == 0 and centroid_gap(one, one) == 0
    for z in (one, np.eye(1, 3).repeat(200, 0)):  # with and without rounding in their mean
        overlaps = [mutual_knn_overlap(z, z, 10, seed) for seed in range(20)]
        assert abs(np.mean(overlaps) - 10 / 199) < 0.01
    corners = np.eye(2).repeat(100, 0)  # two points, a hundred times each
    assert abs(mutual_knn_overlap(corners, corners, 10) - 10 / 99) < 0.04
    assert graph_hausdorff(corners, corners, 10) == pytest.approx(0, abs=1e-7)


def test_a_plane_is_flat_and_a_sphere_the_flatter_the_denser():
    plane = np.random.default_rng(0).random((400, 2)) @ normal(2, 6) + 5
    flat = local_curvature(plane)
    assert flat.dimension == 2 and flat.share < 1e-12
    sparse, dense = (local_curvature(unit(normal(n, 3))) for n in (300, 3000))
    assert sparse.dimension == dense.dimension == 2
    assert sparse.share > 0.01 and sparse.share > 5 * dense.share > 0
    roll = np.random.default_rng(1).random(500) * 6
    assert local_curvature(np.stack([np.cos(roll), np.sin(roll)], -1)).dimension == 1


def test_curvature_sees_no_rotation_scale_shift_or_repeated_point():
    x = normal(80, 4)
    expected = local_curvature(x, 6)
    for same in (x @ rotation(4) * 1e-3 + 1, np.repeat(x, 5, 0)):
        found = local_curvature(same, 6)
        assert found.dimension == expected.dimension and found.share == pytest.approx(expected.share, rel=1e-6)


def test_far_from_the_origin_digits_are_kept():
    x, y = related()
    for measure in (unbiased_cka, foscttm):
        assert measure(x + 1e7, y + 1e7) == pytest.approx(measure(x, y), rel=1e-6), measure
    for same in (x + 1e7, x * 1e-200, x * 1e200):
        assert local_curvature(same).share == pytest.approx(local_curvature(x).share, rel=1e-6)
    # in a narrow cone the nearest by cosine are those by distance across it
    found = [NearestNeighbors(n_neighbors=10).fit(z).kneighbors(return_distance=False) for z in (x, y)]
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*found, strict=True)])
    cones = [np.c_[np.full(60, 1e7), z] for z in (x, y)]
    assert mutual_knn_overlap(*cones) == pytest.approx(expected)


def test_planes_have_no_more_than_half_the_neighbours_dimensions():
    found = local_curvature(normal(300, 60))
    assert found.intrinsic_dimension > 15 and found.dimension == 10 and found.share > 0.1


# ---- all measures with their nulls -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    x, y = related(150, 5)
    labels = (x[:, 0] > 0.5).astype(int)
    return (x, y, labels), measure_alignment(x, y, labels, permutations=60, seed=1)


def test_values_are_those_of_the_single_measures(measured):
    (x, y, _), found = measured
    names = ["centroid gap", "alignment", "MMD", "CKA", "FOSCTTM", "mutual kNN", "graph Hausdorff"]
    for name, measure in zip(names, PAIRED.values(), strict=True):
        assert found[name].value == pytest.approx(measure(x, y)), name
    for name, z in (("x", x), ("y", y)):
        assert found[f"uniformity of {name}"].value == pytest.approx(uniformity(z))
        assert found[f"curvature of {name}"].value == local_curvature(z).share
        assert found[f"plane dimension of {name}"].value == local_curvature(z).dimension
        eigenvalues = np.linalg.eigvalsh(np.cov(z.T))
        dimension = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        assert found[f"effective dimension of {name}"].value == pytest.approx(dimension)


def test_alignment_lies_outside_its_null_and_the_null_where_it_should(measured):
    _, found = measured
    better_above = {"CKA", "mutual kNN", "NMI", "V-measure", "silhouette", "centroid gap", "MMD"}
    with_null = {name: m for name, m in found.items() if m.null}
    halves = {name for name, m in with_null.items() if m.null == "swapped pairs"}
    assert halves == {"centroid gap", "MMD"}
    assert with_null.keys() == better_above | {"alignment", "FOSCTTM", "graph Hausdorff"}
    for name, m in with_null.items():
        assert m.null_low < m.null_mean < m.null_high, name
        assert m.value > m.null_high if name in better_above else m.value < m.null_low, name
    for name, chance in (("CKA", 0), ("FOSCTTM", 0.5), ("mutual kNN", 10 / 149)):
        assert found[name].null_low < chance < found[name].null_high, name


def test_a_null_is_of_the_draws_alone():
    found = geometry.beside_null("permuted rows", np.r_[1000.0, np.arange(41)])
    assert found == (1000, "permuted rows", 20, 1, 39)


def test_of_one_distribution_gap_and_mmd_lie_in_their_null():
    inside = np.zeros(2)
    for seed in range(20):
        x, y = normal(60, 4, seed=seed), normal(60, 4, seed=50 + seed)
        found = measure_alignment(x, y, permutations=60, seed=seed)
        inside += [found[n].null_low <= found[n].value <= found[n].null_high for n in ("centroid gap", "MMD")]
    assert (inside >= 16).all()


def test_results_follow_from_the_seed_and_tensors_do_as_well(measured):
    (x, y, labels), found = measured
    again = measure_alignment(torch.from_numpy(x), torch.from_numpy(y).requires_grad_(), labels, 60, 1)
    assert again == found
    other = measure_alignment(x, y, labels, 60, 2)
    assert other["CKA"].value == found["CKA"].value and other["CKA"].null_mean != found["CKA"].null_mean
    bare = measure_alignment(x, y, permutations=0)
    assert bare["CKA"] == (found["CKA"].value, None, None, None, None)
    assert "NMI" not in bare


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (normal(30, 4), normal(31, 4), {}, "no pairs"),
        (normal(30, 4), normal(30, 5), {}, "no pairs of one width"),
        (normal(30), normal(30), {}, r"x of shape \(30,\)"),
        (normal(30, 4), np.full((30, 4), np.nan), {}, "y of shape .* NaN"),
        (normal(30, 4), np.eye(30, 4), {}, "26 zero vectors, the first in row 4"),
        (np.ones((30, 4)), normal(30, 4), {}, "x of shape .* is one point"),
        (normal(10, 4), normal(10, 4), {}, "10 rows have no k = 10 neighbours"),
        (normal(20, 4), normal(20, 4), {}, "20 different points in 20 rows have no neighbourhoods of k = 20"),
        (normal(30, 4), normal(30, 4), {"permutations": -1}, "permutations"),
        (normal(30, 4), normal(30, 4), {"labels": [1, 2]}, "labels of shape"),
        (normal(30, 4), normal(30, 4), {"labels": [1] * 30}, "1 different labels of 30 rows"),
        (normal(30, 4), normal(30, 4), {"labels": range(30)}, "30 different labels of 30 rows"),
    ],
)
def test_degenerate_input_is_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        measure_alignment(x, y, **options)


def test_measures_that_do_not_exist_are_refused():
    one = np.ones((20, 3))
    with pytest.raises(ValueError, match=r"rows of x .* are equal, but for one"):
        unbiased_cka(one, normal(20, 3))
    alone = one.copy()
    alone[3] = 5
    with pytest.raises(ValueError, match=r"rows of y .* are equal, but for one"):
        unbiased_cka(normal(20, 3), alone)
    with pytest.raises(ValueError, match="too few"):
        unbiased_cka(one[:3], one[:3])
    with pytest.raises(ValueError, match="1 different points"):
        local_curvature(one)
    with pytest.raises(ValueError, match="dimension 20"):
        local_curvature(normal(50, 3), dimension=20)
    for measure in (mmd, foscttm):
        with pytest.raises(ValueError, match="no "):
            measure(one[:1], one[:1])
    with pytest.raises(ValueError, match="no pairs"):
        uniformity(one[:1])
    with pytest.raises(ValueError, match="no pairs"):
        mutual_knn_overlap(one, one[:5])


@pytest.mark.skipif(not (DATA / "clip_coco_pairs.npz").is_file(), reason="FUSION_DATA has no clip_coco_pairs.npz")
def test_clip_on_coco_has_the_known_gap_and_is_aligned():
    arrays = np.load(DATA / "clip_coco_pairs.npz")
    found = measure_alignment(arrays["image"], arrays["text"], permutations=40)
    assert found["centroid gap"].value == pytest.approx(0.851, abs=5e-4)
    assert found["FOSCTTM"].value < 0.02 and found["CKA"].value > 0.5 > found["CKA"].null_high
