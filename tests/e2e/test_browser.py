"""Pages in a real browser: all charts are drawn, nothing fails, nothing is fetched."""

import json
import re
import subprocess

import pytest

from quantcli.verification.report.outliers import outliers_page
from quantcli.verification.report.page import page
from tests import reports

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(tmp_path):
    """Opens a page: the DOM after its scripts have run, what the console says, what was asked for."""

    def open_(text):
        file, log = tmp_path / "page.html", tmp_path / "net.json"
        file.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-default-apps", "--disable-domain-reliability",
                f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
                "--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1400,2200",
                "--dump-dom", file.as_uri(),
            ],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, said, list(requests(log))

    return open_


@pytest.fixture
def dom(opened):
    """The DOM of a page that says nothing and asks for nothing."""

    def dom_(text):
        found, said, asked = opened(text)
        assert said == []
        assert asked == []
        return found

    return dom_


def requests(log):
    """What the page has asked for; what the browser asks for by itself has no initiator."""
    for event in json.loads(log.read_text())["events"]:
        parameters = event.get("params", {})
        if parameters.get("initiator", "not an origin") != "not an origin":
            yield parameters["url"]


def drawn(dom, kind):
    return len(re.findall(f'class="{kind}[" ]', dom))


def test_a_page_that_fails_and_fetches_is_noticed(opened):
    _, said, asked = opened("<img src='http://127.0.0.1:9/x'><script>absent()</script>")
    assert asked == ["http://127.0.0.1:9/x"]
    assert any("absent is not defined" in line for line in said)


def test_every_chart_is_drawn(dom):
    report = reports.report(28, bad=["layers.13"])
    found = dom(page(report))
    assert 'data-drawn="11"' in found
    texts = re.findall(r'class="heatmap-label"[^>]*>(.*?)</text>', found)
    assert len(texts) == len(report["modules"])
    assert sum("✕" in text for text in texts) == 7
    assert found.count(">▼<") == 1
    assert drawn(found, "hm") == 1
    assert drawn(found, "trace bars") == 8 + 1
    assert drawn(found, "point") >= 8 * 16 + 20
    assert drawn(found, "trace scatter") == 1 + 4 + 2  # frames; outputs, limit, failed; perplexities


def test_many_layers_and_experts(dom):
    found = dom(page(reports.report(80, 4, bad=["layers.13.mlp.experts.2"])))
    assert 'data-drawn="11"' in found
    texts = re.findall(r'class="heatmap-label"[^>]*>(.*?)</text>', found)
    assert sum("✕" in text for text in texts) == 3
    assert {re.sub("<.*?>", "", text) for text in texts} <= {"", "✕"}  # numbers have no room


def test_a_page_without_charts(dom):
    assert 'data-drawn="0"' in dom(page(reports.structure()))


def test_strangers_run_nothing_and_are_shown_as_they_are(dom):
    report = reports.hostile()
    report["modules"][2]["module"] = "model.layers.0.&lt;i&gt;%{x}$y$"
    report["modules"][3]["module"] = 'model.layers.0."><img src=x>'
    report["modules"][4]["module"] = "model.layers.0.</script><i>x</i>"
    found = dom(page(report))
    elements = reports.Elements(found)
    assert len(elements.all("script")) == 3
    assert not {"img", "a", "i"} & {tag for tag, _ in elements.elements}
    # as they are, on the axis
    assert ">&amp;lt;i&amp;gt;%{x}$y$</text>" in found
    assert '>"&gt;&lt;img src=x&gt;</text>' in found
    assert ">&lt;/script&gt;&lt;i&gt;x&lt;/i&gt;</text>" in found


def test_outliers(dom):
    found = dom(outliers_page("/models/x", reports.outliers()))
    assert 'data-drawn="5"' in found
    assert drawn(found, "hm") == 5
