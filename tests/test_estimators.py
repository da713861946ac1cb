"""The estimators behave as scikit-learn's do, whichever form X has, and what they explain and certify is exact."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mmfusion.estimators import FusionClassifier, FusionRegressor
from mmfusion.explain.account import exact_layer, latents_of

QUICK = {"n_members": 1, "random_state": 0, "epochs": 12, "learning_rate": 5e-3, "hidden_dim": 16, "latent_dim": 4}
SLICES = {"audio": slice(0, 4), "video": [4, 5, 6]}


@parametrize_with_checks([FusionClassifier(**QUICK), FusionRegressor(**QUICK)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def audio_and_video(count: int = 150, classes: int = 3) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two modalities that each tell something of the class."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % classes
    audio, video = rng.normal(size=(count, 4)), rng.normal(size=(count, 3))
    audio[:, 0] += 4 * y
    video[:, 1] -= 4 * y
    return {"audio": audio, "video": video}, y


def joined(x: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([x["audio"], x["video"]], 1)


@pytest.fixture(scope="module")
def fitted() -> FusionClassifier:
    """Two members, three classes named by texts."""
    x, y = audio_and_video()
    return FusionClassifier(**QUICK | {"n_members": 2}).fit(x, np.array(["bird", "cat", "dog"])[y])


# ---- forms of X --------------------------------------------------------------------------------------------------


def test_dict_list_and_slices_are_the_same_model():
    x, y = audio_and_video()
    of_dict = FusionClassifier(**QUICK).fit(x, y).predict_proba(x)
    of_slices = FusionClassifier(modalities=SLICES, **QUICK).fit(joined(x), y).predict_proba(joined(x))
    listed = list(x.values())
    of_list = FusionClassifier(**QUICK).fit(listed, y).predict_proba(listed)
    np.testing.assert_array_equal(of_dict, of_slices)
    np.testing.assert_array_equal(of_dict, of_list)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "^rank 0: give a number from 1"),
        ({"n_members": 0}, "^n_members 0: give a number from 1"),
        ({"weight_decay": -1.0}, "^weight_decay -1.0: give"),
        ({"keep": "first"}, "^keep 'first': give best or last"),
    ],
)
def test_settings_out_of_range_are_named_as_arguments(settings, said):
    x, y = audio_and_video()
    with pytest.raises(ValueError, match=said):
        FusionClassifier(**settings).fit(x, y)


def test_one_class_is_named_as_a_person_writes_it():
    x, _ = audio_and_video()
    with pytest.raises(ValueError, match=r"one class alone \(3\)"):
        FusionClassifier().fit(x, np.full(150, 3))


def test_order_of_the_dict_and_further_keys_do_not_matter(fitted):
    x, _ = audio_and_video()
    p = fitted.predict_proba(x)
    turned = {"video": x["video"], "more": np.zeros((150, 2)), "audio": x["audio"]}
    np.testing.assert_array_equal(fitted.predict_proba(turned), p)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: {"audio": x["audio"]}, r"lacks the modalities \['video'\]"),
        (lambda x: x | {"video": x["video"][:, :2]}, "widths"),
        (lambda x: x | {"video": x["video"][:9]}, "different numbers of examples"),
        (lambda x: x | {"video": np.where(x["video"] > 2, np.nan, x["video"])}, "NaN"),
    ],
)
def test_features_that_do_not_fit_are_named(fitted, change, said):
    x, _ = audio_and_video()
    with pytest.raises(ValueError, match=said):
        fitted.predict(change(x))


@pytest.mark.parametrize("slices", [{"a": slice(0, 3), "b": [9]}, {"a": slice(0, 3), "b": slice(20, 30)}])
def test_slices_beyond_the_columns_are_named(slices):
    x, y = audio_and_video()
    with pytest.raises(ValueError, match=r"modalities\['b'\]"):
        FusionClassifier(modalities=slices, **QUICK).fit(joined(x), y)


# ---- conventions -------------------------------------------------------------------------------------------------


def test_it_can_be_cloned_piped_searched_and_cross_validated():
    x, y = audio_and_video(300)
    model = FusionClassifier(modalities=SLICES, **QUICK)
    copy = clone(model)
    assert copy.get_params() == model.get_params() and copy is not model
    assert cross_val_score(model, joined(x), y, cv=3).mean() > 0.8
    pipe = make_pipeline(StandardScaler(), model)
    search = GridSearchCV(pipe, {"fusionclassifier__rank": [1, 3]}, cv=2, scoring="neg_log_loss").fit(joined(x), y)
    assert search.best_params_["fusionclassifier__rank"] in (1, 3)
    assert search.predict_proba(joined(x)).shape == (300, 3)
    assert search.score(joined(x), y) == pytest.approx(-log_loss(y, search.predict_proba(joined(x))))


def test_the_same_seed_gives_the_same_model_and_another_another():
    x, y = audio_and_video()
    first, again, other = (
        FusionClassifier(**QUICK | {"random_state": seed}).fit(x, y).predict_proba(x) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_a_fit_leaves_the_global_random_states_alone():
    x, y = audio_and_video(60)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    FusionClassifier(**QUICK | {"epochs": 2}).fit(x, y)
    assert (torch.rand(1), np.random.rand()) == expected


def test_predictions_are_the_members_mean_and_names_come_back(fitted):
    x, y = audio_and_video()
    p, members = fitted.predict_proba(x), fitted.member_predictions(x)
    assert list(fitted.classes_) == ["bird", "cat", "dog"] and members.shape == (2, 150, 3)
    np.testing.assert_allclose(p, members.mean(0), atol=1e-6)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    np.testing.assert_array_equal(fitted.predict(x), fitted.classes_[p.argmax(1)])
    assert fitted.score(x, fitted.classes_[y]) == (fitted.predict(x) == fitted.classes_[y]).mean() > 0.9


def test_two_classes_have_two_columns():
    x, y = audio_and_video(80, 2)
    model = FusionClassifier(**QUICK).fit(x, 2 * y - 1)
    p = model.predict_proba(x)
    assert p.shape == (80, 2) and list(model.classes_) == [-1, 1]
    np.testing.assert_allclose(p[:, 1], model.member_predictions(x)[0], atol=1e-6)
    assert model.score(x, 2 * y - 1) > 0.9


def test_nothing_is_said_before_the_fit():
    x, _ = audio_and_video()
    for ask in ("predict", "predict_proba", "explain", "certified_radius", "member_predictions"):
        with pytest.raises(NotFittedError):
            getattr(FusionClassifier(), ask)(x)


# ---- tasks -------------------------------------------------------------------------------------------------------


def test_class_weights_move_the_answer_towards_the_heavier_class():
    rng = np.random.default_rng(0)
    y = (np.arange(200) % 10 == 0).astype(int)
    x = {"a": rng.normal(size=(200, 3)) + y[:, None], "b": rng.normal(size=(200, 2))}
    shares = {}
    for name, weight in {"none": None, "balanced": "balanced", "named": {1: 30.0}, "equal": {0: 1.0, 1: 1.0}}.items():
        p = FusionClassifier(class_weight=weight, **QUICK).fit(x, y).predict_proba(x)
        shares[name] = p[:, 1].mean()
    assert shares["none"] == pytest.approx(shares["equal"], abs=1e-5)
    assert shares["none"] < 0.2 < shares["balanced"] < shares["named"]


def test_balanced_is_the_weights_that_scikit_learn_would_give():
    x, y = audio_and_video(120, 3)
    keep = (y < 2) | (np.arange(120) % 2 == 0)
    x, y = {name: value[keep] for name, value in x.items()}, y[keep]
    settings = QUICK | {"validation_fraction": 0.0}  # else a part of the examples gives the shares
    balanced = FusionClassifier(class_weight="balanced", **settings).fit(x, y).predict_proba(x)
    weights = {c: len(y) / (3 * (y == c).sum()) for c in range(3)}
    named = FusionClassifier(class_weight=weights, **settings).fit(x, y).predict_proba(x)
    np.testing.assert_allclose(named, balanced, atol=1e-5)


@pytest.mark.parametrize("weight", ["equal", 3.0])
def test_class_weights_that_mean_nothing_are_refused(weight):
    x, y = audio_and_video()
    with pytest.raises(ValueError, match="class_weight"):
        FusionClassifier(class_weight=weight, **QUICK).fit(x, y)


def test_several_labels_have_a_probability_each():
    x, y = audio_and_video()
    labels = np.stack([y > 0, y > 1, np.arange(150) % 2], 1).astype(int)
    model = FusionClassifier(**QUICK).fit(x, labels)
    p = model.predict_proba(x)
    assert p.shape == (150, 3) and ((p >= 0) & (p <= 1)).all()
    np.testing.assert_array_equal(model.predict(x), p >= 0.5)
    assert (model.predict(x)[:, :2] == labels[:, :2]).mean() > 0.9
    account = model.explain(x, output=1).account
    np.testing.assert_allclose(1 / (1 + np.exp(-account.moderated[0])), p[:, 1], atol=1e-6)


def test_a_regression_of_several_targets_keeps_their_units():
    x, _ = audio_and_video()
    target = np.stack([1000 + 100 * x["audio"][:, 0], 0.01 * x["video"][:, 1]], 1)
    model = FusionRegressor(**QUICK | {"epochs": 30, "patience": 30}).fit(x, target)
    assert model.predict(x).shape == (150, 2) and model.score(x, target) > 0.8
    one = FusionRegressor(**QUICK | {"epochs": 30, "patience": 30}).fit(x, target[:, 0])
    assert one.predict(x).shape == (150,) and one.score(x, target[:, 0]) > 0.8
    assert not hasattr(one, "predict_proba")


# ---- exact -------------------------------------------------------------------------------------------------------


def drawn_margins(member, features, order):
    """(draws, N) logit of the first class less that of the second, over draws of the latents' noise."""
    torch.manual_seed(0)
    latents, stds = member.latents(features), [v.sqrt() for v in member.latent_variances()]
    found = []
    for _ in range(2000):
        logits = (
            member.fusion([z + s * torch.randn_like(z) for z, s in zip(latents, stds, strict=True)]).detach().numpy()
        )
        pair = np.take_along_axis(logits, order, 1)
        found.append(pair[:, 0] - pair[:, 1])
    return np.stack(found)


def test_the_parts_of_an_explanation_sum_to_the_margin_of_the_two_likeliest(fitted):
    x, _ = audio_and_video()
    explained, p = fitted.explain(x), fitted.predict_proba(x)
    account = explained.account
    np.testing.assert_allclose(sum(account.parts.values()), account.prediction, atol=1e-5)
    assert list(account.parts) == ["bias", "audio alone", "video alone", "audio x video"]
    order = np.argsort(-p, 1)
    np.testing.assert_array_equal(explained.pairs, fitted.classes_[order[:, :2]])
    tensors = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in x.items()}
    logits = torch.stack([member(tensors, reconstruct=False).prediction for member in fitted.ensemble_.members])
    first, second = (np.take_along_axis(logits.detach().numpy(), order[None, :, [k]], 2)[..., 0] for k in (0, 1))
    np.testing.assert_allclose(account.prediction, first - second, atol=1e-3)
    assert list(account.variance) == ["audio alone", "video alone", "audio x video"]
    drawn = drawn_margins(fitted.ensemble_.members[0], tensors, order[:, :2])
    np.testing.assert_allclose(drawn.var(0), account.std[0] ** 2, rtol=0.15)


@pytest.mark.parametrize("norm", [1, 2, float("inf")])
def test_no_attack_within_the_certified_radius_changes_a_class_and_one_beyond_does(fitted, norm):
    x, _ = audio_and_video()
    x = {name: value[:20] for name, value in x.items()}
    radii, generator = fitted.certified_radius(x, norm), torch.Generator().manual_seed(0)
    features = {name: torch.tensor(value, dtype=torch.float32) for name, value in x.items()}
    for s, member in enumerate(fitted.ensemble_.members):
        layer, latents = exact_layer(member), latents_of(member, features)
        said = layer(latents).argmax(-1)
        for m, name in enumerate(member.modalities):
            radius = torch.from_numpy(radii[name][s])[:, None]  # (20, 1)
            assert radius.shape == (20, 1) and (radius > 0).all()

            def said_at(step, m=m, layer=layer, latents=latents):
                return layer([z + step if k == m else z for k, z in enumerate(latents)]).argmax(-1)

            for _ in range(100):
                step = torch.randn(latents[m].shape, generator=generator, dtype=torch.float64)
                step = step / torch.linalg.vector_norm(step, ord=norm, dim=-1, keepdim=True)
                assert torch.equal(said_at(0.99 * radius * step), said)
            changed = torch.zeros(20, dtype=torch.bool)
            for other in range(3):  # the steepest way to each other class
                gradient = layer.modality_gradient(latents, m)  # (20, 3, L)
                slope = gradient[:, other] - gradient[torch.arange(20), said]
                step = {1: _largest(slope), 2: slope / slope.norm(dim=-1, keepdim=True)}.get(norm, slope.sign())
                step = torch.where((said == other)[:, None], 0.0, step)
                assert torch.equal(said_at(0.99 * radius * step), said)
                changed |= said_at(1.01 * radius * step) != said
            assert changed.all()


def _largest(slope: torch.Tensor) -> torch.Tensor:
    """(N, d) steps of l_1 norm 1 along the coordinate of the largest slope."""
    place = slope.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(slope).scatter(-1, place, slope.gather(-1, place).sign())


@pytest.mark.parametrize("several", [False, True])
def test_the_radius_of_a_regression_is_that_to_its_mean(several):
    x, y = audio_and_video(60)
    target = np.stack([y, -2.0 * y + x["audio"][:, 1]], 1) if several else y.astype(float)
    model = FusionRegressor(**QUICK).fit(x, target)
    (member,) = model.ensemble_.members
    features = {name: torch.tensor(value, dtype=torch.float32) for name, value in x.items()}
    layer, latents = exact_layer(member), latents_of(member, features)
    away = layer(latents) - member.rescale.mean  # (N, O)
    for m, name in enumerate(member.modalities):
        slope = layer.modality_gradient(latents, m).norm(dim=-1)
        np.testing.assert_allclose(model.certified_radius(x)[name][0], (away.abs() / slope).amin(-1), rtol=1e-6)
