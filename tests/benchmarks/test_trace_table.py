import jax
import jax.numpy as jnp
import pytest

from benchmarks import trace_table
from flux_jax.errors import UserError

# Two streams of a GPU: a matrix product and a flash-attention kernel, 1000 ns each with 500 ns of
# overlap; then a gap of 1000 ns and a loop of 600 ns whose body holds a copy of 200 ns. The line
# of modules must not be counted again.
GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_128x256_64x4" } }
  event_metadata { key: 2 value { id: 2 name: "cudnn_generated_native_sdpa_sm90_flash_fprop" } }
  event_metadata { key: 3 value { id: 3 name: "while" } }
  event_metadata { key: 4 value { id: 4 name: "MemcpyD2D" } }
  event_metadata { key: 5 value { id: 5 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines {
    id: 1 name: "Stream #13(Compute)" timestamp_ns: 100
    events { metadata_id: 1 offset_ps: 0 duration_ps: 1000000
             stats { metadata_id: 1 str_value: "cublas-gemm.3" } }
    events { metadata_id: 3 offset_ps: 2500000 duration_ps: 600000 }
    events { metadata_id: 4 offset_ps: 2600000 duration_ps: 200000 }
  }
  lines {
    id: 2 name: "Stream #14(Compute)" timestamp_ns: 100
    events { metadata_id: 2 offset_ps: 500000 duration_ps: 1000000 }
  }
  lines {
    id: 3 name: "XLA Modules" timestamp_ns: 100
    events { metadata_id: 5 offset_ps: 0 duration_ps: 3100000 }
  }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "host work" } }
  lines { id: 1 name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
}
"""


def gpu_profile():
    return jax.profiler.ProfileData.from_text_proto(GPU_TRACE)


def test_gpu_trace_by_kind():
    table = trace_table.summarise(gpu_profile(), {})
    assert table.by_kind() == {"matmul": 1000, "attention": 1000, "control": 400, "copy": 200}
    assert table.span == 3100
    assert table.busy == 2100


def test_gpu_trace_takes_the_kind_from_the_program():
    program = {
        "cublas-gemm.3": trace_table.Operation(
            kind="copy", scope="jit(step)/dot_general", shape="bf16[4608,3072]"
        )
    }
    table = trace_table.summarise(gpu_profile(), program)
    assert table.by_kind()["copy"] == 1200
    text = table.render(steps=2)
    assert "cublas-gemm.3: nvjet_tst_128x256_64x4 · bf16[4608,3072] · jit(step)/dot_general" in text
    assert "busy 0.001 ms of 0.002 ms per step (67.7%)" in text


def test_cpu_trace_of_a_compiled_program(tmp_path):
    @jax.jit
    def step(x, w):
        def body(x, _):
            return x @ w, None

        x, _ = jax.lax.scan(body, x, None, length=4)
        return jnp.transpose(jnp.sin(x))

    x = jnp.ones((256, 256))
    compiled = step.lower(x, x).compile()
    jax.block_until_ready(compiled(x, x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(x, x))
    program = trace_table.read_program(compiled.as_text())
    table = trace_table.read_trace(tmp_path, program)

    product = next(row for row in table.rows if row.kind == "matmul")
    assert product.count == 4
    assert product.shape == "f32[256,256]"
    assert "dot_general" in product.scope
    assert sum(row.nanoseconds for row in table.rows) <= 1.001 * table.busy
    assert 0 < table.busy <= table.span


def test_program_kinds():
    text = """
%fused_dot (a: f32[4], b: f32[4]) -> f32[] {
  %a = f32[4]{0} parameter(0)
  ROOT %dot.1 = f32[] dot(%a, %a), lhs_contracting_dims={0}
}

%fused_copy (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %transpose.9 = f32[4,4]{1,0} transpose(%p), dimensions={1,0}
}

%fused_add (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p.1, %p.1)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %gemm_fusion = f32[] fusion(%x, %x), kind=kCustom, calls=%fused_dot
  %wrapped = f32[4,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_copy
  %loop_add_fusion = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_add
  %custom-call.1 = (bf16[8,8]{1,0}, s8[4]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %fmha = (bf16[8]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %all-reduce.1 = f32[4]{0} all-reduce(%x), replica_groups={}
  ROOT %while.1 = f32[4]{0} while(%x), condition=%c, body=%b, metadata={op_name="jit(f)/while"}
}
"""
    program = trace_table.read_program(text)
    kinds = {
        name: program[name].kind
        for name in (
            "gemm_fusion",
            "wrapped",
            "loop_add_fusion",
            "custom-call.1",
            "fmha",
            "all-reduce.1",
            "while.1",
        )
    }
    assert kinds == {
        "gemm_fusion": "matmul",
        "wrapped": "copy",
        "loop_add_fusion": "elementwise",
        "custom-call.1": "matmul",
        "fmha": "attention",
        "all-reduce.1": "collective",
        "while.1": "control",
    }
    assert program["while.1"].scope == "jit(f)/while"
    assert program["wrapped"].shape == "f32[4,4]"


def test_refuses_a_folder_without_a_trace(tmp_path):
    with pytest.raises(UserError, match="was the profiler stopped"):
        trace_table.read_trace(tmp_path)


def test_refuses_a_trace_without_device_events():
    empty = jax.profiler.ProfileData.from_text_proto('planes { name: "/host:CPU" }')
    with pytest.raises(UserError, match="holds no device event"):
        trace_table.summarise(empty, {})
