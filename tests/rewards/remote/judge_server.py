"""An OpenAI-compatible server on loopback whose answers a test decides."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from genalign.scoring.protocol import decode_image
from rewards.remote.http_client import Patience
from rewards.remote.vlm_judges import Endpoint
from tests.http_servers import Answer, Seen, stub

QUICK = Patience(deadline=10, timeout=5, first_pause=0.01, longest_pause=0.05)


def completion(text: str, first: dict[str, float] | None = None) -> Answer:
    """A chat completion whose first token has these probabilities."""
    choice: dict[str, object] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if first is not None:
        tops = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in first.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tops}]}
    body = {"id": "x", "object": "chat.completion", "model": "judge", "choices": [choice]}
    return Answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


@contextlib.contextmanager
def judging(
    say: Callable[[list[float], str], Answer], requests: list[Seen] | None = None, **settings: Any
) -> Iterator[Endpoint]:
    """A judge that answers as ``say`` does to the levels of the images and the text of a question."""

    def answer(seen: Seen) -> Answer:
        if requests is not None:
            requests.append(seen)
        *images, text = seen.json["messages"][0]["content"]
        urls = [image["image_url"]["url"] for image in images]
        assert text["type"] == "text" and all(url.startswith("data:image/png;base64,") for url in urls)
        decoded = [decode_image(base64.b64decode(url.partition(",")[2]), 10**6) for url in urls]
        return say([round(float(image.mean()), 2) for image in decoded], text["text"])

    with stub(answer) as url:
        yield Endpoint(f"{url}/v1", "judge", **{"patience": QUICK, **settings})
