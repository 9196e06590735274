"""The page of metrics, and that nothing is exported which it does not name."""

from pathlib import Path

from scripts.metrics_page import complete, page

ROOT = Path(__file__).parents[3]
VLLM = """prompt_tokens_total generation_tokens_total request_success_total prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total admission_rejections_total num_requests_running num_requests_waiting
kv_cache_usage_perc lora_requests_info time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_prefill_time_seconds request_decode_time_seconds request_inference_time_seconds request_prompt_tokens
request_generation_tokens request_params_max_tokens request_params_n""".split()
"""What vLLM's dashboards plot."""
SEEDS = """http_requests_total http_request_duration_seconds tokens_generated_total api_requests_total
api_request_duration_seconds gpu_memory_usage_bytes tokens_per_second model_loaded""".split()
"""What the older services export."""


def test_the_page_is_made_from_the_code() -> None:
    """`python -m scripts.metrics_page` gives the file that is in the repository."""
    assert page(complete()) == (ROOT / "docs" / "metrics.md").read_text()


def test_the_names_of_vllm_and_of_the_older_services_are_exported() -> None:
    """With a type of their own each: a dashboard finds them by name."""
    names = {family.name for families in complete().sections.values() for family in families}

    assert {*SEEDS, *(f"vllm:{name}" for name in VLLM)} <= names


def test_no_metric_is_exported_twice_or_without_a_line_on_the_page() -> None:
    metrics = complete()
    metrics.model("m").generated(1, 1)
    exported = [line.split()[2] for line in metrics.render()[0].decode().splitlines() if line.startswith("# TYPE")]
    named = [family.name for families in metrics.sections.values() for family in families]

    assert len(named) == len(set(named))
    assert {name for name in exported if not name.endswith("_created")} == set(named)
