"""Encrypts what other machines store: AES-GCM with keys from the configuration, or nothing where none is set.

A value belongs to its place: the place is authenticated with it, so a value that somebody moves to another key, session
or tenant cannot be read there.  What was stored before the encryption was switched on cannot be read either: whoever
may write to the store could else put texts of his own into a conversation.
"""

import os
from collections.abc import Sequence
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12
KEY_ID_BYTES = 4
_PLAIN, _ENCRYPTED = b"\x00", b"\x01"
_HEADER_BYTES = 1 + KEY_ID_BYTES + NONCE_BYTES


class UnreadableValue(ValueError):
    """A stored value cannot be decrypted with the configured keys, or was stored in another place."""


class Encryption:
    """Encrypts with the first of its keys and decrypts with any of them; safe to call from any thread."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Args: keys: of 32 bytes each; without any, values are stored as they are."""
        self._ciphers = {sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in keys}

    def encrypt(self, value: bytes, place: bytes) -> bytes:
        """Return what may be stored in a place.

        Args: place: names the value's tenant, key and kind; the same is needed to decrypt it.
        """
        if not self._ciphers:
            return _PLAIN + value
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = os.urandom(NONCE_BYTES)
        return _ENCRYPTED + key_id + nonce + cipher.encrypt(nonce, value, place)

    def decrypt(self, stored: bytes, place: bytes) -> bytes:
        """Return the value.

        Raises: UnreadableValue: it was not stored in this place, or with none of these keys, or has been changed.
        """
        if not stored.startswith(_ENCRYPTED if self._ciphers else _PLAIN):
            raise UnreadableValue("is of another form")
        if not self._ciphers:
            return stored[1:]
        cipher = self._ciphers.get(stored[1 : 1 + KEY_ID_BYTES])
        if cipher is None:
            raise UnreadableValue("is encrypted with a key that is not configured")
        try:
            return cipher.decrypt(stored[1 + KEY_ID_BYTES : _HEADER_BYTES], stored[_HEADER_BYTES:], place)
        except (InvalidTag, ValueError):  # ValueError: the nonce is cut off
            raise UnreadableValue("is damaged, or was moved here") from None
