"""Gradients of a filter's taps under autocast, against those without: python experiments/logs/autocast-backward.py"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from afno import AFNO1D  # noqa: E402

torch.manual_seed(0)
operator = AFNO1D(24, filter_length=30).operator
parameters = list(operator.taps.mlp.parameters())
exact, upstream = operator.taps(), torch.randn(4, 30)
wanted = torch.autograd.grad(exact, parameters, upstream)
for name in ("eager", "aot_eager", "inductor"):
    taps = operator.taps if name == "eager" else torch.compile(operator.taps, dynamic=False, backend=name)
    with torch.autocast("cpu", torch.bfloat16):
        made = taps()
    got = torch.autograd.grad(made, parameters, upstream)
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted)]
    print(f"{torch.__version__} {name}: taps {((made - exact).norm() / exact.norm()).item():.1e}, gradients of w1, w2, b1, b2 "
          + " ".join(f"{x:.1e}" for x in off))
