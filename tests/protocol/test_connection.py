"""URLs: what a user may set in them, and what is decided by the program and refused."""

from __future__ import annotations

import pytest

from protocol.connection import check_url
from protocol.errors import StartError


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:secret@h:1/2?client_name=a&socket_connect_timeout=2",
        "rediss://h:1/0?ssl_ca_certs=/a.pem&ssl_cert_reqs=required&ssl_check_hostname=false",
        "unix:///tmp/s.sock?db=3&username=me&password=p",
        "redis+cluster://h:1,i:2?client_name=a",
    ],
)
def test_what_is_the_users_stays(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "option",
    ["protocol=3", "socket_timeout=0.5", "decode_responses=true", "retry_on_timeout=1", "health_check_interval=5",
     "max_connections=3", "socket_keepalive=1", "encoding=latin1", "no_such_option="],
)  # fmt: skip
@pytest.mark.parametrize("url", ["redis://me:secret@h:1/2?{}", "redis+cluster://h:1,i:2?client_name=a&{}"])
def test_what_the_program_decides_is_refused_by_name(url: str, option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(StartError, match=f"--redis-url: the option '{name}'") as refused:
        check_url(url.format(option))
    assert "secret" not in str(refused.value)
