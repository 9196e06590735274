"""Arguments of transformers and LangChain, as settings and sampling parameters, or refused by name."""

from typing import Any

import pytest

from app.langchain.construction import model_fields
from app.langchain.loading import model_settings, pipeline_arguments, sampling_arguments

NO_MODEL: dict[str, Any] = {
    "task": "text-generation",
    "backend": "default",
    "device": None,
    "device_map": None,
    "model_kwargs": None,
    "pipeline_kwargs": None,
    "batch_size": None,
    "model": None,
    "filters": False,
    "token": None,
    "others": {},
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_new_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"], "seed": None}, {"stop": ("x", "y")}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": ((5, 1.0),)}),
    ],
)
def test_sampling_parameters_are_known_by_transformers_and_openais_names(given: Any, expected: Any):
    assert expected == sampling_arguments(given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"beams": 4}, "beams; known: .*max_new_tokens, max_tokens"),
        ({"max_tokens": 1, "max_new_tokens": 2}, "max_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"sample": 1}, "sample"),
    ],
)
def test_what_nothing_would_honour_is_named(given: Any, named: str):
    with pytest.raises(ValueError, match=named):
        sampling_arguments(given)


def test_model_arguments_are_settings():
    settings = model_settings(
        "text-generation",
        "default",
        "cpu",
        "auto",
        {"torch_dtype": "torch.float32"},
        {"threads": 1, "revision": "main"},
    )

    assert {"device": "cpu", "dtype": "float32", "threads": 1, "revision": "main"} == settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "translation"}, "task must be text-generation"),
        ({"backend": "openvino"}, "backend"),
        ({"device": 0}, "device must be auto, cpu, cuda or mps"),
        ({"device_map": "balanced"}, "device_map"),
        ({"model_kwargs": {"trust_remote_code": True}}, "trust_remote_code; known: .*quantization"),
        ({"others": {"beams": 4}}, "beams; known"),
        ({"others": {"spare_worker": True}}, "spare_worker"),
        ({"pipeline_kwargs": {"num_beams": 4}}, "pipeline_kwargs: .*num_beams"),
        ({"pipeline_kwargs": {"return_full_text": True}}, "return_full_text"),
        ({"others": {"device": "tpu"}}, "device"),
        ({"model": "another"}, "must not differ"),
    ],
)
def test_arguments_of_from_model_id_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], named: str):
    """Before anything is loaded."""
    arguments = {**NO_MODEL, **changes}
    if "device" in arguments["others"]:
        arguments |= {"device": arguments["others"]["device"], "others": {}}

    with pytest.raises(ValueError, match=named):
        model_fields("no/model", **arguments)


def test_a_model_is_required():
    with pytest.raises(ValueError, match="model_id is required"):
        model_fields(None, **NO_MODEL)


def test_pipeline_arguments_are_sampling_parameters():
    given = {"max_new_tokens": 5, "return_full_text": False, "do_sample": False}

    assert {"max_tokens": 5, "temperature": 0.0} == pipeline_arguments(given)
