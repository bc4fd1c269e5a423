"""The page of a report: what is on it, and what strangers cannot do to it."""

import base64
import hashlib
import json
import math
from pathlib import Path

import pytest

from quantcli.cli.inspect import show_outliers
from quantcli.cli.output import Output
from quantcli.commands.inspect import outliers as inspect_outliers
from quantcli.planning.outliers import keep_advice
from quantcli.verification.report import words
from quantcli.verification.report.charts import Scale, perplexity_lines
from quantcli.verification.report.document import render
from quantcli.verification.report.heatmap import Quantity, heat_map, lay_out
from quantcli.verification.report.outliers import outliers_page
from quantcli.verification.report.page import page
from tests import reports

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"


SQNR = Quantity("SQNR, dB", "SQNR", lambda module: module["sqnr_db"], words.decibels)


def heat(report):
    modules = report["modules"]
    return heat_map(lay_out(modules, words.badness), SQNR, words.module_facts)


def marks(chart, tag, kind=None):
    """The marks of a chart with a tag, and a class if one is given."""
    return [
        m
        for m in chart.marks
        if m.tag == tag and kind in (None, *m.attributes.get("class", "").split())
    ]


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
    assert shown.charts() == []
    assert "Modules" not in shown.text


def test_the_map_has_every_module_and_marks_those_that_failed():
    report = reports.report(28, bad=["layers.13.mlp.down_proj", "layers.21.self_attn.q_proj"])
    cells = heat(report).cells
    squares = marks(cells, "path")
    assert len(squares) == len(report["modules"])
    assert sum("✕ FAILED" in square.tip for square in squares) == 2
    numbers = [mark.text for mark in marks(cells, "text", "in")]
    assert len(numbers) == len(squares)
    assert sum(number.startswith("✕ ") for number in numbers) == 2
    side = squares[1].attributes["d"].partition(" ")[0]
    side = int(side[1:])  # the second cell begins where the first ends
    frames = marks(cells, "rect", "frame")
    assert [frame.attributes["x"] / side for frame in frames] == [21, 13]
    assert [mark.attributes["x"] / side for mark in marks(cells, "text", "cross")] == [13.5, 21.5]
    assert [mark.text for mark in marks(cells, "text", "marked") if mark.text.isdigit()] == ["13", "21"]
    names = heat(report).names.marks
    assert [n.text for n in names if "marked" in n.attributes["class"]] == [
        "self_attn.q_proj", "mlp.down_proj",
    ]  # fmt: skip
    failed = [square for square in squares if "✕ FAILED" in square.tip]
    assert failed[1].tip[0] == "model.layers.13.mlp.down_proj"
    shown = reports.Elements(page(report))
    assert all(square.tip_text in shown.tips for square in squares)


def test_colours_run_from_the_worst_to_the_best():
    report = reports.report(4)
    for module in report["modules"]:
        module["sqnr_db"] = 40.0
    report["modules"][0]["sqnr_db"], report["modules"][1]["sqnr_db"] = 10.0, 25.0
    fills = [mark.attributes["fill"] for mark in marks(heat(report).cells, "path")]
    assert fills[0] == "#a50026"
    assert fills[4] == "#fee090"  # the second row
    assert set(fills) == {"#a50026", "#fee090", "#74b0d9"}


def test_a_map_of_many_layers_shows_crosses_alone():
    cells = heat(reports.report(80, bad=["layers.13.mlp.down_proj"])).cells
    assert [mark.text for mark in marks(cells, "text", "in")] == ["✕"]
    assert cells.width < 1300


def test_experts_share_a_cell_and_the_worst_stands_for_all():
    report = reports.report(4, 16, bad=["layers.2.mlp.experts.3", "layers.2.mlp.experts.7"])
    grid = lay_out(report["modules"], words.badness)
    assert sum(cell.count for cell in grid.cells.values()) == len(report["modules"])
    row = grid.rows.index("mlp.experts.*.up_proj")
    cell = grid.cells[row, 2]
    assert (cell.count, cell.failed) == (16, 2)
    failed = [m for m in report["modules"] if not m["ok"] and m["module"].endswith("up_proj")]
    assert cell.worst == min(failed, key=lambda m: m["sqnr_db"])
    tips = [mark.tip for mark in marks(heat(report).cells, "path")]
    assert sum("the worst of 16, 2 failed" in tip for tip in tips) == 3


def test_stacks_of_layers_do_not_share_rows():
    names = ["model.layers.0.q", "model.layers.1.q", "visual.blocks.0.q", "lm_head", "7.q"]
    grid = lay_out([reports.module(name, (4, 4), 40.0) for name in names], words.badness)
    assert grid.rows == ["model.layers: q", "lm_head", ": q", "visual.blocks: q"]
    assert grid.columns == ["0", "1", "7", "other"]
    assert len(grid.cells) == len(names)


def test_more_kinds_than_fit_leave_the_worst():
    modules = [reports.module(f"m{i}", (4, 4), 40.0 - (i == 77) * 30) for i in range(100)]
    grid = lay_out(modules, words.badness)
    assert len(grid.rows) == 40
    assert grid.rows_left_out == 60
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


def test_it_says_who_made_the_checkpoint_and_what_it_weighs():
    text = page(reports.report(2))
    shown = reports.Elements(text)
    assert (
        "Made by quantcli 0.1.0 with toy 1.2, as the checkpoint says. Checked by quantcli" in shown.text
    )
    assert shown.pre == "\ntarget: ascend\n"
    assert "Size: 5.1 MB" in shown.text
    assert "W8A8_DYNAMIC 197 4,000,000 4.1 MB 8.2 80.4 %" in shown.text
    assert "FLOAT 12 tensors 500,000 1.0 MB 16 19.6 %" in shown.text
    widths = [a["width"] for a in shown.all("rect") if a["class"].startswith("part part-")]
    assert widths == ["80.39%", "19.61%"]


def test_a_recipe_of_any_length_leaves_the_page_small():
    report = reports.report(1)
    report["made_by"]["recipe"] = "\n".join(["x" * 50_000] * 5000)
    assert len(page(report).encode()) < 300_000


def test_tokens_are_shown_in_context():
    text = page(reports.report(2))
    assert "The capital of France is<mark> Paris</mark>.↵That</td>" in text
    assert (
        "3 17 The capital of France is Paris .↵That 0.512 0.0345 -2.697" in reports.Elements(text).text
    )


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
    assert len(shown.all("script")) == 1
    assert not {"img", "a", "iframe", "object", "link"} & {tag for tag, _ in shown.elements}
    kinds = {tag for tag, _ in harmless.elements}
    assert {tag for tag, _ in shown.elements} == kinds
    names = {name for _, attributes in shown.elements for name in attributes}
    assert names == {name for _, attributes in harmless.elements for name in attributes}
    assert not any(c in text for c in "\x00\x1b\u202e")


def test_nothing_is_fetched_and_no_style_or_script_but_its_own_runs():
    text = page(reports.report(2))
    shown = reports.Elements(text)
    for _, attributes in shown.elements:
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for a in shown.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    style = text.partition("<style>")[2].partition("</style>")[0]
    for kind, content in (("style", style), ("script", shown.scripts[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "@import" not in style
    assert "url(" not in style


def test_names_have_no_backticks():
    errors = [("headers", "`a.safetensors` is cut off", "`model.layers.0.q`[5, 3]")]
    text = page(reports.report(1, errors=errors))
    assert "<code>a.safetensors</code> is cut off" in text
    assert "<code>model.layers.0.q[5, 3]</code>" in text
    assert "`" not in reports.Elements(text).text


@pytest.mark.parametrize(("layers", "experts"), [(36, 0), (94, 8)])
def test_a_page_is_small(layers, experts):
    report = reports.report(layers, experts, bad=["layers.7."])
    assert len(page(report).encode()) < 500_000


def test_a_page_on_which_all_is_wrong_is_small():
    bad = [f"layers.{layer}" for layer in range(60)]
    report = reports.report(60, 8, bad=bad, notes=[f"note {i}" for i in range(2000)])
    text = page(report)
    assert len(text.encode()) < 1_500_000
    assert f"What is wrong ({len(words.errors(report)):,})" in text
    assert "1,995 more, the first 797 of them" not in text
    assert "1,997 more, the first 797 of them" in text


def test_the_same_report_gives_the_same_bytes():
    report = reports.report(4, 4, bad=["layers.1"])
    assert page(report) == page(json.loads(json.dumps(report)))
    assert outliers_page("m", reports.outliers(2)) == outliers_page("m", reports.outliers(2))


def test_charts_have_words():
    shown = reports.Elements(page(reports.report(2)))
    assert len(shown.charts()) == 3 + 1 + 1 + 2 + 1 + 7
    charts = [a for a in shown.all("svg") if "chart" in a["class"]]
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert all("scope" in attributes for attributes in shown.all("th"))
    assert len(shown.all("caption")) == len(shown.all("table"))
    assert "SQNR of the outputs of 2 layers, 0 below the limit" in shown.charts()


def test_points_lie_where_their_values_are():
    scale = Scale.of([12.0, 41.0, None], height=200)
    assert (scale.low, scale.high, scale.step) == (10.0, 50.0, 10.0)
    assert [scale.y(value) for value in (50.0, 30.0, 10.0)] == [0.0, 100.0, 200.0]
    windows = [{"reference": 40.0, "checkpoint": 44.0}, {"reference": 50.0, "checkpoint": 50.0}]
    lines, change = perplexity_lines(windows)
    points = marks(lines, "circle", "two")
    assert [point.attributes["cx"] for point in points] == ["25%", "75%"]
    assert points[0].tip == ("window 0", "reference 40", "checkpoint 44", "change +10.00 %")
    bars = marks(change, "rect")
    assert [bar.attributes["height"] for bar in bars] == [90, 1]


def test_many_windows_share_points():
    windows = [{"reference": 10.0, "checkpoint": 10.0 * (4 if i % 2 else 1)} for i in range(600)]
    points = marks(perplexity_lines(windows)[0], "circle", "two")
    assert len(points) == 200
    assert points[1].tip[0] == "window 3 to 5"
    assert points[1].tip[2] == f"checkpoint {words.number(10.0 * 16 ** (1 / 3))}"


def test_the_first_histogram_is_of_all_modules():
    report = reports.report(2)
    report["modules"][0]["histogram"] = None
    measured = [m["histogram"] for m in report["modules"] if m["histogram"]]
    total = sum(map(sum, (h["counts"] for h in measured)))
    count = sum(h["counts"][16] for h in measured)
    shown = reports.Elements(page(report))
    assert "Histogram of the errors of the worst 14 modules" in shown.charts()
    assert f"0 to 0.25\n{count:,} of {total:,} values" in shown.tips
    report["modules"] = [m | {"histogram": None} for m in report["modules"]]
    assert "Histogram" not in page(report)


def test_outliers_have_a_map_for_each_quantity():
    text = outliers_page("/models/x", reports.outliers())
    shown = reports.Elements(text)
    assert sum(name.startswith("Heat map") for name in shown.charts()) == 5
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
    assert f"{TINY} Weights alone were read." in shown.text
    assert shown.text.startswith(
        f"outlier channels: {TINY} Outlier channels Not hard to quantize: of 44"
    )
    assert "Advice None: no module is far below" in shown.text
    worst = max(ranking["modules"], key=lambda module: module["kurtosis"])
    of = f"the worst is {words.number(worst['kurtosis'])} in {worst['module']}"
    assert f"excess kurtosis, 0 for a normal distribution: {of}" in shown.text


def test_a_ranking_without_modules_has_a_page():
    shown = reports.Elements(outliers_page("m", {**reports.outliers(0), "modules": []}))
    assert "Outliers in the weights" not in shown.text
    assert "None: no module is far below the median of its kind." in shown.text


@pytest.mark.parametrize("name", ["</script><img src=x>", '"><img src=x onerror=a>', "{{ 7 * 7 }}'<b>"])
def test_names_of_tensors_are_shown_as_they_are(name):
    """In the text of HTML, in attributes, and in what the pointer shows."""
    report = reports.report(1)
    report["modules"][0]["module"] = report["run"]["layers"][0]["layer"] = name
    report["modules"][0]["limit_db"], report["modules"][0]["ok"] = 90.0, False
    shown = reports.Elements(page(report))
    assert len(shown.all("script")) == 1
    assert not {"img", "b"} & {tag for tag, _ in shown.elements}
    assert name in shown.text
    assert f"Histogram of the errors of {name}" in shown.charts()
    assert any(tip.startswith(f"{name}\n✕ FAILED") for tip in shown.tips)
    assert any(tip.startswith(f"{name}\nSQNR ") for tip in shown.tips)

    ranking = reports.outliers(6, stack=f"model.{name}.layers")
    shown = reports.Elements(outliers_page(name, ranking))
    assert len(shown.all("script")) == 1
    assert not {"img", "b"} & {tag for tag, _ in shown.elements}
    assert f" {name} Weights alone were read." in shown.text
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
        render("outliers.html.jinja", ranking=reports.outliers(1), maps=[], columns={}, rows=[])
