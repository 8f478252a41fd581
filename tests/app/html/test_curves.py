import math
import re

import numpy as np
import pytest

from app.html.chart import MOST_POINTS, WIDTH, Chart, Line, draw_chart, nice_ticks, thin
from app.html.curves import curves_html, gradients_html, running_mean


def train(step: int, loss: float | None) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3, "seconds": 0.1}


def validation(step: int, dice: float | None) -> dict[str, object]:
    return {"kind": "validation", "step": step, "dice": {"WT": dice, "TC": dice, "ET": dice}, "mean_dice": dice}


def gradients(step: int, before: list[float], after: list[float | None], skipped: int = 0) -> dict[str, object]:
    names = "abcdefgh"
    layers = {names[n]: {"norm_before": b, "norm_after": a} for n, (b, a) in enumerate(zip(before, after, strict=True))}
    return {"kind": "gradients", "step": step, "layers": layers, "skipped_steps": skipped}


def overlap(step: int, **cosines: float | None) -> dict[str, object]:
    return {"kind": "overlap", "step": step, "junctions": {n: {"cosine": c, "ratio": 0.7} for n, c in cosines.items()}}


def points(html: str, style: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="line {style}" d="M([^"h]*)"', html)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


def test_a_long_line_is_thinned_to_the_limit() -> None:
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


def test_a_short_line_keeps_every_point() -> None:
    x = np.arange(MOST_POINTS, dtype=np.float64)
    assert thin(x, x)[0] is x


def test_the_page_of_a_long_run_draws_few_points() -> None:
    html = curves_html([train(step, 1 / (1 + step)) for step in range(20_000)])
    assert len(points(html, "raw")) <= MOST_POINTS


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 97.0), (-2e-5, 3e-5), (1e8, 1e8 + 10), (0.1, 0.3)])
def test_ticks_are_evenly_spaced_within_the_limits(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert ticks[0] >= low - 1e-9 * abs(low)
    assert ticks[-1] <= high + 1e-9 * abs(high)
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


def test_the_running_mean_of_a_constant_is_the_constant() -> None:
    np.testing.assert_allclose(running_mean(np.full(9, 4.0), window=4), 4.0)


def test_the_running_mean_uses_fewer_values_at_the_ends() -> None:
    assert running_mean(np.array([0.0, 3.0, 6.0]), window=3).tolist() == [1.5, 3.0, 4.5]


def test_a_higher_dice_is_drawn_higher() -> None:
    (_, first), (_, second) = points(curves_html([validation(1, 0.2), validation(2, 0.8)]), "wt")
    assert second < first


def test_drawn_points_stay_inside_the_picture() -> None:
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


def test_a_single_record_is_drawn() -> None:
    assert "Last loss 0.5 at step 7." in curves_html([train(7, 0.5)])


def test_malformed_records_are_skipped() -> None:
    html = curves_html([{"kind": "train"}, {"kind": "validation", "dice": None}, {"step": 3}, {}])
    assert "No loss was recorded" in html


def test_a_sentence_says_that_no_records_exist() -> None:
    assert curves_html([]) == '<p class="empty">No training was recorded.</p>'


def test_labels_of_a_chart_are_escaped() -> None:
    line = Line(label="<b>", style="raw", x=np.array([0.0, 1.0]), y=np.array([0.0, 1.0]))
    assert "<b>" not in draw_chart(Chart(title="<b>", y_label="<b>", lines=[line]))


def test_unmeasured_gradients_take_no_space() -> None:
    assert gradients_html([train(1, 0.5), validation(1, 0.5)]) == ""


def test_each_kind_of_telemetry_has_its_own_figure() -> None:
    both = [gradients(1, [1.0], [2.0]), overlap(1, a=0.5)]
    assert [gradients_html(records).count("<figure") for records in ([both[0]], [both[1]], both)] == [1, 1, 2]


def test_norms_before_and_after_are_drawn_on_a_logarithmic_scale() -> None:
    html = gradients_html([gradients(1, [1e-4], [1e4]), gradients(2, [1e-2], [1e2]), gradients(3, [1.0], [0.5])])
    (_, low), (_, middle), (_, high) = points(html, "before")
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert low - middle > 20
    assert points(html, "after")[0][1] < high


def test_the_band_of_the_norms_surrounds_their_median() -> None:
    html = gradients_html([gradients(step, [1.0, 10.0, 1e3], [2.0, 2.0, 2.0]) for step in (1, 2)])
    low, high = re.findall(r'class="line before quartile" d="M[\d.]+ ([\d.]+)L', html)
    assert float(high) < points(html, "before")[0][1] < float(low)
    assert "over the 3 of 3 tensors that it changed" in html


def test_unchanged_layers_do_not_hide_the_layers_that_the_rule_changes() -> None:
    html = gradients_html([gradients(step, [1e-9, 1e-9, 1.0], [1e-9, 1e-9, 100.0]) for step in (1, 2)])
    alone = gradients_html([gradients(step, [1.0], [100.0]) for step in (1, 2)])
    assert points(html, "before") == points(alone, "before")
    assert "over the 1 of 3 tensors that it changed" in html


def test_without_a_rule_every_layer_is_drawn() -> None:
    html = gradients_html([gradients(step, [0.1, 1.0], [0.1, 1.0]) for step in (1, 2)])
    assert "over the 2 of 2 tensors that have one" in html


def test_skipped_steps_are_reported() -> None:
    records = [gradients(1, [1.0], [2.0]), gradients(2, [math.inf], [None], skipped=3)]
    assert "Steps skipped so far: 3." in gradients_html(records)
    assert "skipped" not in gradients_html(records[:1])


def test_each_junction_has_a_line_and_its_last_values_next_to_its_name() -> None:
    html = gradients_html([overlap(1, up=0.2, down=-0.5), overlap(2, up=0.25, down=None)])
    assert len(points(html, "junction j0")) == 2
    assert "up <small>cosine 0.250, ratio 0.700</small>" in html
    assert "down <small>cosine not defined, ratio 0.700</small>" in html


def test_a_higher_cosine_is_drawn_higher() -> None:
    (_, first), (_, second) = points(gradients_html([overlap(1, a=-0.5), overlap(2, a=0.5)]), "junction j0")
    assert second < first


def test_dashes_and_colours_distinguish_sixteen_junctions() -> None:
    html = gradients_html([overlap(step, **{f"n{n}": n / 20 for n in range(16)}) for step in (1, 2)])
    styles = re.findall(r'<li class="([^"]*)"', html)
    assert len(set(styles)) == 16
    assert all(f'class="line {style}"' in html for style in styles)


def test_names_of_layers_and_junctions_are_escaped() -> None:
    assert "<b>" not in gradients_html([overlap(1, **{"<b>": 0.5})])


@pytest.mark.parametrize("kind", ["gradients", "overlap"])
@pytest.mark.parametrize("content", [{}, None, {"a": None}, {"a": {"norm_before": None, "cosine": "x"}}, [1]])
def test_malformed_telemetry_is_skipped(kind: str, content: object) -> None:
    html = gradients_html([{"kind": kind, "step": 1, "layers": content, "junctions": content}])
    assert "Nothing recorded" in html
    assert "nan" not in html.lower()
