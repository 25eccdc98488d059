"""``genalign export``: the weights of a run, for use without genalign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from genalign.cli import config
from genalign.cli.context import CommandContext
from genalign.cli.model_card import model_card
from genalign.runtime.files import write_text
from genalign.training.run_folder import RunFolder


def export_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign export``: write the weights of a run in a form that diffusers or PEFT loads, with a model card."""
    settings, _ = config.parse(config.Export, arguments, "export")
    run, output = Path(settings.run), Path(settings.output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output, or remove it")
    RunFolder(run).require_format()
    card = model_card(run, settings.form, output.name)
    adapter, network = run / "lora", run / "denoiser"
    if not adapter.is_dir() and not network.is_dir():
        raise FileNotFoundError(f"{run} has neither lora/ nor denoiser/: training did not finish a round")
    if settings.form == "lora":
        if not adapter.is_dir():
            raise ValueError(f"{run} trained the whole network: export it with --form merged or pipeline")
        shutil.copytree(adapter, output)
    else:
        pipeline = context.load(config.model_of(json.loads((run / "config.json").read_text(encoding="utf-8"))))
        if adapter.is_dir():
            pipeline.load_lora(adapter)
        else:
            pipeline.load_denoiser(network)
        pipeline.save_merged(output, whole=settings.form == "pipeline")
    write_text(output / "README.md", card)
    print(f"{settings.form}: {output}")
    return 0
