"""Write docs/cli.md from the `--help` texts and docs/recipe.schema.json from the recipe's classes.

`make docs` runs this; a test fails if a file is out of date.
"""

import os
import subprocess
import sys
from pathlib import Path

from quantcli.recipe.json_schema import recipe_schema

DOCS = Path(__file__).parent
COMMANDS = [
    "",
    "recommend",
    "inspect",
    "calibrate",
    "quantize",
    "pack",
    "verify",
    "recipes",
]  # in the order of the README


def cli_reference() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    text = "# Command line\n\nGenerated from `--help` by `make docs`.\n"
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "quantcli", *command.split(), "--help"]
        output = subprocess.check_output(arguments, env=environment, text=True)
        lines = [line.rstrip() for line in output.rstrip().splitlines()]
        screen = "\n".join(lines).replace("python -m quantcli", "quantcli")
        text += f"\n## quantcli {command}".rstrip() + f"\n\n```text\n{screen}\n```\n"
    return text


def generated() -> dict[Path, str]:
    """The content of every generated file."""
    return {DOCS / "cli.md": cli_reference(), DOCS / "recipe.schema.json": recipe_schema()}


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content)
        print(f"wrote {path.relative_to(DOCS.parent)}")
