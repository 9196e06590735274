"""Train the embedded chat model from nothing, on text that it writes itself.

    python models/tiny-chat/training/train.py --out models/tiny-chat

The learning rate rises for 100 steps, stays, and falls to zero over the last `--decay` steps.  Then come `--polish`
steps from the weights as they were saved, at a lower rate that falls to zero, on the last part of the text.  A run can
be ended early: the checkpoint of any step before the fall, resumed with a smaller `--steps`, gives what that smaller
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
from corpus import LAST_FROM, Example, example
from model_card import write_card
from optimizers import make_optimizers
from tokenization import CONTEXT_TOKENS, END_OF_TEXT, PAD, TURN_END, Encoder, make_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1536
POOL_EXAMPLES = 2048
BATCH_TOKENS = 4096
WARMUP_STEPS = 100
LEARNING_RATE = 2e-3
POLISH_RATE = 5e-4


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


def loss_of(model: LlamaForCausalLM, batch: list[Row]) -> Tensor:
    """Mean cross-entropy in nats of the tokens that the model learns to write."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    learnt = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in batch])
    # Padding is on the right, behind everything that is learnt, so the causal mask is enough.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = learnt[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


def rate_at(step: int, steps: int, decay: int) -> float:
    """The learning rate of a step as a share of the highest."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (steps - step) / decay))


@dataclass
class Progress:
    """How far training has come; kept in the checkpoint."""

    step: int = 0
    pool: int = 0
    batch: int = 0
    """The next batch is this one of this pool."""
    tokens: int = 0
    seconds: float = 0.0


def polish(model: LlamaForCausalLM, encoder: Encoder, arguments: argparse.Namespace, done: Progress) -> Progress:
    """Run the last steps, on what goes wrong longest, with new optimizers."""
    optimizers = make_optimizers(model, POLISH_RATE)
    batches = batches_from(encoder, arguments.seed, LAST_FROM // POOL_EXAMPLES, 0)
    begun, tokens = time.monotonic() - done.seconds, done.tokens
    for step in range(arguments.polish):
        _, _, batch = next(batches)
        loss = take_step(model, optimizers, POLISH_RATE * rate_at(step, arguments.polish, arguments.polish), batch)
        tokens += sum(len(ids) for ids, _ in batch)
        if step % 25 == 0:
            print(f"polish {step:4d}  loss {loss:.3f}", flush=True)
    return Progress(done.step + arguments.polish, tokens=tokens, seconds=time.monotonic() - begun)


def train(model: LlamaForCausalLM, encoder: Encoder, arguments: argparse.Namespace) -> Progress:
    """Run the steps; returns what they took, earlier runs included.

    Leaves a checkpoint every 250 steps while the rate is constant.
    """
    optimizers = make_optimizers(model, LEARNING_RATE)
    done = Progress()
    checkpoint = arguments.out / "checkpoint.pt"
    if arguments.resume:
        saved = torch.load(checkpoint)
        done = Progress(**saved["progress"])
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    batches = batches_from(encoder, arguments.seed, done.pool, done.batch)
    begun, shown = time.monotonic() - done.seconds, 0.0
    for step in range(done.step, arguments.steps):
        pool, place, batch = next(batches)
        rate = LEARNING_RATE * rate_at(step, arguments.steps, arguments.decay)
        loss = take_step(model, optimizers, rate, batch)
        tokens = done.tokens + sum(len(ids) for ids, _ in batch)
        done = Progress(step + 1, pool, place + 1, tokens, time.monotonic() - begun)
        shown = 0.95 * shown + 0.05 * loss if shown else loss
        if step % 25 == 0:
            print(f"step {step:5d}  loss {shown:.3f}  {tokens / done.seconds:,.0f} tokens/s", flush=True)
        if step % 250 == 249 and step < arguments.steps - arguments.decay:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "progress": asdict(done),
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return done


def take_step(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], rate: float, batch: list[Row]) -> float:
    """Learn from one batch at a learning rate; returns the loss before."""
    loss = loss_of(model, batch)
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


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/tiny-chat"), help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help=f"optimizer steps of about {BATCH_TOKENS} tokens")
    parser.add_argument(
        "--decay", type=int, default=700, help="steps at the end over which the learning rate falls to zero"
    )
    parser.add_argument("--polish", type=int, default=300, help="steps after that, on the text's last part")
    parser.add_argument("--seed", type=int, default=1, help="of the text and of the first weights")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")
    return parser.parse_args()


def all_text(one: Example) -> str:
    """The words of an example, for the tokenizer to learn from."""
    return one.given + one.text or "\n".join(turn.content for turn in one.turns)


def main() -> None:
    """Train and write the folder."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer((all_text(example(arguments.seed, i)) for i in range(12_000)), VOCABULARY)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    done = train(model, Encoder(tokenizer), arguments)
    save(model, tokenizer, arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32, attn_implementation="sdpa")
    done = polish(model, Encoder(tokenizer), arguments, done)
    save(model, tokenizer, arguments.out)
    write_card(
        arguments.out,
        parameters=model.num_parameters() / 1e6,
        vocabulary=len(tokenizer),
        seed=arguments.seed,
        steps=arguments.steps,
        decay=arguments.decay,
        polish=arguments.polish,
        tokens=done.tokens / 1e6,
        minutes=done.seconds / 60,
    )
    (arguments.out / "checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
