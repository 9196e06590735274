"""What a parser makes of a completion: answer, reasoning and calls, in the order in which they were generated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.engine.parsing.marks import hide_tokens
from app.engine.parsing.scanner import Scan, Scanner
from app.events import ToolCallDelta
from app.types import Tool


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the message that the model writes."""

    end: int
    """Characters of the raw completion up to its end."""
    text: str = ""
    reasoning: str = ""
    call: ToolCallDelta | None = None


class ParsedOutput:
    """Collects the parts of one completion.

    White space between the answer, the reasoning and the calls belongs to the format, so that it is held back until
    more text follows.
    """

    def __init__(
        self,
        source: Scanner,
        tools: Mapping[str, Tool],
        new_id: Callable[[], str],
        *,
        parallel: bool = True,
    ) -> None:
        """Args: new_id: returns the id of the next call; parallel: whether there may be a second call."""
        self._source = source
        self.tools = tools
        self._new_id = new_id
        self._parallel = parallel
        self._parts: list[Part] = []
        self._blank = ""
        """White space that may turn out to be the format's."""
        self._begins = False
        """Whether newlines are left out until there is other text."""
        self._calls = 0
        self._arguments: list[str] = []
        """More of the open call's arguments, which come in many small texts."""
        self._has_arguments = False
        self.is_open = False
        """Whether a call has begun and not ended."""
        self.is_over = False
        """Whether nothing more is wanted of this completion."""
        self.has_text = False
        """Whether there is any answer."""
        self.thoughts: list[tuple[int, int]] = []
        """Where in the raw completion the reasoning begins and ends."""
        self._is_thinking = False
        self._has_thought = False

    @property
    def calls(self) -> int:
        """Return how many calls there are."""
        return self._calls

    def take(self) -> list[Part]:
        """Return the parts since the last time."""
        self._flush_arguments()
        parts, self._parts = self._parts, []
        return parts

    def text(self, text: str) -> None:
        """Append to the answer."""
        text = self._blank + text
        if self._begins:
            text = text.lstrip("\r\n")
        shown = text.rstrip() if self.tools else text
        self._blank = text[len(shown) :]
        if shown:
            self._begins, self.has_text = False, True
            self._add(text=shown)

    def begin_reasoning(self) -> None:
        """Begin to think."""
        if not self._is_thinking:
            self._blank, self._is_thinking, self._begins = "", True, True
            self.thoughts.append((self._source.position, self._source.position))

    def reasoning(self, text: str) -> None:
        """Append to the reasoning."""
        self.thoughts[-1] = (self.thoughts[-1][0], self._source.position)
        text = self._blank + text
        if self._begins:
            text = text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if not shown:
            return
        if self._begins and self._has_thought:
            shown = "\n" + shown
        self._begins, self._has_thought = False, True
        self._add(reasoning=shown)

    def end_reasoning(self) -> None:
        """End the thought; newlines before what follows are the format's."""
        self._blank, self._is_thinking, self._begins = "", False, True

    def open_call(self, name: str | None, call_id: str | None = None) -> bool:
        """Begin a call; return False if there is no such tool."""
        if name is None or name not in self.tools:
            return False
        self._source.release()
        self._blank, self._begins = "", False
        self._add(call=ToolCallDelta(position=self._calls, id=call_id or self._new_id(), name=name))
        self._calls += 1
        self._has_arguments, self.is_open = False, True
        return True

    def arguments(self, text: str) -> None:
        """Append to the arguments of the open call."""
        if text := hide_tokens(text):
            self._has_arguments = True
            self._arguments.append(text)

    def close_call(self) -> None:
        """End the open call; one without arguments has none, unless it breaks off."""
        if not self._has_arguments and not self._source.is_cut:
            self.arguments("{}")
        self._flush_arguments()
        self.is_open = False
        self.is_over = not self._parallel

    def finish(self) -> None:
        """End the completion: white space at its end belongs to what stands before it."""
        if self._is_thinking:
            self._flush(reasoning=True)
        elif not self._calls:
            self._flush(reasoning=False)

    def _flush(self, *, reasoning: bool) -> None:
        blank, self._blank = self._blank, ""
        if blank and reasoning:
            self._add(reasoning=blank)
        elif blank:
            self._add(text=blank)

    def _flush_arguments(self) -> None:
        if self._arguments:
            text = "".join(self._arguments)
            self._arguments.clear()
            self._add(call=ToolCallDelta(position=self._calls - 1, arguments=text))

    def _add(self, *, text: str = "", reasoning: str = "", call: ToolCallDelta | None = None) -> None:
        """Add a part that ends before the white space that is held back."""
        end = self._source.position - len(self._blank)
        self._parts.append(Part(end, text=text, reasoning=reasoning, call=call))


def read_text(source: Scanner, out: ParsedOutput, *marks: str) -> Scan[str | None]:
    """Read the answer up to one of these marks, behind which a call may begin; `reject` takes that back.

    Returns: the mark; None: the completion ended.
    """
    mark = yield from source.until(lambda text: out.text(hide_tokens(text)), *marks)
    if mark is not None:
        source.hold()
    return mark


def reject(source: Scanner, out: ParsedOutput, mark: str = "") -> None:
    """Take a mark for text, since no call of a known tool follows it, and go on behind it."""
    source.rewind()
    if text := hide_tokens(mark):
        out.text(text)
