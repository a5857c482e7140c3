import sys, time, os
sys.path.insert(0, os.getcwd())
import torch, afno, afno_triton
kind, seconds = sys.argv[1], float(sys.argv[2])
torch.manual_seed(0)
B, T, C = 64, 1024, 768
d = "cuda"
u = torch.randn(B, T, C, device=d, dtype=torch.bfloat16, requires_grad=True)
g = torch.randn_like(u)
taps = (0.1 * torch.randn(4, C, device=d)).requires_grad_()
k = (0.05 * torch.randn(12, T, device=d)).requires_grad_()
a, b = torch.randn(65536, 768, device=d, dtype=torch.bfloat16), torch.randn(768, 3072, device=d, dtype=torch.bfloat16)
logits0 = torch.randn(8192, 50304, device=d).bfloat16()
t = torch.randint(50257, (8192,), device=d)
first, n, begin = None, 0, time.time()
try:
    while n == 0 or time.time() - begin < seconds:
        for _ in range(20):
            if kind in ("depthwise", "all"):
                out = torch.autograd.grad(afno_triton.depthwise_conv(u, taps), (u, taps), g)
            if kind in ("conv", "all"):
                out = torch.autograd.grad(afno.kernel_conv(u, k), (u, k), g)
            if kind in ("loss", "all"):
                out = afno_triton.cross_entropy(logits0.clone(), t, 50257, True, 15.0)
            if kind in ("mm", "all"):
                out = (a @ b,)
            n += 1
            if seconds == 0: break
        torch.cuda.synchronize()
        s = [x.double().sum().item() for x in out]
        if first is None: first = s
        elif s != first: print(kind, "DIFFERS", n, s, first, flush=True)
    print(kind, "fine", n, flush=True)
except Exception as e:
    print(kind, "FAILED after", n, str(e)[:300], flush=True)
