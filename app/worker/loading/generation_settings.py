"""What a model's files say about generating with it: end tokens, recommended sampling parameters, rules, stop strings.

Decides what of it is honoured, and says the rest in one line of the log.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from app.worker.loading.model_files import LoadError, read_json
from app.worker.sampling.generation_rules import GenerationRules

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
RECOMMENDED = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "max_new_tokens": (1, 1_000_000),
    "min_new_tokens": (0, 1_000_000),
}
"""Sampling parameters that a model may recommend, and the range in which a request may set them."""
OTHER_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""What `SamplingParams` calls a parameter that transformers calls otherwise."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "typical_p": (1.0,),
    "top_h": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "max_time": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "force_words_ids": ([],),
    "constraints": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "dola_layers": (),
}
"""Fields that are not honoured, with the values that ask for nothing."""
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What is honoured of a model's files."""

    end_ids: tuple[int, ...]
    recommended: tuple[tuple[str, float], ...]
    """By the names of `SamplingParams`."""
    rules: GenerationRules
    stop_strings: tuple[str, ...]


def read_generation_settings(folder: Path, model: Any, tokenizer: Any, vocab_size: int) -> GenerationSettings:
    """Return what the files of a model say, and warn of what is not honoured.

    Raises: LoadError: a field of them has no meaning, or the model has none of the end tokens that they name.
    """
    config: GenerationConfig = model.generation_config
    stop_strings = _stop_strings(config)
    named = {
        stop: tokenizer.convert_tokens_to_ids(stop) for stop in stop_strings if stop in tokenizer.all_special_tokens
    }
    end_ids = {*_end_ids(folder, tokenizer, vocab_size), *(each for each in named.values() if each < vocab_size)}
    if unused := _not_honoured(config):
        log.warning("%s: not honoured here: %s", GENERATION_FILE, ", ".join(unused))
    return GenerationSettings(
        end_ids=tuple(sorted(end_ids)),
        recommended=_recommended_params(config),
        rules=_rules(config, end_ids, vocab_size),
        stop_strings=tuple(stop for stop in stop_strings if stop not in named),
    )


def _end_ids(folder: Path, tokenizer: Any, vocab_size: int) -> set[int]:
    """Collect the end tokens from every file that may name them; chat models often use one place only.

    From the files and not from what transformers made of them: the default of a model's class is nobody's word.

    Raises: LoadError: one is no token id, or the model has none of them.
    """
    generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).exists() else {}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    text = config.get("text_config")
    found: set[int] = set()
    unknown: list[str] = []
    for source, value in (
        (f"{GENERATION_FILE}: eos_token_id", generation.get("eos_token_id")),
        ("config.json: eos_token_id", config.get("eos_token_id")),
        ("config.json: text_config.eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None),
        ("tokenizer_config.json: eos_token", tokenizer.eos_token_id),
    ):
        ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if not all(type(each) is int for each in ids):
            raise LoadError(f"{source} must be a token id or a list of them")
        known = {each for each in ids if 0 <= each < vocab_size}
        if known != set(ids):
            unknown.append(source)
            log.warning("%s names tokens that the model does not have", source)
        found |= known
    if unknown and not found:
        raise LoadError(f"{unknown[0]} names no token that the model has; its last is {vocab_size - 1}")
    if not found:
        log.warning("no file names an end token of the model; its answers end at max_tokens or a stop string")
    return found


def _recommended_params(config: GenerationConfig) -> tuple[tuple[str, float], ...]:
    """Return the sampling parameters that the model's makers recommend, as far as a request could set them.

    Raises: LoadError: one is no number.
    """
    recommended: dict[str, float] = {}
    for name, (least, most) in RECOMMENDED.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise LoadError(f"{GENERATION_FILE}: {name} must be a number")
        if least <= value <= most:
            recommended[OTHER_NAMES.get(name, name)] = value
        else:
            log.warning("%s: %s is not from %g to %g and is not used", GENERATION_FILE, name, least, most)
    if config.do_sample is False:
        recommended["temperature"] = 0.0
    return tuple(recommended.items())


def _stop_strings(config: GenerationConfig) -> tuple[str, ...]:
    value = config.stop_strings
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list | tuple) or not all(isinstance(each, str) for each in stops):
        raise LoadError(f"{GENERATION_FILE}: stop_strings must be a text or a list of them")
    if len(stops) > MAX_STOP_STRINGS or any(len(each) > MAX_STOP_CHARS for each in stops):
        raise LoadError(f"{GENERATION_FILE}: stop_strings has more than {MAX_STOP_STRINGS} texts or a longer one")
    return tuple(each for each in stops if each)


def _rules(config: GenerationConfig, end_ids: Iterable[int], vocab_size: int) -> GenerationRules:
    """Return the rules about tokens; those about tokens that the model does not have are left out.

    Raises: LoadError: one has not the form that transformers gives it.
    """
    size = config.no_repeat_ngram_size or 0
    if type(size) is not int or size < 0:
        raise LoadError(f"{GENERATION_FILE}: no_repeat_ngram_size must be a whole number")
    ends = {(each,) for each in end_ids}
    words = _sequences("bad_words_ids", config.bad_words_ids, vocab_size)
    return GenerationRules(
        suppress_tokens=_tokens("suppress_tokens", config.suppress_tokens, vocab_size),
        begin_suppress_tokens=_tokens("begin_suppress_tokens", config.begin_suppress_tokens, vocab_size),
        # As in transformers, which lets a model end whatever its bad words are.
        bad_words_ids=tuple(each for each in words if each not in ends),
        sequence_bias=_biases(config.sequence_bias, vocab_size),
        no_repeat_ngram_size=size,
    )


def _tokens(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = value if value is not None else []
    if not isinstance(ids, list | tuple) or not all(type(each) is int for each in ids):
        raise LoadError(f"{GENERATION_FILE}: {name} must be a list of token ids")
    known = tuple(each for each in ids if 0 <= each < vocab_size)
    if len(known) < len(ids):
        log.warning("%s: %s names tokens that the model does not have", GENERATION_FILE, name)
    return known


def _sequences(name: str, value: Any, vocab_size: int) -> list[tuple[int, ...]]:
    if value is not None and not isinstance(value, list | tuple):
        raise LoadError(f"{GENERATION_FILE}: {name} must be a list of lists of token ids")
    lists = [(each, _tokens(name, each, vocab_size)) for each in value or []]
    return [known for given, known in lists if known and len(known) == len(given)]


def _biases(value: Any, vocab_size: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = list(value.items()) if isinstance(value, dict) else value if value is not None else []
    if not isinstance(pairs, list) or not all(isinstance(each, list | tuple) and len(each) == 2 for each in pairs):
        raise LoadError(f"{GENERATION_FILE}: sequence_bias must be a list of pairs: token ids, and a number")
    if not all(type(bias) in (int, float) and not math.isnan(bias) and bias < math.inf for _, bias in pairs):
        raise LoadError(f"{GENERATION_FILE}: sequence_bias must have numbers for its biases")
    known = ((_tokens("sequence_bias", ids, vocab_size), len(ids), float(bias)) for ids, bias in pairs)
    return tuple((ids, bias) for ids, count, bias in known if ids and len(ids) == count)


def _not_honoured(config: GenerationConfig) -> list[str]:
    """Return the fields that ask for what this service does not do."""
    return [
        name
        for name, neutral in NEUTRAL.items()
        if (value := getattr(config, name, None)) is not None and value not in neutral
    ]
