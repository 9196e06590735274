"""The child process that tries grammars.  A line of input is a grammar, with the seconds that it may take; a line of
output is what is wrong with it.

A grammar can be made to exhaust the stack or the memory of whoever compiles it.  Here that ends a process which serves
nobody; its parent starts another one.  What is fine here has used a small part of what the worker gives it.
"""

import contextlib
import json
import os
import signal
import sys
import threading

from app.grammars.compiler import create_matcher
from app.grammars.schemas import GrammarError
from app.grammars.vocabulary import Vocabulary, load_vocabulary
from app.types import Grammar

STACK_BYTES = 2**20
MEMORY_BYTES = 2**30
"""More than the process has once the vocabulary is loaded."""


def problem(vocabulary: Vocabulary, grammar: Grammar) -> str | None:
    """Return why a grammar cannot be enforced, as a continuation of its field's name; None if it can."""
    try:
        create_matcher(vocabulary.tokens, grammar)
    except GrammarError as error:
        return str(error)
    except Exception:  # noqa: BLE001  # its message could quote the grammar
        return "cannot be enforced"
    return None


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115
        most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Serve until standard input ends; the arguments are the tokenizer's folder and the width of the logits."""
    folder, vocab_size = sys.argv[1:]
    with contextlib.suppress(OSError):
        os.nice(5)
    # Ctrl-C in a terminal is for the service, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    vocabulary = load_vocabulary(folder, int(vocab_size))
    _limit_memory()
    threading.stack_size(STACK_BYTES)
    _say("ready")
    for line in sys.stdin.buffer:
        kind, text, seconds = json.loads(line)
        found: list[str | None] = []
        thread = threading.Thread(target=lambda: found.append(problem(vocabulary, Grammar(kind, text))))  # noqa: B023
        # Its signal ends the process: nothing else interrupts the compiler.  The time of the processor and not of the
        # clock, because how busy the machine is says nothing of a grammar.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(found[0] if found else "cannot be enforced")


def _say(words: str | None) -> None:
    sys.stdout.buffer.write(json.dumps(words).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
