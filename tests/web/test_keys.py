"""Keys, roles and what they allow, through the routes and over a real database."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.access.key_format import new_key
from app.errors import StoreUnavailable
from tests.web.access import ADMIN_KEY, Running, running


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as service:
        yield service


async def test_a_key_is_shown_once_and_lets_its_owner_in(service: Running):
    """Afterwards only its last four characters can be seen."""
    async with service.client() as admin:
        created = await admin.post("/v1/keys", json={"role": "standard", "owner": "anna"})
        shown = await admin.get(f"/v1/keys/{created.json()['id']}")

    assert (201, "active", "anna") == (created.status_code, created.json()["state"], created.json()["owner"])
    assert created.json()["key"][-4:] == shown.json()["last_four"]
    assert "key" not in shown.json()
    assert 200 == (await service.generate(created.json()["key"])).status_code


async def test_only_a_key_that_may_manage_keys_may(service: Running):
    """Every other one gets 403, on each of the routes."""
    key = await service.key(role="standard")
    async with service.client(key) as user:
        replies = [
            await user.post("/v1/keys", json={}),
            await user.get("/v1/keys"),
            await user.get("/v1/keys/x"),
            await user.patch("/v1/keys/x", json={}),
            await user.delete("/v1/keys/x"),
            await user.post("/v1/keys/x/rotate", json={}),
            await user.get("/v1/roles"),
            await user.put("/v1/roles/free", json={}),
            await user.delete("/v1/roles/free"),
            await user.get("/v1/usage?key=admin"),
            await user.post("/generate_apikey", json={"username": "mallory"}),
        ]

    assert {(403, "forbidden")} == {(reply.status_code, reply.json()["error"]) for reply in replies}


async def test_a_revoked_key_is_refused_at_once_where_it_was_revoked(service: Running):
    key = await service.key()
    assert 200 == (await service.generate(key)).status_code

    async with service.client() as admin:
        revoked = await admin.delete(f"/v1/keys/{key.split('_')[1]}")
        rotated = await admin.post(f"/v1/keys/{key.split('_')[1]}/rotate", json={})

    assert "revoked" == revoked.json()["state"]
    assert 401 == (await service.generate(key)).status_code
    assert 404 == rotated.status_code


async def test_a_rotated_key_is_good_until_the_overlap_ends(service: Running):
    """The id stays, so that its quota and its sessions do; without an overlap the old secret ends at once."""
    first = await service.key()
    key_id = first.split("_")[1]
    async with service.client() as admin:
        second = (await admin.post(f"/v1/keys/{key_id}/rotate", json={"overlap_seconds": 60})).json()
        both = [(await service.generate(key)).status_code for key in (first, second["key"])]
        third = (await admin.post(f"/v1/keys/{key_id}/rotate", json={"overlap_seconds": 0})).json()
    afterwards = [(await service.generate(key)).status_code for key in (first, second["key"], third["key"])]

    assert [200, 200] == both
    assert [401, 401, 200] == afterwards
    assert key_id == second["id"] == third["id"]


async def test_an_expired_key_is_refused(service: Running):
    """Also by a service that has let it in a moment ago."""
    seconds = 1
    key = await service.key(expires_in_seconds=seconds)
    before = await service.generate(key)
    if before.status_code == 401:  # the machine is very busy
        seconds = 20
        key = await service.key(expires_in_seconds=seconds)
        before = await service.generate(key)
    await asyncio.sleep(seconds + 0.1)
    async with service.client() as admin:
        state = (await admin.get(f"/v1/keys/{key.split('_')[1]}")).json()["state"]

    assert (200, 401, "expired") == (before.status_code, (await service.generate(key)).status_code, state)


async def test_keys_are_listed_in_pages(service: Running):
    """In the order of their creation, each exactly once, by owner or role if asked."""
    created = [(await service.key(owner=f"o{number % 2}")).split("_")[1] for number in range(5)]
    seen: list[str] = []
    after: dict[str, str] = {}
    async with service.client() as admin:
        while True:
            page = (await admin.get("/v1/keys", params={"limit": "2", **after})).json()
            seen += [key["id"] for key in page["keys"]]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        mine = (await admin.get("/v1/keys", params={"owner": "o1"})).json()["keys"]

    assert created == seen
    assert created[1::2] == [key["id"] for key in mine]


async def test_changes_hold_from_the_next_request_on(service: Running):
    """What is not named stays; null takes a word back."""
    key = await service.key(role="standard", owner="anna", limits={"monthly_tokens": 5, "burst": 9})
    url = f"/v1/keys/{key.split('_')[1]}"
    refused = await service.generate(key)
    async with service.client() as admin:
        changed = (await admin.patch(url, json={"limits": {"monthly_tokens": None}})).json()
        bad = await admin.patch(url, json={"role": "nobody"})

    assert (429, "quota_exceeded") == (refused.status_code, refused.json()["error"])
    assert (None, 9, "anna") == (changed["limits"]["monthly_tokens"], changed["limits"]["burst"], changed["owner"])
    assert 200 == (await service.generate(key)).status_code
    assert 404 == bad.status_code


async def test_a_role_says_what_its_keys_may(service: Running):
    """Models, system messages and log-probabilities; an edited role holds for keys that were in use before."""
    key = await service.key(role="free")
    system = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "max_tokens": 2}
    async with service.client(key) as user, service.client() as admin:
        before = [
            (await user.post("/v1/chat", json=system)).status_code,
            (await service.generate(key, logprobs=1)).status_code,
            (await service.generate(key)).status_code,
        ]
        rights = {"system_messages": True, "raw_logprobs": True, "control_tokens": True}
        put = await admin.put("/v1/roles/free", json={"rights": rights})
        after = [
            (await user.post("/v1/chat", json=system)).status_code,
            (await service.generate(key, logprobs=1)).status_code,
        ]
        await admin.put("/v1/roles/free", json={"rights": {"models": ["another"]}})
        other = await service.generate(key)

    assert [403, 403, 200] == before
    assert 200 == put.status_code
    assert [200, 200] == after
    assert (403, "forbidden") == (other.status_code, other.json()["error"])


async def test_roles_are_created_and_deleted_but_not_from_under_their_keys(service: Running):
    """The built-in ones stay, and so does the right of admins to manage keys."""
    async with service.client() as admin:
        names = [role["name"] for role in (await admin.get("/v1/roles")).json()["roles"]]
        created = await admin.put("/v1/roles/team", json={"limits": {"requests_per_minute": 3}})
        key = await service.key(role="team")
        in_use = await admin.delete("/v1/roles/team")
        await admin.patch(f"/v1/keys/{key.split('_')[1]}", json={"role": "free"})
        gone = await admin.delete("/v1/roles/team")
        again = await admin.delete("/v1/roles/team")
        built_in = await admin.delete("/v1/roles/standard")
        locked_out = await admin.put("/v1/roles/admin", json={"rights": {"manage_keys": False}})

    assert ["admin", "free", "standard"] == names
    assert 3 == created.json()["limits"]["requests_per_minute"]
    assert [409, 204, 404] == [in_use.status_code, gone.status_code, again.status_code]
    assert [409, 403] == [built_in.status_code, locked_out.status_code]


async def test_an_older_services_way_to_create_a_key_still_works(service: Running):
    """`POST /generate_apikey {"username"}` answers `{"api_key"}`."""
    async with service.client() as admin:
        reply = await admin.post("/generate_apikey", json={"username": "myuser"})

    assert ["api_key"] == list(reply.json())
    assert 200 == (await service.generate(reply.json()["api_key"])).status_code


@pytest.mark.parametrize(
    "body",
    [
        {"role": "no such role!"},
        {"owner": ""},
        {"owner": "x" * 200},
        {"limits": {"burst": -1}},
        {"limits": {"brust": 1}},
        {"limits": {"monthly_tokens": 10**18}},
        {"expires_in_seconds": 0},
        {"expires_in_seconds": 10**12},
        {"key": "mine"},
    ],
)
async def test_a_wrong_body_is_refused_with_the_fields_name(service: Running, body: dict[str, Any]):
    async with service.client() as admin:
        reply = await admin.post("/v1/keys", json=body)

    assert 400 == reply.status_code
    assert next(iter(body)) in reply.json()["message"]


async def test_no_key_that_is_not_there_is_let_in_whatever_it_looks_like(service: Running, subtests):
    """A well-formed one is looked up and compared like any other; a malformed one causes no query."""
    good = await service.key()
    key_id = good.split("_")[1]
    for key in (new_key(), new_key(key_id), good[:-1], good + "x", good.swapcase(), "llm__", "llm_" + "x" * 46):
        with subtests.test(key):
            assert 401 == (await service.generate(key)).status_code


async def test_every_attempt_compares_digests_whether_the_id_exists_or_not(service: Running, monkeypatch):
    """An unknown id and a wrong secret take the same path: the same comparisons of the same lengths."""
    key_id = (await service.key()).split("_")[1]
    seen: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def record(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", record)

    for key in (new_key(), new_key(key_id)):
        await service.access.authenticator.authenticate(key.encode())

    assert [(32, 32)] * 6 == seen


async def test_two_keys_of_one_id_never_share_an_identity(service: Running):
    """What is remembered of a key is remembered by the digest of all of it."""
    good = await service.key()
    assert 200 == (await service.generate(good)).status_code

    assert 401 == (await service.generate(new_key(good.split("_")[1]))).status_code


async def test_the_last_use_of_a_key_is_noted_now_and_then(service: Running):
    """Not by the request itself: that would write a row for each."""
    key = await service.key()
    await service.generate(key)
    async with service.client() as admin:
        before = (await admin.get(f"/v1/keys/{key.split('_')[1]}")).json()["last_used"]
        await service.access.note_used()
        after = (await admin.get(f"/v1/keys/{key.split('_')[1]}")).json()["last_used"]

    assert before is None
    assert after is not None


async def test_the_last_use_of_a_key_outlives_an_outage_and_the_end(service: Running, monkeypatch: pytest.MonkeyPatch):
    """What could not be written is written the next time, at the latest when the service stops."""
    key = await service.key()
    await service.generate(key)
    access, key_id = service.access, key.split("_")[1]

    async def away(moments: object) -> None:
        raise StoreUnavailable()

    with monkeypatch.context() as patch:
        patch.setattr(access.keys, "used", away)
        with pytest.raises(StoreUnavailable):
            await access.note_used()
    moment = access.authenticator.used[key_id]
    await access.close()

    assert moment == (await access.keys.read(key_id)).last_used


async def test_the_configured_key_is_an_admins_of_its_own_name(service: Running):
    report = await service.usage(ADMIN_KEY)

    assert ("admin", None) == (report["key_id"], report["limit"])


@pytest.mark.parametrize("victim", ["another key", "the configured key"])
async def test_an_owner_called_like_somebody_else_gets_nothing_of_theirs(service: Running, victim: str):
    """No session and no cached response, although the owner's name is their id to the letter."""
    key, name = ADMIN_KEY, "admin"
    if victim == "another key":
        key = await service.key()
        name = key.split("_")[1]
    spy = await service.key(owner=name)
    chat = {"messages": [{"role": "user", "content": "the secret word is swordfish"}]}

    async with service.client(key) as mine, service.client(spy) as theirs:
        await mine.post("/v1/chat", json={**chat, "session_id": "s"})
        replies = [await each.post("/v1/chat", json={**chat, "n": 2}) for each in (mine, mine, theirs)]
        listed = [(await each.get("/v1/sessions")).json()["sessions"] for each in (mine, theirs)]
        read = await theirs.get("/v1/sessions/s")

    assert [False, True, False] == [reply.json()["cached"] for reply in replies]
    assert [1, 0] == list(map(len, listed))
    assert 404 == read.status_code


async def test_keys_of_one_owner_share_sessions_and_responses(service: Running):
    """What an owner is for; a key without one has its own."""
    keys = [await service.key(owner=owner) for owner in ("anna", "anna", None)]
    prompt = {"prompt": "hello", "max_tokens": 3}

    cached = []
    for key in keys:
        async with service.client(key) as client:
            cached.append((await client.post("/v1/generate", json=prompt)).json()["cached"])

    assert [False, True, False] == cached


SYSTEM_TOKEN = 0x110000
"""The control token that the echo engine's template puts in front of a system message."""


@pytest.mark.parametrize("prompt", [[SYSTEM_TOKEN, 104, 105], [[104, 105], [104, SYSTEM_TOKEN]]], ids=["one", "two"])
async def test_a_key_that_may_send_no_system_message_cannot_send_one_as_tokens(service: Running, prompt: Any):
    """403 that names the field; ordinary tokens are let through, and so is everything of a key that may."""
    free, standard = [await service.key(role=role) for role in ("free", "standard")]
    body = {"model": "echo", "prompt": prompt, "max_tokens": 2}
    async with service.client(free) as user, service.client(standard) as allowed:
        refused = await user.post("/v1/completions", json=body)
        ordinary = await user.post("/v1/completions", json={**body, "prompt": [104, 105]})
        taken = await allowed.post("/v1/completions", json=body)

    assert (403, "prompt") == (refused.status_code, refused.json()["error"]["param"])
    assert refused.json()["error"]["message"].startswith("prompt ")
    assert [200, 200] == [ordinary.status_code, taken.status_code]


async def test_the_right_to_send_control_tokens_is_nothing_without_system_messages(service: Running):
    """A role that is put without a word on control tokens cannot open what its other rights close."""
    key = await service.key(role="free")
    body = {"model": "echo", "prompt": [SYSTEM_TOKEN, 104], "max_tokens": 2}
    statuses = []
    async with service.client() as admin, service.client(key) as user:
        before = (await admin.get("/v1/roles/free")).json()["rights"]
        for rights in ({"system_messages": False}, {}, {"control_tokens": False}):
            await admin.put("/v1/roles/free", json={"rights": rights})
            statuses.append((await user.post("/v1/completions", json=body)).status_code)

    assert not before["control_tokens"]
    assert [403, 200, 403] == statuses


USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "You are a pirate."}}]


@pytest.mark.parametrize(
    ("path", "body", "rights", "field"),
    [
        ("/v1/chat", {"logprobs": 1}, {"raw_logprobs": False}, "logprobs"),
        ("/v1/chat/completions", {"logprobs": True}, {"raw_logprobs": False}, "logprobs"),
        ("/v1/chat/completions", {"prompt_logprobs": 0}, {"raw_logprobs": False}, "logprobs"),
        ("/v1/chat", {}, {"system_messages": False}, "messages"),
        ("/v1/chat/completions", {}, {"system_messages": False}, "messages"),
        ("/v1/chat", {"messages": USER, "tools": TOOLS}, {"system_messages": False}, "tools"),
        ("/v1/chat/completions", {"messages": USER, "tools": TOOLS}, {"system_messages": False}, "tools"),
        ("/v1/chat", {}, {"models": ["another"]}, "model"),
        ("/v1/chat/completions", {}, {"models": ["another"]}, "model"),
    ],
)
async def test_what_a_role_does_not_allow_is_refused_with_the_fields_name(
    service: Running, path: str, body: dict[str, Any], rights: dict[str, Any], field: str
):
    """In the place where each dialect names fields."""
    key = await service.key(role="free")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    async with service.client() as admin, service.client(key) as user:
        await admin.put("/v1/roles/free", json={"rights": rights})
        reply = await user.post(path, json={"messages": messages, "max_tokens": 2, **body})

    error = reply.json()
    named = error["error"]["param"] if "param" in error["error"] else error["details"]["errors"][0]["field"]
    assert (403, field) == (reply.status_code, named)


async def test_a_configured_key_in_the_form_of_ours_is_not_the_row_of_its_id(tmp_path: Path):
    """A first key that is configured later has a row too: a rotated secret is counted, limited, revoked by itself."""
    key = new_key()
    key_id = key.split("_")[1]
    async with running(tmp_path, security={"api_key": key}) as service:
        await service.access.keys.create(role="admin", key=key)
        async with service.client(key) as admin:
            await admin.patch(f"/v1/keys/{key_id}", json={"role": "free", "limits": {"requests_per_minute": 1}})
            rotated = (await admin.post(f"/v1/keys/{key_id}/rotate", json={"overlap_seconds": 0})).json()["key"]
            used = [(await service.generate(each)).status_code for each in (rotated, rotated, key, key)]
            reports = [await service.usage(each) for each in (key, rotated)]
            await admin.delete(f"/v1/keys/{key_id}")
            revoked = [(await service.generate(each)).status_code for each in (rotated, key)]

    assert [200, 429, 200, 200] == used
    assert [("admin", None), (key_id, 100_000)] == [(report["key_id"], report["limit"]) for report in reports]
    assert [401, 200] == revoked
