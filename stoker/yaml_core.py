"""YAML as configurations and recipes are read: YAML 1.2 scalars, no duplicate keys.

PyYAML follows YAML 1.1, where ``off`` is false, ``1e-3`` is a string and ``12:30`` is 750. Here true and false are the
only booleans, a number with an exponent is a number, and everything else that YAML 1.1 would guess is a string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from stoker.errors import Refusal


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2 (section 10.3.2), and a refusal of duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise Refusal(f"line {key_node.start_mark.line + 1}: key {key!r} is not text: put it in quotes")
            if key in seen:
                raise Refusal(f"line {key_node.start_mark.line + 1}: key {key} is given twice: keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Scalars quoted where this loader or a YAML 1.1 reader would take them for something else; lists on one line."""


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document. Refuses what is not YAML, naming ``source`` and the line."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise Refusal(f"{source} is not YAML: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise Refusal(f"{source}: {' '.join(str(error).split())}") from None


class _BlockDumper(_Dumper):
    """As ``_Dumper``, lists with a line for each item."""


_BlockDumper.add_representer(list, yaml.SafeDumper.represent_list)


def dump_yaml(value: Mapping[str, Any], flow: bool = True) -> str:
    """YAML text, keys in their order, lists on one line if ``flow``; ``parse_yaml`` gives the same value back."""
    return yaml.dump(dict(value), Dumper=_Dumper if flow else _BlockDumper, sort_keys=False, width=120)
