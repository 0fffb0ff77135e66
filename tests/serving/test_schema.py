import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dsv32.serving.schema import ToolSchema, parse_json, read_value, to_json

DEFINITIONS = {"Point": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}, "a/b": {"type": "null"}}


def types_of(subschema):
    types = ToolSchema({"properties": {"p": subschema}, "$defs": DEFINITIONS}).types_of("p")
    return types and set(types)


@pytest.mark.parametrize(
    ("subschema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, {"number", "integer"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "integer", "nullable": True}, {"integer", "null"}),
        ({"enum": ["a", 1]}, {"string", "integer", "number"}),
        ({"const": False}, {"boolean"}),
        # vllm #43255: composed schemas.
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, {"object", "null"}),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, {"array", "string"}),
        ({"allOf": [{"type": "object"}, {"description": "x"}]}, {"object"}),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, {"integer"}),
        ({"anyOf": [{"allOf": [{"type": "object"}]}, {"oneOf": [{"type": "array"}]}]}, {"object", "array"}),
        ({"type": ["string", "integer"], "enum": ["a"]}, {"string"}),
        ({"$ref": "#/$defs/Point"}, {"object"}),
        ({"$ref": "#/$defs/a~1b"}, {"null"}),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, {"object", "null"}),
        # What says nothing allows anything.
        ({}, None),
        (True, None),
        (None, None),
        ({"type": 5}, None),
        ({"anyOf": [{"type": "string"}, {}]}, None),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, None),
        ({"$ref": "#/$defs/Loop"}, None),
        ({"$ref": "#/$defs/None"}, None),
        ({"$ref": "http://x"}, None),
        ({"enum": []}, None),
    ],
)
def test_types(subschema, expected):
    assert types_of(subschema) == expected


def test_types_of_an_explosive_schema_are_bounded():
    schema = {"anyOf": [{"$ref": "#/properties/p"}] * 8}
    assert ToolSchema({"properties": {"p": schema}}).types_of("p") is None


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_types_of_a_deep_schema_are_any(keyword):
    schema = {"type": "string"}
    for _ in range(10_000):
        schema = {keyword: [schema]}
    assert ToolSchema({"properties": {"p": schema}}).types_of("p") is None


@pytest.mark.parametrize("parameters", [None, [], 5, {"properties": []}, {"properties": {"p": 5}, "required": 5}])
def test_malformed_parameters(parameters):
    schema = ToolSchema(parameters)
    assert schema.types_of("p") is None
    assert schema.required == frozenset()
    assert schema.unwrap("p", 1) == [("p", 1)]


ANY = None


@pytest.mark.parametrize(
    ("raw", "is_string", "types", "expected"),
    [
        ("abc", True, ANY, "abc"),
        ("5", True, ANY, "5"),
        ("5", False, ANY, 5),
        ("5", None, ANY, 5),
        ("abc", False, ANY, "abc"),
        ("abc", None, ANY, "abc"),
        ('"abc"', False, ANY, "abc"),
        ("null", False, ANY, None),
        # The schema overrules the attribute.
        ("5", True, {"integer"}, 5),
        ("5", False, {"string"}, "5"),
        ("0123", False, {"string"}, "0123"),
        ('"abc"', False, {"string"}, "abc"),
        ("null", False, {"string"}, "null"),
        ("null", False, {"string", "null"}, None),
        ("null", True, {"string", "null"}, "null"),
        ("5", False, {"string", "integer"}, 5),
        ('{"a": 1}', True, {"object"}, {"a": 1}),
        ('"{\\"a\\": 1}"', False, {"object"}, {"a": 1}),
        ('"[1]"', False, {"array", "null"}, [1]),
        ("5.0", False, {"integer"}, 5),
        ("5.5", False, {"number"}, 5.5),
        ("5", False, {"number", "integer"}, 5),
        ("True", False, {"boolean"}, True),
        ("None", False, {"null", "object"}, None),
        # What does not fit stays as it is.
        ("5.5", False, {"integer"}, 5.5),
        ("{bad", False, {"object"}, "{bad"),
        ("[1]", False, {"object"}, [1]),
        ("abc", True, {"integer"}, "abc"),
        ("[1]", True, {"object"}, "[1]"),
        # What is JSON to Python only.
        ("NaN", False, ANY, "NaN"),
        ("-Infinity", False, {"number"}, "-Infinity"),
        ("1e999", False, ANY, "1e999"),
        ("9" * 5000, False, {"integer"}, "9" * 5000),
        ("[" * 100_000, False, ANY, "[" * 100_000),
        ("", False, {"object"}, ""),
    ],
)
def test_value(raw, is_string, types, expected):
    value = read_value(raw, is_string, types and frozenset(types))
    assert value == expected
    assert type(value) is type(expected)


PATH = ToolSchema({"properties": {"path": {"type": "string"}, "line": {"type": "integer"}}})
COMMAND = ToolSchema({"properties": {"command": {"type": "string"}}})


@pytest.mark.parametrize(
    ("schema", "name", "value", "expected"),
    [
        (PATH, "arguments", {"path": "/x", "line": 3}, {"path": "/x", "line": 3}),
        (PATH, "input", {"path": "/x"}, {"path": "/x"}),
        (PATH, "arguments", '{"path": "/x"}', {"path": "/x"}),
        (PATH, "arguments", {"line": "3"}, {"line": 3}),
        (PATH, "arguments", {}, {}),
        (PATH, "arguments", {"input": {"path": "/x"}}, {"path": "/x"}),
        (COMMAND, "arguments", "ls -la", {"command": "ls -la"}),
        # Not a wrapper.
        (PATH, "arguments", {"other": 1}, {"arguments": {"other": 1}}),
        (PATH, "arguments", "text", {"arguments": "text"}),
        (PATH, "path", {"line": 3}, {"path": {"line": 3}}),
        (ToolSchema({}), "arguments", {"path": "/x"}, {"arguments": {"path": "/x"}}),
        (ToolSchema({"properties": {"input": {}, "x": {}}}), "input", {"x": 1}, {"input": {"x": 1}}),
    ],
)
def test_unwrap(schema, name, value, expected):
    assert dict(schema.unwrap(name, value)) == expected


@given(raw=st.text(max_size=20), is_string=st.sampled_from([True, False, None]), data=st.data())
def test_any_value_becomes_json(raw, is_string, data):
    names = ["string", "number", "integer", "boolean", "null", "object", "array"]
    types = data.draw(st.none() | st.frozensets(st.sampled_from(names), min_size=1))
    text = to_json(read_value(raw, is_string, types))
    text.encode()
    assert parse_json(text) == json.loads(text)


def test_half_a_character_is_escaped():
    assert to_json(read_value('"\\ud800"', False, None)) == '"\\ud800"'
