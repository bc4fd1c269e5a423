"""What pyproject.toml cannot say: a built package carries files from the top of this repository.

The shipped recipes go to quantcli/recipe/recipes, and the text that some of them name as
../examples/calibration.txt next to that. An editable install reads them where they are.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("recipes/*.yaml", "examples/calibration.txt")


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


setup(cmdclass={"build_py": build_with_recipes})
