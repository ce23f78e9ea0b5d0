"""Wanda and SparseGPT: pruning a layer by what its inputs are like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.models import input_hessian, output_error
from fewer.sparsity.magnitude import magnitude_mask, number_kept, row_mask
from fewer.sparsity.sparsegpt import prune_sparsegpt
from fewer.sparsity.structured import n_m_mask
from fewer.sparsity.wanda import wanda_mask, wanda_scores


def problem(seed, rows=8, columns=24, tokens=200, rank=6):
    """A layer whose inputs are correlated and differ in size, as real ones are; in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, rank, generator=generator, dtype=torch.float64) @ mix
    x += 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def obs_column_loop(w, H, sparsity, n_m, damp):
    """Optimal Brain Surgeon in fixed order: a fresh inverse at every step, no Cholesky."""
    w, (rows, columns) = w.clone(), w.shape
    H = H + damp * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(columns)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    if n_m is None:
        cheapest = (w.square() / cost).flatten().argsort()[: round(sparsity * w.numel())]
        pruned.view(-1)[cheapest] = True
    for j in range(columns):
        if n_m is not None and j % n_m[1] == 0:
            group = slice(j, j + n_m[1])
            for row in range(rows):
                order = (w[row, group].square() / cost[group]).argsort()
                pruned[row, j + order[: n_m[1] - n_m[0]]] = True
        for row in pruned[:, j].nonzero().flatten():
            w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
            w[row, j] = 0
    return w


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sparsity=st.sampled_from([0, 0.25, 0.5, 0.9, 1]),
    n_m=st.sampled_from([None, (2, 4), (4, 8), (1, 3)]),
)
def test_sparsegpt_is_optimal_brain_surgery_in_column_order(seed, sparsity, n_m):
    w, x = problem(seed)
    H = input_hessian(x)
    result = prune_sparsegpt(w, H, sparsity, n_m, block=24)
    torch.testing.assert_close(result, obs_column_loop(w, H, sparsity, n_m, 0.01))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sparsity=st.sampled_from([0, 0.3, 0.5, 1]),
    block=st.sampled_from([1, 5, 8, 24, 128]),
)
def test_every_block_of_columns_has_exactly_its_share_of_zeros(seed, sparsity, block):
    w, x = problem(seed)
    result = prune_sparsegpt(w, input_hessian(x), sparsity, block=block)
    for part in result.split(block, dim=1):
        assert int((part != 0).sum()) == number_kept(part.numel(), sparsity)
    if sparsity == 0:
        assert result.equal(w)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([4, 8, 12, 128]))
def test_two_of_four_stay_whatever_the_block(seed, block):
    w, x = problem(seed)
    result = prune_sparsegpt(w, input_hessian(x), n_m=(2, 4), block=block)
    assert (result != 0).view(8, 6, 4).sum(-1).eq(2).all()
    torch.testing.assert_close(result, prune_sparsegpt(w, input_hessian(x), n_m=(2, 4), block=24))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([8, 24]))
def test_inputs_without_correlation_leave_wanda(seed, block):
    w, x = problem(seed)
    x = torch.diag(x.norm(dim=0))  # as loud as before, one at a time
    H = input_hessian(x)
    wanda = w * wanda_mask(w, x, n_m=(2, 4))
    torch.testing.assert_close(prune_sparsegpt(w, H, n_m=(2, 4), damp=0, block=block), wanda)
    one_row = prune_sparsegpt(w[:1], H, 0.5, damp=0, block=24)
    torch.testing.assert_close(one_row, w[:1] * wanda_mask(w[:1], x, 0.5))


@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_sparsegpt_loses_less_output_than_wanda_and_wanda_less_than_magnitude(n_m):
    better_than_wanda, better_than_magnitude = [], []
    for seed in range(25):
        w, x = problem(seed, rows=16, columns=32)
        H = input_hessian(x)
        magnitude = magnitude_mask(w, 0.5) if n_m is None else n_m_mask(w.abs(), *n_m)
        lost = [
            output_error(w, pruned, H)
            for pruned in (
                prune_sparsegpt(w, H, 0.5, n_m),
                w * wanda_mask(w, x, 0.5, n_m),
                w * magnitude,
            )
        ]
        better_than_wanda.append(lost[0] < lost[1])
        better_than_magnitude.append(lost[1] < lost[2])
    assert all(better_than_wanda)
    assert sum(better_than_magnitude) >= 20


def test_a_weight_whose_input_never_occurs_goes_first():
    w, x = problem(0)
    x[:, [2, 7]] = 0
    w[:, [2, 7]] *= 100
    assert not wanda_mask(w, x, 0.25)[:, [2, 7]].any()
    pruned = prune_sparsegpt(w, input_hessian(x), 0.25, damp=1e-9)
    assert (pruned[:, [2, 7]] == 0).all()
    assert pruned.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 1))
def test_wanda_compares_within_a_row_so_rows_may_be_rescaled(seed, sparsity):
    w, x = problem(seed)
    mask = wanda_mask(w, x, sparsity)
    assert mask.sum(1).eq(number_kept(24, sparsity)).all()
    rescaled = w * torch.logspace(-3, 3, 8)[:, None] * -1
    assert wanda_mask(rescaled, x, sparsity).equal(mask)
    assert wanda_mask(w, x * 7, sparsity).equal(mask)
    # What an input is scaled up by can be taken from the weights: the function is the same.
    scale = torch.rand(24, dtype=torch.float64) + 0.5
    assert wanda_mask(w / scale, x * scale, sparsity).equal(mask)


def test_wanda_with_equally_loud_inputs_is_magnitude_per_row():
    w, _ = problem(1)
    x = torch.ones(10, 24) * torch.tensor([1.0, -1.0]).repeat(12)
    assert wanda_mask(w, x, 0.4).equal(row_mask(w.abs(), 0.4))
    assert wanda_mask(w, x, n_m=(4, 8)).equal(n_m_mask(w.abs(), 4, 8))


def test_the_score_squared_is_what_the_output_loses_with_that_weight_alone():
    w, x = problem(2, rows=2, columns=5)
    scores = wanda_scores(w, x.view(4, 50, 5))
    for i in range(2):
        for j in range(5):
            without = w.clone()
            without[i, j] = 0
            lost = output_error(w, without, input_hessian(x))
            assert scores[i, j].item() ** 2 == pytest.approx(lost)


def test_a_single_vector_is_a_single_token():
    w, x = problem(4)
    assert wanda_scores(w, x[0]).equal(wanda_scores(w, x[:1]))


def test_nothing_given_is_modified_and_small_types_are_computed_in_float32():
    w, x = problem(3)
    w, x = w.bfloat16(), x.bfloat16()
    H = input_hessian(x)
    kept = [t.clone() for t in (w, x, H)]
    assert prune_sparsegpt(w, H).dtype == torch.float32
    assert wanda_scores(w, x).dtype == torch.float32
    assert all(a.equal(b) for a, b in zip((w, x, H), kept, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchao_chooses_the_same_two_of_four():
    sparsity = pytest.importorskip("torchao.sparsity")
    w, x = problem(5, rows=16, columns=32)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
    model[0].weight = torch.nn.Parameter(w.float())
    with pytest.warns(UserWarning, match="sparsity_level fixed"):
        sparsifier = sparsity.WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(model, None)
    model(x.float())
    # torchao 0.18 sums squares over batches and forgets the root: without it, |W| ||X||^2.
    model[0].activation_post_process.norm.sqrt_()
    sparsifier.step()
    sparsifier.squash_mask()
    assert (model[0].weight != 0).equal(wanda_mask(w.float(), x.float(), n_m=(2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(3)}, r"hessian must be \(24, 24\), got \(3, 3\)"),
        ({"sparsity": 50}, "sparsity must be between 0 and 1"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"block": 6, "n_m": (2, 4)}, "block must be a multiple of 4, got 6"),
        ({"n_m": (2, 5)}, "the number of columns of w must be a multiple of 5, got 24"),
        ({"n_m": (5, 4)}, "n must be between 0 and 4, got 5"),
        ({"damp": -1.0}, "damp must be at least 0"),
        ({"w": torch.full((8, 24), float("nan"))}, "w must be finite"),
    ],
)
def test_wrong_arguments_of_sparsegpt_are_refused_by_name(change, message):
    w, x = problem(0)
    with pytest.raises(ValueError, match=message):
        prune_sparsegpt(**{"w": w, "hessian": input_hessian(x), **change})


def test_inputs_that_do_not_fit_the_weight_are_refused():
    w, x = problem(0)
    with pytest.raises(ValueError, match="x must have 24 features"):
        wanda_mask(w, x[:, :5])
    with pytest.raises(ValueError, match="w must have two dimensions"):
        wanda_scores(w[0], x)
