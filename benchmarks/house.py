"""Figures of the source tree: names at the top, files in a folder, import chains, lines, signatures.

A room is a folder or a module at the top of the package. Imports inside functions count; imports under
`if TYPE_CHECKING` do not. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

PACKAGE = "quantcli"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
MANY = 8  # parameters
LONG = 500  # lines: more need a reason
REASON = "# Long because"


@dataclass(frozen=True)
class Figure:
    """One figure and the bar that it must not exceed."""

    what: str
    value: int
    bar: int

    @property
    def ok(self) -> bool:
        """Whether the bar holds."""
        return self.value <= self.bar


def modules(source: Path = SOURCE) -> list[Path]:
    """Every module of the package."""
    return sorted(source.rglob("*.py"))


def room(path: Path, source: Path = SOURCE) -> str:
    """The folder or module at the top of the package that a file is in."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def arrows(source: Path = SOURCE) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    rooms = {room(path, source) for path in modules(source)}
    graph: dict[str, set[str]] = {name: set() for name in rooms}
    for path in modules(source):
        for node in _statements(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                head, _, rest = name.partition(".")
                target = rest.partition(".")[0]
                if head == PACKAGE and target in rooms:
                    graph[room(path, source)].add(target)
    return {name: targets - {name} for name, targets in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Rooms that reach each other, in groups of two or more."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for target in graph[queue.pop()] - seen:
                seen.add(target)
                queue.append(target)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset({name, *(o for o in reach[name] if name in reach[o])})
        for name in graph
        if name in reach[name]
    }
    return [set(group) for group in groups]


def chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports; each circle counts as one room."""
    of = {name: name for name in graph}
    for group in circles(graph):
        of |= dict.fromkeys(group, "+".join(sorted(group)))
    condensed: dict[str, set[str]] = {name: set() for name in of.values()}
    for name, targets in graph.items():
        condensed[of[name]] |= {of[target] for target in targets} - {of[name]}

    @cache
    def longest(name: str) -> tuple[str, ...]:
        below = max((longest(target) for target in sorted(condensed[name])), key=len, default=())
        return (name, *below)

    return list(max((longest(name) for name in sorted(condensed)), key=len))


def folders(source: Path = SOURCE) -> dict[str, int]:
    """Modules in each folder, without `__init__` and without those of its folders."""
    counts: dict[str, int] = {}
    for path in modules(source):
        if path.name != "__init__.py":
            name = path.parent.relative_to(source).as_posix()
            counts[name] = counts.get(name, 0) + 1
    return counts


def public_functions(source: Path = SOURCE) -> set[str]:
    """What `quantcli.__init__` offers."""
    for node in ast.parse((source / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and "_HOME" in ast.dump(node.targets[0]):
            return set(ast.literal_eval(node.value))
    return set()


def long_signatures(source: Path = SOURCE) -> list[str]:
    """Functions with many parameters outside of `cli` and the public API, as file:line name (count)."""
    public = public_functions(source)
    lines = []
    for path in modules(source):
        if room(path, source) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in public:
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                number = sum(argument.arg not in {"self", "cls"} for argument in given)
                if number >= MANY:
                    place = path.relative_to(source).as_posix()
                    lines.append(f"{place}:{node.lineno} {node.name} ({number})")
    return lines


def long_modules(source: Path = SOURCE) -> list[str]:
    """Modules of more than 500 lines that do not say why."""
    lines = {path: path.read_text().splitlines() for path in modules(source)}
    return [
        path.relative_to(source).as_posix()
        for path, text in lines.items()
        if len(text) > LONG and not any(line.startswith(REASON) for line in text)
    ]


def figures(source: Path = SOURCE) -> list[Figure]:
    """All figures, with their bars."""
    graph = arrows(source)
    total = sum(len(path.read_text().splitlines()) for path in modules(source))
    return [
        Figure("names at the top of the package", len(graph), 14),
        Figure("files in one folder, without __init__", max(folders(source).values()), 15),
        Figure("longest chain of imports between rooms", len(chain(graph)), 11),
        Figure("circles between rooms", len(circles(graph)), 0),
        Figure("lines of src", total, 21_500),
        Figure(f"functions with {MANY} or more parameters", len(long_signatures(source)), 3),
        Figure(f"modules over {LONG} lines without a reason", len(long_modules(source)), 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    as_json = parser.parse_args().json
    graph, table = arrows(), figures()
    if as_json:
        rooms = {name: sorted(targets) for name, targets in graph.items()}
        print(
            json.dumps({"figures": [asdict(f) | {"ok": f.ok} for f in table], "rooms": rooms}, indent=2)
        )
    else:
        for figure in table:
            mark = "ok" if figure.ok else "MISSED"
            print(f"{figure.what:<45}{figure.value:>8,}   bar {figure.bar:>6,}   {mark}")
        print(f"\nlongest chain: {' > '.join(chain(graph))}")
        for name in sorted(graph):
            paths = [path for path in modules() if room(path) == name]
            lines = sum(len(path.read_text().splitlines()) for path in paths)
            print(
                f"{name:<14}{len(paths):>4} files{lines:>7,} lines   {', '.join(sorted(graph[name]))}"
            )
        for line in [*long_signatures(), *long_modules()]:
            print(f"long: {line}")
    sys.exit(not all(figure.ok for figure in table))


if __name__ == "__main__":
    main()
