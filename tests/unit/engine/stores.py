"""A store of responses in a dictionary."""


class DictStore:
    """Stores responses for as long as the test runs."""

    def __init__(self) -> None:
        self.responses: dict[bytes, bytes] = {}

    async def get(self, key: bytes) -> bytes | None:
        return self.responses.get(key)

    def put(self, key: bytes, response: bytes) -> None:
        self.responses[key] = response
