"""A checkpoint's own configuration, read key by key; what is missing or wrong is told with its file and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import UserError

Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Document:
    """`where` is the file that the values came from."""

    where: str
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a whole number above 0")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """As `integer`; null means none. `default` counts only where the key is not there at all."""
        if key not in self.values:
            return default
        return self.integer(key) if key in self else None

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 on."""
        value = self._value(key, default)
        if not _is_count(value):
            raise self.wrong(key, "a whole number, 0 or above")
        return int(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 on, empty where there is none."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(map(_is_count, value)):
            raise self.wrong(key, "a list of whole numbers, 0 or above")
        return tuple(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, "a number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, Sequence) or len(value) != count or not all(isinstance(n, int | float) for n in value):
            raise self.wrong(key, f"a list of {count} numbers")
        return tuple(float(n) for n in value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def choice(self, key: str, choices: Mapping[str, Choice], default: str | None = None) -> Choice:
        """What `choices` makes of the text under `key`."""
        value = self.text(key, default)
        if value not in choices:
            raise UserError(f"{self.where}: {key} {value!r} is not supported ({', '.join(choices)} are)")
        return choices[value]

    def inner(self, key: str) -> Document:
        """The object under `key`, empty where there is none."""
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Document(f"{self.where}: {key}", value)

    def over(self, defaults: Mapping[str, Any]) -> Document:
        """This document, with an architecture's `defaults` for keys that are not there at all."""
        return Document(self.where, {**defaults, **self.values})

    def renamed(self, names: Mapping[str, str]) -> Document:
        """This document, where a key that `names` has goes by its other name: n_head as num_attention_heads."""
        return Document(self.where, {names.get(key, key): value for key, value in self.values.items()})

    def refuse(self, supported: Mapping[str, Any]) -> None:
        """UserError where a key is there with another value than the one that is supported. Null is not there."""
        for key, value in supported.items():
            if key in self and self.values[key] != value:
                raise UserError(
                    f"{self.where}: {key} {self.values[key]!r} is not supported"
                    + ("" if value is None else f", only {value!r}")
                )

    def wrong(self, key: str, wanted: str) -> UserError:
        if key not in self.values:
            return UserError(f"{self.where}: {key} is missing; it must be {wanted}")
        return UserError(f"{self.where}: {key} must be {wanted}, not {self.values[key]!r}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
