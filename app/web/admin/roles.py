"""/v1/roles: rights and limits of keys, for callers who may manage keys."""

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
from app.web.admin.keys import LimitFields, LimitsResponse, RoleName
from app.web.http.dependencies import AccessDep, AdminDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute

router = APIRouter(prefix="/v1/roles", tags=["roles"], route_class=StrictRoute)

_ERRORS = error_responses(
    InvalidRequest, Unauthorized, Forbidden, RoleNotFound, Conflict, RateLimited, InternalError, StoreUnavailable
)

RolePath = Annotated[RoleName, Path()]
_ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/:-]{1,256}$")]


class RightsFields(StrictModel):
    """A role's rights."""

    models: Annotated[list[_ModelName], Field(max_length=100)] | None = Field(None, description="null: all models.")
    load_models: bool = False
    manage_keys: bool = False
    system_messages: bool = True
    raw_logprobs: bool = True
    control_tokens: bool = Field(
        True, description="Control tokens in prompts of token ids; only together with system_messages."
    )


class RoleFields(StrictModel):
    """A role's limits and rights."""

    limits: LimitFields = LimitFields()
    rights: RightsFields = RightsFields()

    def role(self, name: str) -> Role:
        models = self.rights.models
        rights = self.rights.model_dump() | {"models": None if models is None else tuple(models)}
        return Role(name=name, limits=self.limits.settings(), rights=Rights(**rights))


class RightsResponse(BaseModel):
    """A role's rights."""

    models: list[str] | None
    load_models: bool
    manage_keys: bool
    system_messages: bool
    raw_logprobs: bool
    control_tokens: bool


class RoleResponse(BaseModel):
    """A role."""

    name: str
    limits: LimitsResponse
    rights: RightsResponse

    @classmethod
    def of(cls, role: Role) -> "RoleResponse":
        return cls.model_validate(asdict(role))


class RoleListResponse(BaseModel):
    """All roles."""

    roles: list[RoleResponse]


@router.get("", response_model=RoleListResponse, responses=_ERRORS)
async def list_roles(caller: AdminDep, access: AccessDep) -> RoleListResponse:
    """List the roles."""
    return RoleListResponse(roles=[RoleResponse.of(role) for role in await access.roles.list()])


@router.get("/{name}", response_model=RoleResponse, responses=_ERRORS)
async def read_role(name: RolePath, caller: AdminDep, access: AccessDep) -> RoleResponse:
    """Show one role."""
    return RoleResponse.of(await access.roles.read(name))


@router.put("/{name}", response_model=RoleResponse, responses=_ERRORS)
async def put_role(name: RolePath, body: RoleFields, caller: AdminDep, access: AccessDep) -> RoleResponse:
    """Create or replace a role; it applies to its keys within five seconds."""
    role = body.role(name)
    await access.roles.put(role)
    return RoleResponse.of(role)


@router.delete("/{name}", status_code=204, responses=_ERRORS)
async def delete_role(name: RolePath, caller: AdminDep, access: AccessDep) -> Response:
    """Delete a role that no key uses."""
    await access.roles.delete(name)
    return Response(status_code=204)
