"""The run of a GPU's program in time, against times worked out by hand for programs written by hand."""

import pytest

from trainit.cluster.hardware import find_accelerator
from trainit.experiments.plan.schedule import LATENCY, LAUNCH, MEMORY, PRODUCTS, Schedule
from trainit.experiments.plan.targets import TARGETS, outside

pytestmark = pytest.mark.evidence(
    "predicted times of a GPU's program follow its schedule, against programs with times worked out by hand"
)
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
H100 = find_accelerator("H100")
PRODUCT = PRODUCTS * H100.flops
BYTES = MEMORY * 3350e9
FUSED = """
%fused (a: bf16[1024,512], b: bf16[512,256]) -> bf16[1024,256] {
  %a = bf16[1024,512]{1,0} parameter(0)
  %b = bf16[512,256]{1,0} parameter(1)
  ROOT %dot.1 = bf16[1024,256]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
CALL = 'kind=kCustom, calls=%fused, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}'


def program(body: str, others: str = "") -> str:
    return f"HloModule m, is_scheduled=true\n{others}\nENTRY %main (x: f32[1]) -> f32[1] {{\n{body}\n}}\n"


def test_a_kernel_takes_what_its_operations_or_its_bytes_need():
    """A product by its traffic, since it is small; a large one, through cuBLAS, by its operations."""
    text = program(
        '  %a = bf16[1024,512]{1,0} parameter(0), metadata={op_name="a"}\n'
        "  %b = bf16[512,256]{1,0} parameter(1)\n"
        "  %c = bf16[8192,8192]{1,0} parameter(2)\n"
        f'  %f = bf16[1024,256]{{1,0}} fusion(%a, %b), {CALL}, metadata={{op_name="jit(step)/mlp/dot"}}\n'
        "  ROOT %g = (bf16[8192,8192]{1,0}, s8[100]{0}) custom-call(%c, %c), "
        'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/head/dot"}, '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        FUSED,
    )
    found = Schedule(text, ONE, TARGETS["H100"])
    small = 2 * (1024 * 512 + 512 * 256 + 1024 * 256) / BYTES
    large = 2 * 8192**3 / PRODUCT
    assert found.seconds == pytest.approx(small + large + 2 * LAUNCH)
    assert found.kernels["mlp"].flops == 2 * 1024 * 512 * 256
    assert found.kernels["head"].seconds == pytest.approx(large + LAUNCH)
    products = {("bf16 1024 × 512 × 256", "Triton"): 1, ("bf16 8192 × 8192 × 8192", "cuBLAS"): 1}
    assert found.products == products and found.total.runs == 2


LOOP = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}
%update (p: f32[10,100000], q: f32[1,100000], i: s32[]) -> f32[10,100000] {
  %p = f32[10,100000]{1,0} parameter(0)
  %q = f32[1,100000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[10,100000]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}
%body (t: (s32[], f32[10,100000])) -> (s32[], f32[10,100000]) {
  %t = (s32[], f32[10,100000]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %w = f32[10,100000]{1,0} get-tuple-element(%t), index=1
  %s = f32[1,100000]{1,0} constant(0)
  %v = f32[10,100000]{1,0} fusion(%w, %s, %n), kind=kLoop, calls=%update
  ROOT %r = (s32[], f32[10,100000]{1,0}) tuple(%n, %v)
}
%condition (t: (s32[], f32[10,100000])) -> pred[] {
  %t = (s32[], f32[10,100000]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %k = s32[] constant(5)
  ROOT %c = pred[] compare(%n, %k), direction=LT
}
"""


def test_a_loop_runs_its_body_and_writes_in_place():
    """Five times a row of 100,000 numbers read and written, not the whole array, and an index."""
    body = (
        "  %t = (s32[], f32[10,100000]{1,0}) parameter(0)\n"
        "  ROOT %l = (s32[], f32[10,100000]{1,0}) while(%t), condition=%condition, body=%body"
    )
    for rest in ("", ', backend_config={"known_trip_count":{"n":"5"}}'):
        found = Schedule(program(body + rest, LOOP), ONE, TARGETS["H100"])
        assert found.seconds == pytest.approx(5 * ((2 * 400_000 + 4) / BYTES + LAUNCH))
        assert found.kernels.keys() == {"other, in a loop"}


def exchanged(kernel: str, sizes: dict, groups: str) -> Schedule:
    """A sum of 64 MiB over these groups, while a kernel runs."""
    return Schedule(
        program(
            "  %x = f32[16777216]{0} parameter(0)\n"
            "  %y = f32[16777216]{0} parameter(1)\n"
            f"  %s = f32[16777216]{{0}} all-reduce-start(%x), replica_groups={groups}, to_apply=%add\n"
            f"{kernel}"
            "  ROOT %d = f32[16777216]{0} all-reduce-done(%s)",
            LOOP,
        ),
        ONE | sizes,
        TARGETS["H100"],
    )


@pytest.mark.parametrize(
    "sizes, groups, rate, link",
    [
        ({"fsdp": 8}, "{{0,1,2,3,4,5,6,7}}", 450e9, "NVLink"),
        ({"data": 8, "fsdp": 8}, "[8,8]<=[8,8]T(1,0)", 50e9, "network"),  # one card of each machine
        ({"data": 2, "fsdp": 8}, "{}", 400e9, "network"),  # all eight cards
    ],
)
def test_an_exchange_is_exposed_as_far_as_no_kernel_runs_beside_it(sizes, groups, rate, link):
    devices = 16 if groups == "{}" else 8
    takes = 2 * 2**26 * (devices - 1) / devices / rate + LATENCY[link]
    kernel = 3 * 2**26 / BYTES + LAUNCH
    alone = exchanged("", sizes, groups)
    assert alone.seconds == pytest.approx(takes)
    beside = exchanged("  %k = f32[16777216]{0} add(%y, %y)\n", sizes, groups)
    assert beside.seconds == pytest.approx(max(takes, kernel))
    [(what, seconds)] = beside.exposed.items()
    assert what == f"all-reduce over {' × '.join(sizes if devices == 16 else list(sizes)[:1])}"
    assert seconds == pytest.approx(takes - kernel) and beside.busy[what] == pytest.approx(takes)


def test_attention_and_branches():
    """cuDNN's causal attention has half of the products' operations; the longer of two branches counts."""
    attention = (
        "  %q = bf16[2,128,4,64]{3,2,1,0} parameter(0)\n"
        "  %p = pred[] parameter(1)\n"
        "  %o = (bf16[2,4,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), "
        'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": '
        '{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "128", "128"]}, '
        '"mask_type": "CAUSAL"}}\n'
        "  %x = f32[1000]{0} parameter(2)\n"
        '  %w = f32[1000]{0} custom-call(%x), custom_call_target="sorts"\n'
        "  ROOT %c = f32[1000]{0} conditional(%p, %x, %x), true_computation=%long, false_computation=%short"
    )
    branches = (
        "\n%short (a: f32[1000]) -> f32[1000] {\n  ROOT %a = f32[1000]{0} parameter(0)\n}\n"
        "%long (a: f32[1000]) -> f32[1000] {\n  %a = f32[1000]{0} parameter(0)\n"
        "  ROOT %n = f32[1000]{0} negate(%a)\n}\n"
    )
    found = Schedule(program(attention, branches), ONE, TARGETS["H100"])
    library = "sorts", "a library: only its bytes count"
    assert found.products == {("bf16 attention 2 × 128 × 128, 4 heads of 64", "cuDNN"): 1, library: 1}
    assert found.total.flops == 2 * 2 * 2 * 4 * 128 * 128 * 64 / 2
    assert found.total.runs == 3 and found.conditionals == 1


def test_rooms_of_the_cards():
    """JAX's part of the memory, less half a GiB; outside of it is enough for what is assumed there."""
    for target in TARGETS.values():
        for devices, part in ((1, 0.9), (8, 0.9), (64, 0.85)):
            assert target.room(devices) == pytest.approx(part * target.memory - 2**29)
            assert target.memory - target.part(devices) > outside(devices)
    assert [target.memory for target in TARGETS.values()] == [40e9, 80e9, 80e9, 141e9, 180e9]
