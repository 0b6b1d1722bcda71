"""One HTTP exchange: a request, the head of its response, and what to make of both."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from yarl import URL

from data_prep.download.addresses import PrivateAddress
from data_prep.download.body import BodyReader, discard
from data_prep.download.budget import Claim
from data_prep.download.deadline import Deadline
from data_prep.download.dns import DnsFailed
from data_prep.download.opt_out import opt_out
from data_prep.download.retry import Failed, parse_retry_after
from data_prep.download.urls import follow

REDIRECTS = frozenset({301, 302, 303, 307, 308})

_CLOSE = {"Connection": "close"}

T = TypeVar("T")


async def exchange(session: aiohttp.ClientSession, url: URL, receive: Callable[[aiohttp.ClientResponse], Awaitable[T]], *, keep_alive: bool) -> T:
    """Asks for `url` and gives the response to `receive`. Follows nothing.

    Raises:
        Failed: whatever the network or the server did wrong.
    """
    try:
        response = await session.request("GET", url, allow_redirects=False, headers=None if keep_alive else _CLOSE)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise failure_of(error) from None
    try:
        return await receive(response)
    except aiohttp.ClientError as error:
        response.close()
        raise failure_of(error) from None
    except BaseException:
        response.close()
        raise


class Receiver:
    """Makes of a response either a body or the address that it redirects to.

    Args:
        reader: of the body.
        opt_out_tokens: X-Robots-Tag values that count; None: opt-out headers are not looked at.
    """

    def __init__(self, reader: BodyReader, opt_out_tokens: frozenset[str] | None) -> None:
        self._reader = reader
        self._opt_out_tokens = opt_out_tokens

    async def receive(self, response: aiohttp.ClientResponse, claim: Claim, deadline: Deadline) -> bytes | URL:
        """Reads a body, or returns where the response redirects to.

        Raises:
            Failed: a status other than 200, an opt-out, or what `BodyReader.read` finds.
        """
        try:
            status = response.status
            if status in (200, 203):
                if self._opt_out_tokens is not None and (header := opt_out(response.headers, self._opt_out_tokens)):
                    raise Failed("opt_out", header, status=status)
                return await self._reader.read(response, claim, deadline)
            if status in REDIRECTS:
                target = follow(response.url, response.headers.get("Location"))
                await discard(response, deadline)
                return target
            retry_after_s = parse_retry_after(response.headers.get("Retry-After"), time.time()) if status in (429, 503) else None
            raise Failed(f"http_{status}", status=status, retry_after_s=retry_after_s)
        except Failed as failure:
            failure.status = failure.status or response.status
            await discard(response, deadline)
            raise


def failure_of(error: BaseException) -> Failed:
    """What an exception of aiohttp means."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Failed("tls", str(error.certificate_error), is_final=True)
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return Failed("tls", str(error.os_error), is_final=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _failure_to_connect(error.os_error)
    if isinstance(error, asyncio.TimeoutError):  # aiohttp's own are for connecting alone; the whole has our deadline
        return Failed("timeout", "connecting", is_unreachable=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        # aiohttp says "not enough data" of a reset as well, and names the reset only in the text.
        return Failed("connection" if "ConnectionReset" in str(error) else "wrong_length", str(error))
    if isinstance(error, aiohttp.ClientResponseError):
        return Failed("protocol", error.message)
    if isinstance(error, aiohttp.InvalidURL):
        return Failed("bad_url", str(error))
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        return Failed("connection", str(error) or type(error).__name__)
    return Failed("protocol", f"{type(error).__name__}: {error}")


def _failure_to_connect(error: OSError) -> Failed:
    if isinstance(error, PrivateAddress):
        return Failed("private_address", str(error.args[-1]))
    if isinstance(error, DnsFailed):
        return Failed("dns", error.detail, is_final=error.is_final)
    return Failed("connection", str(error.strerror or error), is_unreachable=True)
