"""What schemathesis is told of our API beyond its contract."""

import schemathesis
from schemathesis.specs.openapi.checks import content_type_conformance


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """As Firecracker's program, ours takes `null` for an optional field, and counts up to 2^64 - 1."""
    for name, definition in raw_schema["definitions"].items():
        required = definition.get("required", [])
        properties = definition.get("properties", {})
        for key, schema in properties.items():
            if schema.get("format") == "int64":
                del schema["format"]
            if key in required:
                continue
            if "$ref" in schema:
                properties[key] = {"x-nullable": True, "allOf": [{"$ref": schema["$ref"]}]}
                continue
            schema["x-nullable"] = True
            if "enum" in schema:
                schema["enum"].append(None)


@schemathesis.check
def type_of_a_body(context, response, case):
    """An answer without a body (204) has no type, which the tool's own check asks for."""
    if response.content:
        return content_type_conformance(context, response, case)
    return None
