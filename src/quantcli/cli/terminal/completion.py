"""Completion in shells: of commands, options, and the values of options that have a few.

A shell's script calls quantcli with the words of the command line, the one at the cursor last, and with
the variable `_QUANTCLI_COMPLETE`. Torch is not imported: it would take a second for each key.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantcli.cli.terminal.environment import COMPLETE
from quantcli.core.errors import InputError
from quantcli.core.place import expanded

_BASH = """\
_quantcli() {
    local IFS=$'\\n'
    COMPREPLY=($(_QUANTCLI_COMPLETE=bash quantcli "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _quantcli quantcli
"""
_ZSH = """\
#compdef quantcli
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_quantcli() {
    local found
    found="$(_QUANTCLI_COMPLETE=zsh quantcli "${(@)words[2,CURRENT]}" 2>/dev/null)"
    if [[ -n "$found" ]]; then
        local -a items=("${(@f)found}")
        _describe quantcli items
    else
        _files
    fi
}
compdef _quantcli quantcli
"""
_FISH = """\
function __quantcli_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    env _QUANTCLI_COMPLETE=fish quantcli $words[2..-1] "$current" 2>/dev/null
end
complete -c quantcli -a '(__quantcli_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script() -> str:
    """The script for the user's shell, which $SHELL names. InputError for one that has none."""
    return _SCRIPTS[_shell()]


def install() -> tuple[Path, Path | None]:
    """Write the script for the user's shell, and let the shell read it when it starts.

    Returns the script's file, and the file that reads it; None if the shell finds it by itself.
    """
    shell = _shell()
    home = expanded("~")
    if shell == "fish":
        base = _base("XDG_CONFIG_HOME", home / ".config")
        return _written(base / "fish" / "completions" / "quantcli.fish", shell), None
    base = _base("XDG_DATA_HOME", home / ".local" / "share")
    file = _written(base / "quantcli" / f"completion.{shell}", shell)
    start = home / f".{shell}rc"
    line = f"source {shlex.quote(str(file))}"
    before = start.read_text(encoding="utf-8", errors="surrogateescape") if start.exists() else ""
    if line not in before.splitlines():
        with start.open("a", encoding="utf-8") as stream:
            stream.write(("" if not before or before.endswith("\n") else "\n") + line + "\n")
    return file, start


def _written(file: Path, shell: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_SCRIPTS[shell], encoding="utf-8")
    return file


def _base(variable: str, otherwise: Path) -> Path:
    chosen = os.environ.get(variable, "")
    return Path(chosen) if Path(chosen).is_absolute() else otherwise


def _shell() -> str:
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in _SCRIPTS:
        what = f"there is no completion for the shell `{shell}`" if shell else "SHELL is not set"
        raise InputError(what, fix=f"set the variable SHELL to one of {', '.join(_SCRIPTS)}")
    return shell


def complete(group: Any, words: Sequence[str]) -> str:
    """What may stand in place of the last of `words`, a line for each; with a text for zsh and fish."""
    shell = os.environ[COMPLETE]
    *before, word = words or [""]
    lines = []
    for value, about in sorted(_completions(group, before, word)):
        text = " ".join(about.split())
        if shell == "zsh":
            value, text = value.replace(":", r"\:"), f":{text}" if text else ""
        elif shell == "fish":
            text = f"\t{text}" if text else ""
        else:
            text = ""
        lines.append(f"{value}{text}\n")
    return "".join(lines)


def _completions(group: Any, before: list[str], word: str) -> Iterator[tuple[str, str]]:
    """The values that begin with `word`, each with a text about it."""
    name = next((word for word in before if word in group.commands), None)
    command = group if name is None else group.commands[name]
    options = [param for param in command.params if param.param_type_name == "option"]
    taking = next((p for p in options if before and before[-1] in p.opts and not p.is_flag), None)
    if taking is not None:
        candidates = [(value, "") for value in _values(taking.name, word)]
    elif word.startswith("-"):
        candidates = [(o, p.help or "") for p in options for o in (*p.opts, *p.secondary_opts)]
        candidates = [("--help", "Show this message and exit."), *candidates]
    elif name is None:
        candidates = [(name, each.get_short_help_str()) for name, each in group.commands.items()]
    else:
        place = _place(before[before.index(name) + 1 :], options)
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        argument = next(iter(arguments[place:] or arguments[-1:]), None)
        values = _values(argument.name if argument else "", word)
        if name == "recipes":
            values = _recipes() if place else ["show"]
        elif name == "quantize":
            from quantcli.recipe.shipped import AUTO

            values = [*values, AUTO]
        candidates = [(value, "") for value in values]
    yield from (candidate for candidate in candidates if candidate[0].startswith(word))


def _place(words: list[str], options: list[Any]) -> int:
    """How many arguments stand among words of a command line, without options and their values."""
    arguments, is_value = 0, False
    for word in words:
        taking = next((o for o in options if word in o.opts and not o.is_flag), None)
        arguments += not is_value and not word.startswith("-")
        is_value = taking is not None
    return arguments


def _recipes() -> Iterable[str]:
    from quantcli.recipe.shipped import shipped_recipes

    return [*shipped_recipes()]


def _targets() -> Iterable[str]:
    """The targets by the names of their folders, and those of other packages."""
    from importlib.metadata import entry_points

    import quantcli.targets as targets

    for module in pkgutil.iter_modules(targets.__path__):
        if module.ispkg:
            yield module.name.replace("_", "-")
    yield from (entry.name for entry in entry_points(group="quantcli.targets"))


def _devices(word: str) -> Iterable[str]:
    """The devices that `recommend` knows, with the number that `word` begins with, as in 2xH100."""
    from quantcli.commands.choosing.devices import known_devices

    match = re.match(r"\d+x", word)
    for device in known_devices():
        name = device["name"].removeprefix("Ascend ").replace(" ", "-")
        yield (match[0] if match else "") + name


def _values(name: str, word: str) -> Iterable[str]:
    """Values by the name of an option or argument."""
    match name:
        case "recipe":
            return _recipes()
        case "target":
            return _targets()
        case "device":
            return "cpu", "cuda", "npu"
        case "serve_on":
            return _devices(word)
    return ()
