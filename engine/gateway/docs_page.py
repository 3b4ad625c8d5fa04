"""/docs: Swagger UI and the description of the routes as one page.

All is in the page: it asks no other machine for scripts, and its own requests for them would have no key.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi.responses import HTMLResponse

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body><div id="swagger-ui"></div>
<script>{script}</script>
<script>SwaggerUIBundle({{spec: {description}, dom_id: "#swagger-ui", validatorUrl: null}})</script>
</body></html>
"""


def docs_page(description: dict[str, Any]) -> HTMLResponse:
    """description: the OpenAPI document."""
    content = _PAGE.format(
        title=description["info"]["title"],
        style=_asset("swagger-ui.css"),
        script=_asset("swagger-ui-bundle.js"),
        description=json.dumps(description).replace("</", "<\\/"),  # which would end the script
    )
    return HTMLResponse(content, headers={"content-security-policy": _POLICY})


@cache
def _asset(name: str) -> str:
    return files("fastapi_offline").joinpath("static", name).read_text(encoding="utf-8")
