"""What keys look like, and what is taken for one."""

from hypothesis import given
from hypothesis import strategies as st

from app.access.key_format import digest_of, id_of, new_key


def test_a_made_key_is_known_by_the_id_in_it():
    """The public part stands in the key itself; a new secret keeps it."""
    key = new_key()

    assert key.split("_")[1] == id_of(key) == id_of(new_key(id_of(key)))


def test_the_checksum_finds_any_changed_character():
    """No database is asked about a key with a typing error."""
    key = new_key()
    for place in range(4, len(key)):
        assert id_of(key[:place] + ("A" if key[place] != "A" else "B") + key[place + 1 :]) is None


@given(st.text(max_size=80))
def test_nothing_else_is_taken_for_a_key(text):
    assert id_of(text) is None


def test_made_keys_differ_and_so_do_their_digests():
    """Also those of one id, whose first characters are the same."""
    keys = {new_key("abcdefgh") for _ in range(100)}

    assert 100 == len(keys) == len({digest_of(key.encode()) for key in keys})
