"""Mappings that hash."""

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenMapping(Mapping[str, Any]):
    """Mapping that cannot be changed, with mappings in it frozen as well.

    Mappings of equal content are equal and have the same hash, whatever their order.
    """

    def __init__(self, content: Mapping[str, Any]):
        self._content = {
            key: FrozenMapping(value) if isinstance(value, Mapping) else value
            for key, value in content.items()
        }

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(self._content)
