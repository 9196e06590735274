"""Defines the settings of files and batches."""

from typing import Annotated

from pydantic import Field, PositiveInt

from app.config.section import Section


class BatchesConfig(Section):
    """Files of requests, answered when nobody else needs the model: /v1/files and /v1/batches."""

    enabled: bool = True
    """False serves neither, and runs no batch that is stored already."""
    parallel_lines: PositiveInt = 8
    """Requests of batches that this process answers at once; one where the model cannot put them behind others."""
    max_lines: PositiveInt = 10_000
    """Requests of one batch."""
    max_file_bytes: PositiveInt = 16_777_216
    """Bytes of one uploaded file; a longer one is refused with 413."""
    max_stored_bytes: PositiveInt = 268_435_456
    """Bytes of one tenant's uploaded files in sum."""
    max_unfinished: PositiveInt = 50
    """Batches of one tenant that have not ended."""
    retention_days: PositiveInt = 30
    """Files, and batches that have ended, are deleted after so long."""
    lease_seconds: Annotated[float, Field(ge=1)] = 30
    """After so long the requests that a dead process was answering are taken up again."""
