"""Write docs/cli.md from the `--help` texts and docs/recipe.schema.json from the recipe's classes.

`make docs` runs it; a test fails when a file here is stale.
"""

import os
import subprocess
import sys
from pathlib import Path

from quantcli.recipe.json_schema import recipe_schema

DOCS = Path(__file__).parent
COMMANDS = ["", "inspect", "calibrate", "quantize", "pack", "verify"]  # the README introduces each


def cli_reference() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    text = "# Command line\n\nGenerated from `--help` by `make docs`.\n"
    for command in COMMANDS:
        words = [*command.split(), "--help"]
        shown = subprocess.run(
            [sys.executable, "-m", "quantcli", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        shown = "\n".join(line.rstrip() for line in shown.rstrip().splitlines())
        shown = shown.replace("python -m quantcli", "quantcli")
        text += f"\n## quantcli {command}".rstrip() + f"\n\n```text\n{shown}\n```\n"
    return text


def generated() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {DOCS / "cli.md": cli_reference(), DOCS / "recipe.schema.json": recipe_schema()}


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content)
        print(f"wrote {path.relative_to(DOCS.parent)}")
