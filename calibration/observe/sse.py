"""Server-sent events, as OpenAI-compatible servers stream them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from calibration.common.errors import CalibrationError

DONE = "[DONE]"
_KNOWN = ("event", "id", "retry")


class EventReader:
    """Takes the bytes of a stream as they come and gives the objects that the events in them hold.

    `done` is true once the server has said ``[DONE]``; not every server does.
    """

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Give the object of every event that `data` completes; `CalibrationError` where one is none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = _decode(line)
            if text:
                self._take(text)
            elif self._data:
                event = self._event()
                if event is not None:
                    yield event

    @property
    def cut(self) -> bool:
        """Whether the stream stopped in the middle of an event."""
        return bool(self._rest.strip() or self._data)

    def _take(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if name == "data" and colon:
            self._data.append(value.removeprefix(" "))
        elif name not in ("", *_KNOWN):  # a line that begins with a colon is a comment
            raise CalibrationError(f"stream: must be server-sent events, got the line {line[:120]!r}")

    def _event(self) -> dict[str, Any] | None:
        text = "\n".join(self._data)
        self._data = []
        if text.strip() == DONE:
            self.done = True
            return None
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise CalibrationError(f"stream: every event must be a JSON object, got {text[:120]!r}")
        return found


def _decode(line: bytes) -> str:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise CalibrationError(f"stream: must be UTF-8, got {line[:60]!r}") from None
