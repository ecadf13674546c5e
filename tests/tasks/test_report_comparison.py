"""A comparison's own page."""

import pyarrow as pa

from schemas.comparison_tables import COMPARISON
from tasks.report.comparison import comparison_figures, comparison_html, comparison_rows


def method(name: str, accuracy: float | None, seconds: float | None, role: str, **more: float) -> dict[str, object]:
    known = {"method": name, "title": name, "accuracy": accuracy, "seconds": seconds, "role": role, "seeds": 5}
    return dict.fromkeys(COMPARISON.columns.names) | known | more


def comparison(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), COMPARISON.columns)


def test_a_comparison_holds_every_method_against_every_baseline() -> None:
    table = comparison(
        method("Teacher", 0.97, None, "teacher"),
        method("SFT", 0.5, 60.0, "baseline", accuracy_low=0.45, accuracy_high=0.55),
        method("On-policy", 0.8, 800.0, "baseline"),
        method("NPD", 0.79, 80.0, "npd", kl_teacher_student=0.4, kl_stderr=0.01, rl_accuracy=0.9),
        method("no <filter>", 0.7, 85.0, "ablation", difference=0.09, difference_low=-0.01, difference_high=0.19),
    )
    header, rows = comparison_rows(table)
    assert len(header) == len(rows[0])
    assert rows[3][-2:] == ["+29.0, ×1.3", "-1.0, ×0.1"]
    assert rows[1][2] == "0.45 to 0.55"
    # What others have less than NPD, and whether that is noise.
    assert [row[3] for row in rows] == ["", "", "", "", "+9.0 (-1.0 to +19.0)"]
    keys = [figure.key for figure in comparison_figures(table)]
    assert keys == ["time", "bars-accuracy", "bars-rl", "bars-kl"]
    page = comparison_html(table, "a <title>")
    assert "no &lt;filter&gt;" in page
    assert "<title>a &lt;title&gt;</title>" in page
    assert "<filter>" not in page
    assert "4 methods from one student" in page


def test_a_comparison_of_nothing_known_is_a_table() -> None:
    table = comparison(method("NPD", None, None, "npd"))
    assert comparison_figures(table) == []
    assert "NPD" in comparison_html(table, "empty")
