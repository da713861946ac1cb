"""The account of the rank factors against direct formulas."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmfusion.dataset import Dataset, Split
from mmfusion.models.decomposition import variance_shares
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.runs import figure as run_figure
from mmfusion.runs.report import rank_report
from mmfusion.training.trainer import Trained


@pytest.fixture
def ensemble() -> FusionEnsemble:
    torch.manual_seed(0)
    return FusionEnsemble({"image": 6, "text": 5}, members=2, latent_dim=4, hidden_dim=8, rank=3).eval()


@pytest.fixture
def features() -> dict[str, torch.Tensor]:
    # far from centred: the account must not depend on the latents' origin
    return {"image": torch.randn(300, 6) + 2, "text": torch.randn(300, 5) - 1}


def test_parts_are_what_replacing_a_latent_by_its_mean_takes_away(ensemble, features):
    report = rank_report(ensemble.members, features)
    for s, member in enumerate(ensemble.members):
        z = [member.encode(features)[name].detach() for name in ("image", "text")]
        mean = [x.mean(0).expand_as(x) for x in z]
        y = [[member.fusion([a, b]).detach().squeeze(-1) for b in (z[1], mean[1])] for a in (z[0], mean[0])]
        logit, constant = y[0][0], y[1][1]
        parts = {"image": y[0][1] - constant, "text": y[1][0] - constant}
        parts["image x text"] = logit - parts["image"] - parts["text"] - constant
        for name, part in parts.items():
            expected = np.cov(part.numpy(), logit.numpy())[0, 1] / logit.var().item()
            assert report.part_share[name][s] == pytest.approx(expected, abs=1e-4)
        assert report.bias[s] == pytest.approx(constant[0].item(), abs=1e-5)


def test_columns_are_the_layers_own_in_order_of_share(ensemble, features):
    report = rank_report(ensemble.members, features)
    for s, member in enumerate(ensemble.members):
        z = [member.encode(features)[name].detach() for name in ("image", "text")]
        terms = member.fusion.rank_terms(z).detach().squeeze(-1).numpy()  # (N, R)
        logit = member.fusion(z).detach().squeeze(-1).numpy()
        share = np.array([np.cov(term, logit)[0, 1] for term in terms.T]) / logit.var(ddof=1)
        order = np.argsort(-share)
        np.testing.assert_allclose(report.share[s], share[order], atol=1e-4)
        np.testing.assert_allclose(report.weight[s], member.fusion.rank_weights.detach().numpy()[order], atol=1e-6)
        strength = member.fusion.rank_strength().detach().squeeze(-1).numpy()
        np.testing.assert_allclose(report.strength[s], strength[order], atol=1e-5)


def test_spectrum_is_the_std_of_the_interactions_canonical_components(ensemble, features):
    report = rank_report(ensemble.members, features)
    for s, member in enumerate(ensemble.members):
        z = [member.encode(features)[name].detach().double().numpy() for name in ("image", "text")]
        roots = [np.linalg.cholesky(np.cov(x.T)) for x in z]
        b = member.fusion.bilinear_map().detach().double().squeeze(0).numpy()
        expected = np.linalg.svd(roots[0].T @ b @ roots[1], compute_uv=False)[:3]
        np.testing.assert_allclose(report.spectrum[s], expected, rtol=1e-4)


def test_shares_of_the_report_are_those_of_the_decomposition(ensemble, features):
    report = rank_report(ensemble.members, features)
    for s, member in enumerate(ensemble.members):
        shares = variance_shares(member.fusion, [z.detach() for z in member.latents(features)])
        ours = [report.part_share[name][s] for name in ("image", "text", "image x text")]
        np.testing.assert_allclose(list(shares.values()), ours, rtol=1e-10)


def test_legends_of_the_figure_lie_outside_the_axes(ensemble, features, tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    terms = {name: [0.5, 0.6] for name in ("bce", "reconstruction", "mmd", "alignment")}
    history = [{"epoch": epoch, "loss": terms, "score": [0.6, 0.7]} for epoch in range(3)]
    trained = Trained([], [1, 2], [0.6, 0.7], history)
    split = Split(features, torch.arange(300) % 2.0, [str(i) for i in range(300)])
    dataset = Dataset("toy", "binary", dict.fromkeys(("train", "dev", "test"), split), "dev")
    shown = run_figure.Shown("test", split, ensemble.predict_proba(features).numpy())
    ranks = rank_report(ensemble.members, features)
    run_figure.draw(tmp_path / "report.png", dataset, ensemble, trained, shown, ranks)
    (figure,) = figures
    assert len(figure.axes) == 8
    boxes = [axis.get_window_extent() for axis in figure.axes]
    for axis in figure.axes:
        legend = axis.get_legend().get_window_extent()
        assert not any(legend.overlaps(box) for box in boxes)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_legend_of_reliability_lies_below_a_label_of_two_lines(task):
    rng, wide = np.random.default_rng(0), task != "binary"
    p = rng.dirichlet(np.ones(3), size=(2, 60)) if wide else rng.random((2, 60))
    target = torch.from_numpy(rng.integers(0, 2, (60, 3) if task == "multilabel" else 60)).float()
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    split = Split({}, target, [str(i) for i in range(60)])
    run_figure._draw_reliability(axis, Dataset("toy", task, {}, "dev"), run_figure.Shown("test", split, p), "test")
    FigureCanvasAgg(figure).draw()
    label = axis.xaxis.get_label()
    assert label.get_text().count("\n") == (task != "binary")
    assert axis.get_legend().get_window_extent().y1 <= label.get_window_extent().y0


def test_errors_say_where_they_are_standardised():
    for outputs, said in ((1, "prediction - target"), (2, "prediction - target (2 targets, standardised)")):
        target = torch.randn(30, outputs)
        shown = run_figure.Shown("test", Split({}, target, [str(i) for i in range(30)]), target.numpy()[None])
        axis = Figure().subplots()
        run_figure._draw_errors(axis, Dataset("toy", "regression", {}, "dev"), shown, "test")
        assert axis.get_xlabel() == said
