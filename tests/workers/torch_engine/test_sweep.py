"""Every causal language model of the installed transformers that declares the attention interface: exact, or refused.

    make sweep

A tiny config is derived from each architecture's default one. The test of an architecture passes if its greedy
outputs equal the reference's, or if it is refused at load with a reason; the table at the end says which.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from protocol.errors import ModelRefused, StartError
from tests.models import BOS, EOS, PAD, VOCAB, byte_tokenizer, liven
from tests.workers.core_driver import CoreDriver
from tests.workers.torch_engine.parity import first_difference, make_engine, make_requests, reference_of
from workers.torch_engine import loader

LAYERS = 4
SIZES = {
    64: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim ffn_hidden_size hidden_size_per_layer_input",
    96: "intermediate_size ffn_dim n_inner dff d_ff shared_intermediate_size mlp_intermediate_size "
    "block_ffn_dim shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size",
    32: "moe_intermediate_size expert_ffn_hidden_size expert_hidden_size moe_ffn_hidden_size index_head_dim_max",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_attn_heads num_routed_experts num_global_attention_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k num_kv_heads n_kv_heads num_experts_per_token top_k "
    "num_global_key_value_heads swa_num_key_value_heads",
    16: "head_dim sliding_window kv_lora_rank v_head_dim qk_nope_head_dim attention_head_dim kv_channels "
    "global_head_dim swa_head_dim qk_head_dim local_attention sliding_window_size window_size",
    24: "q_lora_rank",
    8: "qk_rope_head_dim index_topk index_head_dim",
    256: "max_position_embeddings n_positions n_ctx seq_length",
    1: "n_group topk_group num_groups first_k_dense_replace n_shared_experts num_shared_experts first_dense_layers "
    "num_nextn_predict_layers num_dense_layers moe_layer_start_index",
    VOCAB: "vocab_size padded_vocab_size vocab_size_per_layer_input",
    BOS: "bos_token_id",
    EOS: "eos_token_id",
    PAD: "pad_token_id",
}
NEEDED = """head_dim num_key_value_heads n_routed_experts n_shared_experts num_experts num_experts_per_tok n_group
topk_group""".split()  # noqa: SIM905
OVERRIDES: dict[str, dict[str, Any]] = {  # what no general rule finds
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "xmod": {"default_language": "en_XX"},
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}


def architectures() -> list[tuple[str, type]]:
    """(model type, config class) of each causal language model that declares the interface."""
    found = {}
    mapping = AutoModelForCausalLM._model_mapping
    for config_class in mapping:
        with contextlib.suppress(Exception):  # an optional dependency is missing
            if getattr(mapping[config_class], "_supports_attention_backend", False):
                found[config_class.model_type] = config_class
    return sorted(found.items())


def tiny_config(config_class: Any) -> Any:
    """The architecture's default config, every size in it made small."""
    default = config_class()
    override = OVERRIDES.get(config_class.model_type, {})
    try:
        config = config_class.from_dict({**shrink(default.to_dict(), default), **override})
        AutoModelForCausalLM.from_config(config)(torch.arange(4)[None], use_cache=False)
    except Exception:  # an architecture that needs sizes which its default config leaves open
        config = config_class.from_dict({**shrink(default.to_dict(), default, NEEDED), **override})
    text = config.get_text_config()
    text.use_cache = True
    if hasattr(text, "tie_word_embeddings"):
        config.tie_word_embeddings = text.tie_word_embeddings = False
    for flag in ("is_decoder", "use_sliding_window"):
        if hasattr(text, flag):
            setattr(text, flag, True)
    return config


def shrink(fields: dict[str, Any], default: Any, needed: Sequence[str] = ()) -> dict[str, Any]:
    small: dict[str, Any] = {}
    latent = "kv_lora_rank" in fields  # latent attention has as many key heads as heads
    layers = fields.get("num_hidden_layers") or 0
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = shrink(value, getattr(default, name, None), needed)
        elif name == "per_layer_config":
            small[name] = {}
        elif name == "num_key_value_heads" and latent:
            small[name] = SIZE_OF["num_attention_heads"]
        elif name in ("qk_head_dim", "swa_head_dim") and latent:
            small[name] = SIZE_OF["qk_nope_head_dim"] + SIZE_OF["qk_rope_head_dim"]
        elif name == "head_dim" and latent:
            small[name] = SIZE_OF["qk_rope_head_dim"]
        elif name in SIZE_OF and (name in needed if value is None else type(value) in (int, list)):
            small[name] = SIZE_OF[name]
        elif isinstance(value, list) and layers and len(value) == layers and layers > LAYERS:
            small[name] = one_of_each(value)
        elif name in ("resid_pdrop", "dropout", "attention_dropout", "embd_pdrop", "hidden_dropout_prob"):
            small[name] = 0.0
        else:
            small[name] = value
    return small


def one_of_each(kinds: list[Any]) -> list[Any]:
    """LAYERS entries in which each kind of the long list stands at least once, where there is room."""
    firsts = sorted({str(kind): at for at, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    rest = [at for at in range(len(kinds)) if at not in firsts]
    return [kinds[at] for at in sorted([*firsts, *rest[: LAYERS - len(firsts)]])]


def verdict(config_class: Any, path: Any) -> tuple[str, str]:
    """("exact" | "refused" | "failed" | "not made", reason) of one architecture."""
    try:
        loader.refuse_by_config("", config_class())
        config = tiny_config(config_class)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        liven(model)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        reference = reference_of(path)
        reference(torch.arange(40)[None], use_cache=False)
    except ModelRefused as refused:
        return "refused", str(refused).removeprefix(": ")
    except Exception as error:  # the sweep goes on whatever a single architecture does
        return "not made", f"{type(error).__name__}: {error}"
    try:
        engine = make_engine(path, max_model_len=128)
        requests = make_requests(4, 76)[:12]
        CoreDriver(engine, engine.capacity, 40, budget=24).run(requests)
        wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    except ModelRefused as refused:
        return "refused", str(refused).replace(f"{path}: ", "")
    except (StartError, Exception) as error:
        return "failed", f"{type(error).__name__}: {error}"
    return ("failed", f"{len(wrong)} of {len(requests)} differ: {wrong[0]}") if wrong else ("exact", "")


TABLE: dict[str, tuple[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints what the module found, past the capture."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        for name, (result, reason) in TABLE.items():
            print(f"{name:24} {result:9} {' '.join(reason.split())[:150]}")
        print(", ".join(f"{result} {count}" for result, count in Counter(r for r, _ in TABLE.values()).most_common()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """To list the architectures is to import them all, which takes longer than most tests: not where none is run."""
    if "config_class" in metafunc.fixturenames:
        found = [] if "not sweep" in metafunc.config.option.markexpr else architectures()
        metafunc.parametrize(("name", "config_class"), found, ids=lambda value: value if isinstance(value, str) else "")


@pytest.mark.sweep
@pytest.mark.filterwarnings("default")
def test_architecture(tmp_path, name, config_class):
    result, reason = TABLE[name] = verdict(config_class, tmp_path)
    if result == "not made":
        pytest.skip(reason)
    assert result in ("exact", "refused"), reason
