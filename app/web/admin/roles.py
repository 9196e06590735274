"""/v1/roles: what keys may do and how much, for those who may manage them.  Translation only."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field, StringConstraints

from app.access.roles import Role
from app.errors import (
    Conflict,
    Forbidden,
    InternalError,
    InvalidRequest,
    RateLimited,
    RoleNotFound,
    StoreUnavailable,
    Unauthorized,
)
from app.types import Rights
from app.web.admin.keys import LimitFields, LimitsReply, RoleName
from app.web.http.dependencies import AccessDep, AdminDep
from app.web.http.errors import document
from app.web.http.json_body import StrictModel, StrictRoute

router = APIRouter(prefix="/v1/roles", tags=["roles"], route_class=StrictRoute)

_ERRORS = document(
    InvalidRequest, Unauthorized, Forbidden, RoleNotFound, Conflict, RateLimited, InternalError, StoreUnavailable
)

RolePath = Annotated[RoleName, Path()]
_ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/:-]{1,256}$")]


class RightsFields(StrictModel):
    """What a role may do."""

    models: Annotated[list[_ModelName], Field(max_length=100)] | None = Field(None, description="null: all models.")
    load_models: bool = False
    manage_keys: bool = False
    system_messages: bool = True
    raw_logprobs: bool = True


class RoleFields(StrictModel):
    """A role, whole."""

    limits: LimitFields = LimitFields()
    rights: RightsFields = RightsFields()

    def role(self, name: str) -> Role:
        models = self.rights.models
        rights = self.rights.model_dump() | {"models": None if models is None else tuple(models)}
        return Role(name=name, limits=self.limits.settings(), rights=Rights(**rights))


class RightsReply(BaseModel):
    """What a role may do."""

    models: list[str] | None
    load_models: bool
    manage_keys: bool
    system_messages: bool
    raw_logprobs: bool


class RoleReply(BaseModel):
    """A role."""

    name: str
    limits: LimitsReply
    rights: RightsReply

    @classmethod
    def of(cls, role: Role) -> "RoleReply":
        return cls.model_validate(asdict(role))


class RolesReply(BaseModel):
    """All roles."""

    roles: list[RoleReply]


@router.get("", response_model=RolesReply, responses=_ERRORS)
async def list_roles(caller: AdminDep, access: AccessDep) -> RolesReply:
    """List the roles."""
    return RolesReply(roles=[RoleReply.of(role) for role in await access.roles.list()])


@router.get("/{name}", response_model=RoleReply, responses=_ERRORS)
async def read_role(name: RolePath, caller: AdminDep, access: AccessDep) -> RoleReply:
    """Show one role."""
    return RoleReply.of(await access.roles.read(name))


@router.put("/{name}", response_model=RoleReply, responses=_ERRORS)
async def put_role(name: RolePath, body: RoleFields, caller: AdminDep, access: AccessDep) -> RoleReply:
    """Put a role in the place of the one of this name, or make it; it holds for its keys within five seconds."""
    role = body.role(name)
    await access.roles.put(role)
    return RoleReply.of(role)


@router.delete("/{name}", status_code=204, responses=_ERRORS)
async def delete_role(name: RolePath, caller: AdminDep, access: AccessDep) -> Response:
    """Delete a role that no key has."""
    await access.roles.delete(name)
    return Response(status_code=204)
