# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which paths name an instance: the routes of the compute API, no others."""

from __future__ import annotations

import re
import time
import uuid as uuids
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from cellmw import instance_path, lenient_path

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


def is_ambiguous(
    path: str, patterns: tuple[str, ...] = instance_path.DEFAULT_PATTERNS
) -> bool:
    """Ask both, as the filter does."""
    return bool(instance_path.quick_check(patterns)(path)) and (
        lenient_path.checker(patterns)(path)
    )


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
        # Not a segment of its own.
        f"/myservers/{UUID}",
        f"/serversx/{UUID}",
        f"/servers{UUID}",
        # No UUID.
        "/servers/1",
        f"/servers/{UUID[:-1]}",
        f"/servers/{UUID[:-1]}g",
        # More in front than a version and a project.
        f"/compute/v2.1/servers/{UUID}",
        f"/compute/v2.1/demo/servers/{UUID}",
        f"/v2.1/demo/more/servers/{UUID}",
    ],
)
def test_no_reader_sees_an_instance_in_another_route(path: str) -> None:
    assert find(path) is None
    assert plainly(path) is None
    assert not is_ambiguous(path)


@pytest.mark.parametrize(
    "path",
    [
        # A suffix, a doubled slash, another case.
        f"/servers/{UUID}.json",
        f"/v2.1/demo/servers/{UUID}.xml",
        f"/v2.1/demo/os-fping/{UUID}.json/",
        f"/v2.1/demo/os-volumes_boot/{UUID}/action;x",
        f"//servers/{UUID}",
        f"/servers//{UUID}",
        f"/servers/{UUID}//",
        f"/servers/{UUID}//action",
        f"/servers/{UUID}/action//",
        f"/v2.1//servers/{UUID}",
        f"/v2.1//demo/servers/{UUID}",
        f"//v2.1/demo/servers/{UUID}",
        f"/V2.1/demo/servers/{UUID}",
        f"/Servers/{UUID}",
        f"/SERVERS/{UUID}/action",
        f"/v2.1/demo/OS-Fping/{UUID}",
        # Other separators, and segments that stand for none.
        f"/servers\\{UUID}",
        f"/servers/./{UUID}",
        f"/servers/x/../{UUID}",
        f"/servers/../{UUID}",
        f"/more/than/that/../../servers/{UUID}",
        f"/a/..;x/demo/servers/{UUID}",
        f"/v2.1/demo/x/../servers/{UUID}",
        f"/servers/;x/{UUID}",
        f"/servers/ /{UUID}",
        # More than the UUID in its segment.
        f"/servers/x{UUID}",
        f"/servers/{UUID}0",
        f"/servers/ {UUID}",
        f"/servers/{UUID} ",
        f"/servers/{UUID}\n",
        f"/servers/{UUID}\n/action",
        f"/servers/{UUID}\t",
        f"/servers/{UUID}\0",
        f"/servers/{UUID}\x85",
        f"/servers/{UUID}\xa0",
        f"/servers/{UUID}\xc2\xa0",
        f"/servers/{UUID}\xe2\x80\x8b",
        f"/servers/\xef\xbb\xbf{UUID}",
        f"/servers/{UUID[:9]}\x01{UUID[9:]}",
        f"/servers/{UUID};version=2",
        f"/servers/{UUID},",
        f"/servers/{UUID}?a=b",
        f"/servers/{UUID}#a",
        f"/servers;x=1/{UUID}",
        f"/servers.json/{UUID}",
        f"/servers /{UUID}",
        f"/ser\x00vers/{UUID}",
        f"/s\xc3\xa9rvers/{UUID}",
        # A UUID in another form.
        f"/servers/{UUID.replace('-', '')}",
        f"/servers/{UUID.replace('-', '').upper()}",
        f"/servers/{UUID.replace('-', '_')}",
        f"/servers/{{{UUID}}}",
        f"/servers/urn:uuid:{UUID}",
        "/servers/" + "-".join(UUID),
        # Python's parser takes these for numbers of 32 digits.
        "/servers/0x" + UUID.replace("-", "")[2:],
        "/servers/+" + UUID.replace("-", "")[1:],
        "/servers/6f_" + UUID.replace("-", "")[3:],
        # As UTF-8: a full-width digit, an accent; other alphabets' digits.
        f"/servers/{UUID[:-1]}\uff11",
        f"/servers/{UUID[:-1]}\xef\xbc\x91",
        f"/servers/6\xef\xbd\x86{UUID[2:]}",
        f"/servers/{UUID.replace('e', chr(0xC3) + chr(0xA9))}",
        f"/servers/{UUID[:-1]}\xd9\xa1",
        # MariaDB: "ae" and "d" in the collation uca1400_ai_ci.
        f"/servers/{OTHER.replace('d', chr(0xC3) + chr(0xB0))}",
        "/servers/\xc3\xa6" + UUID[2:],
        # Decoded once more.
        f"/servers%2F{UUID}",
        f"/v2.1%2Fdemo%2Fservers%2F{UUID}",
        f"/%73ervers/{UUID}",
        "/servers/%36" + UUID[1:],
        "/servers/%252536" + UUID[1:],
        f"/servers/{UUID.replace('-', '%2D')}",
        f"/servers/{UUID}%2Faction",
        f"/servers/{UUID}%00",
        f"/servers/{UUID}%0A",
        f"/servers%5c{UUID}",
    ],
)
def test_another_reader_may_see_an_instance(path: str) -> None:
    assert find(path) is None
    assert plainly(path) is None
    assert is_ambiguous(path)


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
    if find(path) is not None:
        assert instance_path.quick_check(instance_path.DEFAULT_PATTERNS)(path)


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
        assert is_ambiguous(text) in (True, False)


def test_a_path_of_any_length_is_looked_at_in_no_time() -> None:
    # A pattern that tries all ways to split it would not come back.
    for unit in ("/v2.1", "/servers", f"/{UUID}", "-", "/-", "a/"):
        assert find(unit * 10_000 + "//") is None
    assert find(f"/servers/{UUID}" + "/a" * 10_000) == UUID


UNITS = (
    *("/a", "/", "/.", "/..", "%25", "%2541", "a;", ";", "{", "urn:", "0x"),
    *("_", "a_", "\n", " ", "/ ", "-", "f", "\\", "/servers", "/v2.1"),
    *(f"/{UUID}", f"/{UUID}.", f"/servers/{UUID}x"),
    *("\xff", "\xc3\xa9", "\xcc\x81", "\xcc\x81\xcc\x95", "\xef\xbc\x91"),
)


def seconds_for(path: str) -> float:
    """The shortest of some, so that others on the machine do not count."""
    check = lenient_path.checker(instance_path.DEFAULT_PATTERNS)
    taken = []
    for _ in range(3):
        began = time.thread_time()
        check(path)
        taken.append(time.thread_time() - began)
    return min(taken)


@pytest.mark.parametrize("length", range(33, 120))
def test_the_quick_check_lets_no_long_segment_pass(length: int) -> None:
    default = instance_path.quick_check(instance_path.DEFAULT_PATTERNS)
    own = instance_path.quick_check(["/(?P<instance_uuid>.*)"])
    for size in (31, 32, 36, 40):
        for begin in range(1, length - size + 1):
            # Slashes wherever none is in the segment.
            path = "/" * begin + "x" * size
            path += "/" * (length - len(path))
            assert bool(own(path)) is (size >= 32)
            # Behind a word, or together with one in front of a backslash.
            if (begin >= 9 and size >= 32) or size >= 40:
                assert default(path)


@pytest.mark.parametrize("front", ["", "/servers/"])
def test_looking_for_other_readers_takes_time_in_proportion(
    front: str,
) -> None:
    for unit in UNITS:
        short, long = (
            front + unit * (size // len(unit)) + "\xff/"
            for size in (1000, 16000)
        )
        # 16 times as long; a square would take 256 times as long.
        bound = 64 * max(seconds_for(short), 20e-6)
        assert seconds_for(long) < bound, repr(unit)


@pytest.mark.parametrize(
    "pattern, names, ambiguous, other",
    [
        (
            r"/vms/(?P<instance_uuid>[0-9a-f-]{36})(?:/action)?\Z",
            f"/vms/{UUID}",
            (f"/VMs/{UUID}\n", f"/vms//{UUID}", f"/vms/{UUID}/action;a=b"),
            (f"/vms/{UUID}/more", f"/more/vms/{UUID}", f"/images/{UUID}"),
        ),
        (
            # A suffix and a prefix of its own, and a group within the group.
            r"/VMs/vm-(?P<instance_uuid>(?:[0-9a-f]|-){36})[.]json\Z",
            f"/VMs/vm-{UUID}.json",
            (f"/vms/VM-{UUID.upper()}.json", f"/VMs/vm-{UUID} .json"),
            (f"/VMs/{UUID}", f"/VMs/vm-{UUID}.xml"),
        ),
        (
            # It stands first, behind a project, before a slash.
            r"/[0-9a-f]{32}/(?P<instance_uuid>[^][()]{36})/\Z",
            f"/{'a' * 32}/{UUID}/",
            (f"/{'a' * 32}/{UUID}/./", f"/{'A' * 32}/{UUID}/"),
            (f"/demo/{UUID}/", f"/{'a' * 32}/x/{UUID}/"),
        ),
        (
            # What refers to a group within the group.
            r"/(?P<instance_uuid>(?P<a>.{8})-[^/]{27})/(?P=a)\Z",
            f"/{UUID}/{UUID[:8]}",
            (f"/{UUID}/./{UUID[:8]}",),
            (f"/{UUID}/{OTHER[:8]}",),
        ),
    ],
)
def test_ones_own_patterns_are_read_as_others_may(
    pattern: str,
    names: str,
    ambiguous: tuple[str, ...],
    other: tuple[str, ...],
) -> None:
    own = instance_path.finder([pattern])
    assert own(names) == UUID
    assert instance_path.quick_check([pattern])(names)
    for path in ambiguous:
        assert own(path) is None
        assert is_ambiguous(path, (pattern,)), path
    for path in other:
        assert own(path) is None
        assert not is_ambiguous(path, (pattern,)), path


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
