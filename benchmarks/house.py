"""Figures of the source tree: names at the top, files in a folder, import chains, lines, signatures.

A room is a folder or a module at the top of the package. Imports inside functions count; imports under
`if TYPE_CHECKING` do not. A name that `quantcli` itself offers counts as an import of the room that
defines it. Plug-ins do not count as files of their folder: a new scheme is one new file, next to any
number of others. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

PACKAGE = "quantcli"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
MANY = 8  # parameters; `self`, `cls`, `*args` and `**kwargs` are not counted
LONG = 500  # lines: more need a reason
TYPING = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
REASON = re.compile(r"# Long because: \S")

NAMES = "names at the top of the package"
FILES = "files in one folder, without __init__ and plug-ins"
CHAIN = "longest chain of imports between rooms"
CIRCLES = "circles between rooms"
LINES = "lines of src"
SIGNATURES = f"functions with {MANY} or more parameters"
REASONS = f"modules over {LONG} lines without a reason"
BARS = {
    NAMES: 14,
    FILES: 15,
    CHAIN: 11,
    CIRCLES: 0,
    LINES: 21_500,
    SIGNATURES: 3,
    REASONS: 0,
}


@dataclass(frozen=True)
class Figure:
    """One figure, the bar that it must not exceed, and where it comes from."""

    what: str
    value: int
    bar: int
    where: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the bar holds."""
        return self.value <= self.bar


@dataclass(frozen=True)
class Room:
    """A folder or module at the top of the package."""

    files: int
    lines: int
    imports: tuple[str, ...]


def modules(source: Path = SOURCE) -> list[Path]:
    """Every module of the package."""
    return sorted(source.rglob("*.py"))


def room(path: Path, source: Path = SOURCE) -> str:
    """The folder or module at the top of the package that a file is in."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def lines(path: Path) -> int:
    """Lines as `wc -l` counts them."""
    return path.read_bytes().count(b"\n")


def homes(source: Path = SOURCE) -> dict[str, str]:
    """What `quantcli` itself offers: names, and the module that each is defined in."""
    for node in ast.parse((source / "__init__.py").read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == ["_HOME"]:
                return dict(ast.literal_eval(node.value))
    return {}


def _runtime(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all in it, but for what only type checkers read."""
    yield node
    inside = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in TYPING:
        inside = iter(node.orelse)
    for child in inside:
        yield from _runtime(child)


def imported(path: Path, source: Path = SOURCE) -> Iterator[str]:
    """The full name of everything that a module imports, its own package's relative imports too."""
    package = (PACKAGE, *path.relative_to(source).parent.parts)
    for node in _runtime(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*names, alias.name]) for alias in node.names)


def arrows(source: Path = SOURCE) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    graph: dict[str, set[str]] = {room(path, source): set() for path in modules(source)}
    offered = homes(source)
    for path in modules(source):
        here = room(path, source)
        for name in imported(path, source):
            head, *rest = name.split(".")
            if head == PACKAGE and rest:
                target = offered.get(rest[0], rest[0]).split(".")[0]
                graph[here] |= {target} & (graph.keys() - {here})
    return graph


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
        frozenset({name, *(other for other in reach[name] if name in reach[other])})
        for name in graph
        if name in reach[name]
    }
    return [set(group) for group in sorted(groups, key=sorted)]


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
        below: tuple[str, ...] = ()
        for target in sorted(condensed[name]):
            below = max(below, longest(target), key=len)
        return (name, *below)

    chains = [longest(name) for name in sorted(condensed)]
    return [*max(chains, key=len)]


def is_plugin(path: Path) -> bool:
    """Whether a class of a module registers itself: it says `name: ClassVar[str] = "..."`."""
    return any(
        isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "name"
        and ast.unparse(node.annotation) == "ClassVar[str]"
        and isinstance(node.value, ast.Constant)
        for cls in ast.parse(path.read_bytes()).body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
    )


def folders(source: Path = SOURCE) -> dict[str, int]:
    """Modules in each folder, without `__init__`, plug-ins and those of its folders."""
    counts: dict[str, int] = {}
    for path in modules(source):
        if path.name != "__init__.py" and not is_plugin(path):
            name = path.parent.relative_to(source).as_posix()
            counts[name] = counts.get(name, 0) + 1
    return counts


def rooms(source: Path = SOURCE) -> dict[str, Room]:
    """Files, lines and imports of each room."""
    graph = arrows(source)
    inside = {name: [path for path in modules(source) if room(path, source) == name] for name in graph}
    return {
        name: Room(len(paths), sum(map(lines, paths)), tuple(sorted(graph[name])))
        for name, paths in sorted(inside.items())
    }


def long_signatures(source: Path = SOURCE) -> list[str]:
    """Functions with many parameters outside of `cli` and the public API, as file:line name (count)."""
    public = {(f"{home.replace('.', '/')}.py", name) for name, home in homes(source).items()}
    found = []
    for path in modules(source):
        place = path.relative_to(source).as_posix()
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if room(path, source) == "cli" or ((place, node.name) in public and node in tree.body):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = sum(argument.arg not in {"self", "cls"} for argument in given)
            if number >= MANY:
                found.append(f"{place}:{node.lineno} {node.name} ({number})")
    return found


def long_modules(source: Path = SOURCE) -> list[str]:
    """Modules of more than 500 lines that do not say why above their first statement."""
    return [
        f"{path.relative_to(source).as_posix()} ({lines(path)})"
        for path in modules(source)
        if lines(path) > LONG and not any(map(REASON.match, _head(path)))
    ]


def _head(path: Path) -> list[str]:
    """The lines of a module before its first statement; a docstring is none."""
    tree = ast.parse(path.read_bytes())
    after = tree.body[ast.get_docstring(tree) is not None :]
    text = path.read_text(encoding="utf-8").split("\n")
    return text[: after[0].lineno - 1] if after else text


def figures(source: Path = SOURCE) -> list[Figure]:
    """All figures, with their bars."""
    graph, counts = arrows(source), folders(source)
    groups, longest = circles(graph), chain(graph)
    most = max(counts.values())
    signatures, unexplained = long_signatures(source), long_modules(source)
    measured: dict[str, tuple[int, list[str]]] = {
        NAMES: (len(graph), sorted(graph)),
        FILES: (most, [name for name, count in counts.items() if count == most]),
        CHAIN: (len(longest), [" > ".join(longest)]),
        CIRCLES: (len(groups), [" + ".join(sorted(group)) for group in groups]),
        LINES: (sum(map(lines, modules(source))), []),
        SIGNATURES: (len(signatures), signatures),
        REASONS: (len(unexplained), unexplained),
    }
    return [
        Figure(what, measured[what][0], bar, tuple(measured[what][1])) for what, bar in BARS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    as_json = parser.parse_args().json
    table, plan = figures(), rooms()
    ok = all(figure.ok for figure in table)
    if as_json:
        shown = [asdict(figure) | {"ok": figure.ok} for figure in table]
        by_room = {name: asdict(each) for name, each in plan.items()}
        print(json.dumps({"ok": ok, "figures": shown, "rooms": by_room}, indent=2))
    else:
        for figure in table:
            mark = "ok" if figure.ok else "MISSED"
            print(f"{figure.what:<45}{figure.value:>8,}   bar {figure.bar:>6,}   {mark}")
        print()
        for name, each in plan.items():
            size = f"{each.files:>4} files{each.lines:>7,} lines"
            print(f"{name:<14}{size}   {', '.join(each.imports)}".rstrip())
        for figure in table[1:]:  # the names at the top are the rooms
            if figure.where:
                print(f"\n{figure.what}:", *figure.where, sep="\n  ")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
