"""The child process that redacts long texts: a step of a stream in, clean text and the stream's next state out.

Stateless between steps, so any process can take any step and one that was killed loses nothing but its current step.
Speaks lines of JSON over its pipes, which carry lone surrogates too; ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

from app.privacy.redactor import PiiKind, Redactor, StreamRedactor, StreamState


def run_step(redactor: Redactor, state: StreamState, segment: str, *, final: bool) -> tuple[str, StreamState]:
    """Continue a stream with one more segment; `final` ends it.  Returns: the clean text and the next state."""
    stream = StreamRedactor(redactor, state=state)
    text = stream.feed(segment)
    if final:
        text += stream.finish()
    return text, stream.state


def encode_step(state: StreamState, segment: str, *, final: bool) -> bytes:
    return json.dumps([state.as_list(), segment, final]).encode() + b"\n"


def decode_result(line: bytes) -> tuple[str, StreamState]:
    text, state = json.loads(line)
    return text, StreamState.of_list(state)


def main() -> None:
    """Serve steps until standard input ends; the arguments are the kinds and the phone regions, comma-separated."""
    kinds, regions = sys.argv[1:]
    # Requests that the service answers at once come first where cores are few.
    with contextlib.suppress(OSError):
        os.nice(5)
    # Ctrl-C in a terminal is for the service, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    redactor = Redactor([PiiKind(kind) for kind in kinds.split(",") if kind], phone_regions=regions.split(","))
    output = sys.stdout.buffer
    for line in sys.stdin.buffer:
        state, segment, final = json.loads(line)
        text, after = run_step(redactor, StreamState.of_list(state), segment, final=final)
        output.write(json.dumps([text, after.as_list()]).encode() + b"\n")
        output.flush()


if __name__ == "__main__":
    main()
