"""Time of a training step: sitting15-step.py CHECKOUT hybrid|attn [gelusig], the median of 30 steps, three times, on CHECKOUT's code.

The hybrid with SiLU and without short convolution, or attention in every layer, T = 1024, 65,536 random tokens, Muon.
"""
import statistics
import sys

root, mixer, *tried = sys.argv[1:]
sys.path.insert(0, root)
import torch  # noqa: E402

import train_gpt2_afno as trainer  # noqa: E402

if "gelusig" in tried:
    trainer.ACTIVATIONS["gelu"] = lambda x: x * torch.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
device = torch.device("cuda")
runtime = trainer.Runtime(device, torch.bfloat16, compile=True)
options = dict(mixer="afno", attn_layers=(3, 9), afno_silu=1, afno_short_conv=1)
if mixer == "attn":
    options = dict(mixer="attn", mixer_scale=1.0)
torch.manual_seed(0)
config = trainer.GPTConfig(embedding_norm=1, logit_softcap=15.0, embedding_residual=1, residual_bf16=1, **options)
model = trainer.GPT(config).to(device)
model.compile()
optimizers = trainer.make_optimizers(model, "muon", 1e-4, 0.1)
tokens = trainer.random_tokens((64, 1025), config.vocab_size).to(device)


def step():
    with runtime.autocast():
        _, loss = model(tokens[:, :-1], tokens[:, 1:], return_logits=False)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


for _ in range(4):
    step()
for _ in range(3):
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    ms = statistics.median(times)
    print(f"{ms:.2f} ms a step, {64 * 1024 / ms * 1000:,.0f} tokens/s", flush=True)
