"""/openapi.json says what the bodies' structs say, and /docs shows it without any other host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec

from gateway.openai.bodies import ChatBody, CompletionBody
from tests.gateway.front import CHAT, COMPLETION, Front

ROOT = Path(__file__).parents[2]


async def document(front: Front) -> dict[str, Any]:
    status, body, _ = await front.ask("GET", "/openapi.json")
    assert (status, body["openapi"]) == (200, "3.1.0")
    return dict(body)


def references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if isinstance(node, dict):
        return set().union(*map(references, node.values())) | {v for k, v in node.items() if k == "$ref"}
    return set()


async def test_every_route_and_field_is_described(front: Front) -> None:
    found = await document(front)
    routes = front.gateway._routes
    assert set(found["paths"]) == set(routes.exact) | {f"{prefix}{{id}}" for prefix in routes.prefixes}
    schemas = found["components"]["schemas"]
    for body in (ChatBody, CompletionBody):
        assert set(schemas[body.__name__]["properties"]) == {field.name for field in msgspec.structs.fields(body)}
        assert schemas[body.__name__]["additionalProperties"] is False
    assert {name.removeprefix("#/components/schemas/") for name in references(found)} <= set(schemas)
    assert all(
        "requestBody" in path["post"] for path in found["paths"].values() if "post" in path
    )  # gateway.api.BODIES
    operations = [op["operationId"] for path in found["paths"].values() for op in path.values()]
    assert len(set(operations)) == len(operations)


async def test_the_readme_lists_every_route(front: Front) -> None:
    table = (ROOT / "README.md").read_text().partition("\n| endpoint | |\n")[2].partition("\n\n")[0]
    named = {path.rstrip("/") for path in re.findall(r"`(?:[A-Z]+ )?(/[\w./]+)", table)}
    paths = {path.rstrip("/") for path in (*front.gateway._routes.exact, *front.gateway._routes.prefixes)}
    missing = sorted(path for path in paths if path not in named and f"/v1{path}" not in named)
    assert not missing, missing


async def test_the_schemas_take_what_the_service_takes(front: Front) -> None:
    schemas = (await document(front))["components"]["schemas"]
    for name, good in (("ChatBody", CHAT), ("CompletionBody", COMPLETION)):
        validator = jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        )
        assert validator.is_valid(good)
        needed = "messages" if name == "ChatBody" else "prompt"
        without = {field: value for field, value in good.items() if field != needed}
        for bad in (
            without,
            {**good, needed: None},
            {**good, "unknown": 1},
            {**good, "max_tokens": "many"},
            {**good, "stop": [3]},
        ):
            assert not validator.is_valid(bad)


async def test_the_page_needs_no_other_host(front: Front) -> None:
    status, page, headers = await front.ask("GET", "/docs")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    text = page.decode()
    assert "POST /v1/chat/completions" in text
    assert "parallel_tool_calls" in text
    assert not re.search(r"https?://|<script|src=", text)
