"""Look for private words where the field has a standard term: `python scripts/check_words.py [PATH ...]`.

Identifiers are split into their words (`ask_id`, `ChatAsk` and `ASK` all hold "ask"), so the English of comments and
docs is not touched: an identifier of one word is read in code only, one of several words everywhere, in comments,
strings and docs too.  The name of a test is a sentence, and read as one.  Phrases are read everywhere.

Prints `file:line: what was found: the standard term` and exits with 1 if there is a finding.  Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("app", "bench", "docs", "models", "scripts", "tests", "README.md")
SUFFIXES = {".py", ".cpp", ".h", ".md", ".mako"}

WORDS: Mapping[str, str] = {
    "account accounts": "usage recorder, metering",
    "alone": "single-query, decode",
    "apart": "relative_error, difference",
    "ask asks asked asker asking": "request, requested, caller; send",
    "gently": "lingering close, graceful",
    "housekeeping": "periodic",
    "kept": "stored, cached, written, remaining",
    "made": "generated, created, built",
    "meter meters": "request statistics",
    "mosts": "row_max",
    "piece pieces": "segment, delta, chunk, token bytes",
    "quickly": "run_in_transaction, fast path",
    "ring": "authenticator",
    "room": "token budget, capacity, free slots",
    "settle settled settles settling settlement unsettled": "commit, release, resolve",
    "soften softens softened": "softmax, scale",
    "spell spells spelled spelling spelt": "detokenize, format",
    "standing": "balance",
    "tell tells told telling": "report, return, notify",
    "ticket tickets": "live request",
    "together": "merge, batched",
}
"""Words that no identifier may hold, and what to say in their place."""

NAMES: Mapping[str, str] = {
    "Answer Answers StoredAnswers": "Completion, Sample, Sequence, parallel sampling; CachedResponse",
    "Call": "Invocation, RequestContext",
    "EngineAround": "EngineWrapper",
    "Found": "KeyWithRole",
    "GOOD_SECONDS good_at good_until": "VALID_SECONDS, valid_at, valid_until",
    "Held": "Reservation",
    "KeyRing key_ring": "Authenticator",
    "Pace CROWD STRETCH": "StepTimeModel, prefill_token_budget",
    "Parts": "Container, State",
    "RowModel": "ModelRunner",
    "Singles": "DecodeGroup",
    "StoredEngine": "PersistentCache",
    "Taken": "BucketState",
    "TenantTurns": "FairLock",
    "TryOut try_out tried_out": "Probe, probe",
    "Used": "UsageRow",
    "Window": "TrimmedHistory",
    "first_key": "bootstrap_key",
    "go_on": "continue_final_message",
    "held_back": "buffered, withheld",
    "keep_text": "store_text",
}
"""Whole identifiers, with the case that they have."""

NATIVE_NAMES: Mapping[str, str] = {
    "Bfloat": "bfloat16",
    "LINES": "MR",
    "PANEL": "NR",
    "Sides": "QkPv",
    "gather": "accumulate_values",
    "hide": "apply_mask",
    "keep": "write_kv",
    "share_out": "parallel_for_tiles",
    "totals": "row_sum",
}
"""Whole identifiers in C++ only; some of them are standard names in Python."""

STEMS: Mapping[str, str] = {
    "accounts": "metering",
    "alone": "attention_decode",
    "answer_tokens": "detokenize_logprobs",
    "around": "wrapper",
    "asks": "requests",
    "channel": "worker_process",
    "common core helpers utils": "a name that says what the file holds",
    "compiling": "torch_compile",
    "drawing": "sampling_ops",
    "fusing": "qkv_fusion",
    "panels": "packed_linear",
    "pairs": "bf16",
    "products": "gemm_packed",
    "programs": "native_build",
    "replies": "schemas",
    "stored": "persistent_cache",
    "ticket": "live_request",
    "together": "attention_prefill",
    "vectors": "simd",
}
"""Names of source files and their tests, without `test_` and suffix."""

PHRASES: Mapping[str, str] = {
    r"\bknow(s|ing)? (no|nothing)\b": "say what the code does, or the rule",
    r"\b(an?|each|every|this|that|one|other|its) asks?\b(?! (for|the|a|to|what)\b)": "request",
    r"\b(goes|go) on with\b(?! one answer\b)": "continues",  # but for an error's reason, which is part of the API
    r"\b(answer|token|text|completion)s? (is|are|was|were) made\b(?! (of|up)\b)": "generated",
    r"\bcompiled programs?\b": "native kernel library",
    r"\b(alone|together)\.h\b": "attention_decode.h, attention_prefill.h",
    r"\b(pairs|products|vectors)\.h\b": "bf16.h, gemm_packed.h, simd.h",
}
"""Sentences and names that prose may not hold; without regard to case."""

ALLOWED: Mapping[str, str] = {
    "SentencePiece": "the name of a tokenizer library",
    "WordPiece WordPieceTrainer": "the name of a tokenizer's algorithm",
    "connection_made": "a method of asyncio's protocols",
    "turns_kept": "a field of the public API",
    "made_up made_up_word made_up_name": "made-up words are ordinary English, and what they are",
}
"""Identifiers that are right although they hold such a word, and why."""

SELF = ("scripts/check_words.py", "tests/unit/scripts/test_check_words.py")
"""They name every word."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_PYTHON_PROSE = re.compile(r'"""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*')
_NATIVE_PROSE = re.compile(r'//[^\n]*|/\*[\s\S]*?\*/|"(?:\\.|[^"\\\n])*"')
_LINE_BREAK = r"\s+(?:(?:#|//|\*)\s+)?"
"""Between two words of a phrase, which may go on in the next line of a comment."""


def _by_word(table: Mapping[str, str]) -> dict[str, str]:
    return {word: hint for words, hint in table.items() for word in words.split()}


_WORD_HINTS, _NAME_HINTS, _STEM_HINTS = _by_word(WORDS), _by_word(NAMES), _by_word(STEMS)
_NATIVE_HINTS = _NAME_HINTS | _by_word(NATIVE_NAMES)
_ALLOWED_NAMES = _by_word(ALLOWED)
_PHRASE_HINTS = [(re.compile(text.replace(" ", _LINE_BREAK), re.IGNORECASE), hint) for text, hint in PHRASES.items()]


@dataclass(frozen=True, order=True)
class Finding:
    """A private word and where it stands."""

    path: str
    line: int
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found}: {self.hint}"


def check(path: str, text: str) -> list[Finding]:
    """Return the findings in one file; `path` is relative to the repository."""
    native = path.endswith((".cpp", ".h"))
    findings = set()
    stem = Path(path).stem.removeprefix("test_")
    if stem in _STEM_HINTS:
        findings.add(Finding(path, 1, stem, _STEM_HINTS[stem]))
    for source, read in ((text, _is_compound), (_code(path, text, native=native), _is_any)):
        for number, line in enumerate(source.splitlines(), 1):
            for name in _IDENTIFIER.findall(line):
                if (hint := _hint(name, native)) and read(name):
                    findings.add(Finding(path, number, name, hint))
    for pattern, hint in _PHRASE_HINTS:
        for match in pattern.finditer(text):
            words = [word for word in match[0].split() if word not in ("#", "//", "*")]
            findings.add(Finding(path, text.count("\n", 0, match.start()) + 1, " ".join(words), hint))
    return sorted(findings)


def sources(roots: Iterable[Path]) -> Iterator[Path]:
    """Yield every file that is checked, below folders and as given."""
    for root in roots:
        paths = [root] if root.is_file() else sorted(root.rglob("*"))
        yield from (path for path in paths if path.suffix in SUFFIXES)


def main(arguments: Sequence[str] = (), root: Path = ROOT) -> int:
    """Check the given paths, or all of a repository; return the exit status."""
    roots = [Path(argument).resolve() for argument in arguments] or [root / name for name in FOLDERS]
    names = {path.relative_to(root).as_posix(): path for path in sources(roots)}
    findings = [
        finding
        for name, path in names.items()
        if name not in SELF
        for finding in check(name, path.read_text(encoding="utf-8"))
    ]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def _code(path: str, text: str, *, native: bool) -> str:
    """Return the text without comments and strings, line for line; a page of docs has no code."""
    if path.endswith(".md"):
        return ""
    prose = _NATIVE_PROSE if native else _PYTHON_PROSE
    return prose.sub(lambda match: "\n" * match[0].count("\n"), text)


@cache
def _hint(name: str, native: bool) -> str | None:
    """Return the standard term for an identifier that is private, or None."""
    if name in _ALLOWED_NAMES:
        return None
    if name.startswith("test_"):
        sentence = name.replace("_", " ")
        return next((hint for pattern, hint in _PHRASE_HINTS if pattern.search(sentence)), None)
    whole = (_NATIVE_HINTS if native else _NAME_HINTS).get(name)
    return whole or next((_WORD_HINTS[word] for word in _words(name) if word in _WORD_HINTS), None)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _is_compound(name: str) -> bool:
    """Return whether it can only be an identifier, as `go_on` or `EngineAround`, and no word of a sentence."""
    return len(_words(name)) > 1


def _is_any(name: str) -> bool:
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
