"""The kernels compile for GPUs that are not here: the interpreter lets pass what the compiler refuses.

A process of its own, since this one may have loaded triton with its interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton (on Linux: pip install triton)")

PROGRAM = """
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.torch_engine.cuda import host_copies
from workers.torch_engine.cuda import triton_attention as attention
from workers.torch_engine.cuda import triton_experts as grouped
from workers.torch_engine.cuda import triton_kernels as kernels
from workers.torch_engine.cuda import triton_products as products
from workers.torch_engine.cuda import triton_sampling


kept = {}  # what the last compilation made


def compile_for(capability, function, types, constants, **options):
    signature, attributes = {}, {}
    for at, name in enumerate(function.arg_names):
        kind = "constexpr" if name in constants else types.get(name, "i32")
        signature[name] = kind
        if kind != "constexpr" and kind != "fp32":
            attributes[(at,)] = [["tt.divisibility", 16]]
    at = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, at, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    kept.update(made.asm)
    return made.metadata


def attend(
    capability, kind, itemsize, rows, group, key, value, window=0, softcap=False, sinks=False, fresh=False, items=1000,
    pool=None,
):
    p2 = triton.next_power_of_2
    shared = 180 << 10 if capability == 90 else 78 << 10
    launch = attention.choose_launch(rows, p2(key), p2(value), itemsize, shared, items)
    types = {name: "*" + kind for name in "query keys values out sinks fresh_key fresh_value cos sin".split()}
    types |= {"partial": "*fp32", "partial_ml": "*fp32", "done": "*i32", "items": "*i32", "tables": "*i32"}
    types |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(("keys", "values"), "*" + (pool or kind))
    sizes = dict(GROUP=group, GROUP_P2=p2(group), ROWS=rows, HEADS=2 * group, KV_HEADS=2, DV=value, DV_P2=p2(value))
    sizes |= dict(SINKS=sinks, LOG2=attention.LOG2E)
    own = dict(DK=key, DK_P2=p2(key), KEYS=launch.keys, PAGE=16, WINDOW=window, SOFTCAP=softcap, ITEM_=12)
    own |= dict(FRESH=fresh, ROTATE=fresh)
    made = compile_for(
        capability, attention.attend_items, types, sizes | own, num_warps=launch.warps, num_stages=launch.stages
    )
    assert made.shared <= shared * 5 // 4, (made.shared, shared)


def copies():
    types = {"blocks": "*i64", "hosts": "*i64", "parts": "*i64"}
    for word, size in ((tl.int64, 8), (tl.int16, 2)):
        for out in (False, True):
            sizes = dict(PARTS=64, WORD=word, BYTES=size, WORDS_=host_copies.WORDS, OUT=out)
            compile_for(90, host_copies.copy_blocks, types, sizes, num_warps=4)
            without_spills()


def small(capability, kind, pool=None):
    types = {name: "*" + kind for name in "x delta total weight out gate up query key value rotated".split()}
    types |= {name: "*" + kind for name in "cos sin".split()} | {"slots": "*i64", "eps": "fp32"}
    types |= {name: "*" + (pool or kind) for name in "keys values".split()}
    for add in (False, True):
        sizes = dict(SIZE=576, SIZE_P2=1024, ADD=add)
        compile_for(capability, kernels.norm_rows, types, sizes, num_warps=4)
    for act in (kernels.SILU, kernels.GELU_TANH):
        compile_for(capability, kernels.gate_rows, types, dict(SIZE=1536, BLOCK=1024, ACT=act), num_warps=4)
    for rotate in (False, True):
        sizes = dict(HEADS=14, HEADS_P2=16, KV_HEADS=2, KV_HEADS_P2=2, DK=80, DK_P2=128, DV=64, DV_P2=64, ROTATE=rotate)
        compile_for(capability, kernels.rotate_and_store, types, sizes, num_warps=4)


def sampling(capability, kind):
    types = {"logits": "*" + kind, "table": "*i32", "bits": "*i32", "tokens": "*i64"}
    types |= {"finite": "*i8", "last_id": "*i64"}
    sizes = dict(BLOCK=triton_sampling.BLOCK, PASSES=triton_sampling.PASSES)
    compile_for(capability, triton_sampling.draw_rows, types, sizes, num_warps=triton_sampling.WARPS)


def experts(capability, kind, itemsize, rows):
    types = {name: "*" + kind for name in "x weight bias hidden out results".split()} | {"weights": "*fp32"}
    types |= {"chosen": "*i64", "slots": "*i64", "order": "*i32", "expert_of": "*i32"}
    types |= {"limit": "fp32", "alpha": "fp32"}
    sizes = dict(CHOICES=8, EXPERTS=64, BINS=128, ROWS=rows, SCAN=grouped.SCAN, PADDED=True)
    compile_for(capability, grouped.place_pairs, types, sizes, num_warps=4)
    columns, depth, stages = grouped.tiles(rows, itemsize)
    tile = dict(SIZE=2048, WIDTH=1024, ROWS=rows, COLUMNS=columns, DEPTH=depth)
    options = dict(num_warps=4, num_stages=stages)
    for act in (grouped.SILU, grouped.GELU_TANH, grouped.CLAMPED):
        clamped = act == grouped.CLAMPED
        own = dict(CHOICES=8, EVERY=1 + clamped, BIAS=clamped, ACT=act)
        made = compile_for(capability, grouped.gate_up_blocks, types, tile | own, **options)
        assert made.shared < 200 << 10
    compile_for(capability, grouped.down_blocks, types, tile | dict(BIAS=False), **options)
    types["logits"] = "*" + kind
    chosen = dict(EXPERTS=60, EXPERTS_P2=64, CHOICES=6, CHOICES_P2=8, AMONG_CHOSEN=True)
    compile_for(capability, grouped.choose_rows, types, chosen, num_warps=4)
    sizes = dict(CHOICES=8, EXPERTS=64, SIZE=2048, BLOCK=1024, PADDED=True)
    compile_for(capability, grouped.sum_choices, types, sizes, num_warps=4)


def without_spills():
    # of the kernel compiled last: what finds no register lies on a stack
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kept["cubin"])
        file.flush()
        usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True)
    stack = int(re.search(r"STACK:(\\d+)", usage.stdout)[1])
    assert stack <= 16, usage  # a pointer or two that is used again at the end; nothing of a loop
    assert int(re.search(r"LOCAL:(\\d+)", usage.stdout)[1]) == 0, usage


def quantized(capability, kind, codes, rows, tile, group=0, shared=1, gated=False):
    types = {"x": "*" + kind, "bias": "*" + kind, "out": "*" + kind, "codes": codes, "zeros": "*u8"}
    types |= {"scale": "*" + kind if group and shared == 1 else "*fp32", "partial": "*fp32", "done": "*i32"}
    pairs = codes == "*u8" and group and shared == 1
    form = dict(PAIRS=bool(pairs), DEPTH=group or products.DEPTH, GROUP=group, SHARED=shared, ZEROS=bool(pairs))
    form |= dict(EVEN=True, BIAS=True, ACT=products.SILU if gated else products.NO_ACT, CUT=not gated)
    form |= dict(ROWS=rows, COLUMNS=tile.columns // (1 + gated))
    made = compile_for(
        capability, products.widened_rows, types, form, num_warps=tile.warps, num_stages=tile.stages
    )
    assert made.shared < 160 << 10
    without_spills()


def in_fp8():
    types = {"x": "*fp8e4nv", "codes": "*fp8e4nv", "x_scale": "*fp32", "scale": "*fp32", "bias": "*bf16"}
    sizes = dict(BIAS=True, ROWS=products.STRIP, COLUMNS=128, DEPTH=128)
    compile_for(90, products.block_product, types | {"out": "*bf16"}, sizes, num_warps=8, num_stages=3)
    assert re.search(r"wgmma\\.mma_async\\.\\S*\\.e4m3\\.e4m3", kept["ptx"]), "products are of FP8"
    without_spills()
    for given, span in ((False, 16384), (True, 128)):
        types = {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", "given": "*fp32"}
        compile_for(90, products.round_rows, types, dict(GIVEN=given, SPAN=span), num_warps=8)
        without_spills()
"""
UNQUANTIZED = """
attend(90, "bf16", 2, 16, 4, 128, 128, fresh=True)
attend(90, "bf16", 2, 16, 4, 128, 128, fresh=True, items=34)
attend(90, "bf16", 2, 64, 7, 64, 64)
attend(90, "bf16", 2, 64, 2, 256, 256, window=4096, softcap=True)
attend(90, "fp16", 2, 64, 8, 192, 128, sinks=True)
attend(90, "fp32", 4, 16, 4, 80, 80)
attend(80, "bf16", 2, 64, 4, 128, 128)
attend(90, "bf16", 2, 16, 4, 128, 128, fresh=True, pool="fp8e4nv")
without_spills()
attend(90, "bf16", 2, 64, 4, 128, 128, pool="fp8e4nv")
without_spills()
attend(89, "fp16", 2, 16, 7, 64, 64, fresh=True, pool="fp8e4nv")
small(90, "bf16")
small(90, "bf16", pool="fp8e4nv")
copies()
small(80, "fp32")
sampling(90, "bf16")
sampling(90, "fp32")
sampling(80, "fp16")
experts(90, "bf16", 2, 16)
experts(90, "bf16", 2, 64)
experts(80, "fp32", 4, 16)
print("compiled")
"""
QUANTIZED = """
for tile in products.FEW:
    quantized(90, "bf16", "*u8", 16, tile, group=128)
    quantized(90, "bf16", "*u8", 16, tile, gated=True)
quantized(90, "bf16", "*u8", 32, products.FEW[0], group=128, gated=True)
quantized(90, "bf16", "*i8", 32, products.FEW[0], gated=True)
quantized(90, "bf16", "*u8", 32, products.FEW[0], group=128, shared=128)
quantized(90, "fp16", "*u8", 16, products.FEW[0], group=32)
quantized(80, "fp16", "*u8", 16, products.FEW[0])
quantized(90, "bf16", "*u8", products.STRIP, products.MANY, group=128)
quantized(80, "bf16", "*u8", products.STRIP, products.MANY)
in_fp8()
print("compiled")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them for the GPU that is here")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launches", [UNQUANTIZED, QUANTIZED], ids=["unquantized", "quantized"])
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path, launches):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + launches],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("compiled"), done.stdout[-3000:]
