"""What may be seen of a prompt where completions are filtered: its text, and its log-probabilities.

A prompt may hold personal data where input is not filtered.  The model's alternatives to its tokens are the model's own
words, and could complete what stands there.
"""

import codecs
from collections.abc import Sequence

from msgspec import structs

from app.engine.logprob_alignment import LogprobAlignment, shared_beginning
from app.events import WITHHELD, Delta, PromptLogprob, Started
from app.privacy.pool import RedactionPool
from app.privacy.redactor import Redactor, StreamRedactor
from app.requests import GenerationRequest


class UnmaskedPrompt:
    """Releases the log-probabilities of a prompt up to its first mask; all tokens from there on are withheld.

    They keep their places, so that nobody takes a sum over what is left for the whole.
    """

    def __init__(self, redactor: Redactor, request: GenerationRequest, pool: RedactionPool) -> None:
        self._pool = pool
        self._tenant = request.tenant
        self._redactor = StreamRedactor(redactor)
        self._shows_text = request.echo and not request.is_chat
        self._text = request.text or ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._alignment = LogprobAlignment[PromptLogprob]()
        self._raw = ""
        """Text of the tokens that the filter has not released."""
        self._left = request.prompt_tokens
        self._held = 0
        self._masked = False

    async def begin(self, started: Started) -> Started:
        """Return the first event with the prompt's text, masked, where it is to be shown."""
        if not self._shows_text:
            return started
        self._text = (await self._pool.redact(self._tenant, self._text)).text
        return structs.replace(started, prompt=self._text)

    async def feed(self, tokens: Sequence[PromptLogprob]) -> Delta:
        """Take the next tokens of the prompt, and return those that may be seen now."""
        self._left -= len(tokens)
        self._held += len(tokens)
        shown = () if self._masked else await self._release(tokens)
        self._held -= len(shown)
        if self._masked:
            shown += (structs.replace(WITHHELD, end=len(self._text)),) * self._held
            self._held = 0
        return Delta(prompt_logprobs=shown)

    async def _release(self, tokens: Sequence[PromptLogprob]) -> tuple[PromptLogprob, ...]:
        text = ""
        for token in tokens:
            part = self._decoder.decode(token.raw)
            self._alignment.add(part, token)
            text += part
        clean = await self._pool.feed(self._tenant, self._redactor, text)
        if self._left <= 0:
            rest = self._decoder.decode(b"", final=True)
            self._alignment.finish(rest)
            text += rest
            clean += self._redactor.feed(rest) + self._redactor.finish()
        self._raw += text
        same = shared_beginning(self._raw, clean)
        self._raw = self._raw[same:]
        self._masked = same < len(clean) or (self._left <= 0 and bool(self._raw))
        return self._alignment.release(same)[0]
