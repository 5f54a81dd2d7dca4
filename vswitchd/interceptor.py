"""What stands before every method of one role's server: the role check, and errors turned into rich
statuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from vswitchd.access import Role, needed_role
from vswitchd.errors import ApiError

log = logging.getLogger("vswitchd.api")

# A caller that goes away, or whose deadline passes, does not leave a change half made: the work goes on to
# its end. These it does stop: they can take long and clean up behind themselves.
STOPS_WITH_CALLER = ("/StartPartition", "/InjectFrames")

_unfinished: set[asyncio.Future[Any]] = set()

Handler = Any  # grpc.RpcMethodHandler: its type has no usable fields in the stubs.


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Lets through what `role` may call; the rest ends with PERMISSION_DENIED before a servicer sees it."""

    def __init__(self, role: Role) -> None:
        self._role = role

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = str(handler_call_details.method)
        needed = needed_role(method)
        if self._role is Role.NONE or (needed is not None and needed > self._role):
            return self._refusal(method, needed)
        handler = await continuation(handler_call_details)
        if handler is None or needed is None:
            return None  # UNIMPLEMENTED
        return _guarded(method, handler)

    def _refusal(self, method: str, needed: Role | None) -> Handler:
        name = method.rpartition("/")[2]
        if self._role is Role.NONE:
            error = ApiError(
                grpc.StatusCode.PERMISSION_DENIED,
                "your user has no role at this daemon, which serves another user",
                reason="NO_ROLE",
                remedy="ask its owner to start it with --viewer, --operator or --admin and your user's name, "
                "or start a daemon of your own with `vswitch daemon start`",
            )
        else:
            assert needed is not None
            error = ApiError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{name} needs the role {needed.name.lower()}; yours is {self._role.name.lower()}",
                reason="ROLE_TOO_SMALL",
                remedy=f"ask the daemon's owner for --{needed.name.lower()} with your user's name",
                metadata={"needed": needed.name.lower(), "role": self._role.name.lower()},
            )

        # Of the four shapes a stream of answers to a stream of requests fits every method on the wire.
        async def refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            log.warning("refused", extra={"method": name, "role": self._role.name.lower()})
            await context.abort(error.code, error.message, error.trailing_metadata())
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


def _guarded(method: str, handler: Handler) -> Handler:
    """`handler` with `ApiError` and surprises turned into statuses."""
    wrap_stream, wrap_unary = _stream_guard(method), _unary_guard(method)
    arguments = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(wrap_unary(handler.unary_unary), **arguments)
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(wrap_unary(handler.stream_unary), **arguments)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(wrap_stream(handler.unary_stream), **arguments)
    return grpc.stream_stream_rpc_method_handler(wrap_stream(handler.stream_stream), **arguments)


def _finished(work: asyncio.Future[Any]) -> None:
    _unfinished.discard(work)
    if not work.cancelled():
        work.exception()  # It has been told to the caller, if there still is one.


def _unary_guard(method: str) -> Callable[[Any], Any]:
    stops_with_caller = method.endswith(STOPS_WITH_CALLER)

    def wrap(behaviour: Any) -> Any:
        async def guarded(request: Any, context: Any) -> Any:
            work = asyncio.ensure_future(behaviour(request, context))
            _unfinished.add(work)
            work.add_done_callback(_finished)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                if stops_with_caller:
                    work.cancel()
                raise
            except Exception as error:
                await _abort(method, error, context)

        return guarded

    return wrap


def _stream_guard(method: str) -> Callable[[Any], Any]:
    def wrap(behaviour: Any) -> Any:
        async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(request, context):
                    yield response
            except Exception as error:
                await _abort(method, error, context)

        return guarded

    return wrap


async def _abort(method: str, error: Exception, context: Any) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, ApiError):
        log.error("failed", extra={"method": method}, exc_info=error)
        error = ApiError(
            grpc.StatusCode.INTERNAL,
            f"{method.rpartition('/')[2]} failed inside the daemon: {type(error).__name__}: {error}",
            reason="INTERNAL",
            remedy="see the daemon's log for the traceback, and report it",
        )
    await context.abort(error.code, error.message, error.trailing_metadata())
