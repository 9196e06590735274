"""Measure the embedded chat model: greedy answers to held-out conversations, as a table.

    python models/tiny-chat/training/evaluate.py --model models/tiny-chat [--write-card]

An answer counts as right only if the model also ended it by itself within 256 tokens.
Leaves with 1 when a figure misses its target.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluation_cases import Case, Suite, suites
from model_card import put_table
from tool_cases import tool_suites
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT_TOKENS = 256
AT_ONCE, BETWEEN = "asked at once", "other turns between"
BATCH_CASES = 128


@dataclass(frozen=True)
class Completion:
    """What the model wrote, how many tokens that took, and whether it stopped by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Figure:
    """The outcome of one suite."""

    name: str
    target: float
    right: int
    count: int

    @property
    def reached(self) -> bool:
        """Whether the share of right answers is high enough."""
        return self.right >= self.target * self.count


def prompt_ids(tokenizer: Any, case: Case) -> list[int]:
    """The tokens of a prompt: through the chat template, or as they are for plain text."""
    if isinstance(case.prompt, str):
        return list(tokenizer(case.prompt, split_special_tokens=True)["input_ids"])
    tools = [tool.schema() for tool in case.tools] or None
    encoded = tokenizer.apply_chat_template(
        list(case.prompt), tools=tools, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    begun = tokenizer(case.begun, add_special_tokens=False)["input_ids"] if case.begun else []
    return [*encoded["input_ids"], *begun]


@torch.inference_mode()
def complete_batch(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[Completion]:
    """Continue every prompt greedily, all at once, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LIMIT_TOKENS, do_sample=False)[
        :, longest:
    ]
    ends = set(model.generation_config.eos_token_id)
    completions = []
    for row in written.tolist():
        length = next((i for i, token in enumerate(row) if token in ends), None)
        content = row[:length]
        completions.append(Completion(tokenizer.decode(content), len(content), length is not None))
    return completions


def complete_all(model: Any, tokenizer: Any, cases: list[Case]) -> list[Completion]:
    """The answers in the order of the cases; prompts of similar length share a batch."""
    prompts = [prompt_ids(tokenizer, case) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for first in range(0, len(order), BATCH_CASES):
        chosen = order[first : first + BATCH_CASES]
        completions.update(zip(chosen, complete_batch(model, tokenizer, [prompts[i] for i in chosen]), strict=True))
    return [completions[i] for i in range(len(cases))]


def measure(model: Any, tokenizer: Any, chosen: list[Suite], *, show_wrong: int) -> list[Figure]:
    """Run the suites and print some wrong answers of each."""
    everything = [(suite, case) for suite in chosen for case in suite.cases]
    completions = complete_all(model, tokenizer, [case for _, case in everything])
    right: dict[str, int] = dict.fromkeys((suite.name for suite in chosen), 0)
    wrong: dict[str, int] = dict.fromkeys(right, 0)
    for (suite, case), completion in zip(everything, completions, strict=True):
        # Behind a dictated beginning a grammar says where the answer ends.
        if (completion.ended or case.begun) and case.right(completion.text, completion.tokens):
            right[suite.name] += 1
        else:
            wrong[suite.name] += 1
            if wrong[suite.name] <= show_wrong:
                print(
                    f"wrong, {suite.name}:\n  {_last(case)!r}\n  -> {completion.text!r}{'' if completion.ended else ' ...'}"
                )
    figures = [Figure(suite.name, suite.target, right[suite.name], len(suite.cases)) for suite in chosen]
    recalls = [figure for figure in figures if figure.name.endswith((AT_ONCE, BETWEEN))]
    right_recalls, count = sum(figure.right for figure in recalls), sum(figure.count for figure in recalls)
    figures.insert(0, Figure("recall of name, colour, number, pet and email, all in one", 0.95, right_recalls, count))
    return [figure for figure in [*figures, *_endings(everything, completions)] if figure.count]


def _endings(everything: list[tuple[Suite, Case]], completions: list[Completion]) -> Iterator[Figure]:
    for name, in_chat in (
        ("chat answers that end by themselves within 256 tokens", True),
        ("plain texts that end by themselves within 256 tokens", False),
    ):
        ended = [
            completion.ended
            for (_, case), completion in zip(everything, completions, strict=True)
            if isinstance(case.prompt, str) != in_chat and not case.begun
        ]
        yield Figure(name, 1.0, sum(ended), len(ended))


def _last(case: Case) -> str:
    return (
        case.prompt if isinstance(case.prompt, str) else " | ".join(message["content"] for message in case.prompt[-5:])
    )


def table(figures: list[Figure]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| what | target | measured | cases |", "|---|---|---|---|"]
    for figure in figures:
        # Rounded down: what misses its target must not look as if it had not.
        share = figure.right * 1000 // figure.count / 10
        measured = f"{share}%{'' if figure.reached else ' (missed)'}"
        lines.append(f"| {figure.name} | {figure.target:.0%} | {measured} | {figure.right} of {figure.count} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and say with the exit status whether every target was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-chat"), help="folder of the model")
    parser.add_argument("--seed", type=int, default=1, help="of the cases")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument(
        "--show-wrong", type=int, default=0, metavar="N", help="print up to N wrong answers of each figure"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="measure only the figures whose names have these words"
    )
    parser.add_argument("--write-card", action="store_true", help="put the table into the model's README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True, dtype=torch.float32).eval()
    chosen = [*suites(arguments.seed), *tool_suites(random.Random(f"tools:{arguments.seed}"))]
    chosen = [suite for suite in chosen if arguments.only in suite.name]
    figures = measure(model, tokenizer, chosen, show_wrong=arguments.show_wrong)
    print(table(figures))
    if arguments.write_card:
        put_table(arguments.model, table(figures))
    return 0 if all(figure.reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
