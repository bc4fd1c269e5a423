"""`quantcli recipes`: lists the shipped recipes, and prints one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import Output
from quantcli.core.errors import InputError, closest

_SHOW = "quantcli recipes show NAME"


@options.on_screen
def recipes(
    output: Output,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="show NAME", help="Print this recipe instead.")
    ] = None,
) -> None:
    """List the recipes that come with quantcli.

    Every command that takes a recipe takes their names. To change one, print it into a file of your
    own: `quantcli recipes show NAME > FILE`.
    """
    from quantcli.recipe.shipped import describe_recipe, recipe_text, shipped_recipes

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
        output.result({"name": words[1], "text": recipe_text(words[1])}, _show_text)
        following.show(output, *following.after_recipes(words[1]))
        return
    lines = [asdict(describe_recipe(name)) for name in shipped_recipes()]
    output.result({"recipes": lines}, _show_recipes)
    following.show(output, *following.after_recipes())


def _show_text(out: Output, document: dict[str, Any]) -> None:
    out.verbatim(document["text"])


def _show_recipes(out: Output, document: dict[str, Any]) -> None:
    rows = [
        [r["name"], r["target"], "yes" if r["calibration"] else "no", r["purpose"]]
        for r in document["recipes"]
    ]
    out.table(["recipe", "target", "calibrates", "for"], rows, whole={"recipe", "target"})
