"""
An OpenAI-compatible server over the edge engine: one model, one thread that answers, and a line of bounded length.

    make_server(make_app(engine, "MiniCPM4-0.5B")).run(sockets=[listen("127.0.0.1", 8000)])

An answer is that of `engine.generate` for the rendered prompt. Requests are answered in the order in which their
prompts are ready; one that follows on an earlier one's text finds it in the engine's cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable

from ..generation.chat import end_ids
from ..generation.constrained import ConstrainedLogitsProcessor, Grammar
from .engine import EdgeEngine
from .server_line import Done, Job, Line
from .server_schema import ApiError, ChatRequest, read_json, read_request
from .server_text import AnswerReader, PromptMaker, whole_message


# JSON is read in one go, and nothing else runs meanwhile: at worst a few tenths of a second for this much.
MAX_BODY_BYTES = 2 << 20
# For contexts that need more: Chinese with every character as \uXXXX takes about ten.
BODY_BYTES_A_TOKEN = 16
MAX_DRAINED_BYTES = 128 << 20
# Up to here a body's prompt is ready in some hundredths of a second.
SHORT_BODY_BYTES = 64 << 10
# A stream says something at least this often, or proxies close it.
SILENT_SECONDS = 15
# JSON may hold them as they are, but some readers of event streams take them for the end of a line.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class ChatServer:
    """What the routes do; `make_app` has the arguments."""

    def __init__(self, engine: EdgeEngine, name: str, queue: int, api_key: str | None):
        self.engine, self.name, self.api_key = engine, name, api_key
        self.prompts = PromptMaker(engine)
        self.line = Line(engine, queue)
        self.begun = int(time.time())
        self.max_body = max(MAX_BODY_BYTES, BODY_BYTES_A_TOKEN * engine.context)
        # Long prompts and schemas are prepared one at a time, so that threads are left for the others.
        self.preparing = asyncio.Lock()
        self.ends = end_ids(engine.model, engine.tokenizer)

    def prepare(self, request: ChatRequest, job: Job) -> None:
        """
        Raises:
            ApiError: the prompt cannot be made, or the schema not be enforced.
        """
        prompt = self.prompts.text(request)
        job.token_ids = self.prompts.ids(prompt)
        job.reader = AnswerReader(self.engine.tokenizer, request, prompt)
        job.options = {
            "max_new_tokens": min(request.max_tokens or self.engine.context, self.engine.context),
            "seed": request.seed,
            "eos_token_id": self.ends or None,
            **self.sampling(request.sampling),
        }
        if request.schema is not None:
            try:
                processor = ConstrainedLogitsProcessor(
                    Grammar.json_schema(request.schema), self.engine.tokenizer, len(job.token_ids), self.ends
                )
            except (ImportError, RecursionError, ValueError) as error:
                message = " ".join(str(error).split())
                raise ApiError(f"response_format: {message}", "response_format", code="unsupported") from error
            job.options["logits_processor"] = [processor]

    def sampling(self, asked: dict[str, float]) -> dict:
        """What the request leaves open is as in the checkpoint's generation_config; greedy where that is silent."""
        config = self.engine.model.generation_config
        samples = asked["temperature"] > 0 if "temperature" in asked else "top_p" in asked or config.do_sample
        if not samples:
            # Neutral values, or `generate` warns of what does nothing without sampling.
            penalty = {name: asked[name] for name in asked if name == "repetition_penalty"}
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, **penalty}
        own = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        own = {name: value for name, value in own.items() if value is not None}
        return {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **own, **asked}

    def authorize(self, request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                status=401,
                code="invalid_api_key",
            )

    async def health(self, request):
        return _json({"status": "ok", **self.line.counts()})

    async def models(self, request):
        self.authorize(request)
        return _json({"object": "list", "data": [self.model()]})

    async def one_model(self, request):
        self.authorize(request)
        self.check_name(request.path_params["name"])
        return _json(self.model())

    def model(self) -> dict:
        return {
            "id": self.name,
            "object": "model",
            "created": self.begun,
            "owned_by": "transformers_minicpm4",
            "context_length": self.engine.context,
        }

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                f"there is no model {name[:100]!r} here; this server has {self.name!r}.",
                "model",
                status=404,
                code="model_not_found",
            )

    async def chat(self, request):
        self.authorize(request)
        # A web page may send other types to any address without being asked; JSON it may not.
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                f"the body's type must be application/json, got {kind[:80]!r}; set Content-Type.", status=415
            )
        body, size = bytearray(), 0
        async for piece in request.stream():
            size += len(piece)
            # What is too much is read all the same, since a client that still writes does not listen.
            if size <= self.max_body:
                body.extend(piece)
            if size > MAX_DRAINED_BYTES:
                break
        if size > self.max_body:
            raise ApiError(f"the body is larger than {self.max_body:,} bytes; shorten it.", status=413)
        wanted = await asyncio.to_thread(lambda: read_request(read_json(body)))
        self.check_name(wanted.model)
        return _Reply(self, wanted, takes_long=size > SHORT_BODY_BYTES or wanted.schema is not None)


class _Reply:
    """The response to one request, as an ASGI application."""

    def __init__(self, server: ChatServer, request: ChatRequest, takes_long: bool):
        self.server, self.request, self.line = server, request, server.line
        self.takes_long, self.begun = takes_long, False
        self.common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.name,
        }

    async def __call__(self, scope, receive, send) -> None:
        job = self.line.enter(asyncio.get_running_loop())
        watch = asyncio.create_task(self._watch(receive, job))
        try:
            async with self.server.preparing if self.takes_long else contextlib.nullcontext():
                if not job.left:
                    await asyncio.to_thread(self.server.prepare, self.request, job)
            self.line.start(job)
            if self.request.stream:
                await self._stream(job, send)
            else:
                await self._whole(job, scope, receive, send)
        except Exception as error:
            if not self.begun:
                raise  # there is a status for it
            traceback.print_exc()
            await send({"type": "http.response.body", "body": _event(_unexpected(error).body()), "more_body": False})
        finally:
            watch.cancel()
            self.line.leave(job)

    async def _watch(self, receive, job: Job) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.line.leave(job)
        job.events.put_nowait(None)

    async def _whole(self, job: Job, scope, receive, send) -> None:
        deltas = []
        while isinstance(event := await job.events.get(), list):
            deltas += event
        if isinstance(event, ApiError):
            raise event
        if isinstance(event, Done):
            choice = {
                "index": 0,
                "message": whole_message(deltas),
                "logprobs": None,
                "finish_reason": event.finish_reason,
            }
            answer = {**self.common, "object": "chat.completion", "choices": [choice], "usage": event.usage}
            await _json(answer)(scope, receive, send)

    async def _stream(self, job: Job, send) -> None:
        async def write(content: bytes, more: bool = True):
            await send({"type": "http.response.body", "body": content, "more_body": more})

        async def begin():
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self.begun = True
            await write(self._chunk({"role": "assistant", "content": ""}))

        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), SILENT_SECONDS)
            except TimeoutError:
                event = []
            if isinstance(event, ApiError) and not self.begun:
                raise event  # in time for a status of its own
            if event is None:
                return
            if not self.begun:
                await begin()
            if event == []:
                await write(b": waiting\n\n")
            if not isinstance(event, list):
                break
            for delta in event:
                await write(self._chunk(delta))
        if isinstance(event, ApiError):
            await write(_event(event.body()), more=False)
            return
        await write(self._chunk({}, event.finish_reason))
        if self.request.include_usage:
            await write(self._chunk(None, usage=event.usage))
        await write(b"data: [DONE]\n\n", more=False)

    def _chunk(self, delta: dict | None, finish_reason: str | None = None, usage: dict | None = None) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        chunk = {**self.common, "object": "chat.completion.chunk", "choices": choices}
        return _event({**chunk, "usage": usage} if self.request.include_usage else chunk)


def _unexpected(error: Exception) -> ApiError:
    """What a client hears of a fault of ours; the log has the rest."""
    return ApiError(f"the request failed: {type(error).__name__}.", status=500)


def _encode(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS).encode("utf-8", "replace")


def _event(value) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def _json(value, status: int = 200, headers: dict[str, str] | None = None):
    from starlette.responses import Response

    return Response(_encode(value), status, headers, media_type="application/json")


def make_app(engine: EdgeEngine, name: str, *, queue: int = 64, api_key: str | None = None):
    """
    The server as an ASGI application (Starlette). `app.state.line` counts its requests.

    Args:
        engine: with a tokenizer that has a chat template. Nobody else may use it while the application runs.
        name: of the model, which requests give.
        queue: requests that may wait while one is answered; one more gets 429.
        api_key: what requests must show as a bearer token, `/health` excepted; `None` asks for nothing.

    Raises:
        ImportError: starlette is not installed.
        ValueError: no chat template, a queue below 0, or an empty key.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    if isinstance(queue, bool) or not isinstance(queue, int) or queue < 0:
        raise ValueError(f"queue must be a whole number of 0 or more requests, got {queue!r}.")
    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty; give one, or leave it out for a server without.")
    server = ChatServer(engine, name, queue, api_key)

    async def api_error(request, error):
        return _json(error.body(), error.status, error.headers)

    async def http_error(request, error):
        path = f"{request.method} {request.url.path[:100]}"
        found = ApiError(f"{path}: {error.detail.lower()}; this server has /v1/chat/completions, /v1/models, /health.")
        return _json(found.body(), error.status_code, error.headers)

    async def unexpected(request, error):  # and Starlette hands it on, to be logged
        return _json(_unexpected(error).body(), 500)

    async def gone(request, error):
        return Response()  # nobody reads it

    @contextlib.asynccontextmanager
    async def lifespan(app):
        server.line.open()
        yield
        server.line.close()
        await asyncio.to_thread(server.line.join)

    app = Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: api_error,
            HTTPException: http_error,
            ClientDisconnect: gone,
            Exception: unexpected,
        },
        lifespan=lifespan,
    )
    app.state.line = server.line
    return app


def listen(host: str, port: int) -> socket.socket:
    """
    A bound socket; port 0 takes a free one.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def make_server(app, on_ready: Callable[[], None] = lambda: None):
    """
    A `uvicorn.Server` whose answers end when it is told to stop; `run(sockets=[sock])` blocks until then.

    Raises:
        ImportError: uvicorn is not installed.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            on_ready()

        async def shutdown(self, sockets=None):
            app.state.line.close()
            await super().shutdown(sockets)

    return Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
