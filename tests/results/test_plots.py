"""Maps of heads: one head that stands far out does not leave all others one colour."""

import numpy as np
import pytest
from matplotlib.colors import Normalize, PowerNorm

from shipsfast.results.plots import Bars, Panel, heatmap


@pytest.mark.parametrize(
    ("largest", "signed", "norm"), [(9.0, False, PowerNorm), (2.0, False, Normalize), (9.0, True, Normalize)]
)
def test_scale_of_the_colours(largest, signed, norm):
    values = np.linspace(0.1, 1, 100).reshape(10, 10)
    values[3, 4] = largest
    panel = Panel(values, "head", "KL", np.zeros(values.shape, bool), "", [(3, 4, largest)], signed=signed)
    figure = heatmap(panel, Bars([(3, 4, largest)], "KL", ""), "")
    image = figure.axes[0].images[0]
    assert type(image.norm) is norm
    said = any("square-root scale" in axes.get_ylabel() for axes in figure.axes)
    assert said == (norm is PowerNorm)
    assert image.norm(largest) == 1 and image.norm(-largest if signed else 0.0) == 0
