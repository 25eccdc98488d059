"""Compare two models sample by sample, from the same noise, with 95% intervals.

    python scripts/examples/evaluate_two_models.py                         the embedded model before and after training
    python scripts/examples/evaluate_two_models.py --lora runs/mine/lora   and with a LoRA of yours

From the shell, on prompts and by rewards of yours: ``genalign evaluate prompts`` for each model, the second one with
``--against``, which writes a page that sets their samples side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import genalign
import pipelines
from genalign.cli.main import main
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.paired import gain
from genalign.worlds import shapes
from rewards.shapes import ShapesReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lora", type=Path, help="a LoRA for the embedded model; by default one is trained for --rounds")
parser.add_argument("--rounds", type=int, default=6)
parser.add_argument("--prompts", type=int, default=12, help="prompts per round")
parser.add_argument("--samples", type=int, default=24, help="evaluated samples of each of five tasks")
parser.add_argument("--output", type=Path, default=Path("runs/example-evaluation"))
options = parser.parse_args()

# 1. Two models: the embedded one, and the same one with a LoRA.
lora = options.lora
if lora is None:
    pipeline = pipelines.load("shapes-sd3")
    policy = genalign.Policy(pipeline.denoiser, genalign.Lora(rank=16, alpha=32))
    trainer = genalign.Trainer(
        pipeline,
        policy,
        ShapesReward("partial"),
        shapes.prompts("train"),
        genalign.flow_grpo(genalign.FlowSDE(0.9), window=2, window_reach=0.25, clip_range=1e-3),
        genalign.TrainerSettings(
            rounds=options.rounds,
            prompts_per_round=options.prompts,
            group_size=8,
            batch_size=8 * options.prompts,
            updates_per_round=1,
            learning_rate=3e-3,
        ),
        genalign.Sampling(num_steps=8),
    )
    for result in trainer.rounds():
        print(f"round {result.round + 1}  reward {result.reward:.3f}")
    lora = options.output / "lora"
    assert policy.config is not None
    with policy.averaged():
        pipeline.save_lora(lora, policy.adapter_state(), policy.config)

# 2. Evaluate each on prompts with held-out compositions. Noise follows from the prompt and the sample number.
common = ["--prompts", "shapes:comp", "--samples_per_task", str(options.samples), "--seeds", "1", "--batch_size", "24"]
for name, adapter in {"base": [], "tuned": ["--lora", str(lora)]}.items():
    if status := main(["evaluate", "shapes", "--output", str(options.output / name), *common, *adapter]):
        raise SystemExit(status)

# 3. The gain of each score: a paired difference with its interval over prompts.
base, tuned = load_evaluation(options.output / "base"), load_evaluation(options.output / "tuned")
for score, difference in gain(base, tuned).items():
    print(f"{score}: {difference.text('+.3f')}, 95% interval")
