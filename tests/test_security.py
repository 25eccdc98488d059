"""Untrusted files, prompts and servers never execute code, write outside their folder, or leak secrets."""

from __future__ import annotations

import ast
import json
import logging
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genalign.cli.main import main
from genalign.evaluation.geneval.result_files import read_samples, write_samples
from genalign.runtime import media
from genalign.runtime.media import inside, read_image
from genalign.types import Prompt
from pipelines import SD3
from rewards.remote.remote_reward import RemoteReward
from rewards.remote.vlm_judges import Endpoint
from tests.genalign.training.toy_runs import write_config
from tests.http_servers import INFO, serving
from tests.packages import folder_of

PACKAGES = ("genalign", "pipelines", "rewards", "scripts")

# --- source code

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval": "evaluates text",
    "exec": "runs text",
    "__import__": "imports by a text",
    "os.system": "is a shell",
    "os.popen": "is a shell",
    "subprocess.getoutput": "is a shell",
    "torch.save": "pickles: use safetensors",
    "torch.hub.load": "runs a repository's code",
    "yaml.load": "makes objects: use yaml.safe_load",
    "yaml.unsafe_load": "makes objects: use yaml.safe_load",
    "tempfile.mktemp": "names a file that another may make",
}
UNSAFE_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "verify": False, "autoescape": False}
REQUIRED_KEYWORDS = {
    "torch.load": ("weights_only", True),
    "Image.open": ("formats", None),
    "Environment": ("autoescape", True),
}


def _unsafe_imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
        yield from (f"imports {alias.name}" for alias in node.names if alias.name != "UnpicklingError")


def _unsafe_calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name, keywords = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
    if name in UNSAFE_CALLS:
        yield f"{name} {UNSAFE_CALLS[name]}"
    for word, value in keywords.items():
        if word in UNSAFE_KEYWORDS and not (
            isinstance(value, ast.Constant) and value.value is not UNSAFE_KEYWORDS[word]
        ):
            yield f"{name} has {word}={ast.unparse(value)}"
    if name in REQUIRED_KEYWORDS:
        word, wanted = REQUIRED_KEYWORDS[name]
        value = keywords.get(word)
        if value is None or (wanted is not None and not (isinstance(value, ast.Constant) and value.value is wanted)):
            yield f"{name} needs {word}={wanted or '...'}"


def violations(source: str) -> list[str]:
    """List the unsafe imports and calls of a module's source."""
    return [line for node in ast.walk(ast.parse(source)) for line in (*_unsafe_imports(node), *_unsafe_calls(node))]


def test_no_module_can_execute_untrusted_data() -> None:
    unsafe = {
        path: lines
        for package in PACKAGES
        for path in sorted(folder_of(package).rglob("*.py"))
        if (lines := violations(path.read_text(encoding="utf-8")))
    }
    assert unsafe == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy; numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=chosen)",
        "os.system(text)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=settings.trust)",
        "Image.open(path)",
        "Environment(loader=loader)",
        "httpx.Client(verify=False)",
    ],
)
def test_unsafe_source_is_detected(source: str) -> None:
    assert violations(source)


def test_safe_source_passes() -> None:
    assert violations("from pickle import UnpicklingError\ntorch.load(path, weights_only=True)\nmodel.eval()") == []


# --- input files ----------------------------------------------------------------------------------------------


def _bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header claims a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _gif() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_bomb(9_000), "has 9000 x 9000 pixels, over 67108864"),
        *((content, "cannot be read as an image") for content in (_bomb(12_000), _bomb(60_000), _gif())),
    ],
    ids=["large", "larger", "largest", "another format"],
)
def test_image_size_and_format_are_checked_before_decoding(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.png {message}"):
        read_image(tmp_path / "x.png")


def test_audio_length_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "long.wav", np.zeros((600, 2), np.float32), 8000)
    assert media.read_waveform(tmp_path / "long.wav").waveform.shape == (2, 600)
    monkeypatch.setattr(media, "MAX_AUDIO_SAMPLES", 1000)
    with pytest.raises(ValueError, match=r"long\.wav has 600 x 2 samples, over 1000: cut it"):
        media.read_waveform(tmp_path / "long.wav")


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd", "..", "./../x"])
def test_path_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)


def test_path_inside_its_folder_is_accepted(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    assert inside(tmp_path, "a/../..b.png") == tmp_path / "..b.png"


def test_reward_check_reads_no_sample_outside_its_folder(tmp_path: Path, error: Callable[..., str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "samples").mkdir()
    line = json.dumps({"file_name": "../secret.png", "prompt": "x"})
    (tmp_path / "samples" / "prompts.jsonl").write_text(f"{line}\n")
    check = ["reward", "check", "rewards.jpeg:compressibility", "--samples", str(tmp_path / "samples")]
    assert "'../secret.png' leads out of" in error(*check)


@pytest.mark.parametrize("library", ["evil", "os", "builtins", "transformers.models"])
def test_code_inside_a_checkpoint_is_not_run(tiny_folder: Path, tmp_path: Path, library: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = [library, "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match=f"takes its scheduler from '{library}', which genalign does not run"):
        SD3.load(folder)
    assert not (tmp_path / "was-run").exists()


# --- output files and secrets ------------------------------------------------------------------------------

EVIL = "../../evil"
HOSTILE = [
    {"prompt": f"{EVIL}/{n}\n<script>document.title='run'</script>{{{{ 7 * 7 }}}} $(touch x) `touch x`"}
    | {"tag": f"../../{EVIL}", "filename": "/etc/evil", "file_name": EVIL, "index": EVIL, "image": EVIL, "id": EVIL}
    for n in range(3)
]
SECRETS = {
    "HF_TOKEN": "hf_secretofthehub",
    "GENALIGN_TOKEN": "secretoftheserver",
    "OPENAI_API_KEY": "sk-secretofthejudge",
    "WANDB_API_KEY": "secretofthetracker",
}


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) + 0.001 * torch.arange(len(samples))


@pytest.mark.slow
def test_hostile_prompts_write_only_into_the_output_folder_and_leak_no_secret(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "hostile.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in HOSTILE))
    prompts, output = str(tmp_path / "hostile.jsonl"), tmp_path / "a" / "b" / "c"  # ".." leads to folders that exist
    output.mkdir(parents=True)
    few = {"prompts": prompts, "samples_per_task": 2, "seeds": 1, "batch_size": 2}
    with serving(redness, INFO, token=SECRETS["GENALIGN_TOKEN"]) as url:
        remote = {"class_path": "rewards.remote.remote_reward.RemoteReward", "init_args": {"url": url}}
        evaluations = {"held_out": {**few, "every": 1, "scorers": {"red": remote}}, "before_after": few}
        training = {"rounds": 1, "batch_size": 4, "updates_per_round": 1}
        config = write_config(output / "run.json", tiny_folder, remote, training, prompts=prompts, **evaluations)
        assert main(["train", "--config", str(config)]) == 0
        search = ["steer", "--output", str(output / "steered"), "--model.path", str(tiny_folder), "--prompts", prompts]
        search += ["--rewards.red.function", "rewards.jpeg.compressibility"]
        search += ["--strategy", "genalign.search.BestOfN", "--strategy.candidates", "2", "--sampling.num_steps", "2"]
        assert main([*search, "--limit", "2"]) == 0
    assert main(["export", "--run", str(output / "run"), "--output", str(output / "exported")]) == 0
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in files if not path.is_relative_to(output)} == {Path(prompts)}
    assert not Path("/etc/evil").exists() and not list(Path.cwd().glob("evil*"))
    written = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    printed = caplog.text + "".join(capsys.readouterr())
    for secret in SECRETS.values():
        assert secret.encode() not in written and secret not in printed
    for page in output.rglob("report.html"):
        assert "<script" not in page.read_text() and "49 $(" not in page.read_text()


def test_metadata_cannot_choose_file_names(tmp_path: Path) -> None:
    """Folders and files in GenEval's layout are named by numbers alone."""
    metadata = {**HOSTILE[0], "tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    write_samples(tmp_path / "images", 3, Prompt(metadata["prompt"], metadata), torch.rand(1, 3, 8, 8))
    (sample,) = read_samples(tmp_path / "images")
    assert sample.path == tmp_path / "images" / "00003" / "samples" / "0000.png"
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:8000",
        "https://hunter2@host.example/v1",
        "http://127.0.0.1:8000/v1?key=hunter2",
        "http://127.0.0.1:8000/#hunter2",
    ],
)
@pytest.mark.parametrize("make", [RemoteReward, lambda url: Endpoint(url, "model")], ids=["remote", "judge"])
def test_url_with_a_secret_is_refused(url: str, make: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="holds a name, a password or a query: give keys by the environment") as error:
        make(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host:8000", "http://"])
def test_url_must_be_http(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a server: give one such as http://127\.0\.0\.1:8000"):
        RemoteReward(url)
