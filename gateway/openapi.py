"""The description of this API (OpenAPI 3.1), made of the structs that check the bodies, and a page that shows it."""

from __future__ import annotations

import functools
import html
from typing import Any

import msgspec

from gateway.edge import Routes, encode_json

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# Fields that a body cannot do without, by the name of its struct; of several lists, one is enough. The structs leave
# them open, so that what is missing is refused by a sentence of its own.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "ChatBody": (("messages",),),
    "CompletionBody": (("prompt",),),
    "DetokenizeBody": (("tokens",),),
    "GenerateBody": (("prompt",),),
    "TokenizeBody": (("prompt",), ("messages",)),
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Headrace API</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font: 600 1rem ui-monospace, monospace; margin: 2rem 0 .5rem }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-top: 1px solid #8884; padding: .2rem .8rem .2rem 0; font: 13px ui-monospace, monospace }}
</style></head><body><h1>Headrace API {version}</h1>
<p><a href="/openapi.json">openapi.json</a> is the same for programs.</p>
{operations}</body></html>
"""
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def description(routes: Routes, bodies: dict[str, type], version: str) -> dict[str, Any]:
    """The OpenAPI document. ``bodies``: the struct that checks the body of each POST, by path."""
    _, schemas = msgspec.json.schema_components(
        sorted(set(bodies.values()), key=lambda body: body.__name__), ref_template="#/components/schemas/{name}"
    )
    for name, lists in NEEDED.items():
        _need(schemas[name], lists)
    paths: dict[str, dict[str, Any]] = {}
    for path, methods in sorted({**routes.exact, **routes.prefixes}.items()):
        shown = path + "{id}" if path.endswith("/") else path
        for method, handler in methods.items():
            body = bodies.get(path)
            operation = _operation(method, shown, handler.__doc__, body)
            paths.setdefault(shown, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": ERROR}},
    }


def _need(schema: dict[str, Any], lists: tuple[tuple[str, ...], ...]) -> None:
    """Say in ``schema`` that the fields of one of ``lists`` are there, and not null."""
    if len(lists) == 1:
        schema["required"] = list(lists[0])
        for name in lists[0]:
            field = schema["properties"][name]
            del field["default"]
            field["anyOf"] = [kind for kind in field["anyOf"] if kind != {"type": "null"}]
        return
    given = {"not": {"type": "null"}}
    schema["anyOf"] = [{"required": list(names), "properties": dict.fromkeys(names, given)} for names in lists]


def _operation(method: str, path: str, told: str | None, body: type | None) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.replace('{id}', 'id')}".replace("/", "_"),
        "responses": {
            "200": {"description": "the answer"},
            "default": {"description": "an error; `param` names the field at fault", "content": error},
        },
    }
    if told:
        operation["summary"] = " ".join(told.split())
    if "{id}" in path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def page(document: dict[str, Any]) -> str:
    """``document`` as HTML that needs no script and no other host."""
    operations = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method == "head":
                continue
            operations.append(f"<h2>{method.upper()} {html.escape(path)}</h2>")
            operations.append(f"<p>{html.escape(operation.get('summary', ''))}</p>")
            if "requestBody" in operation:
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                operations.append(_fields(document["components"]["schemas"][name]))
    return PAGE.format(version=html.escape(document["info"]["version"]), operations="\n".join(operations))


def _fields(schema: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_kind(field))}</td></tr>"
        for name, field in schema["properties"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in few words: ``string or array of integer``."""
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if schema.get("type") == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


class Documents:
    """Both documents, made when they are first asked for."""

    def __init__(self, routes: Routes, bodies: dict[str, type], version: str) -> None:
        self._made = functools.cache(lambda: description(routes, bodies, version))

    def json(self) -> bytes:
        return encode_json(self._made())

    def html(self) -> str:
        return page(self._made())
