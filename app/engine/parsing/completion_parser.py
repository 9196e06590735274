"""Parses one completion with the formats of its model."""

from collections.abc import Mapping

from app.engine.base import ChatFormat
from app.engine.parsing.families.described import parse_described
from app.engine.parsing.families.harmony import parse_harmony
from app.engine.parsing.formats import TOOL_FORMATS, new_call_id
from app.engine.parsing.marks import Marks, hide_tokens
from app.engine.parsing.output import ParsedOutput, Part
from app.engine.parsing.reasoning import THOUGHTS, begins_inside, read_reasoning
from app.engine.parsing.scanner import Scan, Scanner
from app.types import Tool


class CompletionParser:
    """Turns the raw text of one completion into the parts of a message, as it comes."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tools: Mapping[str, Tool],
        prompt_end: str,
        *,
        continued: str | None = None,
        parallel: bool = True,
    ) -> None:
        """
        Args:
            tools: those that may be called, by name.
            prompt_end: the end of the prompt as text, with its special tokens.
            continued: the text of the message that the completion continues; None: it begins one.
            parallel: whether there may be a second call.
        """
        self._format = chat_format
        self._prompt_end = prompt_end
        thought = THOUGHTS.get(chat_format.reasoning or "")
        begun = prompt_end if continued is None else continued
        self.begins_inside = thought is not None and begins_inside(begun, thought, continues=continued is not None)
        """Whether the completion begins within the reasoning."""
        self._marks = Marks(name for name, _ in chat_format.special_marks)
        self._source = Scanner()
        tool_format = TOOL_FORMATS.get(chat_format.tools or "")
        new_id = tool_format.new_id if tool_format else new_call_id
        self.output = ParsedOutput(self._source, tools, new_id, parallel=parallel)
        self._steps = self._parse()
        self._advance()

    def feed(self, text: str) -> list[Part]:
        """Return the parts that more text completes; none once a call was the last that is wanted."""
        if text and not self.output.is_over:
            self._source.feed(text)
            self._advance()
        return self.output.take()

    def finish(self, *, cut: bool) -> list[Part]:
        """Return what is left at the end.  Args: cut: whether the model would have gone on."""
        if not self.output.is_over:
            self._source.end(cut=cut)
            self._advance()
            self.output.finish()
        return self.output.take()

    def _advance(self) -> None:
        next(self._steps, None)

    def _parse(self) -> Scan[None]:
        if self._format.description:
            yield from parse_described(self._source, self.output, self._format.description, self._prompt_end)
        elif self._format.is_harmony:
            yield from parse_harmony(self._source, self.output, self._marks, self._prompt_end)
        else:
            yield from self._read_message()
        if not self.output.is_over:
            yield from self._source.until(lambda text: self.output.text(hide_tokens(text)))

    def _read_message(self) -> Scan[None]:
        if self._format.reasoning is not None:
            thought = THOUGHTS[self._format.reasoning]
            yield from read_reasoning(self._source, self.output, self._marks, thought, inside=self.begins_inside)
        parse = TOOL_FORMATS[self._format.tools].parse if self._format.tools and self.output.tools else None
        if parse is not None:
            yield from parse(self._source, self.output, self._marks)
