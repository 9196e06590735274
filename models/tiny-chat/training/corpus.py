"""Compose the training text of the tiny chat model: whole conversations and plain documents.

Example `i` of a seed is always the same text, whatever was drawn before it.  `train.py` turns examples into tokens; the tables
and single exchanges are in the modules beside this one.
"""

from __future__ import annotations

import random

import exchanges
from conversations import RESTORING_PHASE, STRANGE_TOOLS_PHASE, TOOLS_PHASE, conversation
from documents import document
from tool_conversations import tool_conversation
from turns import Example

LATE_FROM = 12 * 2048
"""The example from which the text is late: by then the model knows the easy things."""
LAST_FROM = 1000 * 2048
"""The example from which on there is most of what goes wrong longest: long conversations, copying, beginnings that fit nothing."""
TOOLS_FROM = 2000 * 2048
"""The example from which on there are tools and JSON, among everything that was learnt before."""
STRANGE_TOOLS_FROM = 3000 * 2048
"""The example from which on tools have stranger names, and there is more of what goes wrong with them; conversations are shorter."""
RESTORING_FROM = 4000 * 2048
"""The example from which on there is most of what the tools displaced: sums, names told long ago, requests that no tool is for."""


def example(seed: int, index: int) -> Example:
    """Example `index` of the training text; the same arguments always give the same example.

    Args:
        seed: the seed of the whole text.
        index: 0 or more.
    """
    rng = random.Random(f"{seed}:{index}")
    phase = (index >= LATE_FROM) + (index >= LAST_FROM) + (index >= TOOLS_FROM) + (index >= STRANGE_TOOLS_FROM)
    phase += index >= RESTORING_FROM
    if rng.random() < (0.16, 0.16, 0.24, 0.14, 0.12, 0.18)[phase]:
        given = (
            exchanges.odd_beginning(rng)
            if phase >= 2 and rng.random() < (0.65 if phase == RESTORING_PHASE else 0.5)
            else ""
        )
        return Example(text=document(rng, short_lists=phase > 0, usual_names=phase >= 2, after=given), given=given)
    draw = rng.random()
    length = rng.randint(40, 200) if draw < 0.35 else rng.randint(200, 800)
    if draw > (0.93, 0.91, 0.88, 0.92, 0.94, 0.85)[phase]:
        length = (
            rng.randint(800, 2600)
            if draw < (0.985, 0.965, 0.93, 0.965, 0.975, 0.88)[phase]
            else rng.randint(2600, 5500)
        )
    if phase == TOOLS_PHASE:
        share = rng.random()
        if share < 0.45:
            return tool_conversation(rng, min(2 * length, 1500), phase=phase)
        # What was learnt before stays as it was in some conversations, without a word of JSON.
        return Example(turns=conversation(rng, length, phase=2 if share < 0.75 else phase))
    if phase == STRANGE_TOOLS_PHASE:
        share = rng.random()
        if share < 0.5:
            return tool_conversation(rng, min(length + 200, 700), phase=phase)
        return Example(turns=conversation(rng, length, phase=2 if share < 0.68 else phase))
    if phase == RESTORING_PHASE:
        share = rng.random()
        if share < 0.52:
            return tool_conversation(rng, min(length + 200, 900), phase=phase)
        return Example(turns=conversation(rng, length, phase=2 if share < 0.76 else phase))
    return Example(turns=conversation(rng, length, phase=phase))
