"""What is stored on other machines."""

import pytest

from app.stores.encryption import Encryption, UnreadableValue

OLD, NEW, PLACE = b"o" * 32, b"n" * 32, b"place"


def test_nothing_of_a_text_is_in_what_is_stored():
    """And the same text is stored in another way each time."""
    encryption = Encryption([NEW])
    stored = [encryption.encrypt(b"canary", PLACE) for _ in range(2)]

    assert all(b"canary" not in each for each in stored)
    assert stored[0] != stored[1]
    assert [b"canary"] * 2 == [encryption.decrypt(each, PLACE) for each in stored]


def test_a_new_key_encrypts_and_the_old_ones_still_decrypt():
    """Rotation: whoever has only the old key cannot read what is written from now on."""
    rotated = Encryption([NEW, OLD])

    assert b"text" == rotated.decrypt(Encryption([OLD]).encrypt(b"text", PLACE), PLACE)
    assert b"text" == Encryption([NEW]).decrypt(rotated.encrypt(b"text", PLACE), PLACE)
    with pytest.raises(UnreadableValue):
        Encryption([OLD]).decrypt(rotated.encrypt(b"text", PLACE), PLACE)


@pytest.mark.parametrize("keys", [[], [NEW]], ids=["plain", "encrypted"])
@pytest.mark.parametrize("stored", [b"", b"\x01", b"\x01" + b"x" * 8, b"\x80\x04\x95pickle", b"{}", b"\x01" * 100])
def test_what_is_no_value_of_ours_is_refused(keys: list[bytes], stored: bytes):
    with pytest.raises(UnreadableValue):
        Encryption(keys).decrypt(stored, PLACE)


def test_a_value_is_read_in_its_own_place_only():
    """Nobody moves a text into another tenant's session, nor changes or cuts it."""
    encryption = Encryption([NEW])
    stored = encryption.encrypt(b"text", PLACE)

    for changed in (stored[:-1], stored + b"x", stored[:-1] + bytes([stored[-1] ^ 1])):
        with pytest.raises(UnreadableValue):
            encryption.decrypt(changed, PLACE)
    with pytest.raises(UnreadableValue):
        encryption.decrypt(stored, b"another place")


def test_plain_values_are_refused_once_there_is_a_key():
    """Whoever may write to the store could else put a text of his own into a conversation."""
    with pytest.raises(UnreadableValue):
        Encryption([NEW]).decrypt(Encryption([]).encrypt(b"text", PLACE), PLACE)
    with pytest.raises(UnreadableValue):
        Encryption([]).decrypt(Encryption([NEW]).encrypt(b"text", PLACE), PLACE)
