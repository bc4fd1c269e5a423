"""A page as one HTML file, which needs no network and runs only its own two scripts."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from quantcli.core.errors import MachineError
from quantcli.verification.report import words
from quantcli.verification.report.charts import Figure


def require_plotly() -> None:
    """Raise MachineError if the plotting library is not installed."""
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "a page needs the package plotly", where=str(error), fix="pip install 'quantcli[report]'"
        ) from None


def render(template: str, figures: dict[str, Figure], **values: Any) -> str:
    """The page that a template of this folder makes of `values`.

    figures: charts by name; each is drawn in the element of the page that has its name as id.

    Values are untrusted: the page shows each one as `words.literal` writes it, escaped. The same values
    give the same bytes. Raises ValueError for a chart that plotly does not know how to draw, and
    jinja2.UndefinedError if the template names a value that is not there.
    """
    # imported here: only those who ask for a page wait for them
    import jinja2
    from markupsafe import Markup
    from plotly import graph_objects
    from plotly.offline import get_plotlyjs

    for figure in figures.values():
        graph_objects.Figure(figure)  # checks it: a misspelt attribute would be a blank chart
    loader = jinja2.PackageLoader(__package__, "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else words.literal(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    environment.globals["words"] = words
    environment.tests["within_limits"] = words.is_ok
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    scripts = [get_plotlyjs().replace("</script", "<\\/script"), script]
    return environment.get_template(template).render(
        **values,
        figures=figures,
        style=Markup(style),
        scripts=[Markup(text) for text in scripts],
        hashes=[_digest(text) for text in scripts],
    )


def _digest(script: str) -> str:
    """SHA-256 as a content security policy writes it: base64."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
