"""A page as one HTML file, which needs no network and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, Any

from quantcli.core.text import size
from quantcli.verification.report import baseline, words

if TYPE_CHECKING:
    from markupsafe import Markup

_CODE = re.compile(r"`([^`]*)`")


def render(template: str, **values: Any) -> str:
    """The page that a template of this package makes of `values`.

    Values are untrusted: the page shows each one as `words.literal` writes it, escaped. The same values
    give the same bytes. Raises jinja2.UndefinedError if the template names a value that is not there.
    """
    # imported here: only those who ask for a page wait for them
    import jinja2
    from markupsafe import Markup

    loader = jinja2.PackageLoader(__package__)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else words.literal(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"words": words, "baseline": baseline, "size_text": size}
    environment.tests["within_limits"] = words.is_ok
    environment.filters["code"] = _with_code
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template(template).render(
        **values,
        style=Markup(style),
        script=Markup(script),
        hashes={name: _digest(text) for name, text in (("style", style), ("script", script))},
    )


def _with_code(text: object) -> Markup:
    """A message as HTML: names in backticks are set as code."""
    from markupsafe import Markup, escape

    parts = _CODE.split(words.literal(text))
    marked = (
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )
    return Markup("").join(marked)


def _digest(text: str) -> str:
    """SHA-256 as a content security policy writes it: base64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
