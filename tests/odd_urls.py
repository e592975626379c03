# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Transport and database URLs of all kinds, for hypothesis.

Upper case stands in passwords and user names only: an upper-case letter in
what is shown of a URL is a piece of a credential.
"""

from __future__ import annotations

import dataclasses
import os
import string
from urllib.parse import quote, quote_plus

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: How many URLs the main properties are tried with.  The unit tests are to be
#: quick; ``CELLMW_URLS=2000`` looks further.
COUNT = int(os.environ.get("CELLMW_URLS", "200"))

many_urls = settings(
    max_examples=COUNT,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
some_urls = settings(many_urls, max_examples=max(50, COUNT // 10))

ODD = "@:/,%+{}#?& '\"\\=;[]<>|^`~!$*()üß€Ж\U0001f600"

SCHEMES = (
    "rabbit",
    "amqp",
    "kombu+memory",
    "cellmw-memory",
    "mysql+pymysql",
    "postgresql+psycopg2",
    "sqlite",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A URL, what is secret in it, and what is to be seen of it.

    :ivar shown: None where what is left to see is not told
    """

    url: str
    shown: str | None
    users: tuple[str, ...]
    passwords: tuple[str, ...]


def passwords(odd: str = ODD) -> st.SearchStrategy[str]:
    """Passwords with odd characters, and some letters between them."""
    return st.text(string.ascii_uppercase + odd, min_size=4, max_size=20).map(
        "HU{}NT".format
    )


users = st.text(string.ascii_uppercase, min_size=1, max_size=9)
names = st.text(string.ascii_lowercase + "-._", min_size=1, max_size=12)
hosts = st.one_of(
    names.map("h{}".format),
    st.sampled_from(
        ["10.0.0.17", "[::1]", "[fe80::1%eth0]", "[2001:db8::7]", "localhost"]
    ),
)
ports = st.one_of(st.just(""), st.integers(1, 65535).map(":{}".format))
paths = st.one_of(
    st.just(""),
    st.just("/"),
    names.map("/{}".format),
    names.map("//{}".format),
    st.just("/%2fcell-1"),
)
#: What is written and what is shown of it.
queries = st.lists(
    st.sampled_from(
        [
            ("heartbeat_timeout_threshold=4", "heartbeat_timeout_threshold=4"),
            ("charset=utf8mb4", "charset=utf8mb4"),
            ("ssl_ca=/etc/ssl/ca.pem", "ssl_ca=/etc/ssl/ca.pem"),
            ("rabbit_ha_queues=true", "rabbit_ha_queues=true"),
            ("password=HUNTER-TWO", "password=***"),
            ("ssl_key_password=12345", "ssl_key_password=***"),
            ("auth_token=%41%42", "auth_token=***"),
            ("options=-c%20X", "options=***"),
            ("HUNTER", "***"),
        ]
    ),
    max_size=3,
)


def encodings() -> st.SearchStrategy[object]:
    """Ways to write a password in a URL so that all drivers read the same."""
    return st.sampled_from(
        [
            lambda text: quote(text, safe=""),
            lambda text: quote_plus(text, safe=""),
            lambda text: quote(text, safe="!$&'()*+;="),
        ]
    )


@st.composite
def proper_urls(draw: st.DrawFn) -> Sample:
    """URLs with one to three hosts whose credentials are encoded."""
    scheme = draw(st.sampled_from(SCHEMES))
    encode = draw(encodings())
    written, shown, user_names, secrets = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        host = draw(hosts) + draw(ports)
        user, password = draw(users), draw(passwords())
        # draw() has no types here.
        written.append(f"{user}:{encode(password)}@{host}")  # type: ignore[operator]
        shown.append(f"***@{host}")
        user_names.append(user)
        secrets.append(password)
    path, query = draw(paths), draw(queries)
    if path == "" and query:
        path = "/"
    mark = "?" if query else ""
    return Sample(
        f"{scheme}://{','.join(written)}{path}{mark}"
        + "&".join(item for item, _ in query),
        f"{scheme}://{','.join(shown)}{path}{mark}"
        + "&".join(item for _, item in query),
        tuple(user_names),
        tuple(secrets),
    )


@st.composite
def raw_urls(draw: st.DrawFn) -> Sample:
    """URLs with one host and a password that nobody has encoded."""
    scheme = draw(st.sampled_from(SCHEMES))
    user, password = draw(users), draw(passwords())
    host, path = draw(hosts) + draw(ports), draw(paths)
    return Sample(
        f"{scheme}://{user}:{password}@{host}{path}",
        f"{scheme}://***@{host}{path}",
        (user,),
        (password,),
    )


@st.composite
def raw_clusters(draw: st.DrawFn) -> Sample:
    """URLs with several hosts, each with its port, and nothing encoded."""
    scheme = draw(st.sampled_from(SCHEMES))
    written, shown, user_names, secrets = [], [], [], []
    for _ in range(draw(st.integers(2, 3))):
        host = f"{draw(hosts)}:{draw(st.integers(1, 65535))}"
        user, password = draw(users), draw(passwords())
        written.append(f"{user}:{password}@{host}")
        shown.append(f"***@{host}")
        user_names.append(user)
        secrets.append(password)
    path = draw(paths)
    return Sample(
        f"{scheme}://{','.join(written)}{path}",
        f"{scheme}://{','.join(shown)}{path}",
        tuple(user_names),
        tuple(secrets),
    )


@st.composite
def template_urls(draw: st.DrawFn) -> Sample:
    """Templates, with names in place of some parts."""
    password = draw(st.one_of(st.just("{password}"), passwords(odd="!$*~")))
    user = draw(st.one_of(st.just("{username}"), users))
    number = draw(st.sampled_from(["", "1", "2"]))
    host = draw(st.one_of(st.just(f"{{hostname{number}}}"), hosts))
    port = draw(st.sampled_from(["", ":{port}", ":{port1}", ":5672"]))
    path = draw(st.sampled_from(["/{path}", "/cell-1", "/", ""]))
    rest = draw(st.sampled_from(["", "?{query}", "?{query}#{fragment}"]))
    scheme = draw(st.sampled_from(["{scheme}", "rabbit"]))
    return Sample(
        f"{scheme}://{user}:{password}@{host}{port}{path}{rest}",
        f"{scheme}://***@{host}{port}{path}{rest}",
        () if user == "{username}" else (user,),
        () if password == "{password}" else (password,),
    )


@st.composite
def broken_urls(draw: st.DrawFn) -> Sample:
    """URLs with something wrong; what is shown of them is not told."""
    sample = draw(st.one_of(proper_urls(), raw_urls()))
    breaks = [
        lambda url: url.replace("://", ":/", 1),
        lambda url: url.replace("://", ":", 1),
        lambda url: url.partition("://")[2],
        lambda url: "://" + url.partition("://")[2],
        lambda url: " " + url + "\n",
        lambda url: f'"{url}"',
        lambda url: url.replace("@", "@ ", 1),
        lambda url: url.rpartition("@")[0] + "@",
        lambda url: url.rpartition("@")[0] + "@host:56x72/vh",
        lambda url: url.rpartition("@")[0] + "@[::1/vh",
        lambda url: url.rpartition("@")[0] + "@ho st/vh",
        lambda url: url + "\x00" + url,
    ]
    if not any("@" in password for password in sample.passwords):
        # Where the host is missing, a password with an @ has one in it.
        breaks += [lambda url: url.partition("@")[0]]
    broken = draw(st.sampled_from(breaks))(sample.url)
    return Sample(broken, None, sample.users, sample.passwords)


def any_urls() -> st.SearchStrategy[Sample]:
    """All of them."""
    return st.one_of(
        proper_urls(),
        raw_urls(),
        raw_clusters(),
        template_urls(),
        broken_urls(),
    )


def has_host_in_password(sample: Sample) -> bool:
    """Whether ``@AB,`` in a password may read as a host for everybody."""
    return any("," in password for password in sample.passwords)
