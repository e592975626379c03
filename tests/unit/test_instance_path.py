# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which paths name an instance: the routes of the compute API, no others."""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from cellmw import instance_path

UUID = "6f70656e-7374-6163-6b20-346576657221"
OTHER = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
PREFIXES = (
    "",
    "/v2",
    "/v2.1",
    "/demo",
    f"/{OTHER}",
    "/0123456789abcdef0123456789abcdef",
    "/v2/demo",
    "/v2.1/demo",
    f"/v2/{OTHER}",
    f"/v2.1/{OTHER}",
    # Not names that a project has, but a segment is a segment.
    "/v2.1/servers",
    "/v2.1/v2.1",
    "/v2.1/a%2Fb",
)
ROUTES = (
    f"/servers/{UUID}",
    f"/servers/{UUID}/action",
    f"/servers/{UUID}/metadata",
    f"/servers/{UUID}/metadata/{OTHER}",
    f"/servers/{UUID}/tags/{OTHER}",
    f"/servers/{UUID}/os-interface/{OTHER}",
    f"/servers/{UUID}/os-volume_attachments/{OTHER}",
    f"/servers/{UUID}/migrations/{OTHER}/action",
    f"/servers/{UUID}/ips/private",
    f"/servers/{UUID}/remote-consoles",
    f"/servers/{UUID}/servers/{OTHER}",
    f"/os-volumes_boot/{UUID}",
    f"/os-volumes_boot/{UUID}/action",
    f"/os-fping/{UUID}",
)
find = instance_path.finder(instance_path.DEFAULT_PATTERNS)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_instance_route_is_found_behind_each_prefix(
    prefix: str, route: str
) -> None:
    assert find(prefix + route) == UUID


@pytest.mark.parametrize("route", ROUTES)
def test_a_slash_at_the_end_changes_nothing(route: str) -> None:
    assert find(f"/v2.1/demo{route}/") == UUID


@pytest.mark.parametrize("route", ROUTES)
def test_an_upper_case_uuid_is_given_in_lower_case(route: str) -> None:
    route = route.replace(UUID, UUID.upper())
    assert find(f"/v2.1/{OTHER.upper()}{route}") == UUID


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/v2.1",
        "/v2.1/",
        "/servers",
        "/servers/",
        "/servers/detail",
        f"/{UUID}",
        f"/{UUID}/servers",
        f"/{UUID}/servers/",
        f"/{UUID}/servers/detail",
        f"/v2.1/{UUID}/servers/detail",
        f"/v2.1/{UUID}/os-volumes_boot",
        # UUIDs of something else.
        f"/flavors/{UUID}",
        f"/images/{UUID}",
        f"/v2.1/demo/images/{UUID}/metadata/key",
        f"/os-server-groups/{UUID}",
        f"/os-volumes/{UUID}",
        f"/os-snapshots/{UUID}",
        f"/os-services/{UUID}",
        f"/os-hypervisors/{UUID}/uptime",
        f"/v2.1/demo/os-hypervisors/{UUID}/servers",
        f"/os-assisted-volume-snapshots/{UUID}",
        f"/os-console-auth-tokens/{UUID}",
        f"/os-keypairs/{UUID}",
        f"/os-instance_usage_audit_log/{UUID}",
        f"/os-migrations/{UUID}",
        f"/v2.1/demo/flavors/{UUID}/servers/{OTHER}",
        # Below what has nothing below it.
        f"/os-volumes_boot/{UUID}/metadata",
        f"/os-volumes_boot/{UUID}/action/{OTHER}",
        f"/os-fping/{UUID}/action",
        # A suffix, a doubled slash, another case.
        f"/servers/{UUID}.json",
        f"/v2.1/demo/servers/{UUID}.xml",
        f"//servers/{UUID}",
        f"/servers//{UUID}",
        f"/servers/{UUID}//",
        f"/servers/{UUID}//action",
        f"/servers/{UUID}/action//",
        f"/v2.1//servers/{UUID}",
        f"/v2.1//demo/servers/{UUID}",
        f"//v2.1/demo/servers/{UUID}",
        f"/Servers/{UUID}",
        f"/SERVERS/{UUID}/action",
        f"/v2.1/demo/OS-Fping/{UUID}",
        # Not a segment of its own.
        f"servers/{UUID}",
        f"/myservers/{UUID}",
        f"/serversx/{UUID}",
        f"/servers{UUID}",
        f"/servers/x{UUID}",
        f"/servers/{UUID}0",
        f"/servers/ {UUID}",
        f"/servers/{UUID} ",
        f"/servers/{UUID}\n",
        f"/servers/{UUID};version=2",
        f"/servers/{UUID}?a=b",
        # Not a UUID in its usual form.
        "/servers/1",
        f"/servers/{UUID.replace('-', '')}",
        f"/servers/{{{UUID}}}",
        f"/servers/urn:uuid:{UUID}",
        f"/servers/{UUID[:-1]}",
        f"/servers/{UUID[:-1]}g",
        f"/servers/{UUID[:-1]}\uff11",
        # More in front than a version and a project.
        f"/compute/v2.1/servers/{UUID}",
        f"/compute/v2.1/demo/servers/{UUID}",
        f"/v2.1/demo/more/servers/{UUID}",
        # Never decoded again.
        f"/servers%2F{UUID}",
        f"/v2.1%2Fdemo%2Fservers%2F{UUID}",
        f"/%73ervers/{UUID}",
        "/servers/%36" + UUID[1:],
        f"/servers/{UUID.replace('-', '%2D')}",
        f"/servers/{UUID}%2Faction",
        f"/servers/{UUID}%00",
    ],
)
def test_no_other_path_names_an_instance(path: str) -> None:
    assert find(path) is None
    assert plainly(path) is None


def plainly(
    path: str, patterns: tuple[str, ...] = instance_path.DEFAULT_PATTERNS
) -> str | None:
    """What the contract says of patterns, to the letter."""
    for pattern in patterns:
        found = re.match(pattern, path)
        if found is not None:
            return found["instance_uuid"].lower()
    return None


RESOURCES: dict[str, Callable[[list[str]], bool]] = {
    # What may follow the instance's UUID.
    "servers": lambda rest: True,
    "os-volumes_boot": lambda rest: rest in ([], ["action"]),
    "os-fping": lambda rest: not rest,
}
_uuid_form = re.compile(
    "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII
)


def by_segments(path: str) -> str | None:
    """What the routes' description says, without a regular expression."""
    if not path.startswith("/"):
        return None
    segments = path[1:].split("/")
    if len(segments) > 1 and not segments[-1]:
        segments.pop()
    if "" in segments:
        return None
    for version in (0, 1):
        if version and segments[0] not in {"v2", "v2.1"}:
            break
        for project in (0, 1):
            head = segments[version + project :][:2]
            rest = segments[version + project + 2 :]
            if len(head) == 2 and _uuid_form.fullmatch(head[1]):
                below = RESOURCES.get(head[0])
                if below is not None and below(rest):
                    return head[1].lower()
    return None


some_uuid = st.uuids().flatmap(
    lambda value: st.sampled_from([str(value), str(value).upper()])
)
segment = st.one_of(
    some_uuid,
    st.sampled_from(
        [
            "",
            "v2",
            "v2.1",
            "V2.1",
            "v3",
            "servers",
            "Servers",
            "detail",
            "action",
            "metadata",
            "tags",
            "os-volumes_boot",
            "os-fping",
            "flavors",
            "images",
            "demo",
            "%2F",
            "servers%2F",
        ]
    ),
    some_uuid.map(lambda text: f"{text}.json"),
    some_uuid.map(lambda text: text.replace("-", "")),
    some_uuid.map(lambda text: f"{text}\n"),
    # Latin-1, as servers decode PATH_INFO (PEP 3333).
    st.text(st.characters(max_codepoint=255), max_size=5),
)
path_of_segments = st.lists(segment, max_size=8).map(
    lambda segments: "".join(f"/{text}" for text in segments)
)
a_segment = st.text(
    st.characters(max_codepoint=255, exclude_characters="/"), min_size=1
)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(path=path_of_segments)
def test_what_is_found_is_what_the_routes_say(path: str) -> None:
    assert find(path) == by_segments(path)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(path=path_of_segments | st.text())
def test_the_quick_finder_finds_what_the_default_patterns_find(
    path: str,
) -> None:
    assert find(path) == plainly(path)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    version=st.sampled_from(["", "/v2", "/v2.1"]),
    project=st.just("") | a_segment.map(lambda text: f"/{text}"),
    value=some_uuid,
    below=st.lists(a_segment, max_size=4),
)
def test_servers_and_everything_below_is_found_whatever_the_segments_hold(
    version: str, project: str, value: str, below: list[str]
) -> None:
    path = "/".join([f"{version}{project}/servers/{value}", *below])
    assert find(path) == str(uuids.UUID(value))


@hypothesis.settings(deadline=None)
@hypothesis.given(
    path=st.text()
    | st.text(st.characters(codec="utf-16", categories=None))
    | st.binary().map(lambda raw: raw.decode("latin-1"))
    | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    in_front=st.booleans(),
)
def test_no_path_makes_it_raise(path: str, in_front: bool) -> None:
    for text in (path, f"/servers/{UUID}/{path}", f"/{path}/servers/{UUID}"):
        found = find(text)
        assert found is None or _uuid_form.fullmatch(found)


def test_a_path_of_any_length_is_looked_at_in_no_time() -> None:
    # A pattern that tries all ways to split it would not come back.
    for unit in ("/v2.1", "/servers", f"/{UUID}", "-", "/-", "a/"):
        assert find(unit * 10_000 + "//") is None
    assert find(f"/servers/{UUID}" + "/a" * 10_000) == UUID


def test_patterns_are_tried_in_their_order_from_the_beginning() -> None:
    first = r"/a/(?P<instance_uuid>[^/]+)"
    second = r"/a/[^/]+/(?P<instance_uuid>[^/]+)"
    assert instance_path.finder([first, second])(f"/a/{UUID}/{OTHER}") == UUID
    assert instance_path.finder([second, first])(f"/a/{UUID}/{OTHER}") == OTHER
    # re.match: from the beginning, not to the end.
    assert instance_path.finder([first])(f"/b/a/{UUID}") is None
    assert instance_path.finder([first])(f"/a/{UUID}/more") == UUID


def test_a_pattern_of_ones_own_finds_the_uuid_in_lower_case() -> None:
    own = instance_path.finder([r"(?i)/vms/(?P<instance_uuid>[0-9a-f-]+)\Z"])
    assert own(f"/VMs/{UUID.upper()}") == UUID
    assert own(f"/servers/{UUID}") is None


def test_what_a_group_holds_counts_only_if_it_is_a_uuid() -> None:
    own = instance_path.finder(
        [
            r"/vms/(?P<instance_uuid>[^/]+)",
            r"/vms/detail(?:/(?P<instance_uuid>.*))?",
        ]
    )
    assert own("/vms/detail") is None
    assert own(f"/vms/{UUID}") == UUID
    assert own(f"/vms/detail/{UUID}") == UUID


@pytest.mark.parametrize(
    "pattern", ["(", "/servers/(?P<uuid>.*)", "/servers/(.*)", "[z-a]", ""]
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError):
        instance_path.compile_pattern(pattern)
    with pytest.raises(ValueError):
        instance_path.finder([*instance_path.DEFAULT_PATTERNS, pattern])
