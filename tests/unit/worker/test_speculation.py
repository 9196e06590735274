"""Prompt lookup: guesses come from where the last tokens stood before, grow while right and pause when wrong."""

from app.worker.scheduling.speculation import MAX_DRAFT, MAX_PAUSE, MIN_DRAFT, NgramDrafter


def test_the_guess_is_what_followed_the_last_time():
    drafter = NgramDrafter()
    tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 9, 1, 2, 3]
    assert (6, 7) == drafter.propose(tokens, 10)
    assert (6,) == drafter.propose(tokens, 1)


def test_what_goes_round_in_circles_is_guessed_beyond_its_end():
    drafter, tokens = NgramDrafter(), [7, 1, 2, 1, 2, 1]
    for length in (MIN_DRAFT, 2 * MIN_DRAFT):
        guess = drafter.propose(tokens, 10)
        assert ([2, 1] * MIN_DRAFT)[:length] == list(guess)
        tokens += guess
        drafter.learn(proposed=length, accepted=length, length=len(tokens))


def test_new_text_has_no_guess():
    assert () == NgramDrafter().propose(list(range(100)), 10)
    assert () == NgramDrafter().propose([1, 2], 10)


def test_guesses_grow_while_they_are_right():
    drafter, tokens = NgramDrafter(), [*range(50), 0, 1, 2]
    lengths = []
    for _ in range(4):
        guess = drafter.propose(tokens, 100)
        lengths.append(len(guess))
        tokens += guess
        drafter.learn(proposed=len(guess), accepted=len(guess), length=len(tokens))
    assert [MIN_DRAFT, 2 * MIN_DRAFT, 4 * MIN_DRAFT, MAX_DRAFT] == lengths


def test_wrong_guesses_become_rare():
    """However the text goes on: of a thousand tokens few are guessed."""
    drafter, tokens, guesses = NgramDrafter(), [1, 2, 3, 4], 0
    for number in range(1000):
        tokens += [1, 2, 3, 100 + number] if number % 4 == 0 else []
        tokens.append(1000 + number)
        guess = drafter.propose([*tokens, 1, 2, 3], 10)
        if guess:
            guesses += 1
            drafter.learn(proposed=len(guess), accepted=0, length=len(tokens))
    assert 5 < guesses < 3 * 1000 / MAX_PAUSE + 10
