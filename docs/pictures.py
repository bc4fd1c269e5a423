"""Make the pictures of README.md in docs/images from real output on the model in examples/tiny-qwen3.

plan.svg is what `quantize --plan` prints; a test fails if it is out of date. report.png is the upper
part of the page of `verify --report`, as chromium shows it. `make pictures` makes both again.
"""

import html
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
MODEL = "examples/tiny-qwen3"
RECIPE = "vllm_int8_dynamic"
PLAN = ("quantize", RECIPE, "--model", MODEL, "--out", "qwen3-int8", "--workers", "2", "--plan")
COLUMNS = 100
# dark on light, readable on pages of both kinds
THEME = TerminalTheme(
    (250, 250, 250), (36, 41, 47),
    [
        (36, 41, 47), (190, 35, 40), (20, 120, 55), (150, 100, 0),
        (10, 90, 180), (125, 60, 170), (0, 120, 130), (90, 96, 102),
    ],
)  # fmt: skip


def settled(screen: str) -> str:
    """The screen without what depends on this machine: its free disk."""
    return re.sub(r", [\d.]+ [kMGT]?B free", "", screen)


def command(*words: str) -> str:
    """What a command prints on a terminal of 100 columns, with its colours."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    run = [sys.executable, "-m", "quantcli", *words]
    return subprocess.check_output(run, env=environment, cwd=ROOT, text=True)


def plan_svg() -> str:
    """The plan as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print(Text(f"$ quantcli {' '.join(PLAN)}\n", style="bold"))
    console.print(Text.from_ansi(settled(command(*PLAN)).rstrip()))
    svg = console.export_svg(title="quantcli", theme=THEME, unique_id="plan")
    # fonts of another site are not loaded in pictures, and nothing here should ask for them
    return re.sub(r"\s*@font-face \{[^}]*\}", "", svg)


def words_of(svg: str) -> list[str]:
    """The words of a picture, in order."""
    return html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).split()


def report_png(target: Path) -> None:
    """The page of a verification, by chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("report.png needs chromium")
    models = Path("/tmp/models")  # the page shows paths: those of a reader might be such
    shutil.copytree(ROOT / MODEL, models / "tiny-qwen3")
    try:
        model, out, page = (str(models / name) for name in ("tiny-qwen3", "qwen3-int8", "page.html"))
        command("quantize", RECIPE, "--model", model, "--out", out, "--quiet")
        text = ("--run", "--data", "examples/evaluation.txt")
        command("verify", out, "--full", "--against", model, *text, "--report", page, "--quiet")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--window-size=1100,1000", f"--user-data-dir={models}/browser"]
        subprocess.run(
            [browser, *flags, f"--screenshot={target}", f"file://{page}"],
            check=True,
            capture_output=True,
        )
    finally:
        shutil.rmtree(models)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "plan.svg").write_text(plan_svg())
    report_png(IMAGES / "report.png")
