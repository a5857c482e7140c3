"""Causality gate: no output may depend on a later token. Run it before every training.

    python test_causality.py [the trainer's flags]    # --preset fineweb --mixer attn ...
    pytest test_causality.py                          # the same on a small model

`check_causality(model, seq_len, vocab_size)` is the check itself. It needs torch alone and takes
any model: `from test_causality import check_causality` in a project of your own. The trainer calls
it at start, on the very graph, dtype and shape that trains.

For every mixer (attention, AFNO and the hybrid), an even and an odd T, at initialisation and with
moved weights, all tokens after a cut are exchanged. r = norm of what changes before the cut / norm
of what changes at or after it. What must hold:

    float64             r <= 1e-10, also for gradients of output t towards embeddings after t
    the training dtype  r == 0: bit-identical prefixes. Nothing here passes a whole sequence through
                        one FFT, so no future value even enters the arithmetic of a past output.

float64 runs on at most 1024 tokens (attention there needs memory for T x T), the training dtype on
all of them, compiled where training is. Exit status: 0, 1 on a leak, 2 on bad flags.
"""
import contextlib
import dataclasses

import torch

CUTS = (1, 3, 7, 15, 31, 32, 63)  # and T - 1
FLOAT64_BOUND, FLOAT64_TOKENS = 1e-10, 1024


# -----------------------------------------------------------------------------
# the check: torch alone


def random_tokens(shape: tuple[int, ...], vocab_size: int) -> torch.Tensor:
    """Return tokens on the CPU from a generator of their own, not from training's."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(vocab_size, shape, generator=generator)


def exchange_after(idx: torch.Tensor, cut: int, vocab_size: int) -> torch.Tensor:
    """Return idx, (B, T), with every token from position `cut` on replaced by another one."""
    shift = 1 + random_tokens(idx.shape, vocab_size - 1).to(idx.device)
    kept = torch.arange(idx.size(1), device=idx.device) < cut
    return torch.where(kept, idx, (idx + shift) % vocab_size)


def cuts(T: int) -> list[int]:
    """Return the lengths of the prefixes after which tokens are exchanged."""
    return sorted({*(cut for cut in CUTS if cut < T), T - 1} - {0})


@dataclasses.dataclass
class Leak:
    """A cut at which check_causality found a leak, or nothing that changes."""

    cut: int  # tokens from here on were exchanged
    position: int | None  # the first output before the cut that moved; None: no output moved at all
    ratio: float  # norm of what moved before the cut / at or after it

    def __str__(self):
        if self.position is None:
            return f"exchanging the tokens from position {self.cut} on changes nothing after it"
        return (f"output {self.position} is the first that changes with the tokens from position "
                f"{self.cut} on (r = {self.ratio:.1e})")


def prefix_changes(model, idx: torch.Tensor, vocab_size: int):
    """Yield (cut, how far row 0 of model(idx), (B, T, ...), moves at each position), for every cut.

    The moves are norms, (T,), float64: all zero before the cut if no future value even enters the
    arithmetic. With gradients enabled a compiled model runs the graph that trains.
    """
    before = model(idx)[0].detach().double()
    for cut in cuts(idx.size(1)):
        after = model(exchange_after(idx, cut, vocab_size))[0].detach().double()
        yield cut, (after - before).flatten(1).norm(dim=-1)


def ratio_of(change: torch.Tensor, cut: int) -> float:
    """Return r; infinite where nothing changes after the cut: then nothing was tested."""
    before, after = change[:cut].norm().item(), change[cut:].norm().item()
    return before / after if after > 0 else float("inf")


def check_causality(model, seq_len: int, vocab_size: int, tolerance: float = 0.0, rows: int = 1,
                    device: torch.device | str = "cpu") -> list[Leak]:
    """Return the leaks of `model`, none if it is causal.

    model: maps tokens (rows, seq_len), int64, to outputs (rows, seq_len, ...). tolerance: the
    largest r that is no leak; 0 asks for bit-identical outputs. A model that passes whole
    sequences through an FFT needs about 1e-5 in fp32.
    """
    idx = random_tokens((1, seq_len), vocab_size).expand(rows, seq_len).to(device)
    leaks = []
    for cut, change in prefix_changes(model, idx, vocab_size):
        ratio = ratio_of(change, cut)
        if ratio == float("inf") and not change[:cut].any():
            leaks.append(Leak(cut, None, ratio))
        elif not ratio <= tolerance:  # NaN is a leak
            moved = (~(change[:cut] <= tolerance * change[cut:].norm())).nonzero().flatten()
            leaks.append(Leak(cut, moved[0].item() if len(moved) else 0, ratio))
    return leaks


@contextlib.contextmanager
def moved_weights(model: torch.nn.Module):
    """Move every weight meanwhile: a leak must not hide behind a weight that begins at zero or one.

    The noise is from a generator of its own; weights come back bit for bit.
    """
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    move_weights(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def move_weights(model: torch.nn.Module):
    """Add noise to every weight, of its own standard deviation and at least 0.02.

    Vectors and single numbers get at least 0.5: such as a share of the first value, which begins at
    zero and would hide a leak from bf16.
    """
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            size = p.std(correction=0).clamp(min=0.02 if p.ndim > 1 else 0.5)
            p.add_(noise.to(p) * size)


# -----------------------------------------------------------------------------
# the gate: this repository's models


@torch.no_grad()
def prefix_leaks(hidden, T: int, vocab_size: int, device) -> list[tuple[float, int]]:
    """Return (r, cut) for every cut."""
    idx = random_tokens((1, T), vocab_size).to(device)
    return [(ratio_of(change, cut), cut) for cut, change in prefix_changes(hidden, idx, vocab_size)]


def gradient_leaks(model, T: int, device) -> list[tuple[float, int]]:
    """Return (r, cut): gradients of output cut - 1 towards embeddings from `cut` on / before it."""
    embeddings = []
    hook = model.transformer.wte.register_forward_hook(
        lambda module, inputs, output: embeddings.append(output))
    hidden = model.hidden(random_tokens((1, T), model.config.vocab_size).to(device))
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(hidden.size(-1), generator=generator).to(hidden)
    leaks = []
    for cut in cuts(T):
        output = hidden[0, cut - 1] @ direction
        (gradient,) = torch.autograd.grad(output, embeddings[0], retain_graph=True)
        change = gradient[0].norm(dim=-1)
        leaks.append((ratio_of(change.flip(0), T - cut), cut))  # here the past is what must move
    return leaks


def build(config, weights: str, device):
    from train_gpt2_afno import GPT

    torch.manual_seed(0)
    model = GPT(config).to(device)
    if weights == "moved":
        move_weights(model)
    return model


def check(config, modes: list) -> list[tuple]:
    """Return rows (weights, T, what, worst r, at which cut, bound, passed) for one config.

    modes: the trainer's Runtimes of the arithmetic that trains.
    """
    rows, device, vocab_size = [], modes[0].device, config.vocab_size

    def add(weights, T, what, leaks, bound):
        # NaN is the worst of all
        worst, cut = max(leaks, key=lambda leak: (leak[0] != leak[0], leak[0]))
        rows.append((weights, T, what, worst, cut, bound, worst <= bound))

    for weights in ("initial", "moved"):
        for mode in modes:
            model = build(config, weights, device)
            if mode.compile:
                model.compile()
            what = str(mode.dtype).removeprefix("torch.") + ", compiled" * mode.compile
            for T in even_and_odd(config.sequence_length):
                with mode.autocast():
                    add(weights, T, what, prefix_leaks(model.hidden, T, vocab_size, device), 0.0)
        model = build(config, weights, device).double()
        for T in even_and_odd(min(config.sequence_length, FLOAT64_TOKENS)):
            leaks = prefix_leaks(model.hidden, T, vocab_size, device)
            add(weights, T, "float64", leaks, FLOAT64_BOUND)
            add(weights, T, "float64 gradients", gradient_leaks(model, T, device), FLOAT64_BOUND)
    return rows


def even_and_odd(T: int) -> list[int]:
    return sorted({max(T, 2), max(T - 1, 2)})


def print_table(name: str, rows: list[tuple]):
    print(f"{name}\n{'weights':<10} {'T':>6}  {'arithmetic':<22} {'worst r':>9}  {'cut':>6}  "
          f"{'bound':>7}")
    for weights, T, what, worst, cut, bound, passed in rows:
        print(f"{weights:<10} {T:>6}  {what:<22} {worst:>9.1e}  {cut:>6}  {bound:>7.0e}  "
              f"{'ok' if passed else 'LEAK'}")


def configs_of(given) -> dict:
    """Return every mixer's config, whichever is about to be trained: attn, afno and hybrid."""
    kept = given.attn_layers or (given.n_layer // 2,)
    states = tuple(n for n in given.afno_state_layers if n not in kept)
    afno = dataclasses.replace(given, mixer="afno", attn_layers=())
    return {"attn": dataclasses.replace(given, mixer="attn"), "afno": afno,
            "hybrid": dataclasses.replace(afno, attn_layers=kept, afno_state_layers=states)}


def main(argv: list[str]) -> int:
    """Run the gate on the model that the trainer's flags ask for; return the exit status."""
    import train_gpt2_afno as trainer

    flags = trainer.parse_flags(argv)
    device = trainer.choose_device(flags.get("device", "auto"))
    args = trainer.merge_flags(flags, device, None, 1, print)
    given = trainer.GPTConfig(**trainer.model_fields(vars(args)))
    modes = [trainer.Runtime(device, torch.float32, compile=False)]
    trained = trainer.Runtime(device, getattr(torch, args.dtype), bool(args.compile))
    modes += [trained] if trained != modes[0] else []
    print(f"{args.model}, sequence length {given.sequence_length}, {device.type}; "
          "r = change before the cut / change at or after it")
    print(f"convolution in training: {trainer.usable('convolution', device, trained.dtype)[1]}")
    passed = True
    for name, config in configs_of(given).items():
        rows = check(config, modes)
        title = f"\n{name}" + (f", attention in {config.attn_layers}" if name == "hybrid" else "")
        if config.afno_state_layers:
            title += f", form state in {config.afno_state_layers}"
        print_table(title, rows)
        passed &= all(row[-1] for row in rows)
    print("\ncausal: every r is within its bound" if passed else "\nNOT CAUSAL: do not train this")
    return 0 if passed else 1


# -----------------------------------------------------------------------------
# pytest test_causality.py (no pytest in here: the command runs where only the trainer's packages
# are)

SMALL = dict(vocab_size=300, n_layer=3, n_head=2, n_embd=32, afno_num_blocks=4)


def assert_causal(**options):
    """Run the gate on a small model, at lengths of one block of the convolution and of several."""
    from train_gpt2_afno import GPTConfig, Runtime, choose_device

    device = choose_device("auto")
    modes = [Runtime(device, torch.float32, compile=False)]
    if device.type == "cuda":
        modes += [Runtime(device, torch.bfloat16, compile=False),
                  Runtime(device, torch.bfloat16, compile=True)]
    for T, position in ((64, "learned"), (64, "sinusoidal"), (64, "fourier"), (64, "none"),
                        (257, "none"), (2200, "none")):
        config = GPTConfig(**SMALL, **options, sequence_length=T, position=position)
        rows = check(config, modes)
        print_table(f"{options} {position}", rows)
        assert all(row[-1] for row in rows)


def test_attention_is_causal():
    assert_causal(mixer="attn")


def test_every_form_of_afno_is_causal():
    for form in ("filter", "hilbert", "state", "dyadic"):
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100)


def test_experts_are_causal():
    for form, routing in (("filter", "position"), ("hilbert", "frequency"), ("dyadic", "position")):
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100, afno_num_experts=2,
                      afno_routing=routing)


def test_hybrids_are_causal():
    assert_causal(mixer="afno", attn_layers=(1,))
    assert_causal(mixer="afno", afno_state_layers=(1,), afno_silu=1)
    assert_causal(mixer="afno", attn_layers=(1,), afno_state_layers=(2,), value_residual=1,
                  half_rotary=1)


if __name__ == "__main__":
    from train_gpt2_afno import run

    run(main)
