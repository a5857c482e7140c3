"""A causal Adaptive Fourier Neural Operator (AFNO): a token mixer in place of attention.

AFNO (Guibas et al., "Adaptive Fourier Neural Operators", ICLR 2022) mixes tokens in four steps. Its
spectrum is that of the *data*, so it already holds the future, and zero-padding does not take it
out again: an MLP on a whole sequence's spectrum leaks. Here the same steps make the *operator*, and
the operator is an ordinary causal convolution:

    the paper                       here, the form `filter`, the default        in the code
    1. transform the data           frequency features of the operator's grid   FilterTaps
    2. block-diagonal complex MLP   the same MLP on those features              SpectralMLP
    3. soft-shrink of the spectrum  of the frequency response                   complex_soft_shrink
    4. transform back               cut to lags >= 0: these are the taps        inverse_rdft
       (adds x)                     y_t = sum over s <= t of taps[t - s] u_s    causal_conv

Read from top to bottom: complex numbers, the MLP, the taps, the convolution, AFNO1D. Details of
this path follow, then the rest of the family: experts, the forms `hilbert`, `state`, `dyadic` and
`reference`. Last come FourierGate and longest_matches, which stand beside the operator. `python
afno.py` shows shapes, the leak of the paper's layer, and that ours has none.

A complex number is a pair (re, im) of real tensors: autocast and torch.compile handle those well.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import constant, usable
from kernels.blocks import BLOCK, chunks_remaining, odd_dft, segment_responses

try:
    import kernels.convolution
    import kernels.state
    import kernels.token_conv
except ImportError:  # no Triton: usable() says so, and the plain paths below are taken
    pass

NUM_DELAYS, MLP_WIDTH = 33, 64  # frequency features of an operator's MLP, and its hidden units
Complex = tuple[Tensor, Tensor]


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x / rms(x) over the last dimension, without weights (Zhang & Sennrich, 2019).

    Half precision is normed in fp32.
    """
    x_full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (x_full * torch.rsqrt(x_full.square().mean(-1, keepdim=True) + eps)).type_as(x)


# -----------------------------------------------------------------------------
# steps 2 and 3 of the paper: MLP and soft-shrink


def complex_linear(z: Complex, weight: Tensor, bias: Tensor | None) -> Complex:
    """Return z @ W + b, block by block.

    z: two of (..., n, in). weight: (..., in, 2 * out), the columns of Re W, then those of Im W.
    bias: (..., 2 * out) likewise, or None. Leading dimensions, such as (num_experts, num_blocks),
    broadcast. Returns two of (..., n, out).
    """
    re, im = weight.chunk(2, -1)
    z = torch.cat(z, -1) @ torch.cat((weight, torch.cat((-im, re), -1)), -2)  # one real product
    return (z if bias is None else z + bias.unsqueeze(-2)).chunk(2, -1)


def complex_relu(z: Complex) -> Complex:
    """Return AFNO's ComplexReLU: a ReLU on the real part, another on the imaginary part."""
    return F.relu(z[0]), F.relu(z[1])


def complex_soft_shrink(z: Complex, threshold: float) -> Complex:
    """Shorten every number by `threshold` >= 0: z * max(0, 1 - threshold / |z|).

    It acts on the modulus, not on each part. So a delay, which only turns phases, never changes
    what is dropped.
    """
    # clamp keeps the gradient of 1/|z| finite where |z| <= threshold; there where() is exactly zero
    squared, least = z[0] ** 2 + z[1] ** 2, threshold**2 + 1e-30
    scale = torch.where(squared > least, 1 - threshold * torch.rsqrt(squared.clamp(min=least)), 0)
    return z[0] * scale, z[1] * scale


class SpectralMLP(nn.Module):
    """AFNO's two-layer complex MLP with ComplexReLU, then soft-shrink.

    Maps two of (num_blocks or 1, n, size_in) to two of (num_experts, num_blocks, n, size_out).
    Every block of every expert has weights of its own. At initialisation inputs of mean square 1
    give outputs of mean square about 1.
    """

    def __init__(self, num_blocks: int, size_in: int, hidden: int, size_out: int,
                 sparsity_threshold: float, num_experts: int, bias: bool):
        super().__init__()
        self.sparsity_threshold = sparsity_threshold
        E, N = num_experts, num_blocks
        self.w1 = nn.Parameter(torch.randn(E, N, size_in, 2 * hidden) * size_in**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, N, hidden, 2 * size_out) * (2 * hidden) ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(E, N, 2 * hidden)) if bias else None
        self.b2 = nn.Parameter(torch.zeros(E, N, 2 * size_out)) if bias else None

    def forward(self, z: Complex) -> Complex:
        z = complex_relu(complex_linear(z, self.w1, self.b1))
        return complex_soft_shrink(complex_linear(z, self.w2, self.b2), self.sparsity_threshold)


# -----------------------------------------------------------------------------
# steps 1 and 4 of the paper: from frequency features to the taps of a causal filter


def response_at(turn: Tensor, mlp: SpectralMLP, router: "Router") -> Complex:
    """Return the frequency response that AFNO's MLP generates at n angles w.

    turn: (n, NUM_DELAYS), w times d in radians for the delays d = 0 ... 32. The features of an
    angle are the responses exp(-i w d) of these delays. Returns two of (num_experts, filters, n),
    or of (1, filters, n) where experts are routed by frequency.
    """
    parts = mlp((turn.cos(), -turn.sin()))
    return tuple(router.by_frequency(part.mT.flatten(1, 2), turn[:, 1]) for part in parts)


class FilterTaps(nn.Module):
    """Make the taps of the forms `filter` and `hilbert` from parameters alone.

    On a fixed grid of 2 x filter_length points: frequency features -> MLP -> soft-shrink -> inverse
    transform, lags >= 0 kept -> decay window exp(-t / tau). The grid and tau, in tokens, are fixed
    at construction. So the same taps serve every T, and lags from filter_length on are zero. With
    fraction < 1 only the lowest modes may be non-zero.
    """

    def __init__(self, mlp: SpectralMLP, router: "Router", num_filters: int, fraction: float,
                 filter_length: int, hilbert: bool):
        super().__init__()
        self.mlp, self.router, self.hilbert = mlp, router, hilbert
        self.num_filters, self.filter_length = num_filters, filter_length
        self.num_modes = math.ceil(fraction * (filter_length + 1))  # of filter_length + 1 bins

    def forward(self) -> Tensor:
        """Return (num_filters, filter_length) in the parameters' dtype, whatever autocast says."""
        like, K = self.mlp.w1, self.filter_length
        with torch.autocast(like.device.type, enabled=False):
            time = torch.arange(K, device=like.device)
            mode = torch.arange(self.num_modes, device=like.device)
            delay = torch.arange(NUM_DELAYS, device=like.device)
            turns = torch.outer(mode, delay) % (2 * K)  # exact: not yet a float
            parts = response_at(turns.to(like.dtype) * (math.pi / K), self.mlp, self.router)
            re, im = (F.pad(part, (0, K + 1 - self.num_modes)) for part in parts)  # other modes: 0
            if self.hilbert:
                response = apply_causal_mask_freq(torch.complex(re, torch.zeros_like(re)), 2 * K)
                re, im = response.real, response.imag
            kernel = self.router.by_lag(inverse_rdft(re, im), time.to(like.dtype))[0]
            return kernel * torch.exp(-time / time_constants(self.num_filters, K, like)[:, None])


# -----------------------------------------------------------------------------
# the causal convolution


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """Return y_t = sum over s <= t of taps[t - s] u_s; later u do not enter its arithmetic.

    u: (B, T, C), any T >= 1. taps: (G, K), lags 0 ... K - 1 in tokens; filter g has channels g C/G
    on. Returns (B, T, C) in u's dtype, under autocast in autocast's.
    """
    kind = u.device.type
    if torch.is_autocast_enabled(kind) and u.dtype == torch.float32:
        u = u.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):  # filters stay in fp32 until they are used
        if usable("convolution", u.device, u.dtype)[0]:
            return kernels.convolution.causal_conv(u, taps)
        return plain_conv(u, taps)


def plain_conv(u: Tensor, taps: Tensor) -> Tensor:
    """Return causal_conv(u, taps), in any dtype, by torch's batched matrix products.

    The sequence is cut into n blocks of b tokens. Inside a block (near field) the product is a
    lower-triangular Toeplitz matrix with exact zeros above. Between blocks (far field) the
    convolution theorem holds block by block: each block is zero-padded to 2b and transformed *by
    itself*; at every frequency a strictly lower-triangular n x n matrix of the responses of the
    taps' segments mixes the blocks; the inverse gives each block what earlier blocks send it
    (overlap-save, uniformly partitioned: Stockham, 1966).

    One FFT over the whole sequence is shorter, but mixes future values into past outputs at
    rounding level, 4e-3 in bf16: too much for a gate that is to find real leaks.
    Costs about 5 b + 4 T/b multiply-adds a token and channel; b = 64 up to T = 2048.
    """
    B, T, C = u.shape
    G = taps.size(0)
    b = 64
    while 32 * b < T:  # at most 32 blocks: the mixing matrices stay small
        b *= 2
    b = min(b, T)
    n = -(-T // b)
    near = toeplitz(F.pad(taps, (0, max(0, b - taps.size(1))))[:, :b])  # (G, b, b)
    # channels of one filter and the batch are columns: (G, b, n * B * C/G)
    x = F.pad(u, (0, 0, 0, n * b - T)).view(B, n, b, G, C // G).permute(3, 2, 1, 0, 4)
    x = x.reshape(G, b, -1)
    y = near.to(x.dtype) @ x
    if n > 1:
        forward, inverse = odd_dft(b, taps)
        responses = toeplitz(segment_responses(taps, forward, n, b))
        re, im = responses.view(G, b, 2, n, n).unbind(2)
        mix = torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2)
        # expand: otherwise matmul would fold filters and columns together, through copies of x
        spectra = forward[:, :b].to(x.dtype).expand(G, -1, -1) @ x  # (G, 2b, columns), (w, re/im)
        mixed = mix.view(G * b, 2 * n, 2 * n).to(x.dtype) @ spectra.view(G * b, 2 * n, -1)
        y = y + inverse.to(x.dtype).expand(G, -1, -1) @ mixed.view(G, 2 * b, -1)
    return y.view(G, b, n, B, C // G).permute(3, 2, 1, 0, 4).reshape(B, n * b, C)[:, :T]


class ShortConv(nn.Module):
    """Convolve (B, T, C) with a few taps a channel, at first the identity; with silu then SiLU."""

    def __init__(self, channels: int, length: int, silu: bool = False):
        super().__init__()
        self.silu = silu
        self.taps = nn.Parameter(torch.zeros(length, channels))
        nn.init.ones_(self.taps[0])

    def forward(self, x: Tensor) -> Tensor:
        if len(self.taps) > 1 and usable("convolution", x.device, x.dtype)[0]:
            return kernels.convolution.short_conv(x, self.taps.float(), self.silu)
        return plain_short_conv(x, self.taps, self.silu)

    def step(self, x_t: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output for one more token x_t, (B, C), and the window for the next one."""
        window = extend(window, x_t, len(self.taps))
        y = newest_output(window, self.taps.T)
        return F.silu(y) if self.silu else y, window


def token_conv(u: Tensor, w: Tensor) -> Tensor:
    """Return y_t = sum over lags j of w_t[j] u_(t - j): every token has its own taps.

    u: (B, T, C). w: (B, T, G, K) in u's dtype, K <= 64; set g has channels g C/G on. Returns (B, T,
    C), bitwise causal.
    """
    if usable("token", u.device, u.dtype)[0]:
        return kernels.token_conv.token_conv(u, w)
    return plain_token_conv(u, w)


class TokenTaps(nn.Module):
    """Convolve u with taps that each token makes: the part of the operator that adapts to the data.

        y_t = sum over j < K of w_t[j] u_(t - j),    w_t = W h_t / 10

    Every group of channels that shares a filter has K such taps. At token t they add the sum over j
    of w_t[j] exp(-i w j) to the filter's frequency response. AFNO's MLP sees no token in the form
    `filter`; this sees the newest one. W begins as zero. Wu et al., 2019, "Pay less attention with
    lightweight and dynamic convolutions"; without their softmax, which keeps taps from being < 0.
    """

    def __init__(self, channels: int, groups: int, length: int):
        super().__init__()
        self.groups, self.length = groups, length
        self.w = nn.Parameter(torch.zeros(groups * length, channels))

    def matrix(self) -> Tensor:
        """Return W / 10, (groups * length, channels)."""
        return 0.1 * self.w

    def forward(self, u: Tensor, taps: Tensor) -> Tensor:
        """Return (B, T, C) from u (B, T, C) and W h / 10, (B, T, groups * length)."""
        return token_conv(u, self.by_group(taps).to(u.dtype))

    def by_group(self, taps: Tensor) -> Tensor:
        return taps.unflatten(-1, (self.groups, self.length))

    def step(self, u_t: Tensor, taps: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return forward() for one more token, (B, C), and the window for the next one."""
        window = extend(window, u_t, self.length)
        return newest_output(window, self.by_group(taps)), window


class FilterOperator(nn.Module):
    """Forms `filter` and `hilbert`: u (B, T, C) convolved with the taps that FilterTaps makes."""

    def __init__(self, taps: FilterTaps):
        super().__init__()
        self.taps = taps

    def forward(self, u: Tensor, taps: Tensor | None = None) -> Tensor:
        """Return (B, T, C); taps are made here where none are given."""
        return causal_conv(u, self.taps() if taps is None else taps)

    def step(self, u_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Return the next output and state, in O(filter_length C).

        The state is the window of inputs and the taps, made once.
        """
        window, taps = state or (None, self.taps())
        window = extend(window, u_t, self.taps.filter_length)
        return newest_output(window, taps), (window, taps)


# -----------------------------------------------------------------------------
# the mixer

FORMS = ("filter", "hilbert", "state", "dyadic", "reference")


class AFNO1D(nn.Module):
    """Mix tokens, (B, T, hidden_size) to the same, any T >= 1; causal but for `reference`.

        value = silu(short_conv(W_in h))      without silu: short_conv(W_in h)
        y     = W_out rmsnorm(operator(value) + token_taps(value) + direct value)

    The form `state` differs: W_in also makes what is written and what is read, heads are normed one
    by one, there is no SiLU, there are no TokenTaps, and the MLP has gcd(num_blocks, heads) blocks.

    Args:
        hidden_size: channels C.
        num_blocks: separate MLPs (block-diagonal weights), C / num_blocks channels each.
        sparsity_threshold: lambda of the soft-shrink, in [0, 1e6], in units of the response's gain,
            in dyadic and reference of an orthonormal spectrum.
        hard_thresholding_fraction: share of the modes, lowest first, that may be non-zero, (0, 1].
            Modes are dropped before a response is cut to lags >= 0, so it stays causal.
        filter_length: taps, in tokens, >= 1; in state a quarter of the longest time constant at
            initialisation; in dyadic twice the longest block that routing tells apart.
        form: the operator, one of FORMS.
        num_experts: sets of the MLP's weights that a Router mixes; >= 1 (reference: 1).
        routing: by what they are mixed, one of ROUTINGS.
        short_conv: taps of the short convolution; >= 1, where 1 mixes no tokens; `state` wants 4.
        silu: whether SiLU follows it, in all forms but state.
        token_taps: taps that each token makes for itself, in all forms but state; 0 to 64.
    Parameters are float32 or float64; autocast makes the rest bf16.
    """

    def __init__(self, hidden_size: int, num_blocks: int = 4, sparsity_threshold: float = 0.01,
                 hard_thresholding_fraction: float = 1.0, filter_length: int = 1024,
                 form: str = "filter", num_experts: int = 1, routing: str = "frequency",
                 short_conv: int = 1, silu: bool = True, token_taps: int = 0):
        super().__init__()
        check_arguments(hidden_size, num_blocks, sparsity_threshold, hard_thresholding_fraction,
                        filter_length, form, num_experts, routing, short_conv, silu, token_taps)
        self.operator = make_operator(form, hidden_size, num_blocks, sparsity_threshold,
                                      hard_thresholding_fraction, filter_length, num_experts,
                                      routing)
        self.stacked = self.operator.sizes if form == "state" else (hidden_size,)  # rows in W_in
        operand = sum(self.stacked)
        self.c_in = nn.Linear(hidden_size, operand, bias=False)
        self.short_conv = ShortConv(operand, short_conv, silu and form != "state")
        self.token_taps = None
        if token_taps and form != "state":
            groups = hidden_size // filter_width(form, hidden_size, num_blocks)
            self.token_taps = TokenTaps(hidden_size, groups, token_taps)
        self.direct = nn.Parameter(torch.ones(hidden_size))
        self.c_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @property
    def filters(self) -> FilterTaps | None:
        """Return what makes this layer's taps, for taps_at_once; None in forms without taps."""
        return self.operator.taps if isinstance(self.operator, FilterOperator) else None

    @property
    def made_once(self) -> nn.Module | None:
        """Return what runs once for all tokens, as it reads no data; None in other forms."""
        return self.operator.mlp if isinstance(self.operator, StateOperator) else self.filters

    def forward(self, h: Tensor) -> Tensor:
        return self.mix(self.project(h), h)

    # The contract of all mixers, attention's, too: a Block calls project, value, then mix or step.

    def project(self, h: Tensor) -> Tensor:
        """Return z = W_in h, (..., hidden_size); in the form state, or with the taps, wider."""
        if self.token_taps is None:
            return self.c_in(h)
        return F.linear(h, torch.cat((self.c_in.weight, self.token_taps.matrix())))  # one product

    def parts(self, z: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the short convolution's input, with the value `added`, and each token's taps."""
        size = self.c_in.out_features
        return add_value(z[..., :size], added), z[..., size:]

    def value(self, z: Tensor) -> Tensor:
        """Return the part of z that becomes the value, (..., hidden_size)."""
        return z[..., : len(self.direct)]

    def mix(self, z: Tensor, h: Tensor, added: Tensor | None = None, rotary=None,
            taps: Tensor | None = None) -> Tensor:
        """Return the mixer's output, (B, T, hidden_size), from z = project(h).

        added: (B, T, hidden_size) or None, is added to the value before the short convolution.
        taps: what filters() makes, where it has been made already. h and rotary are attention's.
        """
        z, own = self.parts(z, added)
        operand = self.short_conv(z)
        y = self.operator(operand) if taps is None else self.operator(operand, taps)
        if self.token_taps is not None:
            y = y + self.token_taps(operand, own)
        return self.output(operand, y)

    @torch.no_grad()
    def step(self, z: Tensor, h: Tensor, added: Tensor | None = None, rotary=None,
             state: tuple | None = None, window: int = 0) -> tuple[Tensor, tuple]:
        """Return mix() for one more token, (B, hidden_size), and the state for the next.

        The first token's state is None. A state is used once: some of its tensors change in place.
        Costs: see the operators' step. The form reference has none. h, rotary, window: attention's.
        """
        inputs, operator_state, newest = state or (None, None, None)
        z, own = self.parts(z, added)
        operand, inputs = self.short_conv.step(z, inputs)
        y, operator_state = self.operator.step(operand, operator_state)
        if self.token_taps is not None:
            more, newest = self.token_taps.step(operand, own, newest)
            y = y + more
        return self.output(operand, y), (inputs, operator_state, newest)

    def output(self, operand: Tensor, y: Tensor) -> Tensor:
        """Return W_out rmsnorm(y + direct value) of the operator's input and output."""
        value = self.value(operand)
        return self.c_proj(rmsnorm(y + self.direct.to(value.dtype) * value))


# =============================================================================
# Details of the default path, then experts, the other forms, a demonstration

CHANNELS_PER_FILTER, CHANNELS_PER_HEAD = 64, 128  # at most; of filters, and of heads of form state


def filter_width(form: str, hidden_size: int, num_blocks: int) -> int:
    """Return how many channels share a filter, or, in the form state, a head."""
    block_size = hidden_size // num_blocks
    if form == "state":  # a head may be wider than a block
        most, divided = CHANNELS_PER_HEAD, hidden_size
    else:
        most, divided = CHANNELS_PER_FILTER, block_size
    return max(d for d in range(1, min(most, block_size) + 1) if divided % d == 0)


def make_operator(form: str, hidden_size: int, num_blocks: int, sparsity_threshold: float,
                  fraction: float, filter_length: int, num_experts: int, routing: str) -> nn.Module:
    """Return the operator of a form; the arguments are AFNO1D's."""
    block_size, width = hidden_size // num_blocks, filter_width(form, hidden_size, num_blocks)
    num_filters = hidden_size // width
    num_blocks = math.gcd(num_blocks, num_filters)  # changes it in the form state alone
    on_data = form in ("dyadic", "reference")  # the MLP's input: the data's spectrum, or features
    sizes = (block_size,) * 3 if on_data else (NUM_DELAYS, MLP_WIDTH, num_filters // num_blocks)
    mlp = SpectralMLP(num_blocks, *sizes, sparsity_threshold, num_experts, bias=form != "dyadic")
    # the lags that experts share out; the dyadic form's are its levels
    near = DyadicOperator.near_length
    lags = (near, filter_length / 2) if form == "dyadic" else (0, filter_length)
    router = Router(num_experts, routing, lags)
    if form == "state":
        return StateOperator(mlp, router, num_filters, width, fraction, filter_length)
    if form == "dyadic":
        return DyadicOperator(mlp, router, num_filters, fraction)
    if form == "reference":
        return ReferenceOperator(mlp, router, fraction)
    taps = FilterTaps(mlp, router, num_filters, fraction, filter_length, hilbert=form == "hilbert")
    return FilterOperator(taps)


def check_arguments(hidden_size, num_blocks, sparsity_threshold, hard_thresholding_fraction,
                    filter_length, form, num_experts, routing, short_conv, silu, token_taps):
    """Raise ValueError, which begins with the argument's name, where one is out of its range."""
    counts = dict(hidden_size=hidden_size, num_blocks=num_blocks, filter_length=filter_length,
                  num_experts=num_experts, short_conv=short_conv)
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if not isinstance(token_taps, int) or not 0 <= token_taps <= BLOCK:
        raise ValueError(f"token_taps must be an integer in [0, {BLOCK}], got {token_taps}")
    if hidden_size % num_blocks:
        raise ValueError(f"num_blocks must divide the {hidden_size} channels, got {num_blocks}")
    if not 0 <= sparsity_threshold <= 1e6:
        raise ValueError(f"sparsity_threshold must be in [0, 1e6], got {sparsity_threshold}")
    if not 0 < hard_thresholding_fraction <= 1:
        raise ValueError("hard_thresholding_fraction must be in (0, 1], "
                         f"got {hard_thresholding_fraction}")
    for name, value, allowed in (("form", form, FORMS), ("routing", routing, ROUTINGS),
                                 ("silu", silu, (False, True))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
    if form == "reference" and num_experts > 1:
        raise ValueError(f"num_experts must be 1 where form is reference, got {num_experts}")


# -----------------------------------------------------------------------------
# pieces of the default path: the inverse transform, taps of all layers at once, one more token


@constant
def rdft_factors(n: int) -> tuple[int, int]:
    """Return N1, even, and N2 with N1 N2 = n for which inverse_rdft needs the fewest products."""
    pairs = ((N, n // N) for N in range(2, n + 1, 2) if n % N == 0)
    return min(pairs, key=lambda factors: factors[0] + 2 * factors[1])


def inverse_rdft(re: Tensor, im: Tensor) -> Tensor:
    """Return irfft(re + i im, n)[..., :K] for n = 2 K, from two of (..., K + 1), as matrix
    products.

    With n = N1 N2, w = N1 a + c and t = N2 d + e (Cooley & Tukey, 1965):

        y[d, e] = Re sum over c of exp(2 pi i c d / N1) exp(2 pi i c e / n)
                     sum over a of exp(2 pi i a e / N2) X[a, c]

    About n (N1 + 2 N2) multiply-adds. torch's FFT is complex, which torch.compile leaves
    uncompiled.
    """
    K = re.size(-1) - 1
    n = 2 * K
    N1, N2 = rdft_factors(n)

    def wave(first: int, second: int, period: int) -> Complex:
        """Return cos and sin of 2 pi x y / period, x < first, y < second.

        x y is reduced modulo the period before it becomes a float.
        """
        x, y = (torch.arange(count, device=re.device) for count in (first, second))
        angle = (torch.outer(x, y) % period).to(re.dtype) * (2 * math.pi / period)
        return angle.cos(), angle.sin()

    rows = K // N1 + 1
    # frequencies 1 ... K - 1 stand for their conjugates, too; 0 and K are real
    inner = re.new_full((K - 1,), 2 / n)
    re, im = re * F.pad(inner, (1, 1), value=1 / n), im * F.pad(inner, (1, 1))
    re, im = (F.pad(part, (0, rows * N1 - K - 1)).unflatten(-1, (rows, N1))
              for part in (re, im))  # (..., a, c)
    cos, sin = wave(N2, rows, N2)
    re, im = cos @ re - sin @ im, sin @ re + cos @ im  # (..., e, c)
    cos, sin = wave(N2, N1, n)
    re, im = re * cos - im * sin, re * sin + im * cos
    cos, sin = wave(N1, N1 // 2, N1)
    return (re @ cos - im @ sin).mT.flatten(-2)  # (..., d, e)


def log_spaced(first: float, last: float, count: int, like: Tensor) -> Tensor:
    """Return `count` numbers from first to last, evenly spaced in their logarithm."""
    steps = torch.linspace(0, 1, count, device=like.device, dtype=like.dtype)
    return first * (last / first) ** steps


def time_constants(count: int, filter_length: int, like: Tensor) -> Tensor:
    """Return (count,) time constants in tokens, log-spaced from 2 to half of filter_length."""
    return log_spaced(2, max(filter_length / 2, 2), count, like)


def taps_at_once(makers: list[FilterTaps]) -> Tensor:
    """Return the taps of L layers, (L, num_filters, filter_length), in as many kernels as one
    takes.

    The makers must be alike but for the values of their parameters. Call it outside of autocast
    where it is compiled: in a compiled function autocast(enabled=False) holds for the forward pass
    alone.
    """
    own = [dict(maker.named_parameters()) for maker in makers]
    stacked = {name: torch.stack([parameters[name] for parameters in own]) for name in own[0]}
    make = lambda parameters: torch.func.functional_call(makers[0], parameters, ())
    return torch.vmap(make)(stacked)


def plain_short_conv(x: Tensor, taps: Tensor, silu: bool = False) -> Tensor:
    """Return the causal convolution of x (B, T, C) with taps (length, C), channel by channel.

    With silu, SiLU of that.
    """
    length, T = taps.size(0), x.size(1)
    padded, taps = F.pad(x, (0, 0, length - 1, 0)), taps.to(x.dtype)
    starts = range(length - 1, -1, -1)
    y = sum(taps[lag] * padded[:, start : start + T] for lag, start in enumerate(starts))
    return F.silu(y) if silu else y


def plain_token_conv(u: Tensor, w: Tensor) -> Tensor:
    """Return token_conv(u, w), in any dtype, by torch's batched matrix products.

    The taps of a block's L tokens are a band matrix (L, L + K - 1): row t has them, the longest lag
    first, from column t on. Column t + K - 1 is token t itself; what is to the right of it is zero.
    """
    B, T, C = u.shape
    G, K = w.shape[2:]
    L = min(BLOCK, T)
    n, reach = -(-T // L), L + K - 1
    band = F.pad(w.flip(-1), (0, L, 0, 0, 0, n * L - T)).view(B, n, L, G, L + K)
    # rows of L + K numbers, read on as rows of L + K - 1: each begins one place later
    band = band.transpose(2, 3).flatten(-2)[..., : L * reach].unflatten(-1, (L, reach))
    x = F.pad(u, (0, 0, K - 1, n * L - T)).unfold(1, reach, L)  # (B, n, C, reach)
    return (band @ x.unflatten(2, (G, -1)).mT).transpose(2, 3).reshape(B, n * L, C)[:, :T]


def toeplitz(x: Tensor) -> Tensor:
    """Return out[t, s] = x[t - s], (..., n, n) from (..., n), with exact zeros where s > t."""
    n = x.size(-1)
    # Rows of 2n numbers (x, then zeros), read on as rows of 2n - 1: each row begins one place later
    # than the one before. Only copies and views, so the gradient is a plain sum, not a scatter.
    rows = F.pad(x, (0, n)).unsqueeze(-2).expand(*x.shape[:-1], n, 2 * n).flatten(-2)
    return rows[..., : n * (2 * n - 1)].unflatten(-1, (n, 2 * n - 1))[..., :n].mT


def add_value(z: Tensor, added: Tensor | None) -> Tensor:
    """Return z with `added` added to its first channels, which become the value."""
    return z if added is None else z + F.pad(added, (0, z.size(-1) - added.size(-1)))


def newest_output(window: Tensor, taps: Tensor) -> Tensor:
    """Return the last output of causal_conv, (B, C), of the last n <= K inputs (B, n, C).

    taps: (G, K); or (B, G, K), then of token_conv.
    """
    B, n, C = window.shape
    G, its_own = taps.size(-2), "b" * (taps.ndim - 2)
    recent = taps[..., :n].flip(-1).to(window.dtype)
    return torch.einsum(f"bngc,{its_own}gn->bgc", window.view(B, n, G, C // G),
                        recent).reshape(B, C)


def extend(window: Tensor | None, u_t: Tensor, length: int) -> Tensor:
    """Return the last `length` inputs, (B, up to length, C), the newest one, (B, C), included."""
    u_t = u_t[:, None]
    return u_t if window is None else torch.cat((window, u_t), 1)[:, -length:]


# -----------------------------------------------------------------------------
# experts

ROUTINGS = ("frequency", "position")


class Router(nn.Module):
    """Mix experts softly: each has a learned Gaussian band on a line from 0 to 1.

    A softmax shares out every point of the line. The line is the frequency (0 to pi), or, where
    routing is `position`, the logarithm of the lag from lags[0] to lags[1] tokens: a tap's (filter,
    hilbert), a head's time constant (state), a block's length (dyadic). It is never the data, so
    nothing can leak through it. One expert has no band and no parameters.
    """

    def __init__(self, num_experts: int, routing: str, lags: tuple[float, float]):
        super().__init__()
        self.routing, self.lags = routing, lags
        if num_experts > 1:
            self.centre = nn.Parameter((torch.arange(num_experts) + 0.5) / num_experts)
            width = torch.full((num_experts,), -math.log(2 * num_experts))
            self.log_width = nn.Parameter(width)

    def by_frequency(self, parts: Tensor, angle: Tensor) -> Tensor:
        """Mix (num_experts, ..., n) at n angles, in radians a token, to (1, ..., n).

        Returns parts as they are where experts are routed by position.
        """
        return self.mix(parts, angle / math.pi) if self.routing == "frequency" else parts

    def by_lag(self, parts: Tensor, lag: Tensor) -> Tensor:
        """Mix likewise at lags, (n,) or (1,), in tokens, where experts are routed by position."""
        if self.routing != "position":
            return parts
        first, last = (math.log1p(end) for end in self.lags)
        place = (torch.log1p(lag) - first) / max(last - first, 1e-9)
        return self.mix(parts, place.clamp(0, 1))

    def mix(self, parts: Tensor, place: Tensor) -> Tensor:
        if len(parts) == 1:
            return parts
        distance = (place - self.centre[:, None]) * torch.exp(-self.log_width)[:, None]
        share = F.softmax(-0.5 * distance**2, 0)  # (num_experts, n)
        share = share.view(len(parts), *[1] * (parts.ndim - 2), -1)
        return (share * parts).sum(0, keepdim=True)


# -----------------------------------------------------------------------------
# form hilbert: a mask in frequency


def apply_causal_mask_freq(X: Tensor, n: int) -> Tensor:
    """Return the rfft of the n-point real kernel with rfft X, lags ceil(n/2) ... n - 1 set to zero.

    A product with a step in time is a circular convolution in frequency: half the identity plus
    half a discrete Hilbert transform, whose kernel is the transform of +1 at kept and -1 at dropped
    lags. So the real and the imaginary part of a causal response determine each other
    (Kramers-Kronig). The form `hilbert` learns the real part and derives the imaginary part in this
    way.

    X: complex, (..., n // 2 + 1); as for irfft, imaginary parts at frequency 0 and, for even n, at
    n/2 do not count. O(n^2), never in time. Raises ValueError where X has another number of
    frequencies.
    """
    if n < 1 or X.size(-1) != n // 2 + 1:
        raise ValueError("n must be >= 1 and X hold n // 2 + 1 frequencies, "
                         f"got n={n} and {X.size(-1)}")
    k = torch.arange(n, device=X.device)
    kept = -(-n // 2)
    turn = torch.exp(-2j * math.pi / n * k.double())  # float64: 1 - turn cancels at low frequencies
    # the geometric sum over kept lags
    hilbert = 2 * (1 - turn[kept * k % n]) / torch.where(k == 0, 1, 1 - turn)
    hilbert[0] = 2 * kept - n
    hilbert = hilbert.to(X.dtype)
    whole = torch.cat((X, X[..., 1:kept].flip(-1).conj()), -1)  # all n frequencies
    real_bins = (k == 0) | (2 * k == n)
    whole = torch.where(real_bins, whole.real.to(X.dtype), whole)
    rows = hilbert[(k[: n // 2 + 1, None] - k) % n]  # (n // 2 + 1, n)
    return (whole[..., : n // 2 + 1] + whole @ rows.T / n) / 2


# -----------------------------------------------------------------------------
# form state: tokens write into damped waves and read from them


def state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Return y_t = q_t S_t with a head's state S_t = a_t S_(t-1) + k_t v_t^T, bitwise causal.

    q, k: (B, T, G, D) of G heads. v: (B, T, G, W). log_a <= 0: (B, T, G), fp32 or float64. Returns
    (B, T, G, W); all but log_a in v's dtype.

    It works in chunks of L = 64 tokens. Inside a chunk it is attention without a softmax, masked by
    exact zeros. Each chunk sends what it adds to the state to the chunks after it. A token costs
    L (D + W) + 2 D W multiply-adds and its share of mixing T / L chunks.
    """
    if usable("state", v.device, v.dtype)[0]:
        return kernels.state.state_scan(q, k, v, log_a)
    return plain_state_scan(q, k, v, log_a)


def in_chunks(x: Tensor) -> Tensor:
    """Return x (B, T, G, ...) in chunks of L = min(64, T) tokens, (B, G, chunks, L, ...).

    The last chunk is padded with zeros.
    """
    T = x.size(1)
    L = min(64, T)
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % L))
    return padded.unflatten(1, (-1, L)).movedim(3, 1).contiguous()


def remains_of(since: Tensor) -> Tensor:
    """Return what remains of token s at token t of a chunk, (..., t, s), exact zeros for s > t.

    since: (..., L), the logarithm of what is left of the chunk's beginning.
    """
    L = since.size(-1)
    before = torch.ones(L, L, dtype=torch.bool, device=since.device).tril()
    between = since[..., None] - since[..., None, :]
    return between.masked_fill(~before, -math.inf).exp()


def plain_state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Return state_scan by torch's batched matrix products, in any dtype."""
    T = v.size(1)
    q, k, v, log_a = map(in_chunks, (q, k, v, log_a))
    since, n = log_a.cumsum(3), v.size(2)
    y = ((q @ k.mT) * remains_of(since)).to(v.dtype) @ v
    if n > 1:
        whole = since[..., -1]
        # (B, G, n, D, W)
        sent = (k * (whole[..., None] - since).exp()[..., None]).to(v.dtype).mT @ v
        state = (chunks_remaining(whole).to(v.dtype) @ sent.flatten(3)).view_as(sent)
        y = y + (q * since.exp()[..., None]).to(v.dtype) @ state
    return y.movedim(1, 3).flatten(1, 2)[:, :T]


class StateOperator(nn.Module):
    """Form `state`: a head's state holds its values v in damped waves of angles w_m.

        S_t[m] = a_t exp(i w_m) S_(t-1)[m] + k_t[m] v_t
        y_t    = rmsnorm(Re sum_m c[m] q_t[m] S_t[m])

    A token writes k, reads q, adds v, and lets a = exp(-softplus(b + d v)) of the past remain. k
    and q have a mean square of one. AFNO's MLP makes the response c from the frequency features of
    the angles. With d = 0 and c = 1 this is retention (Sun et al., 2023, "Retentive network"); with
    d it is a gated linear attention (Yang et al., 2024).

    Angles begin as rotary attention's, time constants as an eighth of filter_length to four times
    it: recall of what is far is what filters lack.
    """

    def __init__(self, mlp: SpectralMLP, router: Router, num_heads: int, width: int,
                 fraction: float, filter_length: int):
        super().__init__()
        self.mlp, self.router, self.num_heads = mlp, router, num_heads
        num_poles = max(1, width // 2)  # complex: the state has as many numbers as a value squared
        kept = math.ceil(fraction * num_poles)
        angle = 10000.0 ** -(torch.arange(num_poles) / num_poles)
        # lowest first; logarithms, so that a step of the optimizer leaves a slow wave slow
        self.log_angle = nn.Parameter(angle.flip(0)[:kept].log())
        tau = log_spaced(filter_length / 8, 4 * filter_length, num_heads, angle)
        self.log_decay = nn.Parameter((1 / tau).expm1().log())  # b: softplus of it is 1 / tau
        self.decay = nn.Parameter(torch.zeros(num_heads, num_heads * width))  # d
        pairs = 2 * kept * num_heads  # (re, im) of each head
        self.sizes = (num_heads * width, pairs, pairs)  # of v, k and q

    def response(self) -> Complex:
        """Return c, two of (num_heads, poles)."""
        delay = torch.arange(NUM_DELAYS, device=self.log_angle.device)
        turn = torch.outer(self.log_angle.exp(), delay)
        parts = response_at(turn, self.mlp, self.router)
        lag = 1 / F.softplus(self.log_decay.detach())
        return tuple(self.router.by_lag(part.mT, lag)[0].mT for part in parts)

    def waves(self, z: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """Return the scan's inputs from z (B, T, v | k | q) at positions (T,).

        q and k are turned to their position, so that their real product is the real part of the
        complex one. q, k and v are in z's dtype.
        """
        v, k, q = z.split(self.sizes, -1)
        log_a = -F.softplus((v @ self.decay.mT.to(v.dtype)).to(self.log_decay.dtype)
                            + self.log_decay)
        turn = torch.outer(position, self.log_angle.exp())[:, None]
        cos, sin = turn.cos(), turn.sin()
        v, k, q = (part.unflatten(-1, (self.num_heads, -1)) for part in (v, k, q))
        (k_re, k_im), (q_re, q_im) = (rmsnorm(part.to(cos.dtype)).chunk(2, -1) for part in (k, q))
        c_re, c_im = self.response()
        q_re, q_im = q_re * c_re - q_im * c_im, q_re * c_im + q_im * c_re
        k = torch.cat((k_re * cos + k_im * sin, k_im * cos - k_re * sin), -1)  # k exp(-i w t)
        q = torch.cat((q_re * cos - q_im * sin, -q_re * sin - q_im * cos), -1)  # conj(q exp(i w t))
        return q.to(v.dtype), k.to(v.dtype), v, log_a

    def forward(self, z: Tensor) -> Tensor:
        """Return (B, T, C) from z (B, T, v | k | q)."""
        with torch.autocast(z.device.type, enabled=False):
            position = torch.arange(z.size(1), device=z.device).to(self.log_angle.dtype)
            return rmsnorm(state_scan(*self.waves(z, position))).flatten(2)

    def step(self, z_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Return the next output and state, in O(C width), however long the text."""
        t, S = state or (0, 0.0)
        with torch.autocast(z_t.device.type, enabled=False):
            waves = self.waves(z_t[:, None], torch.full_like(self.log_angle[:1], t))
            q, k, v, log_a = (part[:, 0, :, None] for part in waves)
            S = log_a.exp()[..., None] * S + k.to(log_a.dtype).mT * v  # (B, G, 2 poles, width)
            y = rmsnorm(q.to(S.dtype) @ S)
            return y.flatten(1).to(z_t.dtype), (t + 1, S)


# -----------------------------------------------------------------------------
# forms dyadic and reference: the MLP stays on the data's spectrum


def spectral_layer(u: Tensor, mlp: SpectralMLP, router: Router, fraction: float, n: int) -> Tensor:
    """Return AFNO's own layer: u (N, L, C), zero-padded to n points -> rfft -> MLP -> irfft (N, n,
    C).

    Transforms are orthonormal over n points, so a threshold means the same at every n. The share
    `fraction` of the modes is kept, lowest first. Where experts are routed by position, L is the
    lag.
    """
    N, L, C = u.shape
    like, (E, blocks) = mlp.w1, mlp.w1.shape[:2]
    with torch.autocast(u.device.type, enabled=False):
        modes = math.ceil(fraction * (n // 2 + 1))
        X = torch.fft.rfft(u.to(like.dtype), n=n, dim=1, norm="ortho")[:, :modes]
        X = X.view(N, modes, blocks, C // blocks).permute(2, 0, 1, 3).flatten(1, 2)
        angle = torch.arange(modes, device=u.device, dtype=like.dtype) * (2 * math.pi / n)
        lag = torch.full((1,), L, device=u.device, dtype=like.dtype)
        parts = (part.view(E, blocks, N, modes, C // blocks).transpose(3, 4)
                 for part in mlp((X.real, X.imag)))
        re, im = (router.by_lag(router.by_frequency(part, angle), lag)[0] for part in parts)
        Y = torch.complex(re, im).permute(1, 3, 0, 2).flatten(2)  # (N, modes, C)
        return torch.fft.irfft(Y, n=n, dim=1, norm="ortho").to(u.dtype)


class DyadicOperator(nn.Module):
    """Form `dyadic`: the non-linear MLP sees the data's spectrum, but only that of completed
    blocks.

    At level L = L0, 2 L0, 4 L0, ... and for every multiple a of 2L, the block [a, a + L),
    zero-padded to 2L, goes through AFNO's layer. The second half of the result, which lies on [a +
    L, a + 2L), is used. So every pair of tokens s < t of different L0-blocks meets at exactly one
    level. Inside a block of L0 = 64 tokens a convolution with learned taps does the rest. All
    levels share the weights, so any T runs. The MLP has no biases: one in frequency would be an
    impulse in time, at the same place of every block, whatever the data are.
    """

    near_length = 64

    def __init__(self, mlp: SpectralMLP, router: Router, num_filters: int, fraction: float):
        super().__init__()
        self.mlp, self.router, self.fraction = mlp, router, fraction
        tau = time_constants(num_filters, self.near_length, mlp.w1.detach())
        window = torch.exp(-torch.arange(self.near_length) / tau[:, None])
        window = window / (2 * window.norm(dim=1, keepdim=True))  # about the filter form's energy
        self.near = nn.Parameter(torch.randn(num_filters, self.near_length) * window)

    def far(self, past: Tensor) -> Tensor:
        """Return what completed blocks (N, L, C) send to the L tokens after each."""
        L = past.size(1)
        return spectral_layer(past, self.mlp, self.router, self.fraction, 2 * L)[:, L:]

    def forward(self, u: Tensor) -> Tensor:
        B, T, C = u.shape
        L = self.near_length
        padded = L
        while padded < T:
            padded *= 2
        u = F.pad(u, (0, 0, 0, padded - T)).contiguous()
        y = causal_conv(u.view(-1, L, C), self.near).reshape(B, padded, C)
        while L < T:
            future = self.far(u.view(-1, 2 * L, C)[:, :L])
            y = y + F.pad(future, (0, 0, L, 0)).view(B, padded, C)
            L *= 2
        return y[:, :T]

    def step(self, u_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Return the next output and state, in O(C log^2 T) on average.

        The state is all inputs and what is known of the outputs to come. It changes in place.
        """
        L0 = self.near_length
        if state is None:
            state = 0, *u_t.new_zeros(2, len(u_t), L0, u_t.size(1))
        t, u, y = state
        u[:, t] = u_t
        y_t = y[:, t] + newest_output(u[:, t - t % L0 : t + 1], self.near)
        t += 1
        if t == u.size(1):
            u, y = (F.pad(part, (0, 0, 0, t)) for part in (u, y))  # twice the room
        if t % L0 == 0:
            L = t & -t  # the one level at which a block ends here: its lowest set bit
            y[:, t : t + L] += self.far(u[:, t - L : t])
        return y_t, (t, u, y)


class ReferenceOperator(nn.Module):
    """Form `reference`: the paper's layer over the whole sequence. NOT CAUSAL, for the gate alone.

    It differs from NVlabs' afno1d.py in this: soft-shrink acts on the modulus, not on each part;
    ceil(f n) modes are kept, not int(f n); weights begin with a gain of one, not 0.02 times normal;
    and AFNO1D surrounds it with projections, short convolution, direct term and norm in place of
    the `+ x` (experiments/causality.md).
    """

    def __init__(self, mlp: SpectralMLP, router: Router, fraction: float):
        super().__init__()
        self.mlp, self.router, self.fraction = mlp, router, fraction

    def forward(self, u: Tensor) -> Tensor:
        return spectral_layer(u, self.mlp, self.router, self.fraction, u.size(1))


# -----------------------------------------------------------------------------
# beside the operator: Fourier-gated positions, and the longest earlier matches


class FourierGate(nn.Module):
    """Turn embeddings x, (B, T, C), into x * sigmoid(W2 g(t)) + W1 g(t).

    g(t), (T, C): sines and cosines of position t at log-spaced frequencies. W1 g begins with the
    size of embeddings, the gate near 1/2.
    """

    def __init__(self, n_embd: int):
        super().__init__()
        self.shift = nn.Linear(n_embd, n_embd, bias=False)  # W1
        self.scale = nn.Linear(n_embd, n_embd, bias=False)  # W2
        for linear in (self.shift, self.scale):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / 3) / n_embd)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return x * torch.sigmoid(self.scale(g)) + self.shift(g)


MATCHES = (1, 2, 3, 4, 6, 8, 12, 16)  # lengths that are told apart, in tokens
# each but the first as two that are shorter
PARTS = {2: (1, 1), 3: (2, 1), 4: (2, 2), 6: (4, 2), 8: (4, 4), 12: (8, 4), 16: (8, 8)}
COPIES = 4  # of equal matches the newest that count
KINDS = COPIES * (len(MATCHES) + 1)  # of sets of matches, see longest_matches


def longest_matches(idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return what followed each token's longest earlier matches in its row, and their kinds.

    What ends with a token is compared with what ends with every token before it. Two sets count:
    the COPIES newest of the longest matches, in the lengths of MATCHES; and where these are longer
    than one token, the COPIES newest places of the token itself. idx: (B, T). Returns the tokens
    after the matches, (B, T, 2, COPIES), the newest first, -1 for none, and kinds_of these sets,
    (B, T, 2). Exact, from tokens of the past alone, in eight sorts.
    """
    (B, T), levels = idx.shape, len(MATCHES)
    place = torch.arange(T, device=idx.device)
    names, befores, level = {}, [], torch.zeros_like(idx)
    for n, length in enumerate(MATCHES, 1):
        key = idx
        if length > 1:  # the names of both parts; the second ends where the first begins
            first, second = PARTS[length]
            key = names[first] * T + F.pad(names[second], (first, 0))[:, :T]
            key = torch.where(place < length - 1, -1 - place, key)  # too short: like nothing else
        names[length], before = name_keys(key)
        befores.append(before)
        level = torch.where(before < 0, level, n)
    before = torch.stack(befores, -1).flatten(1)  # (B, T levels)
    # where the sets' matches stand in `before`: the longest, and length 1; -1 for an empty set
    column = torch.stack((level, (level > 1).long()), -1) - 1
    look_up = lambda table, at: table.gather(1, at.flatten(1)).view(B, T, 2)
    at, found = place[:, None].expand(B, T, 2), []
    for _ in range(COPIES):
        there = (at >= 0) & (column >= 0)
        at = torch.where(there, look_up(before, (at * levels + column).clamp(min=0)), -1)
        found.append(torch.where(at < 0, -1, look_up(idx, (at + 1).clamp(max=T - 1))))
    found = torch.stack(found, -1)
    return found, kinds_of(found, level)


def kinds_of(found: Tensor, level: Tensor) -> Tensor:
    """Return the kinds, (..., 2), of the sets of matches found, (..., 2, COPIES).

    n matches of the length MATCHES[level - 1] have the kind COPIES (level - 1) + n, n of the second
    set KINDS - COPIES + n, none 0. level: (...).
    """
    number = (found >= 0).sum(-1)
    first = torch.stack((COPIES * (level - 1), torch.full_like(level, KINDS - COPIES)), -1)
    return torch.where(number > 0, first + number, 0)


def name_keys(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers 0 ... T - 1 for keys (B, T), equal where the keys of a row are.

    Also the place before each, in its row, that has the same key, or -1.
    """
    ordered, order = key.sort(dim=1, stable=True)
    new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    before = order.roll(1, 1).masked_fill(new, -1)
    back = lambda x: torch.empty_like(order).scatter_(1, order, x)
    return back(new.cumsum(1) - 1), back(before)


def newest_matches(idx_t: Tensor, seen: tuple | None,
                   window: int) -> tuple[tuple[Tensor, Tensor], tuple]:
    """Return longest_matches for one more token (B,), and what the next call needs.

    It looks back at most `window` tokens.
    """
    tokens, lengths = seen or (idx_t.new_zeros(len(idx_t), 0),) * 2
    # a match that ends with an earlier token is one longer than that of the tokens before both
    lengths = torch.where(tokens == idx_t[:, None], 1 + lengths, 0)
    level = torch.bucketize(lengths, lengths.new_tensor(MATCHES), right=True)
    longest = F.pad(level, (1, 0)).amax(1, keepdim=True)
    none = len(MATCHES) + 1
    least = torch.cat((longest.clamp(min=1), torch.where(longest > 1, 1, none)), 1)  # (B, 2)
    place = torch.arange(tokens.size(1), device=idx_t.device)
    at = torch.where(level[:, None] >= least[..., None], place, -1)
    at = F.pad(at, (COPIES, 0), value=-1).topk(COPIES).values  # the newest first
    tokens = torch.cat((tokens, idx_t[:, None]), 1)
    after = tokens.gather(1, (at + 1).clamp(max=tokens.size(1) - 1).flatten(1)).view(at.shape)
    found = torch.where(at < 0, -1, after)
    seen = tokens[:, -window:], F.pad(lengths, (1, 0))[:, -window:]
    return (found, kinds_of(found, longest[:, 0])), seen


@torch.no_grad()
def mean_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return means, (..., C), of a table's rows, normed. rows: (..., n) numbers, -1 for none.

    The table, (V, C), gets no gradient. One would lower the loss by 0.003, and take as much time
    again as the copies (experiments/LOG.md).
    """
    if rows.numel() < len(table):  # then only these are normed
        table = table[rows.clamp(min=0).flatten()]
        place = torch.arange(rows.numel(), device=rows.device).view_as(rows)
        rows = torch.where(rows < 0, -1, place)
    there = (rows >= 0).to(table.dtype)
    share = there / there.sum(-1, keepdim=True).clamp(min=1)
    means = F.embedding_bag(rows.clamp(min=0).flatten(0, -2), rmsnorm(table), mode="sum",
                            per_sample_weights=share.flatten(0, -2))
    return means.unflatten(0, rows.shape[:-1])


# -----------------------------------------------------------------------------
# python afno.py


@torch.no_grad()
def demonstrate(T: int = 256, C: int = 64, cut: int = 128):
    """Print shapes, and how far outputs before `cut` move when the tokens from there on change."""
    torch.manual_seed(0)
    x = torch.randn(1, T, C)
    changed = torch.where(torch.arange(T)[:, None] < cut, x, torch.randn(1, T, C))
    layer = AFNO1D(C)
    print(f"x {tuple(x.shape)} -> taps {tuple(layer.filters().shape)} -> y {tuple(layer(x).shape)}")
    paper = AFNO1D(C, form="reference").operator
    padded = lambda u: spectral_layer(u, paper.mlp, paper.router, 1.0, 2 * T)[:, :T]
    layers = {"the paper's layer": paper, "the paper's layer, zero-padded to 2T": padded}
    layers |= {f"AFNO1D, form {form}": AFNO1D(C, form=form) for form in FORMS[:-1]}
    for name, run in layers.items():
        before, after = run(x)[:, :cut], run(changed)[:, :cut]
        moved = ((after - before).norm() / before.norm()).item()
        print(f"{name:38} outputs before the change move by {moved:.1%}")


if __name__ == "__main__":
    demonstrate()
