import os, sys, time
sys.path.insert(0, ".")
import torch
from train_gpt2_afno import LinearCrossEntropy, cross_entropy_chunk
torch.manual_seed(0)
x = torch.nn.functional.normalize(torch.randn(65536, 768, device="cuda"), dim=-1) * 768**.5
w = torch.randn(50257, 768, device="cuda") * 0.04
t = torch.randint(0, 50257, (65536,), device="cuda")
def go(fp8):
    os.environ["AFNO_FP8"] = "1" if fp8 else ""
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss, losses = LinearCrossEntropy.apply(a, b, t, cross_entropy_chunk, True, 15.0)
    loss.backward()
    return losses.detach(), a.grad, b.grad
ref, ours = go(False), go(True)
for n, r, o in zip(("losses", "dx", "dw"), ref, ours):
    print(n, "relative difference", ((r - o).norm() / r.norm()).item(), "means", r.double().mean().item(), o.double().mean().item(), flush=True)
for fp8 in (False, True, False, True):
    torch.cuda.synchronize(); b = time.time()
    for _ in range(5): go(fp8)
    torch.cuda.synchronize(); print("fp8", fp8, "ms", (time.time() - b) / 5 * 1e3, flush=True)
