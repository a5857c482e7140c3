"""Test what the recipe takes from modded-nanogpt: tables by token and pair, and further targets."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt2_afno as trainer
from data.text_to_bin import gpt2_encoding, prefix_table
from helpers import kept_and_recomputed, relative, tiny
from kernels.loss import cross_entropy_chunk, linear_cross_entropy
from runtime import Runtime
from test_causality import check_generation, check_model, move_weights, random_tokens

TABLES = dict(pair_rows=50, value_tables=1, embedding_residual=1, value_residual=1)
MIXERS = (dict(mixer="attn"), dict(attn_layers=(1,)), dict(mixer="afno", afno_form="state"))


def moved(**options):
    """Return a tiny model whose weights are moved, tables among them."""
    model = tiny(**options)
    move_weights(model)
    return model


# -----------------------------------------------------------------------------
# tables


def test_tables_are_where_the_flags_say():
    model = tiny(n_layer=12, **TABLES)
    assert list(model.values) == ["1", "2", "9", "10", "11"]
    assert all(block.pair_mix.item() == pytest.approx(0.05) for block in model.transformer.h)
    assert tiny(n_layer=2, value_tables=1).config.value_layers() == [0, 1]
    names = dict(tiny().named_parameters())
    assert not any("pair" in name or "values" in name or "table" in name for name in names)


def test_a_table_of_pairs_begins_as_nothing():
    with_pairs, without, idx = tiny(pair_rows=50), tiny(), random_tokens((2, 24), 97)
    weights = {**with_pairs.state_dict(), **without.state_dict()}
    with_pairs.load_state_dict(weights)
    assert torch.equal(with_pairs.hidden(idx), without.hidden(idx))


def test_a_pairs_row_is_the_tokens_and_the_one_befores():
    table = trainer.PairTable(1000, 4)
    table.weight.data = torch.arange(1000.0)[:, None].expand(-1, 4)
    first, second = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    row = table(second, first)[..., 0].long()
    assert torch.equal(row[7, 11], table(torch.tensor(11), torch.tensor(7))[0].long())
    assert (row != row.T).float().mean() > 0.98  # the order counts
    load = torch.bincount(row.flatten(), minlength=1000).double()
    assert load.var() / load.mean() < 1.5  # 1 for rows drawn at random
    last = torch.tensor(65535)  # of the largest vocabulary: no number is too large on the way
    key = (65535 * 50257 + 65535) * 2654435761 % 2**32
    assert table(last, last)[0].long() == key * 1000 // 2**32


@pytest.mark.parametrize("options", MIXERS)
def test_a_layer_adds_its_rows_as_the_formula_says(options):
    """The oracle looks rows up itself, and turns them into the layer's output by hand."""
    model, idx = moved(**TABLES, **options).double(), random_tokens((2, 9), 97)
    layer, found = 1, []
    block, C = model.transformer.h[layer], 16
    around = block.around
    block.around = lambda x, v0, inputs, mix: found.append((x, v0, inputs)) or around(
        x, v0, inputs, mix)
    model.hidden(idx)
    x, v0, (x0, pair, value, _) = found[0]
    before = torch.cat((torch.zeros(2, 1, dtype=torch.long), idx[:, :-1]), 1)
    assert torch.equal(pair, model.pairs(idx, before))
    assert torch.equal(value, model.values[str(layer)].weight[idx])
    norm = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = lambda gates, h: 2 / (1 + torch.exp(-h[..., :32] @ gates.w.T))
    wide = lambda g: g.repeat_interleave(C // g.size(-1), -1)
    a, b = block.embedding_mix
    x = a * x + b * x0
    h = norm(x)
    added = block.value_mix * wide(gate(block.value_gate, h)) * v0
    added = added + wide(gate(block.table_gate, h)) * value
    rotary = model.embed(idx, 0)[1]
    x = x + block.mixer.mix(block.mixer.project(h), h, added, rotary)
    x = x + block.pair_mix * gate(block.pair_gate, h) * pair
    x = x + block.mlp(norm(x))
    assert relative(around(*found[0], lambda z, h, added: block.mixer.mix(
        z, h, added, rotary))[0], x) < 1e-12


@pytest.mark.parametrize("given", (TABLES, dict(pair_rows=50), dict(value_tables=1)))
def test_the_rows_that_tokens_look_up_are_those_that_get_gradients(given):
    """No others have gradients while training. These are those of the whole tables."""
    model = moved(**{"pair_rows": 0, "value_tables": 0, **given}).double()
    idx = random_tokens((3, 7), 97)
    model(idx, idx.roll(-1, 1), return_logits=False)[1].backward()
    tables = trainer.row_tables(model).values()
    wanted = [table.weight.grad for table in tables]
    others = [p.grad for name, p in model.named_parameters()
              if name not in trainer.row_tables(model)]
    trainer.drop_gradients(model)
    model.meet(torch.cat((idx, idx[:1] + 1)))  # a step may have more tokens than a micro-batch
    for part in (idx[:2], idx[2:]):
        loss = model(part, part.roll(-1, 1), return_logits=False)[1]
        (loss * len(part) / len(idx)).backward()
    for table, gradient in zip(tables, wanted, strict=True):
        assert table.weight.grad is None and len(table.met[0]) < len(table.weight)
        there = torch.zeros_like(gradient)
        there[table.met[0]] = table.gradient
        assert relative(there, gradient) < 1e-12
    assert relative(torch.cat([g.flatten() for g in trainer.gradients_of(model)[:len(others)]]),
                    torch.cat([g.flatten() for g in others])) < 1e-12
    assert len(trainer.gradients_of(model)) == len(others) + len(wanted)
    trainer.drop_gradients(model)
    assert not trainer.gradients_of(model)
    with pytest.raises(IndexError):  # a row that was not met, never another one's
        model.meet(idx[:, :1] * 0 + 96)
        model(idx)


@pytest.mark.parametrize("options", MIXERS)
def test_tables_stream_and_do_not_leak(options):
    model = moved(**TABLES, **options)
    assert check_generation(model, 24, torch.device("cpu")) < 1e-5
    autocast = Runtime(torch.device("cpu"), torch.float32, compile=False).autocast
    assert not check_model(model, 24, 4, torch.device("cpu"), autocast, cuts=None)


def test_tables_recompute_to_the_same_gradients():
    model, idx = moved(**TABLES, attn_layers=(1,)).double(), random_tokens((2, 24), 97)
    gradients = kept_and_recomputed(model, idx)
    assert all(relative(again, kept) < 1e-12 for again, kept in zip(*gradients))


@pytest.mark.slow
def test_tables_compile(fresh_compiler):
    model, idx = moved(n_layer=2, **TABLES, attn_layers=(1,)), random_tokens((2, 24), 97)
    before = model.hidden(idx)
    model.compile()
    assert relative(model.hidden(idx), before) < 1e-5


def test_tables_have_an_optimizer_of_their_own():
    model = tiny(**TABLES)
    *_, rows = trainer.make_optimizers(model, "muon", 0.004, 0.1, 0.01, (0.7, 0.98), 0.9, 0.6)
    tables = [model.pairs.weight, *(table.weight for table in model.values.values())]
    (group,) = rows.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in tables}
    assert (group["lr"], group["beta2"], group["eps"]) == (0.6, 0.95, 1e-10)
    every = [p for optimizer in trainer.make_optimizers(model, "muon", 0.004, 0.1)
             for g in optimizer.param_groups for p in g["params"]]
    assert len({p.data_ptr() for p in every}) == len(every)  # Muon's are views
    assert sum(p.numel() for p in every) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n, met, count", ((50, 7, 7), (640, 7, 10), (640, 10, 10), (640, 0, 0),
                                           (645, 641, 645)))
def test_rows_that_are_met_are_filled_up(n, met, count):
    rows = torch.randperm(n)[:met].repeat(2)
    found = trainer.distinct_rows(rows, torch.zeros(n, 1))
    assert len(found) == len(found.unique()) == count and torch.isin(rows, found).all()


def test_rows_without_a_gradient_stay_to_the_bit():
    table = trainer.RowTable(6, 3)
    table.weight.data[1] = -0.0
    before = table.weight.detach().clone()
    optimizer = trainer.RowAdam([table], 0.3)
    for _ in range(2):
        table.meet(torch.arange(5))
        table(torch.tensor([2, 2])).sum().backward()
        optimizer.step()
        table.met = None
    for row in (0, 1, 3, 4, 5):
        assert table.weight[row].view(torch.int32).equal(before[row].view(torch.int32))
    assert (table.weight[2] != before[2]).all()


def test_rows_move_as_an_oracle_moves_them():
    """The oracle goes row by row, met or not, and sums gradients by itself."""
    torch.manual_seed(0)
    table = trainer.RowTable(11, 4).double()
    rows = trainer.RowAdam([table], 0.3, 0.9, 1e-8)
    weights = table.weight.detach().clone()
    square, factor = [0.0] * 11, torch.randn(11, 4).double()
    for step in range(6):
        idx = torch.tensor([[0, 3, 3, 7], [step, 10, 5, 3]])
        table.meet(idx.unique())
        (table(idx) * factor[idx] * (step + 1)).sum().backward()
        before = table.weight.detach().clone()
        rows.step()
        table.met = None
        met = idx.flatten().tolist()
        for row in range(11):
            gradient = met.count(row) * (step + 1) * factor[row]
            square[row] = 0.9 * square[row] + 0.1 * gradient.square().mean().item()
            if row in met:
                weights[row] -= 0.3 * gradient / (square[row] ** 0.5 + 1e-8)
            else:
                assert torch.equal(table.weight[row], before[row])
    assert relative(table.weight, weights) < 1e-12


# -----------------------------------------------------------------------------
# further targets


@pytest.mark.parametrize("cap", (0.0, 2.5))
@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-13), (torch.float32, 1e-5)))
def test_loss_of_several_targets(dtype, bound, cap):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 8, dtype=dtype, requires_grad=True) for n in (300, 97))
    targets, shares = random_tokens((300, 3), 97), torch.tensor([0.5, 0.3, 0.2], dtype=dtype)
    targets[:40, 1] = targets[:40, 0]  # one token twice
    targets[20:60, 2], targets[:5, 0] = -1, -1  # a row without a next token counts in none
    mean, losses = linear_cross_entropy(x, weight, targets, cap, shares=shares)
    logits = x.double() @ weight.double().T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    wanted = torch.stack([F.cross_entropy(logits, column, ignore_index=-1, reduction="none")
                          for column in targets.unbind(1)], 1)
    wanted[:5] = 0
    assert (losses - wanted).abs().max() <= 10 * bound and not losses.requires_grad
    expected = (wanted * shares.double()).sum() / 295
    assert abs(mean - expected) <= 10 * bound
    for got, exact in zip(torch.autograd.grad(mean, (x, weight)),
                          torch.autograd.grad(expected, (x, weight))):
        assert relative(got.double(), exact.double()) <= bound


def test_one_target_of_all_the_weight_is_the_usual_loss():
    x, weight = rows = torch.randn(300, 8), torch.randn(97, 8)
    targets, ones = random_tokens((300,), 97), torch.ones(1)
    usual = linear_cross_entropy(*rows, targets)
    for a, b in zip(usual, linear_cross_entropy(*rows, targets[:, None], shares=ones)):
        assert torch.equal(a, b.view_as(a))


def test_gradients_in_fp8_stay_in_its_range():
    """Shares that sum to 1 leave the gradient of a logit at most 1 from 0, as one target does."""
    logits, targets = 40 * torch.eye(4, 64), torch.full((4, 3), 63)
    shares = torch.tensor([0.5, 0.3, 0.2]).expand(4, -1)
    _, gradient = cross_entropy_chunk(logits, targets, shares, 64, True, 15.0, 2.0**15)
    assert gradient.float().isfinite().all() and gradient.float().abs().max() > 1000


def test_shares_fall_in_two_thirds_of_the_steps():
    at = lambda done: trainer.shares_at(done, True, True)
    for done, ahead, prefix in ((0, [0.5, 0.25], 0.25), (1 / 6, [0.5, 0.125], 0.25),
                                (1 / 2, [0.25], 0.125), (0.7, [], 0), (1, [], 0)):
        got = at(done)
        assert got[0] == pytest.approx(ahead) and got[1] == pytest.approx(prefix), done
    assert trainer.shares_at(0, False, True) == ([], 0.25)
    assert trainer.shares_at(0, True, False) == ([0.5, 0.25], 0.0)


def test_goals_are_later_tokens_and_prefixes():
    args = SimpleNamespace(predict_ahead=1, predict_prefix=1, num_iterations=10)
    run = SimpleNamespace(args=args, step=0, device="cpu", prefixes=torch.arange(20) - 1)
    y = torch.tensor([[3, 5, 7, 9]])
    targets, shares = trainer.Run.goals(run, y)
    assert targets[0].tolist() == [[3, 5, 7, 2], [5, 7, 9, 4], [7, 9, -1, 6], [9, -1, -1, 8]]
    assert shares.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    run.step = 8
    targets, shares = trainer.Run.goals(run, y)
    assert targets is y and shares is None


def test_a_prefix_is_the_longest_token_that_a_token_begins_with():
    encoding, table = gpt2_encoding(), prefix_table(50257)
    text = [encoding.decode_single_token_bytes(token) for token in range(50256)]
    for token in [0, 255, 256, 50255, *random_tokens((20,), 50256).tolist()]:
        shorter = [other for other in text if len(other) < len(text[token])
                   and text[token].startswith(other)]
        prefix = table[token]
        assert (prefix == -1) == (not shorter)
        assert not shorter or text[prefix] == max(shorter, key=len)
    assert table[50256] == -1  # <|endoftext|> is no text
