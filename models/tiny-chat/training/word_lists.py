"""Make the words that the tiny chat model's training text is filled with.

Every function takes the random generator it draws from, so that one seed gives one text.  Names made of random syllables are split in two:
`is_held_out` names are for measuring only and are never drawn for training.
"""

from __future__ import annotations

import random
import zlib

ONSETS = "b c d f g h j k l m n p r s t v w y z br ch cl dr fl gr kr pl pr sh sk sl st th tr qu".split()
VOWELS = "a e i o u a e i o u ai ea ee ia io oo ou y".split()
CODAS = "b d g k l m n p r s t x z nd rt ll nn ss ck sh lf".split()

FIRST_NAMES = """Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Liam Maria Noah Olivia Peter Ruth Sam Tina Victor Wendy Yusuf
Zara Ada Linus Jane John Anna Ben Chloe Daniel Elena Felix Hannah Ivan Julia Kevin Laura Max Nina Oscar Paula Robert Sofia Thomas Ursula Mary
Jos\u00e9 Zo\u00eb Ren\u00e9e J\u00fcrgen \u00c5sa Fran\u00e7ois So\u00f8ren Bj\u00f6rn M\u00fcller Ana-Mar\u00eda O'Brien""".split()

COLOURS = """red blue green yellow purple orange pink brown black white grey teal violet turquoise gold silver crimson indigo maroon olive
cyan magenta beige lavender navy""".split()

FOODS = """pizza sushi soup bread rice curry pasta salad cheese chocolate pancakes noodles tacos apples dumplings falafel porridge
stew honey mango""".split()

ANIMALS = """fox bear owl rabbit mouse dragon cat dog turtle whale sparrow hedgehog robot horse frog wolf penguin bee squirrel lion
elephant snail otter deer crow""".split()

COMMON = """about after again air all along also always and animal another answer any around ask away back ball bank basket beach bed before
begin best better bird boat book both bottle box bread bridge bright bring brother build busy buy cake call calm candle carry castle chair
change child city clean clear clever clock cloud coat cold come cook corner count cousin cover cup dance dark day deep desk dinner door down
draw dream drink drive early earth easy eat egg empty end evening every eye face fair fall family far farm fast father field find fine fire
first fish five floor flower fly follow forest four free friend full garden gate gentle give glad glass gold good grass great green ground
group grow hand happy hard hat head hear heavy help high hill hold home honest hope horse hot hour house idea inside island join journey jump
keep key kind king kitchen lamp land large last late laugh leaf learn leave left letter library light like line listen little live long look
loud love lunch make many map market meadow meet milk mind minute moon more morning mother mountain move much music name near never new next
nice night noise north note now number ocean often old one only open orange order other outside over page paint paper park part path pencil
people piano picture place plan plant play please pocket point pond poor quick quiet quite rain read ready red rest rich ride right ring river
road rock room round run salt same sand school sea season second secret see send seven shape share ship shoe shop short show silver simple
sing sister sit six sky sleep slow small smile snow soft some song soon sound south spoon spring stand star start stay stone stop story street
strong sugar summer sun sweet swim table take talk tall tea tell ten thank thing think three tiger time today together tomorrow tower town
train travel tree true turn two under until up use valley very visit voice wait walk wall warm wash watch water way week well west white whole
why wind window winter wish with wonder wood word work world write yellow year yes young""".split()

HOSTS = "example test mail post cloud work home shop lab school blue north team data acme corp demo".split()
ENDINGS = "com org net io eu de fr co.uk dev info example".split()
PLACEHOLDERS = """[EMAIL] [PHONE] [NAME] [CREDIT_CARD] [IBAN] [IP_ADDRESS] [URL] [PERSON] [ADDRESS] [SSN] [DATE] <EMAIL_ADDRESS>
<PHONE_NUMBER> <PERSON> [REDACTED] ***** [EMAIL_1] [PHONE_2] [SECRET]""".split()

# First and last code point of the writing systems that a phrase to repeat may come from.
SCRIPTS = [
    (0x1F600, 0x1F64F), (0x1F300, 0x1F5FF), (0x1F680, 0x1F6C5), (0x00C0, 0x00FF), (0x0100, 0x017F), (0x0391, 0x03A1), (0x03B1, 0x03C9),
    (0x0410, 0x044F), (0x05D0, 0x05EA), (0x0627, 0x063A), (0x0905, 0x0939), (0x3041, 0x3093), (0x30A1, 0x30F6), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0x2600, 0x2650),
]  # fmt: skip


def listed(text: str) -> list[str]:
    """Split a table of wordings at its `|`; a line may end after one."""
    return text.replace("|\n", "|").split("|")


def is_held_out(name: str) -> bool:
    """Whether a name belongs to the tenth that is kept for measuring."""
    return zlib.crc32(name.lower().encode()) % 10 == 0


def _syllables(rng: random.Random, least: int, most: int) -> str:
    word = ""
    for _ in range(rng.randint(least, most)):
        word += (rng.choice(ONSETS) if rng.random() < 0.9 or word else "") + rng.choice(VOWELS)
        if rng.random() < 0.35:
            word += rng.choice(CODAS)
    return word


def made_up_word(rng: random.Random, *, held_out: bool = False, least: int = 1, most: int = 4) -> str:
    """A lower-case word of one to four random syllables from the training part, or from the held-out part."""
    while True:
        word = _syllables(rng, least, most)
        if len(word) > 2 and is_held_out(word) == held_out:
            return word


def made_up_name(rng: random.Random, *, held_out: bool = False) -> str:
    """A capitalised made-up name such as "Tovin"."""
    return made_up_word(rng, held_out=held_out, least=2, most=3).capitalize()


def person(rng: random.Random) -> str:
    """A name for training: mostly made up, sometimes an existing one, with a surname, or in another script."""
    draw = rng.random()
    if draw < 0.72:
        return made_up_name(rng)
    if draw < 0.87:
        return rng.choice(FIRST_NAMES)
    if draw < 0.95:
        return f"{rng.choice([made_up_name(rng), rng.choice(FIRST_NAMES)])} {made_up_name(rng)}"
    return other_script(rng, rng.randint(2, 4))


def other_script(rng: random.Random, length: int) -> str:
    """A run of characters from one other writing system, or of emoji."""
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(length))


def digits(rng: random.Random, length: int) -> str:
    """Exactly this many random digits."""
    return "".join(rng.choice("0123456789") for _ in range(length))


def number(rng: random.Random) -> str:
    """A whole number of one to six digits, small ones more often."""
    return str(rng.randint(0, 10 ** rng.choice([1, 2, 2, 2, 3, 4, 6]) - 1))


def email(rng: random.Random, *, held_out: bool = False) -> str:
    """An e-mail address in one of the usual forms."""
    first = made_up_word(rng, held_out=held_out, most=3)
    last = made_up_word(rng, held_out=held_out, most=3)
    if not held_out and rng.random() < 0.35:
        first, last = (w.lower() for w in (rng.choice(FIRST_NAMES[:46]), rng.choice([*COMMON, last])))
    user = rng.choice(
        [
            first,
            f"{first}.{last}",
            f"{first}_{last}",
            f"{first}{number(rng)}",
            f"{first[0]}.{last}",
            f"{first}-{last}",
            f"{first}+{last}",
        ]
    )
    host = rng.choice(
        [rng.choice(HOSTS), made_up_word(rng, held_out=held_out, most=3), f"{rng.choice(HOSTS)}-{rng.choice(COMMON)}"]
    )
    if not held_out and rng.random() < 0.12:
        host = rng.choice([first, last, f"{last}-{first}"])
    address = f"{user}@{host}.{rng.choice(ENDINGS)}"
    return address.upper() if rng.random() < (0.03 if held_out else 0.12) else address


def twister(rng: random.Random) -> str:
    """Few pieces that come again and again: to copy them, the piece before is not enough to know the place."""
    draw = rng.random()
    if draw < 0.5:
        few = [
            rng.choice(COMMON) if rng.random() < 0.6 else made_up_word(rng, most=2) for _ in range(rng.randint(2, 4))
        ]
        if rng.random() < 0.3:
            few = [word.upper() if rng.random() < 0.5 else word for word in few]
        return " ".join(rng.choices(few, k=rng.randint(3, 9)))
    letters = rng.choice(
        ["ABCDEFGHIJKLMNOPQRSTUVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"]
    )
    few = rng.sample(letters, rng.randint(2, 5))
    groups = ["".join(rng.choices(few, k=rng.randint(2, 7))) for _ in range(rng.randint(1, 4))]
    return rng.choice(["", " ", "-", ".", "@"]).join(groups)


def phone(rng: random.Random) -> str:
    """A telephone number in one of the usual forms."""
    shapes = [
        "+## ### ######",
        "+1-###-###-####",
        "(###) ###-####",
        "###-####",
        "0### ######",
        "+## ## ## ## ##",
        "##########",
        "### ### ####",
    ]
    return "".join(rng.choice("0123456789") if c == "#" else c for c in rng.choice(shapes))


def card(rng: random.Random) -> str:
    """Sixteen digits in groups, as on a payment card."""
    return rng.choice([" ", " ", "-", ""]).join(
        [rng.choice(["4111", digits(rng, 4)]), *(rng.choice(["1111", digits(rng, 4)]) for _ in range(3))]
    )


def code(rng: random.Random) -> str:
    """A string without meaning: a key, a path, an address or an account number."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    word = made_up_word(rng)
    return rng.choice(
        [
            ".".join(str(rng.randint(0, 255)) for _ in range(4)),
            f"{word}-{number(rng)}",
            f"sk-{''.join(rng.choice('abcdef0123456789') for _ in range(rng.randint(6, 16)))}",
            f"https://{word}.{rng.choice(ENDINGS)}/{rng.choice(COMMON)}",
            f"{rng.choice(letters)}{rng.choice(letters)}{digits(rng, 2)} {digits(rng, 4)} {digits(rng, 4)} {digits(rng, 4)}",
            "".join(rng.choice(letters + "0123456789") for _ in range(rng.randint(4, 10))),
            f"{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 4)}",
            f'{{"{word}": {number(rng)}}}',
            f"/{word}/{rng.choice(COMMON)}.{rng.choice(['txt', 'py', 'json'])}",
            f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
            word.upper(),
            f"{made_up_word(rng)}-{word}".upper(),
        ]
    )
