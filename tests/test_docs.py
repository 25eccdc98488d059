"""Commands, configurations and code in the documentation work."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

import pytest
import yaml

from genalign.cli import parsing
from genalign.cli.demo import DEMOS
from genalign.cli.main import main
from genalign.cli.train_settings import Train
from tests.packages import ROOT, folder_of

METHODS = ROOT / "docs" / "methods"
PAGES = {path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
REWARDS = (METHODS.parent / "rewards.md").read_text()
AUDIO = (METHODS.parent / "audio.md").read_text()
GENEVAL = (METHODS.parent / "geneval.md").read_text()
DESIGN = (METHODS.parent / "reward_design.md").read_text()


def _num_lines(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


@pytest.mark.usefixtures("checkout")
def test_method_of_the_add_a_method_page_trains(tiny_folder: Path) -> None:
    (code,) = re.findall(r"```python\n(# my_methods\.py\n.*?)```", (METHODS / "add_a_method.md").read_text(), re.DOTALL)
    assert _num_lines(code[code.index("def ranks") :]) < 20
    small = ["--training.rounds", "1", "--training.prompts_per_round", "2", "--training.group_size", "4"]
    small += ["--training.batch_size", "4", "--before_after", "null", "--held_out.every", "0", "--lora.rank", "2"]
    method = ["--recipe", "my_methods.rank_grpo", "--recipe.window", "3", "--model.path", str(tiny_folder)]
    assert main(["demo", "--output", "trained", *method, *small]) == 0
    assert Path("trained/lora").is_dir()


@pytest.mark.usefixtures("checkout")
def test_reward_of_the_rewards_page_passes_reward_check(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(# my_scores\.py\n.*?)```", REWARDS, re.DOTALL)
    assert _num_lines(code) < 20
    (command,) = re.findall(r"genalign (reward check my_scores:\w+ --args.*)", REWARDS)
    assert main([*command.split(), "--count", "4"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", REWARDS + AUDIO + GENEVAL + DESIGN, re.DOTALL))
def test_configurations_parse(tmp_path: Path, block: str) -> None:
    whole = {"rewards": {"size": {"function": "rewards.jpeg.compressibility"}}, "output": "runs/x"}
    whole |= {"model": {"path": "shapes-sd3"}, "prompts": "prompts.txt"}
    whole |= {"recipe": {"class_path": "genalign.flow_grpo"}, **yaml.safe_load(block)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    settings, _ = parsing.parse(Train, ["--config", str(tmp_path / "run.yaml")], "train")
    assert set(settings.rewards) == set(whole["rewards"])


def test_named_objects_exist() -> None:
    names = set(re.findall(r"`((?:rewards|genalign)\.[a-z_.]+\.[A-Za-z]\w+)", REWARDS + AUDIO + DESIGN))
    names |= {f"rewards.combine.{name}" for name in re.findall(r"^\| `(\w+)\(", REWARDS, re.MULTILINE)}
    assert len(names) > 30
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to("docs").as_posix() for path in PAGES if path.is_relative_to("docs")}
    assert set(listed) == pages and len(listed) == len(pages)


def test_every_result_is_on_the_results_page() -> None:
    tables = set(re.findall(r"<!-- results:(\w+) -->", PAGES[Path("docs/results.md")]))
    assert tables >= {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}


def test_every_table_is_of_a_result_that_is_there_or_that_a_benchmark_writes() -> None:
    marked = {name for page in PAGES.values() for name in re.findall(r"<!-- [a-z]+:(\w+) -->", page)}
    missing = marked - {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}
    benchmarks = "".join(path.read_text() for path in (ROOT / "scripts" / "benchmarks").glob("*.py"))
    named = set(re.findall(r'"(\w+)"', benchmarks)) | {f"demo_{world}" for world in DEMOS}
    assert [name for name in missing if not {name, name.removesuffix("_shapes")} & named] == []  # some are PART_shapes


def _code() -> list[str]:
    return [block for page in PAGES.values() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]


def test_code_compiles_and_its_imports_exist() -> None:
    blocks = _code()
    assert len(blocks) > 10
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            for alias in node.names if isinstance(node, ast.Import) else []:
                importlib.import_module(alias.name)
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_loop_of_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[Path("docs/quickstart.md")], re.DOTALL)
    (code,) = (block for block in blocks if "genalign.Trainer(" in block)
    exec(code, {})
    assert next((tmp_path / "runs" / "loop" / "lora").glob("*.safetensors"))


class ParsedError(Exception):
    """The settings of a command were parsed."""


def _commands() -> list[str]:
    """Every command line of the pages, with optional arguments; the reader's own files are replaced by the demo's."""
    pages = [re.sub(r"\\\n +", "", page) for page in PAGES.values()]
    lines = {line for page in pages for line in re.findall(r"^(?: {4})?genalign (\S.*)$", page, re.MULTILINE)}
    own = re.compile(r"(?<=--config )(FILE|mine\.yaml)")
    return sorted(
        {own.sub("genalign/assets/demo.yaml", line.replace("[--", "--").replace("DIR]", "DIR")) for line in lines}
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the shipped configurations, and the modules and runs that the pages name."""
    demo = folder_of("genalign") / "assets" / "demo.yaml"
    shutil.copytree(ROOT / "scripts" / "configs", tmp_path / "scripts" / "configs")
    (tmp_path / "genalign" / "assets").mkdir(parents=True)
    shutil.copy(demo, tmp_path / "genalign" / "assets")
    written = [(block, named[1]) for block in _code() if (named := re.match(r"# (my_\w+)\.py\n", block))]
    for block, name in written:
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write(block)
    for name in ("mine", "first"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(yaml.safe_load(demo.read_text())))
    (pickscore,) = re.findall(r"```yaml\n(.*?)```", PAGES[Path("README.md")], re.DOTALL)
    (tmp_path / "pickscore.yaml").write_text(pickscore)
    pages = "".join(
        PAGES[Path("docs") / page]
        for page in ("offline.md", "reward_learning.md", "methods/personal.md", "methods/few_steps.md")
    )
    for block in re.findall(r"```yaml\n(.*?)```", pages, re.DOTALL):
        if named := re.match(r"# (\w+\.yaml):", block):
            (tmp_path / named[1]).write_text(block)
    (tmp_path / "prompts.txt").write_text("a circle\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for _, name in written:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = parsing.parse

    def parsed(*arguments: Any, **options: Any) -> Never:
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(parsing, "parse", parsed)
    with pytest.raises(ParsedError):
        main(shlex.split(line, comments=True))
