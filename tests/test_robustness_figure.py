"""The figure of experiments.robustness fills its canvas, however few groups were measured."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.robustness.figure import draw


@pytest.mark.parametrize(("kinds", "rows"), [(1, 1), (2, 1), (3, 2), (5, 2)])
def test_figure_has_no_empty_row(kinds, rows):
    curve = SimpleNamespace(scores=np.zeros((2, 1, 3)), levels=np.array([0.0, 1.0]))  # (E, S, N)
    result = SimpleNamespace(curves={("latents", str(k)): {"a": curve} for k in range(kinds)}, clean={"a": 0.5})
    data = SimpleNamespace(name="toy", score_name="accuracy")
    figure = Figure(figsize=(15, 9))
    draw(figure, SimpleNamespace(main_row="a", data=data), result, SimpleNamespace(certified={}, seeds=1))
    assert figure.axes[0].get_gridspec().nrows == rows
    assert (figure.get_figheight() == pytest.approx(9)) == (rows == 2)
