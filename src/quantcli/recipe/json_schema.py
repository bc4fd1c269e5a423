"""JSON Schema of recipes, for editors: every scheme and target with its options."""

from __future__ import annotations

import json
from typing import Any

from quantcli.core.numerics import CACHES
from quantcli.core.registry import discover
from quantcli.recipe.fields import RecipeFile
from quantcli.recipe.methods import recipe_methods
from quantcli.recipe.recipe import KEYWORDS
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target


def recipe_schema() -> str:
    """The schema as JSON text; always the same bytes."""
    schema = RecipeFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "quantcli recipe"
    properties = schema["$defs"]["RuleFile"]["properties"]
    blocks = schema["$defs"]
    properties["scheme"] = _choices(discover(Scheme), "scheme", list(KEYWORDS), blocks)
    schema["properties"]["target"] = _choices(discover(Target), "target", [], blocks)
    methods, top = recipe_methods(), schema["properties"]
    top["smooth"]["anyOf"][0] = _options(methods["smooth"], blocks)
    top["kv_cache"]["anyOf"][0]["enum"] = [*CACHES]
    top["kv_cache"]["anyOf"][1] = _options(methods["kv_cache"], blocks)
    top["methods"]["anyOf"][0]["items"] = _choices(methods, "method", [], blocks)
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def _options(cls: Any, blocks: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class with options; the blocks in them are added to `blocks`."""
    schema: dict[str, Any] = cls.model_json_schema()
    schema.pop("title", None)
    blocks.update(schema.pop("$defs", {}))
    return schema


def _choices(
    classes: dict[str, Any], kind: str, keywords: list[str], blocks: dict[str, Any]
) -> dict[str, Any]:
    options = []
    for name, cls in classes.items():
        schema = _options(cls, blocks)
        schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
        schema["required"] = ["name", *schema.get("required", [])]
        options.append(schema)
    description = f"a {kind} by name, or a mapping with its name and options"
    return {"description": description, "anyOf": [{"enum": [*keywords, *classes]}, *options]}
