"""Robustness of choices between classes, and of several labels: margins by hand, by search, and a run to its end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import log_loss
from test_robustness import model_of, of_norm, path_of

from experiments.robustness import measure as robustness
from experiments.robustness.corruption_grid import LATE_FUSION, Condition, Predictor, conditions
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.arrays import ArraysConfig
from mmfusion.metrics.scores import example_scores
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness import worst_case
from mmfusion.robustness.attacks import pgd
from mmfusion.robustness.certificates import (
    certified_change,
    certified_class_radius,
    certified_feature_radius,
    certified_radius,
    change_bounds,
    class_contrasts,
    joint_radius,
)
from mmfusion.robustness.worst_case import (
    SIZES,
    Criterion,
    attack_checks,
    attacked_scores,
    change_size,
    clean_scores,
    feature_certificates,
    joint_scores,
    latent_attack_gap,
    latent_scores,
    latent_stds,
    outputs_under_change,
)
from mmfusion.train import Config, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import TrainingConfig

N, C = 40, 3
TASKS = ("multiclass", "multilabel")


def logit_model(seed: int) -> FusionModel:
    """Of C logits, which nothing rescales."""
    model = model_of({"a": 4, "b": 3}, seed, output_dim=C)
    model.rescale.mean.zero_()
    model.rescale.std.fill_(1)
    return model


def features_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(N, d, generator=generator).double() for name, d in (("a", 4), ("b", 3))}


def criterion_of(model: FusionModel, features: dict, task: str, seed: int = 0) -> Criterion:
    """Targets that the model gets right three times out of four."""
    output, generator = model(features).prediction.detach(), torch.Generator().manual_seed(seed)
    wrong = torch.rand(N, 1 if task == "multiclass" else C, generator=generator) < 0.25
    if task == "multiclass":
        target = torch.where(wrong, output.argmin(-1, keepdim=True), output.argmax(-1, keepdim=True))
    else:
        target = (output > 0) ^ wrong
    return Criterion(target.double(), task, torch.ones(1))


# ---- margins -----------------------------------------------------------------------------------------------------


def test_contrasts_of_classes_are_one_less_the_other():
    first = torch.tensor([2, 0, 1, 3])
    found = class_contrasts(first, 4)
    assert found.shape == (4, 3, 4)
    logits = torch.randn(4, 4)
    for n, one in enumerate(first.tolist()):
        others = [other for other in range(4) if other != one]
        expected = torch.stack([logits[n, one] - logits[n, other] for other in others])
        torch.testing.assert_close(found[n] @ logits[n], expected)


@pytest.mark.parametrize("task", TASKS)
def test_clean_score_is_the_tasks_own(task):
    model, features = logit_model(0), features_of(0)
    criterion = criterion_of(model, features, task)
    target = criterion.target.squeeze(-1) if task == "multiclass" else criterion.target
    expected = example_scores(model(features).prediction.detach().numpy()[None], target.numpy(), task)[0]
    assert 0 < expected.mean() < 1
    np.testing.assert_allclose(clean_scores(model, features, criterion).numpy(), expected)


# ---- certificates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_margin_of_a_feature_path_is_bounded_more_tightly_than_its_two_logits(norm):
    path = path_of(0, 6, 4, outputs=C, examples=30)
    first = path.output.argmax(-1)
    weights = class_contrasts(first, C).double()
    margins = path.contrast(weights)
    change = torch.randn(30, 4, dtype=torch.float64)
    torch.testing.assert_close(margins(change), torch.einsum("nko,no->nk", weights, path(change)))
    fall = certified_change(margins, -torch.ones_like(margins.output), 0.3, norm)  # (n, C - 1)
    steps = 0.3 * of_norm(torch.randn(500, 30, 4, dtype=torch.float64), norm)
    found = torch.stack([margins.output - margins(step) for step in steps]).amax(0)
    assert (fall >= found).all()
    together = change_bounds(margins, -torch.ones_like(margins.output), 0.3, norm)
    falls, rises = (change_bounds(path, sign * torch.ones_like(path.output), 0.3, norm) for sign in (-1, 1))
    for kind in ("interval", "mean value"):
        bound = together[kind]
        apart = torch.einsum("nko,no->nk", weights.clamp_min(0), falls[kind])
        apart += torch.einsum("nko,no->nk", -weights.clamp_max(0), rises[kind])
        assert (bound <= apart + 1e-12).all() and (bound < 0.9 * apart).any(), kind


@pytest.mark.parametrize("norm", [2, math.inf])
def test_no_class_changes_within_the_certified_radius_of_the_features(norm):
    path = path_of(1, 8, 10, outputs=C, examples=100)
    first = path.output.argmax(-1)
    radius = certified_feature_radius(path.contrast(class_contrasts(first, C).double()), norm).amin(-1)
    assert (radius > 0).all()

    def margin(change: torch.Tensor) -> torch.Tensor:
        return Criterion(first.unsqueeze(-1), "multiclass", torch.ones(1)).margin(path(change)).squeeze(-1)

    like = torch.zeros(100, 10, dtype=torch.float64)
    assert (pgd(margin, like, radius, norm).value > 0).all()
    assert (pgd(margin, like, 4 * radius, norm).value <= 0).double().mean() > 0.5


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("task", TASKS)
def test_score_of_a_moved_latent_counts_the_radii_that_are_larger(task, norm):
    model, features = logit_model(1), features_of(1)
    criterion, stds = criterion_of(model, features, task), latent_stds(model, features)
    scores, latents = latent_scores(model, features, criterion, stds, norm), model.latents(features)
    output = model.fusion(latents)
    for m, name in enumerate(model.modalities):
        if task == "multiclass":
            right = output.argmax(-1, keepdim=True) == criterion.target
            radius = certified_class_radius(model.fusion, latents, m, norm).unsqueeze(-1)
        else:
            right = (output > 0) == (criterion.target == 1)
            radius = certified_radius(model.fusion, latents, m, norm)
        for size, score in zip(SIZES, scores[name], strict=True):
            kept = right & (radius > size * change_size(stds[name], norm))
            torch.testing.assert_close(score, kept.double().mean(-1))
        assert 0 < scores[name].mean() < right.double().mean()


def test_joint_radius_of_a_margin_is_attained_where_two_logits_part():
    # y_0 = 1 + (a z_1)(c z_2) and y_1 = -(a z_1)(c z_2): at z = 0 the margin is 1, and both moves count twice
    layer = LowRankMultimodalFusion((3, 2), 2, 1).double()
    a, c = torch.tensor([1.0, -2, 2]).double(), torch.tensor([3.0, 4]).double()
    with torch.no_grad():
        for projection, rows in zip(layer.projections, ([a, -a], [c, c]), strict=True):
            projection.weight.copy_(torch.stack(rows))
            projection.bias.zero_()
        layer.rank_weights.fill_(1.0)
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    latents = [torch.zeros(1, 3).double(), torch.zeros(1, 2).double()]
    margin = class_contrasts(torch.tensor([0]), 2).double()
    radius = joint_radius(layer, latents, 0, 1, margin)
    assert radius.item() == pytest.approx((2 * 3 * 5) ** -0.5)
    worst = layer([radius[0] * a[None] / 3, -radius[0] * c[None] / 5])
    assert (worst[0, 0] - worst[0, 1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_two_latents_within_their_joint_score_leave_class_or_label_as_it_is(task):
    model, features = logit_model(2), features_of(2)
    criterion, stds = criterion_of(model, features, task), latent_stds(model, features)
    sizes = (0.0, 0.02, 0.1)
    (joint,) = joint_scores(model, features, criterion, stds, sizes).values()
    torch.testing.assert_close(joint[0], clean_scores(model, features, criterion))
    assert joint[2].mean() < joint[1].mean()
    size = max(change_size(stds[name], 2) for name in model.modalities)
    wider = {name: std * size / change_size(std, 2) for name, std in stds.items()}
    for single in latent_scores(model, features, criterion, wider, 2, sizes).values():
        assert (joint <= single + 1e-12).all()
    generator = torch.Generator().manual_seed(0)
    for rho, score in zip(sizes, joint, strict=True):
        least = torch.ones(N, dtype=torch.float64)
        for _ in range(300):
            steps = [torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in model.latents(features)]
            moved = [z + rho * size * of_norm(s, 2) for z, s in zip(model.latents(features), steps, strict=True)]
            least = torch.minimum(least, criterion.score(criterion.margin(model.fusion(moved))))
        assert (score <= least).all()


# ---- attacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("task", TASKS)
def test_certified_attacked_and_clean_scores_are_in_this_order(task, norm):
    model, features = logit_model(3), features_of(3)
    criterion, sizes = criterion_of(model, features, task), (0.02, 0.3, 1.5)
    clean = clean_scores(model, features, criterion)
    for name in ("a", "b"):
        certified = feature_certificates(model, features, criterion, name, norm, sizes)
        attacked = attacked_scores(model, features, criterion, name, norm, sizes)
        assert certified.shape == attacked.shape == (3, N)
        assert (certified <= attacked).all() and (attacked <= clean).all()
        assert certified[-1].mean() < certified[0].mean() and attacked[-1].mean() < clean.mean()
        assert (certified[0].mean() - attacked[0].mean()).abs() < 0.1  # a small change is known nearly exactly


def test_certificates_in_chunks_are_those_of_all_examples_at_once(monkeypatch):
    model, features = logit_model(3), features_of(3)
    criterion = criterion_of(model, features, "multiclass")
    whole = feature_certificates(model, features, criterion, "a", 2)
    monkeypatch.setattr(worst_case, "AT_ONCE", 70)  # two margins of five hidden units: seven examples
    assert 0 < whole.mean() < 1 and torch.equal(feature_certificates(model, features, criterion, "a", 2), whole)


def test_every_label_is_attacked_by_itself():
    model, features = logit_model(4), features_of(4)
    criterion, sizes = criterion_of(model, features, "multilabel"), (0.1, 0.4)
    found = attacked_scores(model, features, criterion, "a", 2, sizes, steps=5, restarts=2)
    outputs, like, worst = outputs_under_change(model, features, "a"), torch.zeros(N, 4).double(), []
    for o in range(C):
        sign = 2 * criterion.target[:, o] - 1
        attacks = [pgd(lambda c: sign * outputs(c)[:, o], like, 2 * rho, 2, steps=5, restarts=2) for rho in sizes]  # noqa: B023
        worst.append(torch.stack([attack.value for attack in attacks]).cummin(0).values)
    torch.testing.assert_close(found, (torch.stack(worst) > 0).double().mean(0))


@pytest.mark.parametrize("task", TASKS)
def test_attack_on_a_latents_margins_is_the_closed_form_and_the_checks_of_an_attack_hold(task):
    model, features = logit_model(5), features_of(5)
    criterion = criterion_of(model, features, task)
    assert all(latent_attack_gap(model, features, criterion, name, 2) < 1e-9 for name in features)
    checks = attack_checks(model, logit_model(6), features, criterion, "a", 2, 0.1)
    assert len(checks) == 5
    # a margin may have a floor that no change of one modality gets below: the second check may say so
    assert all(check.holds for k, check in enumerate(checks) if k != 1), checks


# ---- a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TASKS)
def run(request, tmp_path_factory):
    """A run of mmfusion.train on 150 rows, and what the experiment finds of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(150, 4)), rng.normal(size=(150, 3))
        target = (np.stack([a[:, 0], b[:, 0], a[:, 1] - b[:, 1]], 1) > 0).astype(int)
        if request.param == "multiclass":
            target = target.sum(1)  # 0 .. 3
        rows = {"jWAE-LMF": ("a", "b"), "a only": ("a",), "b only": ("b",)}
        stacks = [[Method(name, modalities)] for name, modalities in rows.items()]
        config = Config(ArraysConfig(hold_out=0.3), TrainingConfig(seeds=2, epochs=2))
        made = fit({"a": a, "b": b, "target": target}, config, stacks)
        flags = "--groups latents missing --draws 1 --attack-seeds 1 --device cpu --name measured"
        assert robustness.run([str(made.folder), *flags.split()]) == 0
        yield made.trained, json.loads(Path("runs/measured/results.json").read_text())
        assert Path("runs/measured/figure.png").stat().st_size > 10_000


def test_run_of_classes_or_labels_is_measured_to_the_end(run):
    trained, results = run
    (fold,) = trained.data.folds
    test = {name: x[fold.test] for name, x in trained.data.pool.features.items()}
    target, numbers = trained.data.pool.target[fold.test].numpy(), results["numbers"]
    members = trained.members(trained.main_row)
    said = np.stack([m(test, reconstruct=False).prediction.detach().numpy() for m in members])  # (S, n, O)
    right = said.argmax(-1) == target if trained.task == "multiclass" else ((said >= 0) == (target == 1))
    expected = right.reshape(len(said), -1).mean(1)
    np.testing.assert_allclose(numbers["clean"][trained.main_row], expected)
    assert numbers["two latents, certified"] and all(
        holds for text, holds in numbers["checks"].items() if "closed form" in text or "least gap" in text
    )
    for key, values in numbers["features, certified"].items():
        attacked, clean = np.array(numbers["features, attacked"][key]), numbers["clean"][key.split(" | ")[0]][0]
        assert (np.array(values) <= attacked + 1e-6).all() and (attacked <= clean + 1e-6).all()
    assert (
        f"score: {trained.data.score_name}" in results["table"] and "-log loss of all test examples" in results["table"]
    )


def test_selection_score_is_the_log_loss_clean_and_in_the_mean_over_conditions(run):
    trained, results = run
    predictor, found = Predictor(trained), results["numbers"]["selection score"]
    (fold,) = trained.data.folds
    target = trained.data.pool.target[fold.test].numpy()

    def minus_log_loss(outputs: np.ndarray) -> list[float]:
        if trained.task == "multiclass":
            return [-log_loss(target, softmax(x.astype(float), -1), labels=range(x.shape[1])) for x in outputs]
        return [
            -np.mean([log_loss(y, p) for y, p in zip(target.T, expit(x.astype(float)).T, strict=True)]) for x in outputs
        ]

    for row in predictor.rows:
        assert found["clean"][row] == pytest.approx(minus_log_loss(predictor.clean(row)), abs=1e-6)
        under = [minus_log_loss(predictor.corrupted(row, c)) for c in conditions(trained, ("missing",), 1)]
        assert found["missing"][row] == pytest.approx(np.mean(under, 0), abs=1e-6)


def test_late_fusion_is_the_mean_of_the_one_modality_rows_logits(run):
    trained, _ = run
    predictor = Predictor(trained)
    singles = [predictor.clean(row) for row in ("a only", "b only")]
    assert singles[0].shape == (2, len(trained.data.test_rows), trained.data.output_dim)
    np.testing.assert_allclose(predictor.clean(LATE_FUSION), np.mean(singles, 0), atol=1e-6)
    lacking = Condition("missing", "missing", "a", 1.0, 0)
    np.testing.assert_allclose(predictor.corrupted(LATE_FUSION, lacking), singles[1], atol=1e-6)
