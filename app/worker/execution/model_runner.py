"""A model's forward pass over rows of KV cache, and the proof at load time that it computes what the model computes.

Knows no requests and no sampling.  What cannot be served in rows (recurrent state, cross attention, attention with a
bias of its own, positions that depend on the longest sequence) is recognised here, by its configuration where that says
it and by comparing scores where it does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from app.ipc.messages import Compiled
from app.worker.execution.kv_cache import ATTENTION, RowCache, UnsupportedModelError
from app.worker.execution.native.native_decoder import NativeDecoder
from app.worker.execution.packed_batch import Piece
from app.worker.execution.torch.quantization import in_integers

PROBE_TOKENS = 24
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far the scores of the two ways may be apart, as a share of their norm; rounding alone stays well below."""
QUANTIZED = 5e-2
"""How much farther in integers, where a rounding now and then becomes one of a hundredth."""
GLOBAL_ROPE = ("dynamic", "longrope")
"""Rotations that depend on the longest sequence in the batch, so that one row would change another's answer."""


class RowModel:
    """A causal language model with its KV cache in rows."""

    def __init__(self, model: Any, rows: int, length: int) -> None:
        """Switch the model's attention over; `length` is the number of tokens that fit a row."""
        self.model = model
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        """Tokens that it gives scores for."""
        self.cache = RowCache(rows, length, str(model.device))
        self.layers: NativeDecoder | None = None
        """Computes all layers instead of torch, if there is one."""
        self.restore()

    def restore(self) -> None:
        """Have the model attend to rows in the ordinary way."""
        self.cache.outside = False
        self.model.set_attn_implementation(ATTENTION)

    @property
    def compiled(self) -> Compiled | None:
        """What of it is compiled for this machine."""
        if self.layers is not None or self.cache.outside:
            return "layers"
        return None if self.cache.compiled is None else "attention"

    @torch.inference_mode()
    def scores(self, pieces: Sequence[Piece], wanted: Sequence[bool]) -> Tensor:
        """Compute the pieces and return the scores after the last token of each wanted one, (wanted, vocabulary).

        Args: pieces: single tokens first, by row; every row at most once.
        """
        layout = self.cache.prepare(pieces)
        ends = torch.tensor([len(piece.tokens) for piece in pieces]).cumsum(0) - 1
        keep = ends[torch.tensor(wanted)].to(layout.ids.device)
        if self.layers is not None:
            return self.layers.forward(layout, keep)
        scores: Tensor = self.model(
            input_ids=layout.ids,
            position_ids=layout.positions,
            past_key_values=self.cache,
            use_cache=True,
            # The scores of one token at least: some models cannot compute none.
            logits_to_keep=keep if len(keep) else 1,
        ).logits[0]
        return scores[: len(keep)]

    def apart(self, before: Tensor) -> float:
        """Return how far the scores of the made text are from those that `probe` returned before, as a share of their
        norm; NaN where a score is no number.
        """
        return float((self.probe() - before).norm() / before.norm())

    def probe(self) -> Tensor:
        """Return the scores of a made text, to compare one way of computing them with another; uses the first rows."""
        generator = torch.Generator().manual_seed(0)
        count = min(PROBE_TOKENS, self.cache.length)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (count,), generator=generator).tolist()
        passes = [[Piece(0, 0, ids[: count - 2])], [Piece(0, count - 2, ids[count - 2 : count - 1])]]
        if self.cache.rows > 1:
            passes.append([Piece(0, count - 1, ids[-1:]), Piece(1, 0, ids[: count // 2])])
        return torch.cat([self.scores(pieces, [True] * len(pieces)) for pieces in passes]).float()


def make_row_model(model: Any, *, length: int, rows: int | None, free_bytes: int) -> RowModel:
    """Prove that rows give the model's own scores, and make the rows.

    Args:
        length: tokens that fit a row.
        rows: how many; None takes 32, or fewer where they do not fit.
        free_bytes: memory that the rows may take.

    Raises: UnsupportedModelError: it has to be served another way; the model is left as it was.
    """
    usual = model.config._attn_implementation
    try:
        if not model._can_set_attn_implementation():
            raise UnsupportedModelError("it computes attention of its own")
        _check_config(model.config.get_text_config(decoder=True))
        tolerance = TOLERANCE.get(model.dtype, 0) + (QUANTIZED if in_integers(model) else 0)
        bytes_per_token = _prove(model, min(length, PROBE_TOKENS), tolerance)
    except Exception as error:
        model.set_attn_implementation(usual)
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(f"its forward pass fails with rows ({type(error).__name__})") from error
    fitting = max(1, free_bytes // max(1, bytes_per_token * length))
    return RowModel(model, min(rows or MOST_ROWS, fitting), length)


MOST_ROWS = 32


def _check_config(config: Any) -> None:
    """Raises: UnsupportedModelError: the configuration says that rows would be wrong."""
    strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise UnsupportedModelError(f"it has layers of the kind {', '.join(sorted(strange))}")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in GLOBAL_ROPE:
            raise UnsupportedModelError(f"its rotary positions are of the kind {each['rope_type']}")


@torch.inference_mode()
def _prove(model: Any, tokens: int, tolerance: float) -> int:
    """Compare scores computed in pieces, beside a neighbour, with those of an ordinary forward pass.

    Returns: how many bytes of keys and values a token has.
    Raises: UnsupportedModelError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids, neighbour = torch.randint(vocabulary, (2, tokens), generator=generator).tolist()
    # The reference that knows every model's peculiarities; the others drop some of them in silence.
    model.set_attn_implementation("eager")
    expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -3:]
    rows = RowModel(model, rows=3, length=tokens)
    cut = tokens // 2
    rows.scores([Piece(0, 0, neighbour[:-3]), Piece(2, 0, ids[:cut])], [False, False])
    found = [rows.scores([Piece(0, tokens - 3, neighbour[-3:-2]), Piece(2, cut, ids[cut:-2])], [False, True])]
    for left in (2, 1):
        place = tokens - left
        found.append(
            rows.scores([Piece(r, place, [seq[place]]) for r, seq in ((0, neighbour), (2, ids))], [False, True])
        )
    _check_windows(model.config.get_text_config(decoder=True), rows.cache.windows)
    difference = (torch.cat(found) - expected).float().norm() / expected.float().norm()
    if not difference <= tolerance:
        raise UnsupportedModelError(f"its scores differ by {difference:.1%} when they are computed in rows")
    return rows.cache.bytes_per_token


def _check_windows(config: Any, windows: dict[int, int | None]) -> None:
    """Raises: UnsupportedModelError: a layer has a window that it does not tell its attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * len(windows)
    for layer, window in windows.items():
        if (kinds[layer] == "sliding_attention") != (window is not None):
            raise UnsupportedModelError("its sliding windows are not told to the attention")
