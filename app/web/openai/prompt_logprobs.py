"""Log-probabilities of prompts in vLLM's shape, and encoders that take those of prompt and completion as they come."""

from collections.abc import Sequence
from typing import Any

from app.events import DetokenizedLogprob, PromptLogprob
from app.web.http.json_encoding import JsonArray, exact_float
from app.web.openai.response_objects import ChatLogprobsEncoder, TextLogprobs


class PromptLogprobs:
    """Builds vLLM's `prompt_logprobs`: for each token of the prompt an object by token ids, or null."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self.positions = JsonArray()

    def extend(self, tokens: Sequence[PromptLogprob]) -> None:
        """Encode the next tokens of the prompt."""
        self.positions.extend([self._position(token) for token in tokens])

    def _position(self, token: PromptLogprob) -> dict[str, Any] | None:
        if token.logprob is None:
            return None
        return {str(each.token_id): _ranked(each) for each in (token, *token.top[: self._alternatives])}


def _ranked(token: PromptLogprob) -> dict[str, Any]:
    assert token.logprob is not None  # noqa: S101  # only the first token has none, and no alternatives
    return {"logprob": exact_float(token.logprob), "rank": token.rank, "decoded_token": token.text}


class ChatSampleLogprobs:
    """Encodes what a chat's response says of log-probabilities, for one sample; a `LogprobsEncoder`."""

    def __init__(self, prompt_logprobs: int | None) -> None:
        self.completion = ChatLogprobsEncoder()
        self.prompt = None if prompt_logprobs is None else PromptLogprobs(prompt_logprobs)

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        self.completion.extend(tokens)

    def extend_prompt(self, tokens: Sequence[PromptLogprob]) -> None:
        if self.prompt is not None:
            self.prompt.extend(tokens)


class TextSampleLogprobs:
    """Encodes what a completion's choice says of log-probabilities; a `LogprobsEncoder`."""

    def __init__(self, *, prompt_logprobs: int | None, echo: int | None) -> None:
        """Args:
        prompt_logprobs: alternatives in vLLM's field; None leaves it out.
        echo: alternatives to the tokens of a prompt that stands before the completion; None where none does.
        """
        self.text = TextLogprobs(echo)
        self.prompt = None if prompt_logprobs is None else PromptLogprobs(prompt_logprobs)

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        self.text.extend(tokens)

    def extend_prompt(self, tokens: Sequence[PromptLogprob]) -> None:
        self.text.extend_prompt(tokens)
        if self.prompt is not None:
            self.prompt.extend(tokens)
