"""Serve the label page until it is interrupted."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

from genalign.reward_learning.label_page.questions import LabelPageSettings
from genalign.reward_learning.label_page.store import LabelStore
from genalign.runtime.files import Claims

LOCKS = ".label_page"
"""The folder of the lock, in the dataset's folder, which the server of its label page holds."""


def serve_labels(
    folder: Path,
    settings: LabelPageSettings,
    host: str = "127.0.0.1",
    port: int = 8322,
    token: str | None = None,
    token_variable: str = "GENALIGN_TOKEN",
) -> None:
    """Serve the label page of a dataset's folder, and print its address; an interruption (Ctrl+C) ends it.

    Args:
        folder: The folder with ``comparisons.jsonl``, to whose ``preferences.jsonl`` judgments are appended.
        settings: What annotators are asked.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        token: The token that annotators need; an address that other machines reach needs one.
        token_variable: The environment variable from which the token comes, for messages.

    Raises:
        FileNotFoundError: There are no comparisons, or a file that they list is missing.
        ValueError: The comparisons cannot be asked about, do not go together with the judgments that the folder has,
            or another process serves the folder; an address that others reach has no token, or the port is taken; or
            starlette or uvicorn is not installed.
    """
    try:
        from genalign.reward_learning.label_page.app import build_label_app
        from genalign.scoring import server
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'genalign[serve]'") from None
    server.require_safe(host, token, token_variable)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    with Claims(folder / LOCKS).try_claim(0) as held:
        if not held:
            raise ValueError(f"another process serves the label page of {folder}: open its address, or end it first")
        store = LabelStore(folder, settings)
        app = build_label_app(store, token)
        print(_summary(store))
        socket = server.listen(host, port)
        host, port = socket.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        suffix = f"#token=TOKEN, with the token in {token_variable}" if token else ""
        print(f"label page at {url}{suffix}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # which may or may not come, depending on where uvicorn was
            server.server(app).run(sockets=[socket])
        print("stopped")


def _summary(store: LabelStore) -> str:
    """Say what was loaded, what was left out, and what is judged already."""
    questions = store.questions
    prompts = len({question.comparison.prompt.text for question in questions.distinct})
    lines = [
        f"{questions.comparisons} comparisons: {len(questions.distinct)} questions of the kind {store.settings.kind!r}"
        f" about {prompts} prompts"
    ]
    if questions.equal:
        lines.append(f"left out: {questions.equal} comparisons of equal files")
    if questions.repeated:
        lines.append(f"left out: {questions.repeated} questions that repeat another")
    by_annotator = Counter(judgment.annotator or "unnamed" for judgment in store.judgments())
    judged = ", ".join(f"{name} {count}" for name, count in by_annotator.items())
    lines.append(f"judgments in the folder: {judged or 'none'}")
    return "\n".join(lines)
