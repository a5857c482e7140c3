import sys, time, statistics; sys.path.insert(0, '.')
import torch, triton
import afno, afno_triton as k
dev = torch.device('cuda')
def ms(f, n=10):
    for _ in range(3): f()
    torch.cuda.synchronize(); ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b))
    return statistics.median(ts)
def tryit(label, f):
    try: print(f"{label:60s} {ms(f):.3f}", flush=True)
    except Exception as e: print(label, 'FAILS', str(e).splitlines()[0][:150], flush=True)
shapes = [dict(BN=bn, BK=bk, num_warps=w, num_stages=s) for bn, bk, w, s in
          ((256,64,8,3),(128,64,4,3),(128,64,8,3),(128,32,4,4),(256,64,8,4),(256,32,8,4))]
short = lambda sh: ','.join(str(v) for v in sh.values())
orig = k.tile_shapes
for G in (48, 12):
  for T in (1024, 4096, 16384, 65536):
    B = 65536 // T
    u = torch.randn(B, T, 768, device=dev, dtype=torch.bfloat16); dy = torch.randn_like(u)
    P = f"G={G} T={T} "
    if T in (1024, 4096):
        K = 1024
        taps = torch.randn(G, K, device=dev) / 32
        tryit(P+f"toeplitz tiles", lambda: k.toeplitz(taps, k.count_lags(k.Sizes(u,G,128),K), (128,128), 128, 1, 1, u.dtype))
        for sh in shapes:
            k.tile_shapes = lambda d, sh=sh: dict(sh)
            tryit(P+f"K={K} short fwd {short(sh)}", lambda: k.short_conv(u, taps, False))
            if T == 1024: tryit(P+f"K={K} short dgrad {short(sh)}", lambda: k.short_conv(dy, taps, True))
            for pr in (256, 512, 1024) if sh is shapes[0] or sh is shapes[1] else (512,):
                k.PROGRAMS = pr
                tryit(P+f"K={K} taps_gradient {short(sh)} programs {pr}", lambda: k.taps_gradient(u, dy, G, K))
            k.PROGRAMS = 512
        k.tile_shapes = orig
        tryit(P+f"K={K} WHOLE taps given, fwd", lambda: afno.kernel_conv(u, taps))
        uu, tt = u.clone().requires_grad_(), taps.clone().requires_grad_()
        tryit(P+f"K={K} WHOLE taps given, both", lambda: torch.autograd.grad(afno.kernel_conv(uu, tt), (uu, tt), dy))
    if T >= 4096:
        taps = torch.randn(G, T, device=dev) / 64
        s = k.Sizes(u, G, k.FAR); half = k.half_transform(dev, u.dtype, k.FAR)
        response = torch.randn(G, 2*k.FAR, s.blocks, device=dev) / 100
        spectra = k.transform(u, half, s); ds = k.transform(dy, half, s)
        near = taps[:, :k.FAR].contiguous()
        for sh in shapes[:4] if T == 4096 else shapes[:2]:
            k.tile_shapes = lambda d, sh=sh: dict(sh)
            tryit(P+f"transform {short(sh)}", lambda: k.transform(u, half, s))
            tryit(P+f"long {short(sh)}", lambda: k.long_conv(u, near, spectra, half, s, False))
            for pr in (256, 512):
                k.PROGRAMS = pr
                if T == 4096: tryit(P+f"near taps_gradient {short(sh)} programs {pr}", lambda: k.taps_gradient(u, dy, G, k.FAR, 2))
            k.PROGRAMS = 512
        k.tile_shapes = orig
        width, blocks = s.width, s.blocks
        for BI, BN, w in ((16,64,4),(16,128,4),(16,256,8),(32,64,4),(64,64,4),(64,64,8),(128,32,4),(128,64,8)):
            pc = triton.cdiv(blocks, BI) * width
            if BN > triton.next_power_of_2(pc) or BI > blocks: continue
            out = torch.empty_like(spectra)
            tryit(P+f"mix BI={BI} BN={BN} warps={w}", lambda: k.mix_kernel[k.FAR // 2, G, triton.cdiv(pc, BN)](spectra, response, out, s.B, blocks, s.columns, pc, W=s.W, FAR=k.FAR, TRANSPOSED=False, BI=BI, BN=BN, num_warps=w))
        for BI, BK, w in ((16,64,4),(16,128,4),(32,64,4),(32,64,8),(64,32,4),(64,64,4),(64,64,8),(128,64,8)):
            if BI > blocks: continue
            lags = triton.cdiv(blocks, BI)
            part = max(1, min(G, 2**25 // (2 * k.FAR * lags * BI * BI)))
            t = u.new_empty(part, k.FAR, 2, lags, BI, BI, dtype=torch.float32)
            tryit(P+f"response_gradient kernel, {part} filters BI={BI} BK={BK} warps={w}", lambda: k.response_gradient_kernel[k.FAR // 2, part, lags](spectra, ds, t, s.B, blocks, s.columns, W=s.W, FAR=k.FAR, BI=BI, BK=BK, num_warps=w))
            tryit(P+f"   its fold", lambda: k.fold(t.flatten(0, 2).unsqueeze(2), 1, lags, lags, 1))
        if T in (4096, 65536):
            for n in (4, 8) if G == 48 else (1, 2):
                W = 768 // G; y = u[..., :n*W].contiguous()
                def chunked():
                    for c in range(0, G, n):
                        x = u[..., c*W:(c+n)*W]; sc = k.Sizes(x, n, k.FAR)
                        k.long_conv(x, near[c:c+n], k.mix(k.transform(x, half, sc), response[c:c+n], sc, False), half, sc, False)
                tryit(P+f"chunks of {n} filters: transform+mix+long", chunked)
            def whole(): k.long_conv(u, near, k.mix(k.transform(u, half, s), response, s, False), half, s, False)
            tryit(P+f"all filters: transform+mix+long", whole)
print('== kdone')
