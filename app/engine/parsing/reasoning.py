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
    word: str = ""
    """What stands behind the first mark and belongs to it."""

    @property
    def opening(self) -> str:
        """Return the whole of what begins the reasoning."""
        return self.begin + self.word


THOUGHTS = {
    "think": ThoughtMarks("<think>", "</think>"),
    "mistral": ThoughtMarks("[THINK]", "[/THINK]"),
    "gemma4": ThoughtMarks("<|channel>", "<channel|>", word="thought"),
}
"""The marks by the format's name."""


def begins_inside(text: str, thought: ThoughtMarks, *, continues: bool) -> bool:
    """Return whether a completion begins within the reasoning.

    Args:
        text: the end of the prompt; of a message that is continued, its own text.
        continues: whether it is a message that is continued.
    """
    if text.rstrip().endswith(thought.opening):
        return True
    return continues and text.rfind(thought.opening) > text.rfind(thought.end)


def read_reasoning(
    source: Scanner, out: ParsedOutput, marks: Marks, thought: ThoughtMarks, *, inside: bool
) -> Scan[None]:
    """Read the reasoning, if there is any."""
    if not inside:
        source.hold()
        yield from source.blank()
        begun = yield from source.accept(marks(thought.begin))
        if begun and thought.word:
            begun = yield from source.accept(thought.word)
        if not begun:
            source.rewind()
            return
        source.release()
    out.begin_reasoning()
    if (yield from source.until(lambda text: out.reasoning(hide_tokens(text)), marks(thought.end))):
        out.end_reasoning()
