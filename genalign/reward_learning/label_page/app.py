"""The label page behind HTTP.

``GET /`` and ``GET /agreement`` are the page, which holds no data; ``GET /api/about``, ``GET /api/agreement`` and
``GET /media/NUMBER`` need the token where there is one, and so do the writes, ``POST /api/ACTION`` with a JSON body and
the header X-Genalign-Label, which no other site can send. ``POST /api/enter`` exchanges the token for a cookie.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genalign.reward_learning.label_page.agreement import label_agreement
from genalign.reward_learning.label_page.questions import MEDIA_TYPES, annotator_name
from genalign.reward_learning.label_page.store import LabelStore, Superseded
from genalign.scoring.protocol import WireError, is_loopback
from genalign.scoring.server import Refusal, answer_refusal, read_body

_MAX_BODY = 2**16  # bytes of a request
_COOKIE, _COOKIE_SECONDS = "genalign_label", 30 * 24 * 3600
_HEADER = "x-genalign-label"


class LabelService:
    """The handlers of the label page; ``token`` None needs no token.

    Files have random numbers, new ones with each start, which say nothing about their names or their order.
    """

    def __init__(self, store: LabelStore, token: str | None) -> None:
        self._store, self._token = store, token
        self._page = files("genalign.reward_learning.label_page").joinpath("page.html").read_text("utf-8")
        samples = (sample for question in store.questions.distinct for sample in question.comparison.samples)
        self._numbers = {sample.content: str(secrets.randbits(64)) for sample in samples}
        self._files = {number: path.resolve() for path, number in self._numbers.items() if isinstance(path, Path)}

    @property
    def policy(self) -> str:
        """The content security policy of the page: its own script and style, by hash, and its own server."""
        script, style = (re.findall(rf"<{tag}>(.*?)</{tag}>", self._page, re.DOTALL) for tag in ("script", "style"))
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in (*script, *style)
        ]
        return (
            f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; img-src 'self' data:;"
            " media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def page(self, request: Request) -> Response:
        """Return the page, which holds no data and so needs no token."""
        return Response(self._page, media_type="text/html", headers={"Cache-Control": "no-store"})

    async def enter(self, request: Request) -> Response:
        """Set the cookie of a client that has the token."""
        self._require_local(request)
        body = await _json_body(request)
        token = body.get("token")
        if self._token is None:
            return _json({})
        if not isinstance(token, str) or not hmac.compare_digest(
            token.strip().encode("utf-8", "replace"), self._token.encode()
        ):
            raise Refusal(401, "token", "this is not the token of this page: ask whoever gave you its address")
        answer = _json({})
        secure = request.url.scheme == "https"
        answer.set_cookie(
            _COOKIE, _cookie(self._token), max_age=_COOKIE_SECONDS, httponly=True, samesite="strict", secure=secure
        )
        return answer

    async def about(self, request: Request) -> Response:
        """Return what annotators read before they start."""
        self._authorize(request)
        settings, total = self._store.settings, len(self._store.questions.distinct)
        return _json({"kind": settings.kind, "instructions": settings.instructions, "total": total})

    async def agreement(self, request: Request) -> Response:
        """Return how far the annotators agree."""
        self._authorize(request)
        return _json(asdict(await run_in_threadpool(lambda: label_agreement(self._store.judgments()))))

    async def media(self, request: Request) -> Response:
        """Return the file of a sample, or a range of its bytes."""
        self._authorize(request)
        path = self._files.get(request.path_params["number"])
        if path is None or not path.is_file():
            raise Refusal(404, "media", "there is no such sample")
        headers = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "same-origin"}
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix.lower()], headers=headers)

    async def act(self, request: Request) -> Response:
        """Judge, skip, undo, or ask again what was skipped; return what is asked next."""
        self._authorize(request)
        body = await _json_body(request)
        return _json(await run_in_threadpool(self._act, request.path_params["action"], body))

    def _act(self, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
        store = self._store
        actions: dict[str, Callable[[str], None]] = {
            "next": lambda annotator: None,
            "judge": lambda annotator: store.judge(annotator, _index(body), _scores(body)),
            "skip": lambda annotator: store.skip(annotator, _index(body)),
            "ask_skipped": store.ask_skipped,
            "undo": store.undo,
        }
        if action not in actions:
            raise Refusal(404, "action", f"there is no action {action!r}")
        try:
            annotator = annotator_name(body.get("annotator"))
            actions[action](annotator)
        except Superseded as error:
            raise Refusal(409, "judged", str(error)) from None
        except ValueError as error:
            raise Refusal(422, action, str(error)) from None
        except OSError as error:
            raise Refusal(507, "disk", f"not saved, for the server cannot write its file: {error.strerror}") from None
        return self._state(annotator)

    def _state(self, annotator: str) -> dict[str, Any]:
        """Return an annotator's progress, and the current question in the order in which it is shown."""
        progress = self._store.progress(annotator)
        answer: dict[str, Any] = {"annotator": annotator, **asdict(progress), "question": None}
        upcoming = [sample for index in progress.upcoming for sample in self._samples(annotator, index)]
        answer["upcoming"] = [sample["url"] for sample in upcoming if not sample["sound"]]
        if progress.current is not None:
            comparison = self._store.question(progress.current).comparison
            answer["question"] = {
                "kind": comparison.kind,
                "prompt": comparison.prompt.text,
                "samples": self._samples(annotator, progress.current),
                "scale": self._store.settings.scale,
            }
        return answer

    def _samples(self, annotator: str, index: int) -> list[dict[str, Any]]:
        question = self._store.question(index)
        samples = question.comparison.samples
        contents = [samples[place].content for place in question.order(annotator, self._store.settings.seed)]
        paths = [path for path in contents if isinstance(path, Path)]
        media_types = [MEDIA_TYPES[path.suffix.lower()] for path in paths]
        return [
            {"url": f"/media/{self._numbers[path]}", "sound": media_type.startswith("audio")}
            for path, media_type in zip(paths, media_types, strict=True)
        ]

    def _authorize(self, request: Request) -> None:
        self._require_local(request)
        if self._token is None:
            return
        cookie = request.cookies.get(_COOKIE, "").encode("utf-8", "replace")
        if not hmac.compare_digest(cookie, _cookie(self._token).encode()):
            raise Refusal(401, "token", "this page needs its token: ask whoever gave you its address")

    def _require_local(self, request: Request) -> None:
        """Refuse a request by the name of another host where no token protects the page, as after DNS rebinding."""
        if self._token is None and not is_loopback(request.url.hostname or ""):
            raise Refusal(403, "host", "open this page by the address that genalign reward label prints")


def _cookie(token: str) -> str:
    return hmac.new(token.encode(), b"genalign label page", hashlib.sha256).hexdigest()


async def _json_body(request: Request) -> dict[str, Any]:
    """Read the JSON object of a write. Raises Refusal for a request that another site may have sent."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    site = request.headers.get("sec-fetch-site", "same-origin")
    if kind != "application/json" or request.headers.get(_HEADER) != "1" or site != "same-origin":
        raise Refusal(403, "origin", f"send application/json with the header {_HEADER}: 1, from this page")
    body = await read_body(request, _MAX_BODY, "one judgment is smaller")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "malformed", "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Refusal(400, "malformed", "the body is no object")
    return value


def _index(body: Mapping[str, Any]) -> int:
    index: int = body.get("index", -1)  # any type, which the store refuses
    return index


def _scores(body: Mapping[str, Any]) -> dict[str, list[float]]:
    scores = body.get("scores")
    if not isinstance(scores, dict):
        raise ValueError("give scores by dimension")
    return scores


def _json(value: Any) -> JSONResponse:
    return JSONResponse(value, headers={"Cache-Control": "no-store"})


class _Headers:
    """Adds headers to every answer of an application."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app, self._headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def build_label_app(store: LabelStore, token: str | None = None) -> Starlette:
    """Build the ASGI application of the label page; ``token`` None needs no token, and serves this machine alone.

    The store's folder is to be served once at a time: see ``serve_labels``.
    """
    service = LabelService(store, token)
    headers = {
        "Content-Security-Policy": service.policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return Starlette(
        routes=[
            Route("/", service.page),
            Route("/agreement", service.page),
            Route("/media/{number}", service.media),
            Route("/api/about", service.about),
            Route("/api/agreement", service.agreement),
            Route("/api/enter", service.enter, methods=["POST"]),
            Route("/api/{action}", service.act, methods=["POST"]),
        ],
        middleware=[Middleware(_Headers, headers=headers)],
        exception_handlers={WireError: answer_refusal},
    )
