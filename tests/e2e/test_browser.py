"""Pages in a real browser: nothing fails, nothing is fetched, they fit, and marks say what they are."""

import pytest

from quantcli.verification.report.dashboard import dashboard
from quantcli.verification.report.outliers import outliers_page
from quantcli.verification.report.page import page
from tests import reports
from tests.browser import Browser

pytestmark = pytest.mark.browser
WIDTHS = (1400, 400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens a page, which must say nothing, ask for nothing, and fit the window."""

    def open_(text, **options):
        file = tmp_path_factory.mktemp("page") / "page.html"
        file.write_text(text, encoding="utf-8")
        browser.open(file, **options)
        assert browser.said == []
        assert browser.asked == []
        wide = browser.run("document.documentElement.scrollWidth")
        assert wide <= options.get("width", 1400)
        return browser

    return open_


def test_a_page_that_fails_and_fetches_is_noticed(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x'><script>absent()</script>")
    browser.open(bad)
    assert browser.asked == ["http://127.0.0.1:9/x"]
    assert any("absent is not defined" in text for text in browser.said)


@pytest.mark.parametrize("width", WIDTHS)
def test_all_marks_are_drawn_within_their_charts(opened, width):
    shown = opened(page(reports.report(28, bad=["layers.13"])), width=width)
    lost = shown.run("""[...document.querySelectorAll("svg.chart")].flatMap((chart) => {
      const box = chart.getBoundingClientRect();
      return [...chart.querySelectorAll("[data-tip], text")].filter((mark) => {
        const { left, right, top, bottom, width } = mark.getBoundingClientRect();
        const fine = getComputedStyle(mark).display === "none";
        return !fine && (!width || left < box.left - 1 || right > box.right + 1
          || top < box.top - 1 || bottom > box.bottom + 1);
      }).map((mark) => mark.outerHTML);
    })""")
    assert lost == []
    overlapping = shown.run("""[...document.querySelectorAll("svg.plot")].filter((chart) => {
      const boxes = [...chart.querySelectorAll("text.middle")]
        .map((text) => text.getBoundingClientRect()).filter((box) => box.width)
        .sort((a, b) => a.top - b.top || a.left - b.left);
      return boxes.some((box, i) => i && box.top === boxes[i - 1].top && box.left < boxes[i - 1].right);
    }).length""")
    assert overlapping == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["structure", "experts", "outliers", "several"])
def test_pages_fit(opened, width, kind):
    text = {
        "structure": lambda: page(reports.structure()),
        "experts": lambda: page(reports.report(80, 4, bad=["layers.13.mlp.experts.2"])),
        "several": lambda: dashboard([reports.report(2), reports.report(2, bad=["layers.1"])]),
        "outliers": lambda: outliers_page("/models/x", reports.outliers(94)),
    }[kind]()
    shown = opened(text, width=width)
    assert shown.run("document.querySelectorAll('.map').length") == {"experts": 1, "outliers": 5}.get(
        kind, 0
    )


def test_marks_say_what_they_are(opened):
    shown = opened(page(reports.report(28, bad=["layers.13"])))
    tip = "document.querySelector('.tip')"
    assert shown.run(f"{tip}.hidden") is True
    shown.run("document.addEventListener('pointerover', (e) => { at = [e.clientX, e.clientY]; })")
    shown.point(".map .heat path")
    text = shown.run(f"{tip}.textContent")
    assert text.splitlines()[0] == "self_attn.q_proj" or text.startswith(
        "model.layers.0.self_attn.q_proj"
    )
    shown.run("document.querySelector('svg.heat:not(.names)').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        shown.press(key)
    assert shown.run(f"{tip}.textContent").startswith("model.layers.")
    assert shown.run("document.querySelectorAll('.shown').length") == 1
    # the page moves below a pointer at rest; then the pointer moves
    for across, marks in ((0, 1), (30, 0)):
        place = f"{{bubbles: true, clientX: at[0] + {across}, clientY: at[1]}}"
        shown.run(f"document.body.dispatchEvent(new PointerEvent('pointerover', {place}))")
        assert shown.run("document.querySelectorAll('.shown').length") == marks
    shown.press("ArrowDown")
    shown.press("Escape")
    assert shown.run(f"{tip}.hidden") is True


def test_colours_of_the_dark_and_of_paper(opened):
    text = page(reports.report(2))
    back = "getComputedStyle(document.body).backgroundColor"
    assert opened(text, scheme="dark").run(back) == "rgb(17, 22, 28)"
    assert opened(text, scheme="dark", media="print").run(back) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("layers", [28, 126])
def test_a_map_fits_on_paper(opened, layers):
    """A4 across is 1031 pixels wide between its margins."""
    shown = opened(page(reports.report(layers, bad=["layers.13"])), width=1031, media="print")
    ends = "[...document.querySelectorAll('.map svg')].map((m) => m.getBoundingClientRect().right)"
    assert 600 < max(shown.run(ends)) <= 1031


def test_strangers_run_nothing_and_are_shown_as_they_are(opened):
    report = reports.hostile()
    name = 'model.layers.0.&lt;i&gt;"><img src=x></title></svg><i>x</i>'
    report["modules"][2]["module"] = name
    shown = opened(page(report))
    assert shown.run("document.querySelectorAll('script').length") == 1
    assert shown.run("document.querySelectorAll('img, a, i').length") == 0
    tips = shown.run(
        "[...document.querySelectorAll('[data-tip]')].map((m) => m.getAttribute('data-tip'))"
    )
    assert any(tip.startswith(f"{name}\n") for tip in tips)
