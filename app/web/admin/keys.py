"""/v1/keys: API keys, for callers who may manage them.

A secret is shown when its key is created or rotated, and never again.
"""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field, StringConstraints

from app.access.keys import KeyRecord
from app.access.limits import LimitSettings
from app.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    KeyNotFound,
    RateLimited,
    RoleNotFound,
    StoreUnavailable,
    Unauthorized,
)
from app.web.http.dependencies import AccessDep, AdminDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.owner_name import OwnerName

MAX_PAGE = 200
MAX_SECONDS = 100 * 366 * 86_400
MAX_LIMIT = 10**15

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=StrictRoute)

_ERRORS = error_responses(
    InvalidRequest, Unauthorized, Forbidden, KeyNotFound, RoleNotFound, RateLimited, InternalError, StoreUnavailable
)

KeyPath = Annotated[str, Path(pattern=r"^[0-9A-Za-z]{1,64}$")]
RoleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
_Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None
_Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]


class LimitFields(StrictModel):
    """Limits; 0 means unlimited, null takes the role's or the configured limit."""

    monthly_tokens: _Limit = None
    requests_per_minute: _Limit = None
    burst: _Limit = None
    tokens_per_minute: _Limit = None
    parallel_requests: _Limit = None

    def settings(self) -> LimitSettings:
        return LimitSettings(**self.model_dump())


class LimitsResponse(BaseModel):
    """Limits as stored; null is unset."""

    monthly_tokens: int | None
    requests_per_minute: int | None
    burst: int | None
    tokens_per_minute: int | None
    parallel_requests: int | None


class CreateKey(StrictModel):
    """A new key."""

    role: RoleName = "standard"
    owner: OwnerName | None = Field(
        None, description="The tenant whose sessions and cached responses it uses; its own if null."
    )
    limits: LimitFields = LimitFields()
    expires_in_seconds: _Seconds | None = Field(None, description="null: it never expires.")


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class ChangeKey(StrictModel):
    """The fields to change; the others stay as they are."""

    role: RoleName = Field("", json_schema_extra=_without_default)
    owner: OwnerName | None = None
    limits: LimitFields = LimitFields()
    expires_in_seconds: _Seconds | None = None

    def values(self) -> dict[str, Any]:
        given = self.model_dump(include=self.model_fields_set & {"role", "owner"})
        if "expires_in_seconds" in self.model_fields_set:
            given["expires"] = _expiry(self.expires_in_seconds)
        return given | self.limits.model_dump(exclude_unset=True)


class RotateKey(StrictModel):
    """How long the old secret stays valid beside the new one."""

    overlap_seconds: Annotated[int, Field(ge=0, le=30 * 86_400)] = 3600


class KeyResponse(BaseModel):
    """A key without its secret."""

    id: str
    state: str = Field(examples=["active", "expired", "revoked"])
    last_four: str
    role: str
    owner: str | None
    limits: LimitsResponse
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    last_used: datetime | None
    previous_expires: datetime | None = Field(description="End of the previous secret's validity.")

    @classmethod
    def of(cls, record: KeyRecord, **more: str) -> Self:
        valid = record.valid_at(datetime.now(UTC))
        state = "active" if valid else "revoked" if record.revoked else "expired"
        return cls.model_validate({**asdict(record), "state": state, **more})


class NewKeyResponse(KeyResponse):
    """A key with its secret."""

    key: str


class KeyListResponse(BaseModel):
    """A page of keys."""

    keys: list[KeyResponse]
    next: str | None = Field(description="Pass it as `after` for the next page; null on the last one.")


@router.post("", response_model=NewKeyResponse, status_code=201, responses=_ERRORS)
async def create_key(body: CreateKey, caller: AdminDep, access: AccessDep) -> NewKeyResponse:
    """Create a key; its secret is shown in this response only."""
    expires = _expiry(body.expires_in_seconds)
    record, key = await access.keys.create(
        role=body.role, owner=body.owner, limits=body.limits.settings(), expires=expires
    )
    return NewKeyResponse.of(record, key=key)


@router.get("", response_model=KeyListResponse, responses=_ERRORS)
async def list_keys(
    caller: AdminDep,
    access: AccessDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Query(pattern=r"^[0-9A-Za-z]{1,64}$")] = None,
    owner: Annotated[OwnerName | None, Query()] = None,
    role: Annotated[RoleName | None, Query()] = None,
) -> KeyListResponse:
    """List keys in the order of their creation."""
    found = await access.keys.list(limit=limit + 1, after=after, owner=owner, role=role)
    page = [KeyResponse.of(record) for record in found[:limit]]
    return KeyListResponse(keys=page, next=page[-1].id if len(found) > limit else None)


@router.get("/{key_id}", response_model=KeyResponse, responses=_ERRORS)
async def read_key(key_id: KeyPath, caller: AdminDep, access: AccessDep) -> KeyResponse:
    """Show a key; its secret is stored nowhere."""
    return KeyResponse.of(await access.keys.read(key_id))


@router.patch("/{key_id}", response_model=KeyResponse, responses=_ERRORS)
async def change_key(key_id: KeyPath, body: ChangeKey, caller: AdminDep, access: AccessDep) -> KeyResponse:
    """Change role, owner, limits or expiry."""
    record = await access.keys.change(key_id, body.values())
    return KeyResponse.of(record)


@router.delete("/{key_id}", response_model=KeyResponse, responses=_ERRORS)
async def revoke_key(key_id: KeyPath, caller: AdminDep, access: AccessDep) -> KeyResponse:
    """Revoke a key: at once on this replica, within five seconds on every other."""
    record = await access.keys.revoke(key_id)
    return KeyResponse.of(record)


@router.post("/{key_id}/rotate", response_model=NewKeyResponse, responses=_ERRORS)
async def rotate_key(key_id: KeyPath, body: RotateKey, caller: AdminDep, access: AccessDep) -> NewKeyResponse:
    """Rotate a key's secret; the new one is shown in this response only, the old one stays valid for a while."""
    record, key = await access.keys.rotate(key_id, timedelta(seconds=body.overlap_seconds))
    return NewKeyResponse.of(record, key=key)


def _expiry(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
