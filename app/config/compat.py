"""Defines the settings of the routes of older services."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from app.config.section import Section


class CompatConfig(Section):
    """The routes of older services, which keep their clients working; docs/compat.md lists them."""

    enabled: bool = True
    """False leaves them out: /generate, /predict, /predict/batch, /v1/stream, /load_model, /unload_model and
    /generate_apikey."""
    generate_max_new_tokens: PositiveInt = 50
    """New tokens on /generate, where a plain request names no `max_new_tokens`."""
    generate_most_new_tokens: PositiveInt = 200
    """The greatest `max_new_tokens` of such a request."""
    predict_max_length: PositiveInt = 100
    """New tokens on /predict and /predict/batch where a request names no `max_length`."""
    predict_most_length: PositiveInt = 2048
    """The greatest `max_length` of such a request."""
    predict_most_prompt_tokens: PositiveInt = 2048
    """Tokens that a prompt there may have."""
    predict_top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """`top_p` there where a request names none."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """API processes of an older configuration: as `app.workers` where that is 1 and Redis is configured, else only
    warned about."""
    health_status: Literal["healthy", "ok"] = "healthy"
    """What `status` of GET /health says."""
    health_needs_model: bool = False
    """Answer GET /health with 503 while a request sent now would not be served, for deployments whose readiness probe
    is at that path; without it the path says only that the process lives."""
