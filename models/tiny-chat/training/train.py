"""Train the embedded chat model from nothing, on text that it writes itself.

    python models/tiny-chat/training/train.py --out models/tiny-chat

There are five stages.  In the first the learning rate rises for 100 steps, stays, and falls to zero over the last
`--decay` steps.  Then come `--polish` steps from the weights as they were saved, at a lower rate that falls to zero, on
text that has more of what goes wrong longest, then `--tools` steps on text with tools and JSON, `--strange` steps
with tools of stranger names, and `--restore` steps with more of what these displaced.  `--start` and `--stage` begin with a later stage, from weights that those before have made.

A stage can be ended early: the checkpoint of any step before its fall, resumed with fewer steps, gives what that smaller
number would have given from the start.  The same seed, steps and machine kind give the same weights; other processors
round differently.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import LAST_FROM, RESTORING_FROM, STRANGE_TOOLS_FROM, TOOLS_FROM, example
from model_card import write_card
from optimizers import make_optimizers
from tokenization import CHAT_TEMPLATE, CONTEXT_TOKENS, END_OF_TEXT, PAD, TURN_END, Encoder, make_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from turns import Example

VOCABULARY = 1536
POOL_EXAMPLES = 2048
BATCH_TOKENS = 4096
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 100
FIRST, POLISH, TOOLS, STRANGE, RESTORE = "first", "polish", "tools", "strange", "restore"
LEARNING_RATES = {FIRST: 2e-3, POLISH: 5e-4, TOOLS: 1.5e-3, STRANGE: 1.2e-3, RESTORE: 1.2e-3}
FIRST_POOLS = {
    FIRST: 0,
    POLISH: LAST_FROM // POOL_EXAMPLES,
    TOOLS: TOOLS_FROM // POOL_EXAMPLES,
    STRANGE: STRANGE_TOOLS_FROM // POOL_EXAMPLES,
    RESTORE: RESTORING_FROM // POOL_EXAMPLES,
}
BFLOAT16 = {TOOLS, STRANGE, RESTORE}
"""Stages whose products are computed in bfloat16: twice as fast on processors that have it, and the loss is the same.
The weights and their optimizers stay in float32."""


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one token."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 2.7 million parameters with random weights."""
    # LlamaConfig's annotations leave out what its base class takes.
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=token_id(tokenizer, PAD),
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


Row = tuple[list[int], list[bool]]


def pool_batches(encoder: Encoder, seed: int, pool: int) -> list[list[Row]]:
    """The batches of one pool: rows of similar length together, in random order.

    A batch has at most BATCH_TOKENS tokens, padding included.
    """
    rows = encoder.encode([example(seed, i) for i in range(pool * POOL_EXAMPLES, (pool + 1) * POOL_EXAMPLES)])
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list[Row]] = [[]]
    for row in rows:
        if (len(batches[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    random.Random(f"{seed}:{pool}").shuffle(batches)
    return batches


def batches_from(encoder: Encoder, seed: int, pool: int, skip: int) -> Iterator[tuple[int, int, list[Row]]]:
    """All batches in order, without end, from batch `skip` of a pool, each with its place (pool, batch)."""
    while True:
        for place, batch in enumerate(pool_batches(encoder, seed, pool)):
            if place >= skip:
                yield pool, place, batch
        pool, skip = pool + 1, 0


def loss_of(model: LlamaForCausalLM, batch: list[Row], *, bfloat16: bool) -> Tensor:
    """Mean cross-entropy in nats of the tokens that the model learns to write."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    learnt = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in batch])
    # Padding is on the right, behind everything that is learnt, so the causal mask is enough.
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        wanted = learnt[:, 1:]
        return functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


@dataclass(frozen=True)
class Stage:
    """A number of steps on one part of the text, with optimizers of its own."""

    name: str
    steps: int
    decay: int
    """Steps at the end over which the learning rate falls to zero."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        share = min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (self.steps - step) / self.decay))
        return LEARNING_RATES[self.name] * share


@dataclass
class Progress:
    """How far a stage has come; kept in the checkpoint."""

    stage: str
    pool: int
    batch: int = 0
    """The next batch is this one of this pool."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of this stage and those before."""


def train(
    model: LlamaForCausalLM, encoder: Encoder, stage: Stage, before: Progress | None, arguments: argparse.Namespace
) -> Progress:
    """Run the steps of a stage; returns what they took, earlier stages and runs included.

    Leaves a checkpoint now and then while the rate does not fall.
    """
    optimizers = make_optimizers(model, LEARNING_RATES[stage.name])
    done = Progress(stage.name, FIRST_POOLS[stage.name])
    if before is not None:
        done.tokens, done.seconds = before.tokens, before.seconds
    checkpoint = arguments.out / f"checkpoint-{stage.name}.pt"
    if arguments.resume and checkpoint.exists():
        done = restore(checkpoint, model, optimizers)
    batches = batches_from(encoder, arguments.seed, done.pool, done.batch)
    begun, shown = time.monotonic() - done.seconds, 0.0
    for step in range(done.step, stage.steps):
        pool, place, batch = next(batches)
        loss = take_step(model, optimizers, stage.rate_at(step), batch, bfloat16=stage.name in BFLOAT16)
        tokens = done.tokens + sum(len(ids) for ids, _ in batch)
        done = Progress(stage.name, pool, place + 1, step + 1, tokens, time.monotonic() - begun)
        shown = 0.95 * shown + 0.05 * loss if shown else loss
        if step % 25 == 0:
            print(f"{stage.name} {step:5d}  loss {shown:.3f}  {tokens / done.seconds:,.0f} tokens/s", flush=True)
        if done.step % CHECKPOINT_STEPS == 0 and step < stage.steps - stage.decay:
            keep(checkpoint, model, optimizers, done)
    return done


def keep(checkpoint: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], done: Progress) -> None:
    """Replace the checkpoint."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(
        {"model": model.state_dict(), "optimizers": states, "progress": asdict(done)}, checkpoint.with_suffix(".new")
    )
    checkpoint.with_suffix(".new").replace(checkpoint)


def restore(checkpoint: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Load a checkpoint into the model and its optimizers; returns how far it had come."""
    saved = torch.load(checkpoint)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Progress(**saved["progress"])


def take_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    rate: float,
    batch: list[Row],
    *,
    bfloat16: bool,
) -> float:
    """Learn from one batch at a learning rate; returns the loss before."""
    loss = loss_of(model, batch, bfloat16=bfloat16)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder that AutoTokenizer and AutoModelForCausalLM load; the weights as bfloat16."""
    ends = [token_id(tokenizer, token) for token in (TURN_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=token_id(tokenizer, PAD))
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: Path) -> LlamaForCausalLM:
    """Load saved weights for further training."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/tiny-chat"), help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help=f"optimizer steps of about {BATCH_TOKENS} tokens")
    parser.add_argument(
        "--decay", type=int, default=700, help="steps at the end over which the learning rate falls to zero"
    )
    parser.add_argument("--polish", type=int, default=300, help="steps after that, on the text's last part")
    parser.add_argument("--tools", type=int, default=700, help="steps after that, on text with tools and JSON")
    parser.add_argument("--tools-decay", type=int, default=300, help="steps of these over which the rate falls")
    parser.add_argument("--strange", type=int, default=700, help="steps after that, on tools with stranger names")
    parser.add_argument("--strange-decay", type=int, default=500, help="steps of these over which the rate falls")
    parser.add_argument("--restore", type=int, default=1000, help="steps after that, with more of what tools displaced")
    parser.add_argument("--restore-decay", type=int, default=700, help="steps of these over which the rate falls")
    parser.add_argument("--start", type=Path, help="folder of weights to train further")
    parser.add_argument(
        "--stage", choices=(FIRST, POLISH, TOOLS, STRANGE, RESTORE), default=FIRST, help="the stage to begin with"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the text and of the first weights")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the folder")
    return parser.parse_args()


def all_text(one: Example) -> str:
    """The words of an example, for the tokenizer to learn from."""
    return one.given + one.text or "\n".join(turn.content for turn in one.turns)


def run_stages(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Progress:
    """Run the stages from the chosen one on and save after each; returns what they took."""
    stages = [
        Stage(FIRST, arguments.steps, arguments.decay),
        Stage(POLISH, arguments.polish, arguments.polish),
        Stage(TOOLS, arguments.tools, arguments.tools_decay),
        Stage(STRANGE, arguments.strange, arguments.strange_decay),
        Stage(RESTORE, arguments.restore, arguments.restore_decay),
    ]
    begin = [stage.name for stage in stages].index(arguments.stage)
    model = make_model(tokenizer) if arguments.start is None else load(arguments.start)
    done: Progress | None = None
    for stage in stages[begin:]:
        done = train(model, Encoder(tokenizer), stage, done, arguments)
        save(model, tokenizer, arguments.out)
        model = load(arguments.out)
    assert done is not None
    return done


def main() -> None:
    """Train and write the folder."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.start is None:
        tokenizer = make_tokenizer((all_text(example(arguments.seed, i)) for i in range(12_000)), VOCABULARY)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(arguments.start), local_files_only=True)
        tokenizer.chat_template = CHAT_TEMPLATE
    done = run_stages(arguments, tokenizer)
    write_card(
        arguments.out,
        vocabulary=len(tokenizer),
        seed=arguments.seed,
        steps=arguments.steps,
        decay=arguments.decay,
        polish=arguments.polish,
        tools=arguments.tools,
        tools_decay=arguments.tools_decay,
        strange=arguments.strange,
        strange_decay=arguments.strange_decay,
        restore=arguments.restore,
        restore_decay=arguments.restore_decay,
        tokens=done.tokens / 1e6,
        minutes=done.seconds / 60,
    )
    for checkpoint in arguments.out.glob("checkpoint-*.pt"):
        checkpoint.unlink()


if __name__ == "__main__":
    main()
