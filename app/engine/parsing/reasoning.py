"""What a model thinks before it answers, between two marks at the beginning of the completion."""

from dataclasses import dataclass

from app.engine.parsing.marks import Marks, hide_tokens
from app.engine.parsing.output import ParsedOutput
from app.engine.parsing.scanner import Scan, Scanner


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """The marks around the reasoning."""

    begin: str
    end: str


THOUGHTS = {
    "think": ThoughtMarks("<think>", "</think>"),
    "mistral": ThoughtMarks("[THINK]", "[/THINK]"),
    "gemma4": ThoughtMarks("<|channel>thought", "<channel|>"),
}
"""The marks by the format's name."""


def begins_inside(text: str, thought: ThoughtMarks, *, continues: bool) -> bool:
    """Return whether a completion begins within the reasoning.

    Args:
        text: the end of the prompt; of a message that is continued, its own text.
        continues: whether it is a message that is continued.
    """
    if text.rstrip().endswith(thought.begin):
        return True
    return continues and text.rfind(thought.begin) > text.rfind(thought.end)


def read_reasoning(
    source: Scanner, out: ParsedOutput, marks: Marks, thought: ThoughtMarks, *, inside: bool
) -> Scan[None]:
    """Read the reasoning, if there is any."""
    if not inside:
        source.hold()
        yield from source.blank()
        if not (yield from _accept_begin(source, marks, thought)):
            source.rewind()
            return
        source.release()
    out.begin_reasoning()
    if (yield from source.until(lambda text: out.reasoning(hide_tokens(text)), marks(thought.end))):
        out.end_reasoning()


def _accept_begin(source: Scanner, marks: Marks, thought: ThoughtMarks) -> Scan[bool]:
    """Read the mark of the beginning, which may be a token and a word behind it."""
    token, separator, word = thought.begin.partition(">")
    if word:
        token += separator
        return bool((yield from source.accept(marks(token))) and (yield from source.accept(word)))
    return bool((yield from source.accept(marks(thought.begin))))
