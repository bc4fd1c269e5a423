"""The page of a report: what is on it, and what strangers cannot do to it."""

import json
import math
import sys
from pathlib import Path

import pytest

from quantcli.cli.inspect import show_outliers
from quantcli.cli.output import Output
from quantcli.commands.inspect import outliers as inspect_outliers
from quantcli.core.errors import MachineError
from quantcli.planning.outliers import keep_advice
from quantcli.verification.report import words
from quantcli.verification.report.document import render
from quantcli.verification.report.heatmap import lay_out
from quantcli.verification.report.outliers import outliers_page
from quantcli.verification.report.page import page, require_plotly
from tests import reports

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"


def figures(text):
    return json.loads(reports.Elements(text).scripts[0])


def heat(text):
    return next(f for f in figures(text).values() if f["data"][0]["type"] == "heatmap")


def test_the_verdict_is_said_with_the_place_to_look_at():
    text = reports.Elements(page(reports.report(28, bad=["layers.13"]))).text
    assert "FAILED · 7 errors (7 sqnr) · 1 note Look at layer 13 " in text
    assert text.index("What is wrong") < text.index("Layers and projections") < text.index("Notes")
    passed = reports.Elements(page(reports.report(2))).text
    assert "✓ Passed · 1 note" in passed
    assert "FAILED" not in passed
    assert "perplexity at most 1.01 x, mean KL divergence at most 0.05" in passed


def test_what_was_not_checked_is_said():
    text = page(reports.structure())
    shown = reports.Elements(text)
    assert "Not checked: weights were not read (--full); nothing was compared" in shown.text
    assert figures(text) == {}
    assert "Modules" not in shown.text


def test_the_map_has_every_module_and_marks_those_that_failed():
    report = reports.report(80, bad=["layers.13.mlp.down_proj", "layers.71.self_attn.q_proj"])
    map_ = heat(page(report))
    cells = map_["data"][0]
    assert sum(z is not None for row in cells["z"] for z in row) == len(report["modules"])
    assert sum("✕" in text for row in cells["text"] for text in row) == 2
    assert [note["x"] for note in map_["layout"]["annotations"]] == [13, 71]
    assert "<b>13</b>" in map_["layout"]["xaxis"]["ticktext"]
    assert map_["layout"]["yaxis"]["ticktext"][0] == "<b>self_attn.q_proj</b>"
    assert "model.layers.13.mlp.down_proj" in cells["hovertext"][6][13]
    assert "FAILED" in cells["hovertext"][6][13]


def test_experts_share_a_cell_and_the_worst_stands_for_all():
    report = reports.report(4, 16, bad=["layers.2.mlp.experts.3", "layers.2.mlp.experts.7"])
    grid = lay_out(report["modules"], words.badness)
    assert sum(cell.count for cell in grid.cells.values()) == len(report["modules"])
    row = grid.rows.index("mlp.experts.*.up_proj")
    cell = grid.cells[row, 2]
    assert (cell.count, cell.failed) == (16, 2)
    failed = [m for m in report["modules"] if not m["ok"] and m["module"].endswith("up_proj")]
    assert cell.worst == min(failed, key=lambda m: m["sqnr_db"])
    assert "the worst of 16, 2 failed" in heat(page(report))["data"][0]["hovertext"][row][2]


def test_stacks_of_layers_do_not_share_rows():
    names = ["model.layers.0.q", "model.layers.1.q", "visual.blocks.0.q", "lm_head", "7.q"]
    grid = lay_out([reports.module(name, (4, 4), 40.0) for name in names], words.badness)
    assert grid.rows == ["model.layers: q", "lm_head", ": q", "visual.blocks: q"]
    assert grid.columns == ["0", "1", "7", "other"]
    assert len(grid.cells) == len(names)


def test_more_kinds_than_fit_leave_the_worst():
    modules = [reports.module(f"m{i}", (4, 4), 40.0 - (i == 77) * 30) for i in range(100)]
    grid = lay_out(modules, words.badness)
    assert len(grid.rows) == 60
    assert grid.rows_left_out == 40
    assert "m77" in grid.rows


def test_tables_say_the_same_as_the_report():
    report = reports.report(2, bad=["layers.1.mlp.up_proj"])
    shown = reports.Elements(page(report))
    rows = [attributes.get("class") for attributes in shown.all("tr")]
    assert rows.count("out") == 3  # module, layer output, check
    for check in report["checks"]:
        assert check["about"] in shown.text
    first = report["modules"][5]["worst_rows"][0]
    assert f"{first['row']} ({first['sqnr_db']:.1f} dB)" in shown.text
    assert "(31 x)" in shown.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_numbers_that_are_none(bad):
    report = reports.report(2)
    report["modules"][3] |= {"sqnr_db": bad, "limit_db": None, "cosine": None, "max_rel_error": None}
    report["run"]["layers"][0] |= {"sqnr_db": bad}
    report["run"]["windows"][0] = {"reference": 0.0, "checkpoint": bad}
    assert {math.inf: "exact", None: "-"}.get(bad, "NaN" if bad != bad else "-inf dB") in page(report)


def test_an_empty_report_and_absent_keys():
    report = {"ok": True, "checkpoint": "x", "depths": ["structure"], "checks": [], "findings": []}
    assert "✓ Passed" in page(report)


def test_one_error_of_a_check_is_not_hidden_by_many_of_another():
    report = reports.report(4, 16, bad=["layers.1"], errors=[("headers", "cut off", "a.safetensors")])
    text = reports.Elements(page(report)).text
    assert text.index("cut off") < text.index("48 more")


def test_strangers_add_no_element_script_or_link():
    harmless = reports.Elements(page(reports.report(2, bad=["layers.1.mlp.up_proj"])))
    text = page(reports.hostile())
    shown = reports.Elements(text)
    assert len(shown.all("script")) == 3
    assert not {"img", "a", "iframe", "object", "link"} & {tag for tag, _ in shown.elements}
    kinds = {tag for tag, _ in harmless.elements}
    assert {tag for tag, _ in shown.elements} == kinds
    names = {name for _, attributes in shown.elements for name in attributes}
    assert names == {name for _, attributes in harmless.elements for name in attributes}
    assert not any(c in text for c in "\x00\x1b\u202e")
    for figure in figures(text).values():
        for string in strings(figure):
            bare = string
            for known in ("<b>", "</b>", "<br>"):
                bare = bare.replace(known, "")
            assert "<" not in bare, string


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_nothing_is_fetched():
    text = page(reports.report(2))
    shown = reports.Elements(text)
    for _, attributes in shown.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    policy = next(a["content"] for a in shown.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "@import" not in text.partition("</style>")[0]
    assert "url(" not in text.partition("</style>")[0]


def test_the_same_report_gives_the_same_bytes():
    report = reports.report(4, 4, bad=["layers.1"])
    assert page(report) == page(json.loads(json.dumps(report)))
    assert outliers_page("m", reports.outliers(2)) == outliers_page("m", reports.outliers(2))


def test_charts_have_words():
    shown = reports.Elements(page(reports.report(2)))
    charts = [a for a in shown.all("div") if a.get("class") == "plot"]
    assert len(charts) == 1 + 2 + 1 + 7
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert all("scope" in attributes for attributes in shown.all("th"))
    assert len(shown.all("caption")) == len(shown.all("table"))


def test_the_first_histogram_is_of_all_modules():
    report = reports.report(2)
    report["modules"][0]["histogram"] = None
    measured = [m["histogram"] for m in report["modules"] if m["histogram"]]
    total = sum(map(sum, (h["counts"] for h in measured)))
    charts = figures(page(report))
    first, single = charts["errors"], charts["errors-1"]
    assert first["layout"]["title"]["text"] == "the worst 14 modules"
    share = sum(h["counts"][16] for h in measured) / total
    assert first["data"][0]["y"][16] == pytest.approx(share)
    assert f" of {total:,} values" in first["data"][0]["hovertext"][16]
    assert first["data"][0]["x"] == single["data"][0]["x"]
    assert first["data"][0]["x"][0] == -3.875
    report["modules"] = [m | {"histogram": None} for m in report["modules"]]
    assert "Histogram" not in page(report)


def test_outliers_have_a_map_for_each_quantity():
    text = outliers_page("/models/x", reports.outliers())
    shown = reports.Elements(text)
    assert len(figures(text)) == 5
    assert "the worst is 260 in model.layers.5.mlp.down_proj" in shown.text
    assert shown.text.index("model.layers.5.mlp.down_proj 1024 x 3072 260") > 0
    assert "Largest channel ratio first. module shape channel ratio channel max / rms" in shown.text


def test_kurtosis_is_named_after_what_is_measured():
    text = reports.Elements(outliers_page("m", reports.outliers(6))).text
    assert "excess kurtosis, 0 for a normal distribution: the worst is 130 in" in text
    assert "3 for a normal" not in text


@pytest.mark.parametrize("far", [0, 1, 7])
def test_the_advice_is_that_of_the_terminal(far, capsys):
    ranking = reports.outliers(28)
    for place, module in enumerate(ranking["modules"]):
        bad = place % 28 == 8 and place < 28 * far
        module["sqnr_db"]["int8 per channel"] = 20.25 + place / 28 if bad else 40.0
    ranking["advice"] = keep_advice(ranking["modules"])
    assert (len(ranking["advice"]["far_below"]) if far else ranking["advice"]) == (far or None)
    show_outliers(Output(as_json=False), ranking)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("far below", "advice")))
    shown = reports.Elements(outliers_page("m", ranking))
    advice, _, rest = shown.text.partition("Advice ")[2].partition(" Outliers in the weights")
    assert rest
    for line in lines[start:]:
        words_ = line.removeprefix("advice").split()
        assert " ".join(words_).casefold() in advice.replace(" :", ":").replace(" ;", ";").casefold()
    assert (ranking["advice"]["yaml"] in shown.pre) if far else not shown.pre


def test_inspect_writes_the_page(tmp_path):
    ranking = inspect_outliers(str(TINY), page=tmp_path / "page.html")
    shown = reports.Elements((tmp_path / "page.html").read_text())
    assert f"Outlier channels {TINY} Advice None: no module is far below" in shown.text
    worst = max(ranking["modules"], key=lambda module: module["kurtosis"])
    of = f"the worst is {words.number(worst['kurtosis'])} in {worst['module']}"
    assert f"excess kurtosis, 0 for a normal distribution: {of}" in shown.text


def test_a_ranking_without_modules_has_a_page():
    shown = reports.Elements(outliers_page("m", {**reports.outliers(0), "modules": []}))
    assert "Outliers in the weights" not in shown.text
    assert "None: no module is far below the median of its kind." in shown.text


@pytest.mark.parametrize("name", ["</script><img src=x>", '"><img src=x onerror=a>', "{{ 7 * 7 }}'<b>"])
def test_names_of_tensors_are_shown_as_they_are(name):
    """In the text of HTML, in attributes, and in the JSON that page.js reads."""
    report = reports.report(1)
    report["modules"][0]["module"] = report["run"]["layers"][0]["layer"] = name
    report["modules"][0]["limit_db"], report["modules"][0]["ok"] = 90.0, False
    text = page(report)
    shown = reports.Elements(text)
    assert len(shown.all("script")) == 3
    assert not {"img", "b"} & {tag for tag, _ in shown.elements}
    assert name in shown.text
    charts = [a["aria-label"] for a in shown.all("div") if a.get("class") == "plot"]
    assert f"Histogram of the errors of {name}." in charts
    plotted = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<b>{plotted}</b>" in heat(text)["layout"]["yaxis"]["ticktext"]
    assert figures(text)["layers"]["data"][0]["hovertext"][0].startswith(f"<b>{plotted}</b><br>")

    ranking = reports.outliers(6, stack=f"model.{name}.layers")
    shown = reports.Elements(outliers_page(name, ranking))
    assert len(shown.all("script")) == 3
    assert not {"img", "b"} & {tag for tag, _ in shown.elements}
    assert f"Outlier channels {name} Advice" in shown.text
    assert ranking["advice"]["yaml"] in shown.pre
    assert f"model.{name}.layers.5.mlp.down_proj" in shown.text


def test_rows_have_a_cell_for_each_column():
    for text in (page(reports.report(3, bad=["layers.1"])), outliers_page("m", reports.outliers(3))):
        tags = [tag for tag, _ in reports.Elements(text).elements]
        head = 0
        for row in " ".join(tags).split("tr")[1:]:
            cells = row.split()
            head = cells.count("th") or head
            assert cells.count("td") in (0, head)


def test_a_value_that_a_template_lacks_is_an_error():
    import jinja2

    with pytest.raises(jinja2.UndefinedError, match="'model' is undefined"):
        render("outliers.html.jinja", {}, ranking=reports.outliers(1), maps={}, columns={}, rows=[])


def test_a_chart_that_plotly_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="colour"):
        render("page.html.jinja", {"a": {"data": [{"type": "bar", "colour": "red"}], "layout": {}}})


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MachineError) as caught:
        require_plotly()
    assert caught.value.fix == "pip install 'quantcli[report]'"
    with pytest.raises(MachineError):
        page(reports.report(1))
