"""GB of disk that quantcli's packages take: all that it declares, and all that these declare.

Counts the files of this environment that installers list, with the bytecode that pip compiles.
Packages that only developers need are not counted.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common import Line, finish, parser

LARGEST = 5


def needed(name: str, found: set[str]) -> set[str]:
    """The packages that a package declares, and theirs, that are installed here."""
    found.add(canonicalize_name(name))
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        key = canonicalize_name(requirement.name)
        if key not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            needed(requirement.name, found)
    return found


def size(name: str) -> int:
    """Bytes of a package's files, as its installer listed them."""
    paths = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes = {name: size(name) for name in needed("quantcli", set())}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    lines = [Line("all packages", sum(sizes.values()) / 1e9, "GB", detail=f"{len(sizes)} packages")]
    lines += [Line(name, sizes[name] / 1e9, "GB") for name in largest]
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
