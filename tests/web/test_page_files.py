"""The files of the chat page: who gets them, from which paths, and what their headers allow."""

import hashlib
import re
from importlib.resources import files

import pytest

from app.web.page import routes
from scripts import vendor_page
from tests.web.harness import make_web

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


async def test_browsers_get_the_page_and_programs_what_they_got_before():
    """Without a key; who asks for anything, for JSON, or for nothing is a program."""
    web = await make_web()
    async with web.client(nothing="") as client:
        page = await client.get("/", headers=BROWSER)
        programs = [await client.get("/", headers={"Accept": kind}) for kind in ("*/*", "application/json", "text/*")]

    assert (200, "text/html; charset=utf-8") == (page.status_code, page.headers["content-type"])
    assert "Accept" == page.headers["vary"]
    for reply in programs:
        assert {"name", "version", "links"} == set(reply.json())


async def test_the_page_allows_only_its_own_files_and_no_inline_script_or_style():
    web = await make_web()
    async with web.client(nothing="") as client:
        page = await client.get("/", headers=BROWSER)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))

    assert ("'none'", "'self'", "'self'", "'self'") == (
        policy["default-src"],
        policy["script-src"],
        policy["style-src"],
        policy["connect-src"],
    )
    assert ("'none'", "'script'", "dompurify") == (
        policy["frame-ancestors"],
        policy["require-trusted-types-for"],
        policy["trusted-types"],
    )
    assert not re.search(r"unsafe|https?:|[*]", str(policy))
    assert "set-cookie" not in page.headers
    assert [] == re.findall(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=|javascript:", page.text)
    assert [] == re.findall(r'(?:src|href)="(?!page/|#|docs")', page.text)


async def test_a_browser_that_has_a_file_is_told_so():
    """By its tag, also one among several or a weak one; the tag changes with the file."""
    web = await make_web()
    async with web.client(nothing="") as client:
        for path, headers in (("/", BROWSER), ("/page/main.js", {})):
            first = await client.get(path, headers=headers)
            tag = first.headers["etag"]
            again = await client.get(path, headers={**headers, "If-None-Match": f'"other", W/{tag}'})
            other = await client.get(path, headers={**headers, "If-None-Match": '"other"'})

            assert (304, b"", tag) == (again.status_code, again.content, again.headers["etag"])
            assert (200, "no-cache") == (other.status_code, other.headers["cache-control"])
            assert other.content == first.content


async def test_every_file_that_the_page_names_is_served_with_its_type():
    web = await make_web()
    table = routes.page_files()
    async with web.client(nothing="") as client:
        replies = {name: await client.get(f"/page/{name}") for name in table}

    assert {200} == {reply.status_code for reply in replies.values()}
    for name, reply in replies.items():
        expected = "text/javascript" if name.endswith(".js") else reply.headers["content-type"]
        assert reply.headers["content-type"].startswith(expected)
        folder = name.rpartition("/")[0]
        imported = re.findall(r"""(?:from|import)[ (]"(\.[^"]+)\"""", reply.text) if "vendor" not in name else []
        for path in imported:
            parts = [*folder.split("/")] if folder else []
            for part in path.split("/"):
                parts = parts[:-1] if part == ".." else parts if part == "." else [*parts, part]
            assert "/".join(parts) in table, f"{name} imports {path}"


@pytest.mark.parametrize(
    "path", ["routes.py", "../__init__.py", "vendor/../routes.py", "%2e%2e/routes.py", "__init__.py", "", "admin"]
)
async def test_no_other_file_is_served(path):
    """A stranger is told nothing, and a caller that there is none."""
    web = await make_web()
    async with web.client(nothing="") as stranger, web.client() as caller:
        replies = [await each.get(f"http://test/page/{path}") for each in (stranger, caller)]

    assert [401, 404] == [reply.status_code for reply in replies]


async def test_an_operator_can_switch_the_page_off():
    web = await make_web(security={"page": False})
    async with web.client() as client:
        root = await client.get("/", headers=BROWSER)
        file = await client.get("/page/main.js")

    assert {"name", "version", "links"} == set(root.json())
    assert 404 == file.status_code


def test_the_libraries_are_those_that_were_fetched():
    """Each with its license; a file that was changed by hand fails here."""
    vendor = files("app.web.page").joinpath("vendor")
    lines = vendor.joinpath(vendor_page.SUMS).read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}

    assert sums == {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in vendor.iterdir()
        if each.name != vendor_page.SUMS
    }
    for package in vendor_page.PACKAGES:
        assert {package.stored, package.stored.replace(".js", ".license.txt")} < set(sums)
