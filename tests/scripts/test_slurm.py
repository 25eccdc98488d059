"""The SLURM script, with stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from genalign.runtime.distributed import RankShare

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"
JOB = {
    "SLURM_JOB_NODELIST": "node[3-4]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
}
SRUN = """\
#!/bin/bash
shift
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || exit; done
"""


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes with two tasks each, whose Python prints what it is given."""
    programs = {
        "scontrol": '#!/bin/bash\n[ "$*" = "show hostnames node[3-4]" ] && printf "node%d\\n" {3..9999}\n',
        "srun": SRUN,
        "python": '#!/bin/bash\necho "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT'
        ' $OMP_NUM_THREADS $*"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {**JOB, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}


def test_every_task_becomes_a_rank(variables: dict[str, str]) -> None:
    arguments = ["my run.yaml", "--training.rounds", "5"]
    run = subprocess.run(["bash", SCRIPT, *arguments], env=variables, capture_output=True, text=True, check=True)
    command = "scripts/train.py --config my run.yaml --training.rounds 5 --model.device cuda --resume"
    assert run.stdout.splitlines() == [f"{rank} 4 {rank % 2} 2 node3:24567 8 {command}" for rank in range(4)]
    words = run.stdout.splitlines()[3].split()
    assert RankShare.from_environment({"RANK": words[0], "WORLD_SIZE": words[1]}) == RankShare(3, 4)


def test_without_a_configuration_it_says_how_to_use_it(variables: dict[str, str]) -> None:
    run = subprocess.run(["bash", SCRIPT], env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("usage: sbatch")
