"""2,000 steps of the built-in task: memory at the end is what it was after 200."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torchrun import environment

pytestmark = pytest.mark.slow

STEPS, EARLY = 2000, 200
SCRIPT = f"""
import json, sys
from transformers import TrainerCallback
from fastrank.training import run
from fastrank.training.config import RankConfig
from fastrank.training.run_options import BUILT_IN_DEFAULTS, TrainOptions
from fastrank.training.trainer import RankTrainer

seen = {{}}

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in ({EARLY}, {STEPS}):
            for line in open("/proc/self/status"):
                if line.startswith("VmRSS"):
                    seen[state.global_step] = int(line.split()[1])

train = RankTrainer.train

def watched(self, *args, **kwargs):
    self.add_callback(Watch())
    return train(self, *args, **kwargs)

RankTrainer.train = watched
options = dict(
    output_dir=sys.argv[1], max_steps={STEPS}, save_steps=100, save_total_limit=2,
    eval_strategy="steps", eval_steps=100, disable_tqdm=True, per_device_train_batch_size=4,
)
config = RankConfig(**(BUILT_IN_DEFAULTS | options))
run.train(TrainOptions(eval_groups=64), config)
print(json.dumps(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    early, late = seen[str(EARLY)], seen[str(STEPS)]
    assert late <= 1.05 * early, f"{early} KiB after {EARLY} steps, {late} after {STEPS}"
