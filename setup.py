"""What pyproject.toml cannot say.

A built package carries files from the top of this repository: the shipped recipes go to
quantcli/recipe/recipes, and the text that some of them name as ../examples/calibration.txt next to
that. An editable install reads them where they are.

A package page shows README.md, and has no files to link to: its relative links are made absolute.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("recipes/*.yaml", "examples/calibration.txt")
PAGES = "https://github.com/quantcli/quantcli/blob/main/"
FILES = "https://raw.githubusercontent.com/quantcli/quantcli/main/"
# [text](target) and ![text](target); targets that have a scheme, and anchors of this page, stay
LINK = re.compile(r"(!?)(\[[^]]*])\((?![a-z]+:|#)([^)]+)\)")


def with_absolute_links(page: str) -> str:
    """Markdown whose links to files of this repository work anywhere."""
    return LINK.sub(lambda link: f"{link[1]}{link[2]}({FILES if link[1] else PAGES}{link[3]})", page)


class build_with_recipes(build_py):
    """Builds the package as ever, then adds the carried files."""

    def run(self) -> None:
        """Copy into the build folder; an editable install has none."""
        super().run()
        if not self.editable_mode:
            for pattern in CARRIED:
                for file in sorted(Path().glob(pattern)):
                    target = Path(self.build_lib, "quantcli", "recipe", file)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(file), str(target))


setup(
    cmdclass={"build_py": build_with_recipes},
    long_description=with_absolute_links(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
