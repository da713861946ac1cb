"""The multiple-kernel machine against scikit-learn's, a numeric minimiser, and problems with a known answer."""

import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC, SVR

from mmfusion.models.mkl_svm import MultipleKernelSVM, closed_form_weights


def informative_and_noise(seed=0, n=150):
    """Two modalities of 4 columns: the first knows the class, the second nothing."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    return {"signal": rng.normal(size=(n, 4)) + 1.2 * target[:, None], "noise": rng.normal(size=(n, 4))}, target


def accuracy(machine, features, target):
    return np.mean((machine.decision(features) > 0) == target)


def standardised_rbf(x, train):
    mean, std = train.mean(0), train.std(0)
    return rbf_kernel((x - mean) / std, (train - mean) / std, gamma=1 / x.shape[1])


@pytest.mark.parametrize("uniform", [True, False])
def test_one_modality_equals_scikit_learn_svc(uniform):
    features, target = informative_and_noise()
    x, other = features["signal"] * 7 + 3, np.random.default_rng(1).normal(4, 7, (40, 4))
    machine = MultipleKernelSVM(uniform=uniform, regularisation=2.0).fit({"x": x}, target)
    kernel = standardised_rbf(x, x)
    # a normalised kernel K / f with C is the plain kernel with C / f
    factor = 1 - kernel.mean()
    svc = SVC(kernel="precomputed", C=2.0 / factor, tol=1e-6).fit(kernel, target)
    np.testing.assert_allclose(
        machine.decision({"x": other}), svc.decision_function(standardised_rbf(other, x)), atol=5e-3
    )
    assert machine.weights == {("x",): pytest.approx(1.0)}


def test_one_modality_equals_scikit_learn_svr_whose_tube_is_in_standard_deviations():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(80, 3))
    target = 50 + 20 * np.tanh(x[:, 0])
    machine = MultipleKernelSVM("regression", epsilon=0.2).fit({"x": x}, target)
    kernel = standardised_rbf(x, x)
    std = target.std()
    svr = SVR(kernel="precomputed", C=std / (1 - kernel.mean()), epsilon=0.2 * std, tol=1e-5).fit(kernel, target)
    np.testing.assert_allclose(machine.decision({"x": x}), svr.predict(kernel), atol=5e-3 * std)


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_objective_equals_the_primal_one(task):
    features, target = informative_and_noise(12)
    x, epsilon = features["signal"], 0.3
    y = 2.0 * target - 1 if task == "binary" else (x[:, 0] - x[:, 0].mean()) / x[:, 0].std()
    machine = MultipleKernelSVM(task, epsilon=epsilon).fit({"x": x}, target if task == "binary" else y)
    kernel = standardised_rbf(x, x)
    kernel /= 1 - kernel.mean()
    settings = {"kernel": "precomputed", "tol": 1e-6}
    fitted = (SVC(**settings) if task == "binary" else SVR(epsilon=epsilon, **settings)).fit(kernel, y)
    a = np.zeros(len(y))
    a[fitted.support_] = fitted.dual_coef_[0]
    f = kernel @ a + fitted.intercept_
    losses = np.maximum(0, 1 - y * f) if task == "binary" else np.maximum(0, np.abs(y - f) - epsilon)
    assert machine.objectives[0][0] == pytest.approx(a @ kernel @ a / 2 + losses.sum(), rel=1e-3)


@pytest.mark.parametrize("norm", [1.0, 4 / 3, 2.0, 8.0])
def test_closed_form_is_the_minimum_on_the_norm_ball(norm):
    squared = np.array([0.3, 2.0, 0.9])
    beta = closed_form_weights(squared, norm)
    assert (beta**norm).sum() == pytest.approx(1.0)
    found = minimize(
        lambda b: (squared / b).sum(),
        np.full(3, 0.3),
        bounds=[(1e-3, 1)] * 3,
        constraints={"type": "ineq", "fun": lambda b: 1 - (b**norm).sum()},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    np.testing.assert_allclose(beta, found.x, atol=1e-4)


def test_closed_form_without_any_norm_is_equal_weights():
    np.testing.assert_allclose(closed_form_weights(np.zeros(4), 2.0), 0.5)
    assert closed_form_weights(np.array([-1e-18, 1e-200]), 2.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("task", ["binary", "regression"])
@pytest.mark.parametrize("norm", [1.1, 2.0, 4.0])
def test_objective_falls_and_weights_have_the_norm(task, norm):
    features, target = informative_and_noise(3)
    target = target if task == "binary" else target + features["signal"][:, 0]
    machine = MultipleKernelSVM(task, norm=norm).fit(features, target)
    (objectives,) = machine.objectives
    assert len(objectives) > 2
    assert (np.diff(objectives) <= 1e-4 * objectives[0]).all()  # libsvm stops at 1e-3 in the gradient
    assert objectives[-1] < 0.999 * objectives[0]
    assert (machine.weights_per_output**norm).sum() == pytest.approx(1.0)
    assert list(machine.weights) == machine.kernel_names == [("signal",), ("noise",), ("signal", "noise")]


def test_learned_objective_is_below_that_of_random_weights():
    features, target = informative_and_noise(4, 60)
    machine = MultipleKernelSVM(tolerance=1e-5, iterations=200).fit(features, target)
    single = {name: standardised_rbf(x, x) for name, x in features.items()}
    kernels = np.stack([single["signal"], single["noise"], single["signal"] * single["noise"]])
    kernels = kernels / (1 - kernels.mean((1, 2), keepdims=True))

    def objective(beta):
        kernel = np.tensordot(beta, kernels, 1)
        svc = SVC(kernel="precomputed", tol=1e-5).fit(kernel, target)
        a = np.zeros(len(target))
        a[svc.support_] = svc.dual_coef_[0]
        return np.abs(a).sum() - a @ kernel @ a / 2

    found = machine.objectives[0][-1]
    assert objective(machine.weights_per_output[0]) == pytest.approx(found, rel=1e-3)
    others = np.abs(np.random.default_rng(0).normal(size=(200, 3)))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert min(map(objective, others)) > found * (1 - 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_noise_gets_less_weight_than_signal_and_uniform_gives_both_the_same(seed):
    features, target = informative_and_noise(seed)
    for norm, share in ((2.0, 0.85), (1.1, 0.6)):  # the nearer to 1, the sparser
        weights = MultipleKernelSVM(products=False, norm=norm).fit(features, target).weights
        assert weights[("noise",)] < share * weights[("signal",)]
    equal = MultipleKernelSVM(products=False, uniform=True).fit(features, target)
    assert equal.weights == {("signal",): pytest.approx(2**-0.5), ("noise",): pytest.approx(2**-0.5)}
    assert [len(o) for o in equal.objectives] == [1]


def test_exclusive_or_of_two_modalities_is_found_by_products_alone():
    rng = np.random.default_rng(5)
    x = {"a": rng.normal(size=(600, 1)), "b": rng.normal(size=(600, 1))}
    target = (x["a"] * x["b"] > 0)[:, 0].astype(int)
    train, test = ({name: v[part] for name, v in x.items()} for part in (slice(300), slice(300, 600)))
    additive = MultipleKernelSVM(products=False).fit(train, target[:300])
    products = MultipleKernelSVM().fit(train, target[:300])
    # f(a) + g(b) has at most three of four quadrants right: the four conditions contradict each other
    assert accuracy(additive, test, target[300:]) < 0.75
    assert accuracy(products, test, target[300:]) > 0.9
    assert products.weights[("a", "b")] > 0.9


def test_every_set_of_three_modalities_has_a_kernel():
    rng = np.random.default_rng(6)
    x = {name: rng.normal(size=(30, 2)) for name in "abc"}
    machine = MultipleKernelSVM(uniform=True).fit(x, np.arange(30) % 2)
    sets = [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert machine.kernel_names == sets
    assert sum(w**2 for w in machine.weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_outputs_are_solved_each_for_itself(task):
    features, target = informative_and_noise(7)
    second = (features["noise"][:, 0] > 0).astype(int)
    both = MultipleKernelSVM(task).fit(features, np.stack([target, second], 1))
    decisions = both.decision(features)
    for output, y in enumerate((target, second)):
        alone = MultipleKernelSVM(task).fit(features, y)
        np.testing.assert_allclose(decisions[:, output], alone.decision(features))
        np.testing.assert_allclose(both.weights_per_output[output], list(alone.weights.values()))
    np.testing.assert_allclose(list(both.weights.values()), both.weights_per_output.mean(0))


def test_decision_does_not_depend_on_units_constants_or_the_order_of_modalities():
    features, target = informative_and_noise(8)
    machine = MultipleKernelSVM().fit(features, target)
    scaled = {"noise": features["noise"] / 1000 - 5, "signal": features["signal"] * 40 + 2}
    np.testing.assert_allclose(
        MultipleKernelSVM().fit(scaled, target).decision(scaled), machine.decision(features), atol=2e-2
    )
    reversed_order = dict(reversed(features.items()))
    np.testing.assert_allclose(machine.decision(reversed_order), machine.decision(features))
    # a column that is constant in training says nothing, whatever it holds later
    constant = {name: np.c_[x, np.full(len(x), 0.1)] for name, x in features.items()}
    shifted = {name: np.c_[x, np.full(len(x), 9.0)] for name, x in features.items()}
    machine.fit(constant, target)
    np.testing.assert_array_equal(machine.decision(shifted), machine.decision(constant))


def test_modality_that_never_varies_has_no_weight():
    features, target = informative_and_noise(9)
    features["noise"][:] = 3.0
    machine = MultipleKernelSVM(products=False).fit(features, target)
    assert machine.weights == {("signal",): pytest.approx(1.0), ("noise",): 0.0}


def test_constant_regression_target_is_predicted_as_it_is():
    features, _ = informative_and_noise(10, 30)
    machine = MultipleKernelSVM("regression").fit(features, np.full(30, 4.0))
    np.testing.assert_allclose(machine.decision(features), 4.0)


def test_too_few_iterations_warn():
    features, target = informative_and_noise(11)
    with pytest.warns(ConvergenceWarning, match="after 1 machines"):
        MultipleKernelSVM(iterations=1).fit(features, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultipleKernelSVM().fit(features, target)


X = np.random.default_rng(0).normal(size=(6, 2))
Y = np.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "features, target, message",
    [
        ({}, Y, "per modality"),
        ({"a": X[:, 0]}, Y, r"\(6,\)"),
        ({"a": X, "b": X[:5]}, Y, r"\(5, 2\)"),
        ({"a": X}, Y[:5], r"\(5,\)"),
        ({"a": X}, Y[:, None, None], r"\(6, 1, 1\)"),
        ({"a": X}, Y + 1, "0 and 1"),
        ({"a": X}, np.ones(6), "one class alone"),
        ({"a": X}, np.where(Y, np.nan, 0), "NaN"),
        ({"a": np.where(X > 0, np.nan, X)}, Y, "a of shape"),
    ],
)
def test_unfit_data_are_an_error(features, target, message):
    with pytest.raises(ValueError, match=message):
        MultipleKernelSVM().fit(features, target)


def test_decision_refuses_other_modalities_and_widths_and_an_unfitted_machine():
    with pytest.raises(NotFittedError):
        MultipleKernelSVM().decision({"a": X})
    machine = MultipleKernelSVM().fit({"a": X, "b": X**2}, Y)
    for wrong in ({"a": X}, {"a": X, "c": X}, {"a": X, "b": X[:, :1]}, {"a": X, "b": X[:4]}):
        with pytest.raises(ValueError, match="do not fit"):
            machine.decision(wrong)


@pytest.mark.parametrize(
    "setting", [{"task": "ranking"}, {"norm": 0.5}, {"norm": np.inf}, {"regularisation": 0.0}, {"iterations": 0}]
)
def test_settings_out_of_range_are_an_error(setting):
    with pytest.raises(ValueError):
        MultipleKernelSVM(**setting)
