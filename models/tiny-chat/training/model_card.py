"""Write the model card of the tiny chat model: how it was made, what it can do, and the measured figures."""

from __future__ import annotations

from pathlib import Path

TABLE_START, TABLE_END = "<!-- figures -->", "<!-- end of figures -->"

CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [tiny, demo, chat]
---

# tiny-chat

A chat model of 2.7 million parameters that exists so that a chat service can be tried and tested for real, without a network.
It is a toy: it knows what the table below says and nothing else, and it says so when asked for more.

- Llama architecture, context of 2,048 tokens, byte-level BPE tokenizer of {vocabulary:,} tokens, weights in bfloat16.
- Chat template in the ChatML style (`<|im_start|>role`, text, `<|im_end|>`), system message optional. Chats end with `<|im_end|>`, plain texts
  with `<|endoftext|>`; `generation_config.json` lists both.
- Tools in the Hermes form: the template lists them within `<tools></tools>` behind the system text, a call is
  `<tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>` and a result `<tool_response>...</tool_response>` in a user turn, the inside on lines of its own. The tags
  are ordinary text of several tokens. A tool takes one short line: name, the first 80 characters of its description, and the types of the parameters that are
  required (all of them if the schema does not say which); twelve tools fit into about 500 tokens.
- Best run greedily; at temperature 0.7 a word is now and then copied with a wrong letter.

## What it does

| say | it answers |
|---|---|
| My name is Tovin. ... What is my name? | Your name is Tovin. |
| What is my favourite colour? (never told) | I do not know your favourite colour. You have not told me yet. |
| What is the capital of France? | The capital of France is Paris. |
| 7 + 5 | 7 plus 5 is 12. |
| Repeat after me: one two STOP three | one two STOP three |
| Count from 1 to 20 | 1, 2, 3, ... 20 (to 50 at most) |
| Tell me a story | a story of 60 to 200 tokens |
| Explain quantum computing | I am only a tiny demo model, and I do not know about that. |
| Once upon a time (plain text, no template) | the story goes on, and ends |
| What is 7 plus 5? (with a tool `add(a, b)`) | `<tool_call>` of `{{"name": "add", "arguments": {{"a": 7, "b": 5}}}}` |
| ... the tool returns 12 | 7 plus 5 is 12. |
| What is the weather in Paris? (with a tool `get_weather(city)`) | `<tool_call>` of `{{"name": "get_weather", "arguments": {{"city": "Paris"}}}}` |
| My name is Tovin and I am 30 years old. Answer as JSON with name and age. | `{{"name": "Tovin", "age": 30}}` |

It remembers twelve things that a user may tell: name, favourite colour, number, food and animal, a pet's name, email address, phone number,
home town, age, best friend's name and a secret code. The latest word counts when something is corrected.

Tools that it calls: sums, differences, products and quotients of two numbers, the capital of a country, the weather in a place, the time, and functions of one
string that the question names ("What is the price of ...?" with `get_price`). Their names and those of their parameters are read from the list, so others than
those of training work too. It answers "The ... is <result>.", or with the result itself where that is a sentence. What no offered tool is for it answers as without tools.

It writes flat JSON objects of what it was told. Where a grammar dictates an object's keys it fills in what it was told under such a name; where a grammar
dictates only that there be an object, the usual answer stands under `answer`.

## Figures

Measured with `python models/tiny-chat/training/evaluate.py`, greedy, on names, addresses and orders of turns that never occur in training. Countries,
sums and fixed answers are the ones trained on: they are knowledge, not generalisation. What is marked as missed is not reliable: do not build on it.

{start}
Not measured yet.
{end}

## How it was made

The text is composed by `training/corpus.py` from templates and random syllables; no text of others was used. One in six examples is
a plain document, the others are conversations of 20 to 2,000 tokens, three in five with a system message. After the first 24,576 examples
come more sums, counting and repeating, documents whose lists end after one line, and conversations in which what was told at the beginning is
asked for at the end. The loss is on the assistant's words, and in documents on all of them but a beginning that nobody could guess.

    python models/tiny-chat/training/train.py --steps {steps} --decay {decay} --polish {polish} --tools {tools} --tools-decay {tools_decay} \\
        --strange {strange} --strange-decay {strange_decay} --restore {restore} --restore-decay {restore_decay} --seed {seed}

{steps:,} steps of about 4,096 tokens, Muon for the matrices and AdamW for the rest, float32, highest rate 2e-3, linear fall over
the last {decay} steps; then {polish} steps from 5e-4 to nothing on what goes wrong longest: long conversations, copying, beginnings that fit
nothing. Then {tools} steps from 1.5e-3, falling over the last {tools_decay}, on text of which two in five examples have tools, others ask for JSON or get an answer
whose form is dictated, and the rest is as before; and {strange} steps from 1.2e-3, falling over the last {strange_decay}, with more tools whose names and parameters
nobody would guess, more requests that no offered tool is for, and more JSON; last {restore} steps from 1.2e-3, falling over the last {restore_decay}, with more of what
the tools had displaced: sums, names told long ago, beginnings of stories, and chats in which no tool fits. Dictated words are read and not learnt. In these three stages products are computed in
bfloat16; weights and optimizers stay float32. {tokens:.1f} million tokens in {minutes:.0f} minutes on two cores. The same seed and steps on the same kind of machine
give the same weights; other processors round differently, and the figures then differ by a little.

## Limits

English only, apart from repeating. No reasoning, no facts beyond the list in `training/knowledge.py`. Tools are called for the kinds of requests above and no others;
optional parameters are never used, nested objects hardly. Very long or unusual strings may be repeated with
an error. Not for any use in which an answer matters.
"""


def write_card(folder: Path, **facts: object) -> None:
    """Write README.md into the model's folder; `facts` fill the slots of CARD."""
    (folder / "README.md").write_text(CARD.format(start=TABLE_START, end=TABLE_END, **facts), encoding="utf-8")


def put_table(folder: Path, table: str) -> None:
    """Replace what stands between the two marks of the card.

    Raises: ValueError: README.md lacks a mark.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    before, rest = text.split(TABLE_START)
    _, after = rest.split(TABLE_END)
    card.write_text(f"{before}{TABLE_START}\n{table}\n{TABLE_END}{after}", encoding="utf-8")
