"""GET and DELETE /v1/sessions: the caller's own sessions.  Translation only.

Another tenant's session does not exist for this caller: the answer is the same 404, so ids cannot be probed.
"""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel

from app.errors import InternalError, InvalidRequest, RateLimited, SessionNotFound, Unauthorized
from app.generation.sessions import Session, SessionSummary
from app.types import Role
from app.web.http.dependencies import CallerDep, SessionsDep
from app.web.http.errors import document
from app.web.http.json_body import StrictRoute
from app.web.http.sampling_params import SessionId

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=StrictRoute)

_ERRORS = document(InvalidRequest, Unauthorized, SessionNotFound, RateLimited, InternalError)

SessionPath = Annotated[SessionId, Path()]


class SummaryReply(BaseModel):
    """One session in the list."""

    session_id: str
    turns: int
    text_bytes: int
    updated: datetime

    @classmethod
    def of(cls, summary: SessionSummary) -> "SummaryReply":
        return cls(
            session_id=summary.session_id,
            turns=summary.turns,
            text_bytes=summary.text_bytes,
            updated=summary.updated,
        )


class SessionsReply(BaseModel):
    """The caller's sessions."""

    sessions: list[SummaryReply]


class StoredMessage(BaseModel):
    """A message of an earlier turn."""

    role: Role
    content: str


class SessionReply(BaseModel):
    """A session with all that is remembered of it."""

    session_id: str
    messages: list[StoredMessage]
    created: datetime
    updated: datetime
    expires_in_seconds: float

    @classmethod
    def of(cls, session: Session) -> "SessionReply":
        return cls(
            session_id=session.session_id,
            messages=[
                StoredMessage(role=message.role, content=message.content)
                for turn in session.turns
                for message in turn.messages
            ],
            created=session.created,
            updated=session.updated,
            expires_in_seconds=session.expires_in_seconds,
        )


@router.get("", response_model=SessionsReply, responses=_ERRORS)
async def list_sessions(caller: CallerDep, sessions: SessionsDep) -> SessionsReply:
    """List the caller's sessions."""
    return SessionsReply(sessions=[SummaryReply.of(summary) for summary in await sessions.list(caller.tenant)])


@router.get("/{session_id}", response_model=SessionReply, responses=_ERRORS)
async def read_session(session_id: SessionPath, caller: CallerDep, sessions: SessionsDep) -> SessionReply:
    """Show the messages of one session, oldest first."""
    session = await sessions.read(caller.tenant, session_id)
    if session is None:
        raise _unknown()
    return SessionReply.of(session)


@router.delete("/{session_id}", status_code=204, responses=_ERRORS)
async def delete_session(session_id: SessionPath, caller: CallerDep, sessions: SessionsDep) -> Response:
    """Forget a session, once the turn that it is in has ended: that would bring it back."""
    async with sessions.turn(caller.tenant, session_id):
        if not await sessions.delete(caller.tenant, session_id):
            raise _unknown()
    return Response(status_code=204)


def _unknown() -> SessionNotFound:
    return SessionNotFound("You have no session of this id; it may have expired.")
