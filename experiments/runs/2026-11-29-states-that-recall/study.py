"""study.py: T_DELTA, T_STILL env; args: tasks, num_blocks, steps, seeds"""
import sys, os, time
sys.path.insert(0, ".")  # a checkout of 01fab49 with trial.patch
import torch
from experiments import recall as R
from runtime import Runtime
from dataclasses import replace
tasks = sys.argv[1].split(","); blocks = int(sys.argv[2]); steps = int(sys.argv[3]); seeds = [int(s) for s in sys.argv[4].split(",")]
name = sys.argv[5] if len(sys.argv) > 5 else "states"
grid = replace(R.GRIDS["small"], steps=steps)
R.MIXERS["states"]["afno_num_blocks"] = blocks
runtime = Runtime(torch.device("cpu"), torch.float32, False)
for task in tasks:
    for seed in seeds:
        t = time.time()
        row = R.measure(task, name, seed, grid, runtime)
        acc = R.share([(c["right"], c["answers"]) for c in row["cells"]])
        print(f"{task} {name} delta {os.environ.get('T_DELTA')} still {os.environ.get('T_STILL')} blocks {blocks} steps {row['steps']} seed {seed}: {acc:.1%} loss {row['loss']:.3f} {time.time()-t:.0f} s", flush=True)
