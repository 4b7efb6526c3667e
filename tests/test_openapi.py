"""Our own OpenAPI document, and whatever can be made of it: no 500, every error in the error shape."""
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies

import rustinfer
from harness import ask, check_error, local_server

LIMITS = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens",
          "/v1/responses": "max_output_tokens"}


def test_the_document_has_every_field_that_is_supported(tiny_llm):
    with local_server(tiny_llm) as server:
        paths = schemathesis.openapi.from_url(server.url + "/openapi.json").raw_schema["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    supported = {name for name, field in rustinfer.CHAT_FIELDS.items() if field.kind != "unsupported"}
    assert set(body["properties"]) == supported and body["required"] == ["messages"]
    assert body["properties"]["temperature"] == {"type": ["number", "null"], "minimum": 0, "maximum": 2}
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]


def test_the_document_has_every_route(tiny_llm):
    with local_server(tiny_llm) as server:
        paths = ask(server, "GET", "/openapi.json")[2]["paths"]
        for path, methods in paths.items():  # what a route does not list is not taken
            for method in ("GET", "POST", "DELETE", "PUT"):
                status, _, body = ask(server, method, path.replace("{id}", "x"), *([{}] if method == "POST" else []))
                assert (status == 405) == (method.lower() not in methods), (path, method)
        assert set(paths) == set(rustinfer.Server.ROUTES)
    query = {parameter["name"]: parameter for parameter in paths["/v1/chat/completions"]["get"]["parameters"]}
    assert query["messages"]["required"] and query["temperature"]["content"]["application/json"]["schema"] == {
        "type": ["number", "null"], "minimum": 0, "maximum": 2}
    assert query["user"]["schema"] == {"type": "string"} and "store" not in query


def test_anything_that_the_document_allows_is_answered(tiny_llm):
    with local_server(tiny_llm) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        for operation in (result.ok() for result in schema.get_all_operations()):
            attempt(operation.as_strategy())


def attempt(cases: strategies.SearchStrategy) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def run(case):
        body, limit = case.body, LIMITS.get(case.operation.path)
        if isinstance(body, dict) and limit and body.get(limit, 0) is not None:
            body[limit] = 3  # the answer's length is not the point
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and not case.operation.path.startswith("/v1/messages"):
            check_error(response.json()["error"])

    run()
