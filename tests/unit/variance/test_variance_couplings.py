"""What each coupling and replication does, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from mdm_jax import draws, variance
from mdm_jax.draws import GRID_BITS, DrawSpec
from mdm_jax.variance.transform import Phase, stateless


def levels(transform, batch_size, count, seed=0, num_levels=1):
    spec = DrawSpec(batch_size, num_levels, (1,))
    keys = jax.random.split(jax.random.key(seed), count)

    def u(key):
        return variance.draw_batch(key, transform, transform.init(spec), spec).u[0]

    return np.asarray(zoo.quick(jax.vmap(u))(keys), np.float64)


def test_grid_is_open_symmetric_and_exact():
    ends = draws.from_grid(jnp.array([0, 2**GRID_BITS - 1]))
    np.testing.assert_array_equal(ends, [2.0**-24, 1 - 2.0**-24])
    u = draws.open_uniform(jax.random.key(0), (10_000,))
    reflected = 1.0 - u
    np.testing.assert_array_equal(1.0 - reflected, u)
    assert np.all(np.asarray(reflected * 2.0**24) % 2 == 1)


@pytest.mark.parametrize(
    "sizes", [(1, 98, 4096), pytest.param((2, 3, 7, 49, 1000), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("transform", [variance.stratified(), variance.systematic()])
def test_one_quantile_per_cell_for_every_batch_size(transform, sizes):
    """Peers' float lattices have the wrong length at 49, 98, 103, ...; integers do not."""
    for size in sizes:
        u = levels(transform, size, 2, seed=size)
        assert u.shape == (2, size, 1)
        for row in u[..., 0]:
            cells = np.sort(np.floor(row * size + 1e-9).astype(int))
            if transform.name == "stratified":
                np.testing.assert_array_equal(cells, np.arange(size))
            gaps = np.diff(np.sort(row))
            assert len(set(row)) == size
            if transform.name == "systematic" and size > 1:
                np.testing.assert_allclose(gaps, 1 / size, atol=2.0**-22)


def test_systematic_lattice_length_for_all_sizes_up_to_4096():
    for size in range(2, 4097):
        lattice = (np.arange(size, dtype=np.int64) << GRID_BITS) // size
        assert np.diff(lattice).min() > 0
        assert lattice[-1] < 2**GRID_BITS


@pytest.mark.slow
def test_variance_of_the_mean_quantile():
    """f(u) = u, B = 16: iid 1/(12 B), systematic 1/(12 B^2), jittered cells 1/(12 B^3).

    Relative standard error of a variance from N = 20000 draws is at most sqrt(2/N) = 1%.
    """
    size, count = 16, 20_000
    for transform, power in (
        (variance.identity(), 1),
        (variance.systematic(), 2),
        (variance.stratified(), 3),
    ):
        mean = levels(transform, size, count)[..., 0].mean(1)
        np.testing.assert_allclose(mean.var(ddof=1), 1 / (12 * size**power), rtol=0.05)


def test_stratified_rows_are_permuted_and_levels_independent():
    u = levels(variance.stratified(), 8, 4_000, num_levels=2)
    cells = np.floor(u * 8).astype(int)
    for row in range(8):
        counts = np.bincount(cells[:, row, 0], minlength=8)
        # Expected 500 with standard deviation 21.
        assert np.all(np.abs(counts - 500) < 5 * 21)
    assert not np.array_equal(cells[..., 0], cells[..., 1])
    pairs = np.corrcoef(u[:, 0, 0], u[:, 0, 1])[0, 1]
    assert abs(pairs) < 5 / 4_000**0.5


def test_mirror_reflects_noise_and_keeps_levels():
    spec = DrawSpec(3, 1, (4,))
    transform = variance.mirror()

    @zoo.quick
    def run(key):
        return variance.draw_batch(key, transform, transform.init(spec), spec)

    draw = jax.tree.map(np.asarray, run(jax.random.key(0)))
    assert draw.u.shape == (2, 3, 1)
    np.testing.assert_array_equal(draw.u[0], draw.u[1])
    np.testing.assert_array_equal(draw.noise[0] + draw.noise[1], np.ones((3, 4), np.float32))
    assert transform.views == 2


def test_chain_label_views_and_members():
    biased = stateless("biased", Phase.WARP, lambda _key, draw, _spec: draw, bias="biased")
    chained = variance.chain(variance.stratified(), biased, variance.mirror())
    assert chained.bias == "biased"
    assert chained.views == 2
    assert [t.name for t in chained.members] == ["stratified", "biased", "mirror"]
    assert set(chained.init(DrawSpec(2, 1, (1,)))) == {"stratified", "biased", "mirror"}
    assert variance.chain().bias == "exact"


@pytest.mark.parametrize(
    "members, words",
    [
        ((variance.mirror(), variance.stratified()), ("mirror", "stratified", "order")),
        ((variance.mirror(), variance.mirror()), ("mirror", "twice")),
        ((variance.stratified(), variance.systematic()), ("stratified", "systematic", "discard")),
        (
            (variance.chain(variance.stratified()), variance.chain(variance.systematic())),
            ("stratified", "systematic"),
        ),
        ((variance.complement(), variance.stratified()), ("complement", "stratified", "views")),
        (
            (variance.complement(), variance.stratified_levels(3)),
            ("complement", "stratified_levels", "first"),
        ),
        ((variance.stratified_levels(), variance.antithetic_pairs()), ("levels", "pairs", "views")),
        ((variance.ppots(), variance.stratified()), ("ppots", "stratified", "order")),
        ((variance.clipped(0.3, 0.8), variance.ppots()), ("clipped", "ppots", "one warp")),
    ],
)
def test_chain_refuses_nonsense_and_names_the_clash(members, words):
    with pytest.raises(ValueError) as error:
        variance.chain(*members)
    assert all(word in str(error.value) for word in words)


def test_chain_takes_one_of_each_kind_in_order():
    """Strata first, then their reflection, one warp, and replications of the four views."""
    chained = variance.chain(
        variance.stratified(),
        variance.complement(),
        variance.ppots(),
        variance.mirror(),
        variance.rotate(3),
    )
    assert chained.views == 12
    spec = DrawSpec(4, 1, (5,))
    draw = jax.eval_shape(
        lambda key: variance.draw_batch(key, chained, chained.init(spec), spec), jax.random.key(0)
    )
    assert draw.u.shape == draw.log_weight.shape == (12, 4, 1)
    assert draw.noise.shape == (12, 4, 5)


def test_chain_refuses_what_is_no_transform():
    with pytest.raises(TypeError, match=r"did you mean mirror\(\)"):
        variance.chain(variance.mirror)


def test_spec_and_split_errors():
    with pytest.raises(ValueError, match="batch_size"):
        draws.iid(jax.random.key(0), DrawSpec(0, 1, (4,)))
    with pytest.raises(ValueError, match="num_levels"):
        draws.iid(jax.random.key(0), DrawSpec(1, 0, (4,)))
    with pytest.raises(ValueError, match="event_shape"):
        draws.iid(jax.random.key(0), DrawSpec(1, 1, ()))
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of 8"):
        draws.split_rows(jnp.zeros((1, 8, 2)), 3, axis=1)


def test_split_rows_and_join_rows_are_inverse():
    tree = {"a": jnp.arange(24.0).reshape(2, 12), "b": jnp.arange(72.0).reshape(2, 12, 3)}
    parts = draws.split_rows(tree, 3, axis=1)
    assert parts["a"].shape == (3, 2, 4)
    assert parts["b"].shape == (3, 2, 4, 3)
    jax.tree.map(np.testing.assert_array_equal, draws.join_rows(parts, axis=1), tree)


def test_noise_of_a_row_does_not_depend_on_the_batch_size():
    iid = zoo.quick(draws.iid, static_argnums=1)
    small, large = (
        jax.tree.map(np.asarray, iid(jax.random.key(4), DrawSpec(b, 2, (6,)))) for b in (4, 32)
    )
    np.testing.assert_array_equal(small.noise, large.noise[:, :4])
    np.testing.assert_array_equal(small.u, large.u[:, :4])
