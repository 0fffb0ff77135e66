"""The JSON schema of one tool's parameters, as far as reading its arguments needs it.

Schemas come from clients, so nothing here trusts their form: what cannot be understood allows any type.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from vllm_dsv32.serving.messages import is_unicode

JsonTypes = frozenset[str]

# Keys under which the model sometimes puts all arguments at once.
_WRAPPERS: Final = ("arguments", "input")
# How many subschemas are read for one parameter: references may form cycles.
_MAX_SUBSCHEMAS: Final = 256
# Of lists and objects in a value: half of what Python takes, as the rest of the server is in its stack too.
_MAX_DEPTH: Final = 500
_INVALID: Final = object()
# Made once: `json.dumps` makes an encoder for each call.
_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


class ToolSchema:
    """What the declaration of a tool says about its arguments."""

    def __init__(self, parameters: object) -> None:
        self._root: Mapping[str, Any] = parameters if isinstance(parameters, Mapping) else {}
        properties = self._root.get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        required = self._root.get("required")
        names = required if isinstance(required, list | tuple) else ()
        self.required = frozenset(name for name in names if isinstance(name, str))
        self._types: dict[str, JsonTypes | None] = {}

    def types_of(self, name: str) -> JsonTypes | None:
        """The JSON types that the parameter may have; None if any."""
        if name not in self._types:
            try:
                self._types[name] = _Types(self._root).of(self._properties.get(name))
            except RecursionError:
                # How deep a schema may be depends on how deep the caller is in the server's stack.
                self._types[name] = None
        return self._types[name]

    def may_wrap(self, name: str) -> bool:
        """Whether a lone parameter of this name is a wrapper around the real arguments."""
        return name in _WRAPPERS and bool(self._properties) and name not in self._properties

    def unwrap(self, name: str, value: Any) -> list[tuple[str, Any]]:
        """The arguments meant by a call whose only argument is `name`."""
        while self.may_wrap(name):
            inner = parse_json(value) if isinstance(value, str) else value
            if not isinstance(inner, Mapping):
                # A bare value is meant for the only parameter there is.
                only = next(iter(self._properties)) if len(self._properties) == 1 else name
                return [(only, self._fit(only, value))]
            if len(inner) == 1 and self.may_wrap(next(iter(inner))):
                ((name, value),) = inner.items()
            elif inner.keys() <= self._properties.keys():
                return [(key, self._fit(key, item)) for key, item in inner.items()]
            else:
                break
        return [(name, value)]

    def _fit(self, name: str, value: Any) -> Any:
        return read_value(value, True, self.types_of(name)) if isinstance(value, str) else value


def read_value(raw: str, is_string: bool | None, types: JsonTypes | None) -> Any:
    """The value of a DSML parameter.

    Args:
        raw: the text between the tags.
        is_string: the tag's `string` attribute; None if it has none.
        types: what the schema allows; None if anything. It overrules the attribute.

    Returns:
        The text itself where it may be a string and is marked as one, or does not parse as an allowed type;
        else the JSON value. Whatever does not fit the schema is returned as the model wrote it.
    """
    may_be_string = types is None or "string" in types
    if is_string and may_be_string:
        return raw
    value = parse_json(raw)
    for candidate in _readings(raw, value):
        if types is None or _types_of_value(candidate) & types:
            return candidate
    return raw if is_string or value is _INVALID or may_be_string else value


def parse_json(text: str) -> Any:
    """The value of strict JSON text (no NaN, no infinities), or a private marker if it is none, or too deep."""
    try:
        value = json.loads(text, parse_constant=_reject, parse_float=_finite)
    except (ValueError, RecursionError):
        return _INVALID
    return _INVALID if _is_deep(value) else value


def _is_deep(value: Any) -> bool:
    """Whether what could be read here might nest too deep to be written elsewhere in the stack."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
        if not level:
            return False
    return True


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def to_json(value: Any) -> str:
    """JSON as vLLM writes it, non-ASCII text as it is."""
    text = _encode(value)
    # A lone surrogate has no UTF-8; escaped, it has.
    return text if is_unicode(text) else json.dumps(value)


def _readings(raw: str, value: Any) -> Iterable[Any]:
    """What a text may mean, the likeliest first."""
    if value is _INVALID:
        word = {"true": True, "false": False, "none": None}.get(raw.strip().lower(), _INVALID)
        if word is not _INVALID:
            yield word
        return
    yield value
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, str) and (inner := parse_json(value)) is not _INVALID:
        yield inner


def _types_of_value(value: Any) -> JsonTypes:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number"})
        case str():
            return frozenset({"string"})
        case Mapping():
            return frozenset({"object"})
        case _:
            return frozenset({"array"})


class _Types:
    """Reads the types that a subschema allows; one object for one reading."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = _MAX_SUBSCHEMAS

    def of(self, schema: object) -> JsonTypes | None:
        """The types that `schema` allows; None if any, or if the schema is not understood."""
        self._left -= 1
        if self._left < 0 or not isinstance(schema, Mapping):
            return None
        allowed: JsonTypes | None = None
        for constraint in self._constraints(schema):
            allowed = constraint if allowed is None else allowed & constraint
        if allowed and schema.get("nullable") is True:
            allowed |= {"null"}
        return allowed or None

    def _constraints(self, schema: Mapping[str, Any]) -> Iterable[JsonTypes]:
        """One set of types for each keyword that limits them."""
        names = schema.get("type")
        if isinstance(names, str | list):
            yield _closed({names} if isinstance(names, str) else {n for n in names if isinstance(n, str)})
        if "const" in schema:
            yield _types_of_value(schema["const"])
        if isinstance(values := schema.get("enum"), list):
            yield frozenset[str]().union(*map(_types_of_value, values))
        if isinstance(reference := schema.get("$ref"), str):
            yield from _known([self.of(self._resolve(reference))])
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list):
                members = [self.of(option) for option in options]
                if None not in members:
                    yield frozenset[str]().union(*_known(members))
        if isinstance(parts := schema.get("allOf"), list):
            yield from _known(self.of(part) for part in parts)

    def _resolve(self, reference: str) -> object:
        """The subschema that a reference into the same document names."""
        path = reference.removeprefix("#")
        if path == reference:
            return None
        node: object = self._root
        for key in path.split("/")[1:]:
            if not isinstance(node, Mapping):
                return None
            node = node.get(key.replace("~1", "/").replace("~0", "~"))
        return node


def _known(sets: Iterable[JsonTypes | None]) -> list[JsonTypes]:
    return [types for types in sets if types is not None]


def _closed(names: set[str]) -> JsonTypes:
    """With "number" an integer is allowed too."""
    return frozenset(names | {"integer"} if "number" in names else names)


def _reject(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number
