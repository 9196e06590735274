"""/v1/keys: API keys, for those who may manage them.  Translation only.

A key is shown when it is made and when it is rotated, and never again.
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
from app.web.http.errors import document
from app.web.http.json_body import StrictModel, StrictRoute

MAX_PAGE = 200
MAX_SECONDS = 100 * 366 * 86_400
MAX_LIMIT = 10**15

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=StrictRoute)
seed_router = APIRouter(tags=["keys"], route_class=StrictRoute)

_ERRORS = document(
    InvalidRequest, Unauthorized, Forbidden, KeyNotFound, RoleNotFound, RateLimited, InternalError, StoreUnavailable
)

KeyPath = Annotated[str, Path(pattern=r"^[0-9A-Za-z]{1,64}$")]
RoleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
OwnerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._ -]{1,128}$")]
"""No address: what is kept of people here is in every report."""
_Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None
_Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]


class LimitFields(StrictModel):
    """Limits; 0 is none at all, null leaves it to the role or the configuration."""

    monthly_tokens: _Limit = None
    requests_per_minute: _Limit = None
    burst: _Limit = None
    tokens_per_minute: _Limit = None
    parallel_requests: _Limit = None

    def settings(self) -> LimitSettings:
        return LimitSettings(**self.model_dump())


class LimitsReply(BaseModel):
    """Limits as they are stored: null says nothing."""

    monthly_tokens: int | None
    requests_per_minute: int | None
    burst: int | None
    tokens_per_minute: int | None
    parallel_requests: int | None


class CreateKey(StrictModel):
    """A new key."""

    role: RoleName = "standard"
    owner: OwnerName | None = Field(None, description="Whose sessions and cached answers it uses; its own if null.")
    limits: LimitFields = LimitFields()
    expires_in_seconds: _Seconds | None = Field(None, description="null: it never expires.")


class ChangeKey(StrictModel):
    """What is to change; what is not named stays."""

    role: RoleName = ""
    owner: OwnerName | None = None
    limits: LimitFields = LimitFields()
    expires_in_seconds: _Seconds | None = None

    def values(self) -> dict[str, Any]:
        given = self.model_dump(include=self.model_fields_set & {"role", "owner"})
        if "expires_in_seconds" in self.model_fields_set:
            given["expires"] = _moment(self.expires_in_seconds)
        return given | self.limits.model_dump(exclude_unset=True)


class RotateKey(StrictModel):
    """How long the old secret is good beside the new one."""

    overlap_seconds: Annotated[int, Field(ge=0, le=30 * 86_400)] = 3600


class KeyReply(BaseModel):
    """What may be known of a key."""

    id: str
    state: str = Field(examples=["active", "expired", "revoked"])
    last_four: str
    role: str
    owner: str | None
    limits: LimitsReply
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    last_used: datetime | None
    previous_expires: datetime | None = Field(description="Until when the secret before the last rotation is good.")

    @classmethod
    def of(cls, record: KeyRecord, **more: str) -> Self:
        good = record.good_at(datetime.now(UTC))
        state = "active" if good else "revoked" if record.revoked else "expired"
        return cls.model_validate({**asdict(record), "state": state, **more})


class NewKeyReply(KeyReply):
    """A key with its secret, this one time."""

    key: str


class KeysReply(BaseModel):
    """A page of keys."""

    keys: list[KeyReply]
    next: str | None = Field(description="Pass it as `after` for the next page; null on the last one.")


@router.post("", response_model=NewKeyReply, status_code=201, responses=_ERRORS)
async def create_key(body: CreateKey, caller: AdminDep, access: AccessDep) -> NewKeyReply:
    """Make a key; its secret is shown in this answer only."""
    expires = _moment(body.expires_in_seconds)
    record, key = await access.keys.create(
        role=body.role, owner=body.owner, limits=body.limits.settings(), expires=expires
    )
    return NewKeyReply.of(record, key=key)


@router.get("", response_model=KeysReply, responses=_ERRORS)
async def list_keys(
    caller: AdminDep,
    access: AccessDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Query(pattern=r"^[0-9A-Za-z]{1,64}$")] = None,
    owner: Annotated[OwnerName | None, Query()] = None,
    role: Annotated[RoleName | None, Query()] = None,
) -> KeysReply:
    """List keys in the order of their making."""
    found = await access.keys.list(limit=limit + 1, after=after, owner=owner, role=role)
    page = [KeyReply.of(record) for record in found[:limit]]
    return KeysReply(keys=page, next=page[-1].id if len(found) > limit else None)


@router.get("/{key_id}", response_model=KeyReply, responses=_ERRORS)
async def read_key(key_id: KeyPath, caller: AdminDep, access: AccessDep) -> KeyReply:
    """Show a key without its secret, which nobody has."""
    return KeyReply.of(await access.keys.read(key_id))


@router.patch("/{key_id}", response_model=KeyReply, responses=_ERRORS)
async def change_key(key_id: KeyPath, body: ChangeKey, caller: AdminDep, access: AccessDep) -> KeyReply:
    """Change role, owner, limits or expiry."""
    return KeyReply.of(await access.keys.change(key_id, body.values()))


@router.delete("/{key_id}", response_model=KeyReply, responses=_ERRORS)
async def revoke_key(key_id: KeyPath, caller: AdminDep, access: AccessDep) -> KeyReply:
    """End a key for good: at once here, within five seconds on every other replica."""
    return KeyReply.of(await access.keys.revoke(key_id))


@router.post("/{key_id}/rotate", response_model=NewKeyReply, responses=_ERRORS)
async def rotate_key(key_id: KeyPath, body: RotateKey, caller: AdminDep, access: AccessDep) -> NewKeyReply:
    """Give a key a new secret, shown in this answer only; the old one stays good for a while."""
    record, key = await access.keys.rotate(key_id, timedelta(seconds=body.overlap_seconds))
    return NewKeyReply.of(record, key=key)


class GenerateApiKey(StrictModel):
    """Whose the new key is."""

    username: OwnerName


class GeneratedApiKey(BaseModel):
    """The key, this one time."""

    api_key: str


@seed_router.post("/generate_apikey", response_model=GeneratedApiKey, responses=_ERRORS)
async def generate_apikey(body: GenerateApiKey, caller: AdminDep, access: AccessDep) -> GeneratedApiKey:
    """Make a key of the role standard, in the words of an older service."""
    _, key = await access.keys.create(role="standard", owner=body.username)
    return GeneratedApiKey(api_key=key)


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
