"""The web application of `emu2 serve`: one page, and what it asks of a model.

    GET  /              the page, chat.html
    GET  /api/model     what the model is
    POST /api/generate  a prompt in the form of `records`, pictures as base64, and fields of `search.Options`

It has no users and no passwords. What it defends against is other people's pages in the same browser: they can send
requests to a server on this machine, under its name (which an `Origin` gives away) or under a name of their own that
they point here (which the `Host` gives away).
"""

import asyncio
import base64
import dataclasses
import hashlib
import ipaddress
import json
import math
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.visuals import EncodedPicture
from emu2_megatron.errors import ConfigError, DataError, Emu2Error
from emu2_megatron.inference import boxes, records
from emu2_megatron.inference.model import Prompt
from emu2_megatron.inference.prompt import encode, system_message, to_text
from emu2_megatron.inference.search import Options

Answer: TypeAlias = Callable[[Prompt, Options], list[int]]
"""Generates the new tokens of a prompt."""

PAGE = Path(__file__).with_name("chat.html")
MAX_BODY = 64 * 2**20
"""Bytes of a request: some 48 MiB of picture files."""
MAX_BEAMS = 16
"""Each costs a cache of its own."""
MAX_LETTERS = 64
"""Of a token, roughly: pieces of LLaMA's vocabulary have up to 16, names of added tokens up to 30. A text that must be
too long by this is not worth cutting into tokens."""


def app(
    answer: Answer, tokenizer: Tokenizer, model: ModelConfig, worker: Executor,
    name: str, host: str = "127.0.0.1", max_body: int = MAX_BODY,
) -> FastAPI:  # fmt: skip
    """The application.

    Args:
        answer: called in `worker`.
        tokenizer: the model's; says whether it is a chat model.
        model: says how many tokens a picture has, and how many a prompt may have.
        worker: of one thread, in which requests wait for each other.
        name: of the model, as people know it.
        host: the address or name that the server is bound to.
        max_body: bytes of a request.
    """
    web = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    page = PAGE.read_text(encoding="utf-8")
    headers = {**HEADERS, "Content-Security-Policy": policy(page)}

    @web.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = refused(request.headers, host)
        response = _error(refusal, 403) if refusal else await go_on(request)
        response.headers.update(headers)
        return response

    @web.get("/")
    def show() -> Response:
        return HTMLResponse(page)

    @web.get("/api/model")
    def describe() -> Response:
        return JSONResponse(_description(tokenizer, model, name, max_body))

    @web.post("/api/generate")
    async def generate(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the request's Content-Type has to be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body:
                raise HTTPException(413, f"the request has more than {max_body:,} bytes: send fewer, smaller pictures")
        loop = asyncio.get_running_loop()
        return JSONResponse(await loop.run_in_executor(worker, _answered, bytes(body), answer, tokenizer, model))

    @web.exception_handler(Emu2Error)
    def wrong(_: Request, error: Exception) -> Response:
        return _error(str(error), 400)

    @web.exception_handler(HTTPException)
    def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.detail, error.status_code)

    @web.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> Response:  # and the server logs where
        return _error(f"the server failed ({type(error).__name__}); its terminal says where", 500)

    return web


HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def policy(page: str) -> str:
    """The Content-Security-Policy under which a page may run its own script and style and no others, show pictures that
    it has in itself, and talk to its own server alone."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def refused(headers: Mapping[str, str], host: str) -> str:
    """Why a request is not answered; empty if it is.

    Args:
        headers: of the request.
        host: the address or name that the server is bound to.
    """
    asked = headers.get("host", "")
    try:
        name = urlsplit(f"//{asked}").hostname or ""
    except ValueError:  # of [ and ] that hold no address
        name = ""
    if not _is_own(name, host):
        return f"Host {asked!r}: this server answers to localhost and to the --host it was started with"
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != asked:
        return f"Origin {origin!r}: this server answers its own page alone"
    return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a name or address."""
    address = _address(host)
    return address.is_loopback if address else host == "localhost"


def _is_own(name: str, host: str) -> bool:
    if name == host.lower() or is_loopback(name):
        return True
    bound, asked = _address(host), _address(name)
    # Bound to every address of the machine: whoever asks for an address was not sent here by a name of his own.
    every = bound is not None and bound.is_unspecified
    return every and (asked is not None or name == socket.gethostname().lower())


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _description(tokenizer: Tokenizer, model: ModelConfig, name: str, max_body: int) -> dict[str, Any]:
    return {
        "name": name,
        "chat": _is_chat(tokenizer),
        "picture_tokens": model.image_queries + 2,  # and [IMG], [/IMG]
        "context": model.decoder.max_position_embeddings,
        "system": system_message(grounding=False),
        "system_grounding": system_message(grounding=True),
        "defaults": dataclasses.asdict(Options()),
        "max_beams": MAX_BEAMS,
        "max_body": max_body,
    }


def _is_chat(tokenizer: Tokenizer) -> bool:
    return "[USER]" in tokenizer.ids


def _answered(body: bytes, answer: Answer, tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    """What a request gets; DataError or ConfigError if it cannot be answered."""
    record = _record(body)
    options, grounding = _options(record), record.get("grounding", False)
    if not isinstance(grounding, bool):
        raise DataError("`grounding` is true or false")
    pictures = 0

    def show(kind: str, data: str) -> EncodedPicture:
        nonlocal pictures
        pictures += 1
        if kind != "image":
            raise DataError(f"{kind}: pictures are shown here alone; `emu2 generate` takes videos")
        try:
            return EncodedPicture(base64.b64decode(data, validate=True))
        except ValueError as error:
            raise DataError(f"picture {pictures}: its data is not base64 ({error})") from error

    parts = records.parts(record, "the request", show, _is_chat(tokenizer), grounding=grounding)
    letters = sum(len(part) for part in parts if isinstance(part, str))
    room = model.decoder.max_position_embeddings - options.max_new_tokens
    shown = sum(not isinstance(part, str) for part in parts)  # boxes are pictures too
    at_least = shown * (model.image_queries + 2) + letters // MAX_LETTERS
    if at_least > room:  # before anything is decoded
        raise _too_long(f"more than {at_least}", options, model)
    prompt = encode(parts, tokenizer, model)
    if len(prompt.tokens) > room:
        raise _too_long(str(len(prompt.tokens)), options, model)
    start = time.perf_counter()
    tokens = answer(prompt, options)
    answered = {
        "text": to_text(tokens, tokenizer),
        "prompt_tokens": len(prompt.tokens),
        "new_tokens": len(tokens),
        "seconds": time.perf_counter() - start,
    }
    if grounding:
        said = boxes.parse(to_text(tokens, tokenizer, keep_added=True))
        answered["boxes"] = [{"phrase": g.phrase, "boxes": g.boxes} for g in said]
    return answered


def _too_long(tokens: str, options: Options, model: ModelConfig) -> DataError:
    return DataError(
        f"the prompt has {tokens} tokens, and {options.max_new_tokens} are to follow: the model reads "
        f"{model.decoder.max_position_embeddings} (a picture is {model.image_queries + 2} of them); "
        "send less, or begin anew"
    )


_FIELDS = {field.name: field.type for field in dataclasses.fields(Options)}
_SAID = ("content", "turns", "system", "grounding")


def _record(body: bytes) -> dict[str, Any]:
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError("the request: an object with `content` or `turns` is wanted")
    if unknown := [name for name in record if name not in _SAID and name not in _FIELDS]:
        raise DataError(f"the request: {unknown[0]!r} is unknown; legal: {', '.join([*_SAID, *_FIELDS])}")
    return record


def _options(record: dict[str, Any]) -> Options:
    given: dict[str, Any] = {}
    for name, kind in _FIELDS.items():
        value = given[name] = record.get(name, getattr(Options, name))
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        # Beyond 2^63 torch takes no seed, and no float is exact.
        if not number or abs(value) >= 2**63 or not math.isfinite(value):
            raise ConfigError(f"{name}: {value!r}; legal: {'a whole number' if kind is int else 'a number'}")
    if "beams" not in record and given["temperature"] > 0:
        given["beams"] = 1
    if given["beams"] > MAX_BEAMS:
        raise ConfigError(f"beams: {given['beams']}; legal: up to {MAX_BEAMS}")
    return Options(**given)
