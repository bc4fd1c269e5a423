"""`quantcli recipes`: lists the shipped recipes, and prints one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.output import Output
from quantcli.core.errors import InputError, closest

_SHOW = "quantcli recipes show NAME"


def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="show NAME", help="Print this recipe instead.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the recipes that come with quantcli.

    Every command that takes a recipe takes their names. To change one, print it into a file of your
    own: `quantcli recipes show NAME > FILE`.
    """
    from quantcli.recipe.shipped import describe_recipe, recipe_text, shipped_recipes

    out = Output(as_json=as_json)
    if words:
        if words[0] != "show":
            what = f"`quantcli recipes` has no part `{words[0]}`"
            near = closest(words[0], ["show"]) or words[0] in shipped_recipes()
            raise InputError(
                what, fix=f"did you mean `{_SHOW}`?" if near else f"leave it out, or {_SHOW}"
            )
        if len(words) != 2:
            what = "`quantcli recipes show` takes one name"
            raise InputError(what, fix=f"{_SHOW}; `quantcli recipes` lists the names")
        text = recipe_text(words[1])
        if as_json:
            out.document({"name": words[1], "text": text})
            return
        for line in text.splitlines():
            out.line(line)
        return
    lines = [describe_recipe(name) for name in shipped_recipes()]
    if as_json:
        out.document({"recipes": [asdict(line) for line in lines]})
        return
    rows = [[r.name, r.target, "yes" if r.calibration else "no", r.purpose] for r in lines]
    out.table(["recipe", "target", "calibrates", "for"], rows)
