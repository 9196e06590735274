"""GET, PATCH and DELETE /v1/sessions: the caller's own sessions.

Another tenant's session gives the same 404 as one that does not exist, so ids cannot be probed.
"""

from datetime import datetime
from typing import Annotated, NotRequired

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, StringConstraints

from app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    RateLimited,
    SessionNotFound,
    SessionUnreadable,
    StoreUnavailable,
    Unauthorized,
)
from app.generation.sessions import Session, SessionSummary, turn_within
from app.types import Message, Role
from app.web.http.dependencies import CallerDep, ContainerDep, SessionsDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.sampling_params import SessionId
from app.web.http.tool_calls import ReasonedFields, tool_call_objects

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=StrictRoute)

_ERRORS = error_responses(
    InvalidRequest, Unauthorized, SessionNotFound, SessionUnreadable, RateLimited, InternalError, StoreUnavailable
)

SessionPath = Annotated[SessionId, Path()]


class SessionSummaryResponse(BaseModel):
    """One session in the list."""

    session_id: str
    title: str | None
    turns: int
    text_bytes: int
    updated: datetime

    @classmethod
    def of(cls, summary: SessionSummary) -> "SessionSummaryResponse":
        return cls(
            session_id=summary.session_id,
            title=summary.title,
            turns=summary.turns,
            text_bytes=summary.text_bytes,
            updated=summary.updated,
        )


class SessionListResponse(BaseModel):
    """The caller's sessions."""

    sessions: list[SessionSummaryResponse]


class StoredMessage(ReasonedFields):
    """A message of an earlier turn; it may be sent back as it is."""

    role: Role
    content: str
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


def _stored(message: Message) -> StoredMessage:
    stored: StoredMessage = {"role": message.role, "content": message.content}
    if message.tool_calls:
        stored["tool_calls"] = tool_call_objects(message.tool_calls)
    if message.reasoning:
        stored["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        stored["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        stored["name"] = message.name
    return stored


class SessionResponse(BaseModel):
    """A session with its stored messages."""

    session_id: str
    title: str | None
    messages: list[StoredMessage]
    created: datetime
    updated: datetime
    expires_in_seconds: float

    @classmethod
    def of(cls, session: Session) -> "SessionResponse":
        return cls(
            session_id=session.session_id,
            title=session.title,
            messages=[_stored(message) for turn in session.turns for message in turn.messages],
            created=session.created,
            updated=session.updated,
            expires_in_seconds=session.expires_in_seconds,
        )


class RenameSession(StrictModel):
    """What a session is called."""

    title: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class SessionTitleResponse(BaseModel):
    """A session's title as it is stored: personal data is masked in it as in messages."""

    session_id: str
    title: str


@router.get("", response_model=SessionListResponse, responses=_ERRORS)
async def list_sessions(caller: CallerDep, sessions: SessionsDep) -> SessionListResponse:
    """List the caller's sessions."""
    return SessionListResponse(
        sessions=[SessionSummaryResponse.of(summary) for summary in await sessions.list(caller.tenant)]
    )


@router.get("/{session_id}", response_model=SessionResponse, responses=_ERRORS)
async def read_session(session_id: SessionPath, caller: CallerDep, sessions: SessionsDep) -> SessionResponse:
    """Show the messages of one session, oldest first."""
    session = await sessions.read(caller.tenant, session_id)
    if session is None:
        raise _session_not_found()
    return SessionResponse.of(session)


@router.patch("/{session_id}", response_model=SessionTitleResponse, responses=_ERRORS)
async def rename_session(
    session_id: SessionPath, body: RenameSession, caller: CallerDep, sessions: SessionsDep, container: ContainerDep
) -> SessionTitleResponse:
    """Give a session a title; it lives no longer for that."""
    (stored,) = await container.service.storable(caller.tenant, [Message(Role.USER, body.title)])
    if not await sessions.rename(caller.tenant, session_id, stored.content):
        raise _session_not_found()
    return SessionTitleResponse(session_id=session_id, title=stored.content)


@router.delete("/{session_id}", status_code=204, responses={**_ERRORS, **error_responses(DeadlineExceeded)})
async def delete_session(
    session_id: SessionPath, caller: CallerDep, sessions: SessionsDep, container: ContainerDep
) -> Response:
    """Delete a session, after a turn that is running in it: that would store it again."""
    async with turn_within(container.settings.deadlines.waiting_seconds, sessions, caller.tenant, session_id):
        if not await sessions.delete(caller.tenant, session_id):
            raise _session_not_found()
    return Response(status_code=204)


def _session_not_found() -> SessionNotFound:
    return SessionNotFound("You have no session of this id; it may have expired.")
