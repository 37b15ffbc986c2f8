"""Downloads images from http: and https: URLs, if the operator enables it.

A client could use these downloads to reach hosts in the server's internal network (SSRF). Therefore the server
connects only to public IP addresses, also for host names and redirects. The IP address that is checked is the one that
is connected to, so DNS rebinding does not bypass the check. Proxy settings of the environment are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeAlias

import certifi
import httpcore
import httpx

from jinaclip.server.errors import Problem

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
REDIRECTS = 5
AT_ONCE = 16  # concurrent downloads
HEADERS = {"User-Agent": f"jinaclip/{version('jinaclip')}", "Accept": "image/*", "Accept-Encoding": "identity"}
# IPv6 prefixes that count as public but embed an IPv4 address that may be private: NAT64, Teredo, 6to4.
TUNNELS = [ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")]


def is_public(address: str, allow: Sequence[Network] = ()) -> bool:
    """Whether the server may connect to an IP address.

    Args:
        address: the IP address.
        allow: networks that are allowed even if they are not public.
    """
    found: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if any(found in network for network in allow):
        return True
    tunnelled = any(found in network for network in TUNNELS)
    return found.is_global and not found.is_multicast and not found.is_reserved and not tunnelled


class Fetcher:
    """Downloads images. Use it from one event loop.

    Args:
        allow: networks that are allowed even if they are not public.
        most_bytes: the largest size of an image file, in bytes.
        timeout_s: the longest time for one image, including redirects, in seconds.
    """

    def __init__(self, *, allow: Iterable[Network] = (), most_bytes: int, timeout_s: float) -> None:
        self._most_bytes, self._timeout_s = most_bytes, timeout_s
        # The CA certificates are those of certifi, or of the file in OpenSSL's variable SSL_CERT_FILE.
        context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
        network = _PublicNetwork(tuple(allow))
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_connections=AT_ONCE, max_keepalive_connections=0, network_backend=network
        )
        self._downloads = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """Download the content of a URL.

        Raises:
            Problem: 403 if the host's IP address is not public, 422 if the download fails or times out. The message
                contains no content of the response.
        """
        async with self._downloads:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._followed(url)
            except TimeoutError:
                raise _failed(f"the download took more than {self._timeout_s:g} s") from None
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
                raise _failed(f"the connection failed ({type(error).__name__})") from None

    async def _followed(self, text: str) -> bytes:
        url = _parsed(text)
        for _ in range(REDIRECTS + 1):
            address = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            headers = httpx.Request("GET", url, headers=HEADERS).headers.raw  # with Host
            async with self._pool.stream("GET", address, headers=headers) as response:
                location = httpx.Headers(response.headers).get("location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = _parsed(location, url)
                    continue
                if response.status != 200:
                    raise _failed(f"the host returned status {response.status}")
                return await self._content(response)
        raise _failed(f"the URL redirects more than {REDIRECTS} times")

    async def _content(self, response: httpcore.Response) -> bytes:
        if httpx.Headers(response.headers).get("content-encoding", "").lower() not in ("", "identity"):
            raise _failed("the host sent a compressed response, which was not requested")
        content = bytearray()
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > self._most_bytes:
                raise _failed(f"the file has more than {self._most_bytes} bytes")
        return bytes(content)

    async def close(self) -> None:
        await self._pool.aclose()


class _PublicNetwork(httpcore.AnyIOBackend):
    """Connects only to public IP addresses and to those in `allow`."""

    def __init__(self, allow: Sequence[Network]) -> None:
        self._allow = allow

    async def connect_tcp(self, host: str, port: int, *rest: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _failed("the host name cannot be resolved") from None
        addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
        permitted = [address for address in addresses if is_public(address, self._allow)]
        if not permitted:
            raise Problem(403, "address_not_allowed", "cannot be fetched: the host's IP address is not public; the "
                          "operator can allow more networks with --fetch-allow")  # fmt: skip
        for address in permitted:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await super().connect_tcp(address, port, *rest, **options)
        raise httpcore.ConnectError("none of the addresses accepts a connection")


def _parsed(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """Parse and check a URL.

    Args:
        text: the URL.
        base: the URL that redirected to it, or None.

    Raises:
        Problem: 422, it is not an http: or https: URL or contains a user name.
    """
    try:
        url = base.join(text) if base is not None else httpx.URL(text)
        fits = url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 1) < 1 << 16
    except (httpx.InvalidURL, ValueError, TypeError, UnicodeError):
        fits = False
    if not fits:
        start = "the URL" if base is None else "the URL redirects to one that"
        raise _failed(f"{start} is not a valid http: or https: URL")
    if url.userinfo:
        raise _failed("the URL contains a user name; send the image itself")
    return url


def _failed(reason: str) -> Problem:
    return Problem(422, "fetch_failed", f"cannot be fetched: {reason}", param="input")
