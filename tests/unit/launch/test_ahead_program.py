"""Products of jaxprs; traffic, collectives and buffers of compiled text."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from mdm_jax.launch.ahead import program
from mdm_jax.models import products as models

TEXT = (pathlib.Path(__file__).parents[2] / "data/compiled_module.txt").read_text("utf-8")


def test_collectives_count_as_often_as_their_loop_runs():
    found = {(c.kind, c.type): c for c in program.Module(TEXT, 8).collectives()}
    loop = found["all-gather", "f32[16,4]"]
    assert (loop.count, loop.group) == (12, 2)
    assert loop.bytes_sent == 12 * (16 * 4 * 4) / 2  # half of what is gathered is one's own
    reduced = found["all-reduce", "f32[8,4]"]
    assert (reduced.count, reduced.group, reduced.bytes_sent) == (1, 4, 2 * 128 * 3 / 4)
    started = found["all-gather", "bf16[64,4]"]
    assert (started.count, started.bytes_sent) == (1, 512 * 7 / 8)
    assert program.describe(found.values())["all-gather"] == (13, 12 * 128 + 448)


def test_traffic_counts_the_slice_of_a_stack_not_the_stack():
    # In the loop: a slice read and written (128 bytes each), an index (4), and the gather's 128
    # read and 256 written. Outside: collectives that are started, and a product of two arrays.
    inside = 12 * ((128 + 4 + 128) + (128 + 256))
    reduce, gather = 128 + 128, 128 + (64 + 512)
    assert program.Module(TEXT, 8).traffic() == inside + reduce + gather + 3 * 128


def test_largest_arrays_are_those_that_instructions_make():
    largest = program.Module(TEXT, 8).largest(2)
    assert [(buffer.type, buffer.bytes) for buffer in largest] == [
        ("bf16[64,4]", 512),
        ("f32[16,4]", 256),
    ]
    assert [buffer.type for buffer in program.Module(TEXT, 8).largest()[2:]] == [
        "f32[8,4]",
        "f32[1,8,4]",
    ]  # not the stack, which is an argument


def test_loops_of_unknown_length_are_counted():
    text = TEXT.replace('{"known_trip_count":{"n":"12"},"known_init_step"', '{"other"')
    module = program.Module(text, 8)
    assert module.unknown_loops == 1 and program.Module(TEXT, 8).unknown_loops == 0
    assert {c.count for c in module.collectives()} == {1}


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.Module("HloModule nothing", 8)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", 2),
        ("replica_groups=[2,4]<=[2,4]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=8] {'axis_0'}, dimensions={0}", 2),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b'}, use_global_device_ids=true", 16),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 2),
        ("replica_groups={}, to_apply=%add", 16),
        ("dimensions={0}", 16),
    ],
)
def test_sizes_of_groups(attributes, size):
    assert program.group_size(attributes, 16) == size


def test_ring_collectives_send_the_published_amounts():
    assert program.bytes_sent("all-gather", 800.0, 8) == 700.0
    assert program.bytes_sent("reduce-scatter", 100.0, 8) == 700.0
    assert program.bytes_sent("all-reduce", 800.0, 8) == 1400.0
    assert program.bytes_sent("collective-permute", 800.0, 2) == 800.0


def test_sizes_of_types():
    assert program.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[], s4[8], f8e4m3fn[4])") == [
        (12, "bf16[2,3]"),
        (1, "pred[]"),
        (4, "s4[8]"),
        (4, "f8e4m3fn[4]"),
    ]


def test_products_of_a_jaxpr_by_hand():
    def loss(w, x):
        def layer(x, w):
            return jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w), None

        x, _ = jax.lax.scan(layer, x, w)
        return jnp.sum(x)

    w, x = jnp.zeros((3, 8, 8)), jnp.zeros((5, 8))
    one = 2 * 5 * 8 * 8
    assert program.count_flops(jax.make_jaxpr(loss)(w, x)) == 3 * one
    # Backward: two products a layer, and the forward one again, since it is rematerialised.
    assert program.count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(w, x)) == 3 * 4 * one


def test_products_with_bfloat16_gradients_count_too():
    def loss(w, x):
        return jnp.sum(models.product("nd,dk->nk", x, w, jnp.bfloat16))

    w, x = jnp.zeros((8, 6)), jnp.zeros((5, 8))
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(w, x)
    assert program.count_flops(traced) == 3 * 2 * 5 * 8 * 6


def test_products_of_branches_and_convolutions():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert program.count_flops(jax.make_jaxpr(branches)(jnp.zeros((4, 4)))) == 2 * 2 * 4**3

    def convolve(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 5))
    assert program.count_flops(jax.make_jaxpr(convolve)(*shapes)) == 2 * (2 * 36 * 5) * (9 * 3)
