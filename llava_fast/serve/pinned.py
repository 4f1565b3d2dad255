"""One GET whose connection goes to addresses chosen beforehand, whatever the name in it would resolve to.

httpcore2 speaks HTTP and TLS. It follows no redirects, decodes no content, keeps no cookies and knows neither proxies
nor credentials of the environment; it opens sockets through its network backend alone, which here is ``_Pinned``.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache

import httpcore2

from llava_fast.serve.urls import HttpUrl


@asynccontextmanager
async def get(
    url: HttpUrl,
    addresses: Sequence[str],
    headers: dict[str, str],
    *,
    timeout: float,
    network: httpcore2.AsyncNetworkBackend | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[httpcore2.Response]:
    """The response, its body not read yet; leaving the block closes the connection.

    Args:
        url: its host goes into TLS (the name asked for, and the one that the certificate must hold) and into Host.
        addresses: what is dialled, one after the other until one answers. No name is ever resolved.
        timeout: seconds for connecting, shared out among the addresses. The caller bounds the rest.
        network: what opens the sockets; tests put their own here.

    Raises:
        httpcore2.NetworkError, TimeoutException, ProtocolError: as it says; OSError: no certificates can be loaded.
    """
    pinned = _Pinned(network or httpcore2.AnyIOBackend(), addresses, timeout / len(addresses))
    target = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.path)  # nothing to parse again
    context = ssl_context or (_tls() if url.scheme == "https" else None)
    sent = [("Host", url.authority), *headers.items()]
    async with (
        httpcore2.AsyncConnectionPool(ssl_context=context, max_connections=1, network_backend=pinned) as pool,
        pool.stream("GET", target, headers=sent) as response,
    ):
        yield response


class _Pinned(httpcore2.AsyncNetworkBackend):
    def __init__(self, network: httpcore2.AsyncNetworkBackend, addresses: Sequence[str], timeout: float):
        self._network, self._addresses, self._timeout = network, addresses, timeout

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failed: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:  # and not host
            try:
                return await self._network.connect_tcp(address, port, self._timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed


@cache
def _tls() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()  # reads a hundred and more certificates: once
