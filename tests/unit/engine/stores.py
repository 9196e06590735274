"""A store of answers in a dictionary."""


class DictStore:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.answers: dict[bytes, bytes] = {}

    async def get(self, key: bytes) -> bytes | None:
        return self.answers.get(key)

    def put(self, key: bytes, answer: bytes) -> None:
        self.answers[key] = answer
