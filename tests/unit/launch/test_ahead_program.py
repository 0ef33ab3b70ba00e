"""Products of jaxprs; traffic, collectives and buffers of compiled text."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from mdm_jax.launch.ahead import collectives, program
from mdm_jax.models import products as models

TEXT = (pathlib.Path(__file__).parents[2] / "data/compiled_module.txt").read_text("utf-8")


def test_collectives_count_as_often_as_their_loop_runs():
    found = {(c.kind, c.type): c for c in collectives.find(program.Module(TEXT, 8))}
    loop = found["all-gather", "f32[16,4]"]
    assert (loop.count, loop.group) == (12, 2)
    assert loop.bytes_sent == 12 * (16 * 4 * 4) / 2  # half of what is gathered is one's own
    reduced = found["all-reduce", "f32[8,4]"]
    assert (reduced.count, reduced.group, reduced.bytes_sent) == (1, 4, 2 * 128 * 3 / 4)
    started = found["all-gather", "bf16[64,4]"]
    assert (started.count, started.bytes_sent) == (1, 512 * 7 / 8)
    gathers = collectives.describe(found.values())["all-gather"]
    assert (gathers.count, gathers.bytes_sent) == (13, 12 * 128 + 448)


def test_traffic_counts_the_slice_of_a_stack_not_the_stack():
    # In the loop: a slice read and written (128 bytes each), an index (4), and the gather's 128
    # read and 256 written. Outside: collectives that are started, and a product of two arrays.
    inside = 12 * ((128 + 4 + 128) + (128 + 256))
    reduce, gather = 128 + 128, 128 + (64 + 512 - 128)  # the operand stands in the gather's type
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
    assert {c.count for c in collectives.find(module)} == {1}


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
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_0'}, dimensions={0}", 4),
        ("replica_groups=mesh['a'=4,'b'=6] {'a','b':(1)2}, dimensions={0}", 8),
        ("dimensions={0}", 16),
    ],
)
def test_sizes_of_groups(attributes, size):
    assert collectives.group_size(attributes, 16) == size


def test_ring_collectives_send_the_published_amounts():
    assert collectives.bytes_sent("all-gather", 800.0, 8) == 700.0
    assert collectives.bytes_sent("reduce-scatter", 100.0, 8) == 700.0
    assert collectives.bytes_sent("all-reduce", 800.0, 8) == 1400.0
    assert collectives.bytes_sent("collective-permute", 800.0, 2) == 800.0


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


TPU = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[64,4]) -> f32[16,4] {
  %input = f32[64,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,4]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %constant.5 = s32[] constant(0)
  ROOT %dynamic-slice.5 = f32[16,4]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.1, %constant.5, %constant.5), dynamic_slice_sizes={16,4}
}

%started (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[2,8], r: f32[16,4], s: f32[4,4]) -> (f32[16,4], bf16[8,8]) {
  %q = bf16[2,8]{1,0} parameter(0)
  %r = f32[16,4]{1,0} parameter(1)
  %s = f32[4,4]{1,0} parameter(2)
  %convolution.1 = f32[16,4]{1,0} convolution(%r, %s), dim_labels=bf_io->bf
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %tuple.5 = (f32[16,4]{1,0}, bf16[8,8]{1,0}) tuple(%convolution.1, %all-gather.2)
}

%ended (t: bf16[2,8]) -> bf16[8,8] {
  %t = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[8,8]{1,0} all-gather(%t), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%body (arg.1: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %arg.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  %get-tuple-element.1 = s32[] get-tuple-element(%arg.1), index=0
  %get-tuple-element.2 = f32[16,4]{1,0} get-tuple-element(%arg.1), index=1
  %constant.3 = s32[] constant(2)
  %add.3 = s32[] add(%get-tuple-element.1, %constant.3)
  %collective-permute-start.1 = (f32[16,4]{1,0}, f32[16,4]{1,0}, u32[], u32[]) collective-permute-start(%get-tuple-element.2), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.1 = f32[16,4]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %tuple.3 = (s32[], f32[16,4]{1,0}) tuple(%add.3, %collective-permute-done.1)
}

%condition (arg.2: (s32[], f32[16,4])) -> pred[] {
  %constant.4 = s32[] constant(7)
  %arg.2 = (s32[], f32[16,4]{1,0}) parameter(0)
  %get-tuple-element.4 = s32[] get-tuple-element(%arg.2), index=0
  ROOT %compare.1 = pred[] compare(%get-tuple-element.4, %constant.4), direction=LT
}

ENTRY %main (x: bf16[2,8], y: f32[64,4], z: f32[4,4]) -> f32[16,4] {
  %x = bf16[2,8]{1,0} parameter(0)
  %y = f32[64,4]{1,0} parameter(1)
  %z = f32[4,4]{1,0} parameter(2)
  %fusion.1 = f32[16,4]{1,0:T(8,128)S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  %async-collective-start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%started
  %get-tuple-element.7 = bf16[2,8]{1,0} get-tuple-element(%async-collective-start), index=0
  %fusion.2 = (f32[16,4]{1,0}, bf16[8,8]{1,0}) fusion(%get-tuple-element.7, %fusion.1, %z), kind=kCustom, calls=%async_collective_fusion.1
  %async-collective-done = bf16[8,8]{1,0} fusion(%get-tuple-element.7), kind=kCustom, calls=%ended
  %get-tuple-element.8 = f32[16,4]{1,0} get-tuple-element(%fusion.2), index=0
  %constant.1 = s32[] constant(1)
  %copy.1 = s32[] copy(%constant.1)
  %tuple.4 = (s32[], f32[16,4]{1,0}) tuple(%copy.1, %get-tuple-element.8)
  %while.1 = (s32[], f32[16,4]{1,0}) while(%tuple.4), condition=%condition, body=%body
  ROOT %get-tuple-element.9 = f32[16,4]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_collectives_of_a_tpu_in_fusions_pieces_and_loops_that_count_to_a_constant():
    module = program.Module(TPU, 4)
    assert module.unknown_loops == 0
    gather, permute, scatter = sorted(collectives.find(module))
    assert gather[:4] == ("all-gather", "bf16[8,8]", 4, 1)  # three pieces of one
    assert gather.bytes_sent == gather.asynchronous == gather.overlapped == 128 * 3 / 4
    assert permute[:4] == ("collective-permute", "f32[16,4]", 2, 3)  # counting 1, 3, 5
    assert (permute.asynchronous, permute.overlapped) == (3 * 256, 0)  # nothing runs beside it
    assert scatter[:4] == ("reduce-scatter", "f32[64,4] / 4", 4, 1)
    assert (scatter.bytes_sent, scatter.asynchronous) == (256 * 3, 0)


def test_vector_memory_of_a_tpu_is_no_traffic():
    entry = program.Module(TPU, 4).computations["main"]
    assert entry["fusion.1"].bytes == 0 and entry["fusion.2"].bytes == 16 * 4 * 4 + 128
