"""Causality gate: no output may depend on a later token. Run it before every training.

    python test_causality.py [the trainer's flags]    # --model d12 --attn_layers 5,10 ...
    pytest test_causality.py                          # the same on a small model

For every mixer (attention, AFNO and the hybrid), an even and an odd T, at initialisation and with perturbed
weights, all tokens after a prefix are exchanged. r = norm of what changes before the cut / norm of what changes
at or after it. What must hold:

    float64             r <= 1e-10, and gradients of output t towards embeddings after t likewise
    the training dtype  r == 0: bit-identical prefixes. Nothing here passes a whole sequence through one FFT, so no
                        future value even enters the arithmetic of a past output; rounding is no excuse.

float64 runs on at most 1024 tokens (attention there needs memory for T x T), the training dtype on all of them,
compiled where training is. Exit status: 0, 1 on a leak, 2 on bad flags.
"""
import dataclasses

import torch

from afno import FORMS, kernel_path
from train_gpt2_afno import (DEFAULTS, DEVICE_DEFAULTS, GPT, GPTConfig, Runtime, choose_device, cuts, model_fields,
                             parse_flags, prefix_changes, random_tokens, run)

FLOAT64_BOUND, FLOAT64_TOKENS = 1e-10, 1024


def perturb(model: GPT):
    """Move every weight, also those that begin at zero or one: a leak must not hide behind an initialisation."""
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            p.add_(noise.to(p) * p.std(correction=0).clamp(min=0.02))


def leak_of(change: torch.Tensor, cut: int) -> float:
    """r; infinite where nothing changes after the cut, because then nothing was tested."""
    before, after = change[:cut].norm().item(), change[cut:].norm().item()
    return before / after if after > 0 else float("inf")


@torch.no_grad()
def prefix_leaks(hidden, T: int, vocab_size: int, device) -> list[tuple[float, int]]:
    """(r, cut) for every cut."""
    idx = random_tokens((1, T), vocab_size).to(device)
    return [(leak_of(change, cut), cut) for cut, change in prefix_changes(hidden, idx, vocab_size)]


def gradient_leaks(model: GPT, T: int, device) -> list[tuple[float, int]]:
    """(norm of the gradients of output cut - 1 towards embeddings from `cut` on / towards those before, cut)."""
    embeddings = []
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    hidden = model.hidden(random_tokens((1, T), model.config.vocab_size).to(device))
    hook.remove()
    direction = torch.randn(hidden.size(-1), generator=torch.Generator().manual_seed(0)).to(hidden)
    leaks = []
    for cut in cuts(T):
        (gradient,) = torch.autograd.grad(hidden[0, cut - 1] @ direction, embeddings[0], retain_graph=True)
        change = gradient[0].norm(dim=-1)
        leaks.append((leak_of(change.flip(0), T - cut), cut))  # here the past is what must move
    return leaks


def build(config: GPTConfig, weights: str, device) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).to(device)
    if weights == "perturbed":
        perturb(model)
    return model


def check(config: GPTConfig, modes: list[Runtime]) -> list[tuple]:
    """Rows (weights, T, what, worst r, at which cut, bound, passed) for one config; the modes are those that train."""
    table, device = [], modes[0].device

    def add(weights, T, what, leaks, bound):
        worst, cut = max(leaks, key=lambda leak: (leak[0] != leak[0], leak[0]))  # NaN is the worst of all
        table.append((weights, T, what, worst, cut, bound, worst <= bound))

    for weights in ("initial", "perturbed"):
        for mode in modes:
            model = build(config, weights, device)
            if mode.compile:
                model.compile()
            what = str(mode.dtype).removeprefix("torch.") + (", compiled" if mode.compile else "")
            for T in even_and_odd(config.sequence_length):
                with mode.autocast():
                    add(weights, T, what, prefix_leaks(model.hidden, T, config.vocab_size, device), 0.0)
        model = build(config, weights, device).double()
        for T in even_and_odd(min(config.sequence_length, FLOAT64_TOKENS)):
            add(weights, T, "float64", prefix_leaks(model.hidden, T, config.vocab_size, device), FLOAT64_BOUND)
            add(weights, T, "float64 gradients", gradient_leaks(model, T, device), FLOAT64_BOUND)
    return table


def even_and_odd(T: int) -> list[int]:
    return sorted({max(T, 2), max(T - 1, 2)})


def print_table(name: str, table: list[tuple]):
    print(f"{name}\n{'weights':<10} {'T':>6}  {'arithmetic':<22} {'worst r':>9}  {'cut':>6}  {'bound':>7}")
    for weights, T, what, worst, cut, bound, passed in table:
        print(f"{weights:<10} {T:>6}  {what:<22} {worst:>9.1e}  {cut:>6}  {bound:>7.0e}  {'ok' if passed else 'LEAK'}")


def main(argv: list[str]) -> int:
    flags = parse_flags(argv)
    device = choose_device(flags.get("device", "auto"))
    values = {**DEFAULTS, **DEVICE_DEFAULTS[device.type], **flags}
    given = GPTConfig(**model_fields(values))
    modes = [Runtime(device, torch.float32, compile=False)]
    trained = Runtime(device, getattr(torch, values["dtype"]), bool(values["compile"]))
    modes += [trained] if trained != modes[0] else []
    kept = given.attn_layers or (given.n_layer // 2,)
    configs = {  # every mixer, whichever is about to be trained
        "attn": dataclasses.replace(given, mixer="attn", attn_layers=(), afno_state_layers=()),
        "afno": dataclasses.replace(given, mixer="afno", attn_layers=()),
        "hybrid": dataclasses.replace(given, mixer="afno", attn_layers=kept,
                                      afno_state_layers=[n for n in given.afno_state_layers if n not in kept]),
    }
    print(f"{values['model']}, sequence length {given.sequence_length}, {device.type}; "
          "r = change before the cut / change at or after it")
    print(f"convolution in training: {kernel_path(device, trained.dtype)[1]}")
    passed = True
    for name, config in configs.items():
        table = check(config, modes)
        print_table(f"\n{name}" + (f", attention in {config.attn_layers}" if name == "hybrid" else "")
                    + (f", form state in {config.afno_state_layers}" if config.afno_state_layers else ""), table)
        passed &= all(row[-1] for row in table)
    print("\ncausal: every r is within its bound" if passed else "\nNOT CAUSAL: do not train this")
    return 0 if passed else 1


SMALL = dict(vocab_size=300, n_layer=3, n_head=2, n_embd=32, afno_num_blocks=4)


def assert_causal(**options):
    """The gate on a small model, on lengths of one block of the convolution, of several, and of wider ones."""
    device = choose_device("auto")
    modes = [Runtime(device, torch.float32, compile=False)]
    if device.type == "cuda":
        modes += [Runtime(device, torch.bfloat16, compile=False), Runtime(device, torch.bfloat16, compile=True)]
    for T, position in ((64, "learned"), (64, "sinusoidal"), (64, "fourier"), (64, "none"), (257, "none"), (2200, "none")):
        table = check(GPTConfig(**SMALL, **options, sequence_length=T, position=position), modes)
        print_table(f"{options} {position}", table)
        assert all(row[-1] for row in table)


def test_attention_is_causal():  # no pytest in here: the command runs where only the trainer's packages are
    assert_causal(mixer="attn")


def test_every_form_of_afno_is_causal():
    for form in FORMS[:-1]:
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100)


def test_experts_are_causal():
    for form, routing in (("filter", "position"), ("hilbert", "frequency"), ("dyadic", "position")):
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100, afno_num_experts=2, afno_routing=routing,
                      afno_relu="modulus")


def test_hybrids_are_causal():
    for gate in (0, 1):
        assert_causal(mixer="afno", attn_layers=(1,), afno_gate=gate)
    assert_causal(mixer="afno", afno_state_layers=(1,), afno_silu=1)
    assert_causal(mixer="afno", attn_layers=(1,), afno_state_layers=(2,), value_residual=1, half_rotary=1)


if __name__ == "__main__":
    run(main)
