import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.html.overlay import OUTLINE_COLOURS
from app.reports.demo import Page, PageCase, render, write_page

PICTURE = np.zeros((6, 4, 3), dtype=np.uint8)
HOSTILE = "<script>alert('\"&')</script>"


def scores(dice: float, hd95_mm: float = 3.0) -> dict[str, Mapping[str, float]]:
    region = {"dice": dice, "hd95_mm": hd95_mm, "volume_ml": 31.25, "reference_volume_ml": 29.5}
    return {"WT": region, "TC": region, "ET": region}


def page(*cases: PageCase, **changed: object) -> Page:
    values: dict[str, object] = {
        "title": "Demo", "lead": "What this is.", "provenance": [("Seed", "17")], "cases": cases,
        "metrics": [{"kind": "train", "step": 1, "loss": 0.5, "learning_rate": 1e-3, "seconds": 1.0}],
        "commands": [("Train again", "znormseg demo --out x")],
    }  # fmt: skip
    return Page(**{**values, **changed})  # type: ignore[arg-type]


def case(name: str = "case-a", dice: float = 0.8765, hd95_mm: float = 3.0, overlay: Any = PICTURE) -> PageCase:
    return PageCase(case=name, scores=scores(dice, hd95_mm), overlay=overlay, overlay_caption="FLAIR; z = 3.")


def rows(html: str) -> dict[str, list[str]]:
    """Cells of the table of scores by the name of their row, tags removed."""
    table = html[html.index("<tbody>") : html.index("</tfoot>")]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    plain = [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in found]
    return {row[0]: row[1:] for row in plain}


class Outline(HTMLParser):
    VOID = frozenset({"meta", "img", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    return parser


def test_the_page_contains_every_case_and_number() -> None:
    html = render(page(case("first", 0.8765, 3.21), case("second", 0.5, 12.5)))
    for text in ("first", "second", "0.876", "3.2", "0.500", "12.5", "31.2", "29.5"):
        assert text in html


def test_mean_and_median_rows_summarise_the_cases() -> None:
    table = rows(render(page(case("a", 0.9, 1), case("b", 0.6, 2), case("c", 0.3, 6))))
    assert table["Mean"][:2] == ["0.600", "3.0"]
    assert table["Median"][:2] == ["0.600", "2.0"]


def test_the_best_and_worst_values_of_a_column_are_marked() -> None:
    table = rows(render(page(case("a", 0.9, 9), case("b", 0.6, 5), case("c", 0.3, 1))))
    assert [table[name][:2] for name in "abc"] == [["▲0.900", "▽9.0"], ["0.600", "5.0"], ["▽0.300", "▲1.0"]]


def test_equal_scores_are_not_marked() -> None:
    assert rows(render(page(case("a", 0.5), case("b", 0.5))))["a"][0] == "0.500"


def test_undefined_scores_are_left_out_of_the_mean_and_reported() -> None:
    html = render(page(case("a", 0.5, float("nan")), case("b", 0.5, 4.0)))
    assert rows(html)["Mean"][1] == "4.0"
    assert "3 values are not defined" in html


def test_an_infinite_distance_is_shown_and_kept_in_the_mean() -> None:
    assert rows(render(page(case("a", 0.5, float("inf")), case("b", 0.5, 4.0))))["Mean"][1] == "∞"


def test_a_case_without_scores_is_shown() -> None:
    assert rows(render(page(PageCase(case="bare", scores={}, overlay=None))))["bare"] == ["&ndash;"] * 6


def test_hostile_strings_are_escaped() -> None:
    hostile = PageCase(case=HOSTILE, scores=scores(0.5), overlay=PICTURE, overlay_caption=HOSTILE)
    texts = {"title": HOSTILE, "lead": HOSTILE, "provenance": [(HOSTILE, HOSTILE)], "commands": [(HOSTILE, HOSTILE)]}
    html = render(page(hostile, **texts))
    assert not [tag for tag, _ in outline(html).seen if tag == "script"]
    assert "&lt;script&gt;alert(&#39;&#34;&amp;&#39;)" in html


def test_the_page_references_nothing_external() -> None:
    html = render(page(case()))
    links = [attrs[name] or "" for _, attrs in outline(html).seen for name in ("src", "href") if name in attrs]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#case-")) for link in links)
    assert "url(" not in html
    assert "@import" not in html


def test_every_element_is_closed_in_order() -> None:
    assert outline(render(page(case(), case("b", overlay=None)))).open == []


def test_every_link_within_the_page_has_its_target() -> None:
    seen = outline(render(page(case("a"), case("b")))).seen
    targets = {f"#{attrs['id']}" for _, attrs in seen if "id" in attrs}
    assert {attrs["href"] for _, attrs in seen if "href" in attrs} <= targets


def test_every_picture_has_a_text_alternative() -> None:
    (image,) = [attrs for tag, attrs in outline(render(page(case("a", 0.75)))).seen if tag == "img"]
    assert image["alt"] == (
        "Case a: reference outlines on the left, predicted outlines on the right, in three planes where the tumour is "
        "largest. Dice WT 0.750, TC 0.750, ET 0.750."
    )


def test_the_picture_keeps_its_size() -> None:
    assert '<img width="4" height="6"' in render(page(case()))


def test_without_a_reference_the_left_column_is_called_image() -> None:
    alone = PageCase(case="a", scores={"WT": {"volume_ml": 3.0}}, overlay=PICTURE)
    assert "<span>Image</span><span>Prediction</span>" in render(page(alone))


def test_the_legend_has_the_colours_of_the_outlines() -> None:
    html = render(page(case()))
    for region, (red, green, blue) in OUTLINE_COLOURS.items():
        assert f".legend .{region.lower()}::before {{ border-color: rgb({red} {green} {blue}); }}" in html


def test_the_page_says_it_is_for_research_only() -> None:
    assert "Research use only; not a medical device." in render(page())


@pytest.mark.parametrize("empty", ["metrics", "commands", "provenance", "cases"])
def test_the_page_renders_with_an_empty_part(empty: str) -> None:
    assert outline(render(page(**{"cases": [case()], empty: []}))).open == []


def test_gradients_have_a_section_only_if_they_were_measured() -> None:
    record = {"kind": "overlap", "step": 1, "junctions": {HOSTILE: {"cosine": 0.5, "ratio": 0.9}}}
    with_it = render(page(case(), metrics=[record]))
    assert ['<h2 id="gradients">' in html for html in (with_it, render(page(case())))] == [True, False]
    assert outline(with_it).open == []
    assert not [tag for tag, _ in outline(with_it).seen if tag == "script"]


def test_every_junction_colour_is_in_the_style_sheet() -> None:
    junctions = {f"n{n}": {"cosine": 0.1 * n, "ratio": 0.9} for n in range(8)}
    html = render(page(case(), metrics=[{"kind": "overlap", "step": 1, "junctions": junctions}]))
    used = set(re.findall(r'class="junction (j\d+)"', html))
    assert len(used) == 8
    assert all(f".{name} {{ --colour:" in html for name in used)


def test_the_written_page_equals_the_rendered_page(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page(case()))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(page(case()))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("app.reports.demo.render", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(tmp_path / "report.html", page())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_page_with_a_case_id_that_is_not_unicode_is_still_written(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page(case("broken-\udce9")))
    assert "broken-?" in (tmp_path / "report.html").read_text(encoding="utf-8")
