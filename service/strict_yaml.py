"""YAML without its two traps: a key that occurs twice is an error, and 1e-3 a number."""

from __future__ import annotations

import re
from typing import Any

from yaml import MappingNode, Node, SafeLoader, ScalarNode
from yaml.composer import ComposerError

_MERGE = "tag:yaml.org,2002:merge"  # `<<` may stand there twice


class _Loader(SafeLoader):
    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        """As the base class, which lets the last of equal keys win. What `<<` brings comes later, and is no fault."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"{key.value} occurs twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str) -> Any:
    """The value that a text holds.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
