"""Rooflines of programs are read rightly from their text."""

import pytest

from benchmarks.chips import hlo, roofline

CHIP = roofline.Chip(bandwidth=1e9, flops=1e12, clock=1e9)
GPU = roofline.Chip(bandwidth=1e9, flops=1e12, start=1e-6)
KB = 1e3
CYCLES = 'backend_config={"estimated_cycles":"5000","cost_model_type":"COST_MODEL_TYPE_'


def program(*lines, others=""):
    """A program with parameters %x, %w (1000 bytes each) and these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule step

{others}
ENTRY %main (x: f32[250], w: f32[250]) -> f32[250] {{
  %x = f32[250]{{0}} parameter(0)
  %w = f32[250]{{0:T(256)}} parameter(1)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
{body}
}}
"""


def moved(*lines, **others):
    found = roofline.read(program(*lines, **others), CHIP)
    assert not found.notes
    return found.moved


def test_an_instruction_reads_its_operands_and_writes_its_result():
    """Only in the main memory; what gives an array another name is free."""
    assert moved("ROOT %y = f32[250]{0} add(%x, %w)") == 3 * KB
    assert moved("ROOT %y = f32[250]{0:S(1)} add(%x, %w)") == 2 * KB
    assert moved("ROOT %y = f32[25,10]{1,0} bitcast(%x)") == 0
    assert moved("ROOT %y = bf16[250]{0} convert(%x)") == 1.5 * KB
    assert moved("ROOT %y = f32[5]{0} dynamic-slice(%x, %zero)") == 40


SLICED = """
%fused (p: f32[250], u: f32[5]) -> f32[250] {
  %p = f32[250]{0} parameter(0)
  %u = f32[5]{0} parameter(1)
  %i = s32[] constant(0)
  %s = f32[5]{0} slice(%p), slice={[0:5]}
  %sum = f32[5]{0} add(%s, %u)
  ROOT %d = f32[250]{0} dynamic-update-slice(%p, %sum, %i)
}
"""
SEVERAL = SLICED.replace(
    "ROOT %d = f32[250]{0} dynamic-update-slice(%p, %sum, %i)",
    """%d = f32[250]{0} dynamic-update-slice(%p, %sum, %i)
  ROOT %t = (f32[250]{0}, f32[5]{0}) tuple(%d, %sum)""",
)
FILLED = SLICED.replace("(%p, %sum, %i)", "(%b, %sum, %i)").replace(
    "  %s =", "  %b = f32[250]{0} broadcast(%i), dimensions={}\n  %s ="
)


def test_a_fusion_reads_and_writes_the_slices_that_it_needs():
    """Also one with several results; an array that it fills is written as a whole."""
    u = "%u = f32[5]{0:S(1)} slice(%x), slice={[0:5]}"  # 20 bytes
    one = "ROOT %y = f32[250]{0} fusion(%x, %u), kind=kLoop, calls=%fused"
    assert moved(u, one, others=SLICED) == 20 + 20 + 20
    two = one.replace("f32[250]{0} fusion", "(f32[250]{0}, f32[5]{0}) fusion")
    assert moved(u, two, others=SEVERAL) == 20 + 20 + 20 + 20
    assert moved(u, one, others=FILLED) == 20 + 20 + KB


def loop(condition="ROOT %less = pred[] compare(%i, %n), direction=LT", known=""):
    others = f"""
%cond (c: (s32[], f32[250])) -> pred[] {{
  %c = (s32[], f32[250]{{0}}) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%c), index=0
  {condition}
}}

%body (b: (s32[], f32[250])) -> (s32[], f32[250]) {{
  %b = (s32[], f32[250]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %a = f32[250]{{0}} get-tuple-element(%b), index=1
  %by = s32[] constant(2)
  %next = s32[]{{:S(6)}} add(%j, %by)
  %u = f32[5]{{0:S(1)}} broadcast(%by), dimensions={{}}
  %d = f32[250]{{0}} dynamic-update-slice(%a, %u, %j)
  ROOT %r = (s32[], f32[250]{{0}}) tuple(%next, %d)
}}
"""
    run = f"%l = (s32[], f32[250]{{0}}) while(%t), condition=%cond, body=%body{known}"
    return program("%t = (s32[], f32[250]{0}) tuple(%one, %x)", run, others=others)


SCALARS = 4 + 4 + 4
"""The bytes of numbers that each turn of the loop reads."""


def test_a_loop_counts_as_often_as_it_runs_and_updates_in_place():
    """From 1 in steps of 2 to below 7: three times, 20 bytes each."""
    found = roofline.read(loop(), CHIP)
    assert not found.notes and found.moved == 3 * (20 + SCALARS)
    said = loop(known=', backend_config={"known_trip_count":{"n":"9"}}')
    assert roofline.read(said, CHIP).moved == 9 * (20 + SCALARS)
    outside = "ROOT %y = f32[250]{0} dynamic-update-slice(%x, %u, %zero)"
    u = "%u = f32[5]{0:S(1)} iota(), iota_dimension=0"
    assert moved(u, outside) == 2 * KB + 4


def test_a_loop_of_unknown_length_is_named():
    found = roofline.read(loop("ROOT %less = pred[] custom-call(%i, %n)"), CHIP)
    (note,) = found.notes
    assert note == "how often l runs is not known, it is counted 7 times"
    assert found.moved == 7 * (20 + SCALARS)


def test_products_take_the_cycles_of_the_compiler():
    """On a TPU, and no others do; it is named if the compiler gives none."""
    views = "%a = f32[25,10]{1,0} bitcast(%x)", "%b = f32[10,25]{1,0} bitcast(%w)"
    line = "%y = f32[25,25]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, " + CYCLES
    found = roofline.read(program(*views, line + 'CLASSIC"}'), CHIP)
    assert found.seconds == pytest.approx(5e-6) and not found.notes
    other = roofline.read(program(*views, line + 'INVALID"}'), CHIP)
    assert other.seconds == pytest.approx(4.5e-6)
    assert other.costs[0].product_seconds == 2 * 25 * 25 * 10 / 5e11
    assert "no cycles" in other.notes[0]


DOT = """
%fused (p: bf16[100,50], q: bf16[50,200]) -> bf16[100,200] {
  %p = bf16[100,50]{1,0} parameter(0)
  %q = bf16[50,200]{1,0} parameter(1)
  ROOT %d = bf16[100,200]{1,0} dot(%p, %q), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}
"""


def test_products_on_a_gpu_take_their_arithmetic():
    """Fused ones, and those of NVIDIA's library, whose room to work in is not moved."""
    p, q = ("%p = bf16[100,50]{1,0} iota()", "%q = bf16[50,200]{1,0} iota()")
    fused = "%y = bf16[100,200]{1,0} fusion(%p, %q), kind=kCustom, calls=%fused"
    call = "%y = (bf16[100,200]{1,0}, s8[999]{0}) custom-call(%p, %q), custom_call_"
    call += (
        'target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}'
    )
    for line in (fused, call):
        found = roofline.read(program(p, q, line, others=DOT), GPU)
        (cost,) = found.costs
        assert cost.product_seconds == pytest.approx(2 * 100 * 50 * 200 / 1e12)
        assert found.moved == 2 * (100 * 50 + 50 * 200 + 100 * 200)
        assert found.seconds == pytest.approx(found.moved / 1e9 + 1e-6)
        assert not found.notes


def test_copies_beside_a_product_take_no_time_of_their_own():
    start = "%s = (f32[250]{0:S(1)}, f32[250]{0}, u32[]) copy-start(%x)"
    done = "%t = f32[250]{0:S(1)} copy-done(%s)"
    product = "%y = f32[250]{0} convolution(%x, %w), dim_labels=b_io->b, " + CYCLES
    product += 'CLASSIC"}'
    alone = roofline.read(program(start, done), CHIP)
    assert (alone.moved, alone.seconds) == (KB, pytest.approx(1e-6))
    both = roofline.read(program(start, product, done), CHIP)
    assert both.moved == 4 * KB and both.seconds == pytest.approx(5e-6)


GROUPS = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((f"%y = f32[250]{{0}} all-reduce(%x), {GROUPS}",), {"all-reduce": 1.5 * KB}),
        (
            (
                f"%y = (f32[250]{{0}}, f32[1000]{{0}}) all-gather-start(%x), {GROUPS}",
                "%z = f32[1000]{0} all-gather-done(%y)",
            ),
            {"all-gather": 3 * KB},
        ),
        (
            (
                "%y = (f32[250]{0}, f32[250]{0}, u32[]) collective-permute-start(%x)",
                "%z = f32[250]{0} collective-permute-done(%y)",
            ),
            {"collective-permute": KB},
        ),
    ],
)
def test_collectives_tell_what_they_bring(lines, expected):
    """Asynchronous ones, too. They take no time."""
    found = roofline.read(program(*lines), CHIP)
    assert found.received == expected
    assert found.seconds == 0 and not found.notes


def carried(target="", product=""):
    """A computation of a TPU's fusion with (a part of) an all-gather."""
    result = "custom-call(%g), custom_call_target=" + f'"{target}"'
    result = result if target else "tuple(%y, %x, %g)"
    return f"""
%fused{target} (x: f32[250], w: f32[250]) -> f32[1000] {{
  %x = f32[250]{{0}} parameter(0)
  %w = f32[250]{{0}} parameter(1)
  %o = f32[1000]{{0}} parameter(2)
  %g = f32[1000]{{0}} all-gather(%x), {GROUPS}
  {product}
  ROOT %r = f32[1000]{{0}} {result}
}}
"""


def test_a_collective_beside_products_is_counted_once():
    """A TPU fuses it with each of them; they take their own time, and move their own
    arrays.
    """
    parts = [carried("AsyncCollectiveStart"), carried("AsyncCollectiveDone")]
    parts += [carried(product="%y = f32[250]{0} convolution(%w, %w)")]
    start = "(f32[250]{0}, f32[1000]{0}) fusion(%x, %w), calls=%fusedAsync"
    both = "(f32[250]{0}, f32[250]{0}, f32[1000]{0}) fusion(%x, %w, %o), calls=%fused, "
    both += "output_to_operand_aliasing={{1}: (0, {}), {2}: (2, {})}, "
    both += CYCLES + 'CLASSIC"}'
    lines = [f"%s = {start}CollectiveStart", "%o = f32[1000]{0} bitcast(%s)"]
    lines += [f"%p{k} = {both}" for k in range(2)]
    lines += ["%d = f32[1000]{0} fusion(%x, %w), calls=%fusedAsyncCollectiveDone"]
    found = roofline.read(program(*lines, others="".join(parts)), CHIP)
    assert found.received == {"all-gather": 3 * KB} and not found.notes
    assert found.seconds == pytest.approx(2 * 5e-6)
    assert found.moved == 2 * 2 * KB  # %w and %y


def test_a_sum_that_is_fused_with_its_cut_is_a_reduce_scatter():
    others = f"""
%all-reduce-scatter.1 (x: f32[1000]) -> f32[250] {{
  %a = f32[1000]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %s = f32[1000]{{0}} all-reduce(%a), {GROUPS}
  ROOT %r = f32[250]{{0}} dynamic-slice(%s, %zero), dynamic_slice_sizes={{250}}
}}
"""
    line = "%y = f32[250]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    found = roofline.read(program(line, others=others), CHIP)
    assert found.received == {"reduce-scatter": 3 * KB}


def test_what_is_not_understood_is_named_or_refused():
    def notes(line):
        return roofline.read(program(line), GPU).notes

    assert "one pass" in notes("%y = f32[250]{0} sort(%x)")[0]
    assert "in full" in notes("%y = f32[250]{0} all-reduce(%x)")[0]
    call = '%y = f32[250]{0} custom-call(%x), custom_call_target="mine"'
    assert "a call of mine" in notes(call)[0]
    with pytest.raises(ValueError, match=r"got f3\[\]"):
        roofline.read(program("%y = f3[250]{0} add(%x, %w)"), CHIP)
    with pytest.raises(ValueError, match="must have an entry"):
        roofline.read("HloModule step", CHIP)


def test_arrays_inside_fusions_are_not_written():
    fused = "ROOT %y = f32[250,1]{0} fusion(%x, %w), kind=kLoop, calls=%fused"
    assert hlo.written(program(fused, others=SLICED)) == {hlo.Array("f32", (250,))}
