import math
import re

import numpy as np
import pytest

from app.reporting.chart import MOST_POINTS, WIDTH, Chart, Line, draw, nice_ticks, thin
from app.reporting.curves import curves_html, running_mean


def train(step: int, loss: float | None) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3, "seconds": 0.1}


def validation(step: int, dice: float | None) -> dict[str, object]:
    return {"kind": "validation", "step": step, "dice": {"WT": dice, "TC": dice, "ET": dice}, "mean_dice": dice}


def points(html: str, style: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="line {style}" d="M([^"h]*)"', html)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


def test_long_line_is_thinned_to_the_limit() -> None:
    x = np.arange(100_000.0)
    kept_x, kept_y = thin(x, np.sin(x))
    assert len(kept_x) == len(kept_y) <= MOST_POINTS


def test_thinning_keeps_a_single_spike() -> None:
    y = np.zeros(100_000)
    y[54_321] = 7.0
    kept_x, kept_y = thin(np.arange(100_000.0), y)
    assert kept_x[kept_y == 7.0].tolist() == [54_321.0]


def test_thinning_keeps_the_order_of_steps() -> None:
    x = np.arange(10_000.0)
    assert (np.diff(thin(x, np.cos(x))[0]) > 0).all()


def test_short_line_keeps_every_point() -> None:
    x = np.arange(MOST_POINTS, dtype=np.float64)
    assert thin(x, x)[0] is x


def test_page_of_a_long_run_draws_few_points() -> None:
    html = curves_html([train(step, 1 / (1 + step)) for step in range(20_000)])
    assert len(points(html, "raw")) <= MOST_POINTS


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 97.0), (-2e-5, 3e-5), (1e8, 1e8 + 10), (0.1, 0.3)])
def test_ticks_lie_evenly_within_the_limits(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert ticks[0] >= low - 1e-9 * abs(low)
    assert ticks[-1] <= high + 1e-9 * abs(high)
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


def test_running_mean_of_a_constant_is_the_constant() -> None:
    np.testing.assert_allclose(running_mean(np.full(9, 4.0), window=4), 4.0)


def test_running_mean_takes_fewer_values_at_the_ends() -> None:
    assert running_mean(np.array([0.0, 3.0, 6.0]), window=3).tolist() == [1.5, 3.0, 4.5]


def test_higher_dice_is_drawn_higher() -> None:
    (_, first), (_, second) = points(curves_html([validation(1, 0.2), validation(2, 0.8)]), "wt")
    assert second < first


def test_drawn_points_stay_within_the_picture() -> None:
    html = curves_html([train(step, (-1.0) ** step * step) for step in range(1000)])
    assert all(0 <= x <= WIDTH and 0 <= y <= 230 for x, y in points(html, "raw"))


def test_records_without_a_finite_loss_are_counted() -> None:
    records = [train(0, 1.0), train(1, None), train(2, math.nan), train(3, math.inf), train(4, 0.5)]
    assert "3 of 5 records have no finite loss" in curves_html(records)


def test_nan_never_reaches_the_drawing() -> None:
    records = [train(0, 1.0), train(1, math.nan), validation(1, math.nan), validation(2, 0.5)]
    assert "nan" not in curves_html(records).lower()


def test_losses_too_large_to_draw_do_not_break_the_page() -> None:
    assert "1 of 2 records" in curves_html([train(0, 1e308), train(1, 1.0)])


def test_one_record_alone_is_drawn() -> None:
    assert "Last loss 0.5 at step 7." in curves_html([train(7, 0.5)])


def test_malformed_records_are_passed_over() -> None:
    html = curves_html([{"kind": "train"}, {"kind": "validation", "dice": None}, {"step": 3}, {}])
    assert "No loss was recorded" in html


def test_no_records_are_said_in_a_sentence() -> None:
    assert curves_html([]) == '<p class="empty">No training was recorded.</p>'


def test_labels_of_a_chart_are_escaped() -> None:
    line = Line(label="<b>", style="raw", x=np.array([0.0, 1.0]), y=np.array([0.0, 1.0]))
    assert "<b>" not in draw(Chart(title="<b>", y_label="<b>", lines=[line]))
