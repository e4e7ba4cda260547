"""Loading a checkpoint: what is refused and why, precision and device, the tokenizer, fixed rotary tables.

Only safetensors are read and no code of the checkpoint's is ever run. What cannot be served is refused by
name before its weights are loaded, where the config tells; the rest is found by the check of ``verify``.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from protocol.errors import HeadraceError, ModelRefused, StartError
from workers.engines.base import Progress
from workers.torch_engine.attention import NAME
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.parallel.group import ALONE, Group
from workers.torch_engine.parallel.layers import stage_of
from workers.torch_engine.parallel.modules import join
from workers.torch_engine.parallel.split import Parts, files_of, local_config, read_parts, shares_of
from workers.torch_engine.quantized import checkpoint, methods
from workers.torch_engine.quantized.linear import quantize_linears
from workers.torch_engine.quantized.weights import MAKERS

log = logging.getLogger(__name__)

# Layers whose state is not keys and values, by the names that config.layer_types gives them.
RECURRENT_LAYERS = {"linear_attention", "mamba", "mamba2", "recurrent", "ssm", "conv", "hybrid", "short_conv"}


def load_config(model: str) -> Any:
    """The checkpoint's config. Raises ModelRefused for one that cannot be served, as far as a config tells."""
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(model)
        if not raw:
            raise StartError(f"{model}: there is no config.json")
        if "auto_map" in raw:
            raise ModelRefused(
                f"{model}: its config.json asks for code of its own (auto_map), which is never run. "
                "If transformers knows the architecture, remove auto_map from a local copy"
            )
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        _find_quantization(model, config)
    except StartError:
        raise
    except Exception as error:  # configs check their fields each in a way of its own
        raise StartError(f"{model}: cannot read the model's config: {_first_line(error)}") from error
    refuse_by_config(model, config)
    return config


def _find_quantization(model: str, config: Any) -> None:
    """Make ``config`` say how the weights are quantized where only modelopt's own file does. ModelRefused for what is
    not read."""
    own = cached_file(model, "hf_quant_config.json", _raise_exceptions_for_missing_entries=False)
    if getattr(config, "quantization_config", None) is None and own is not None:
        config.quantization_config = {"quant_method": "modelopt", **json.loads(Path(own).read_text())["quantization"]}
    stated = stated_quantization(config)
    if stated is not None and (reason := methods.refusal(stated)) is not None:
        raise ModelRefused(f"{model}: {reason}")


def directory_of(model: str) -> Path:
    """Where the files of ``model`` are: the directory itself, or that of the hub's cache, once it was loaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    return Path(str(cached_file(model, "config.json", local_files_only=True))).parent


def refuse_by_config(model: str, config: Any) -> None:
    """Raise ModelRefused, with the reason, for architectures that this engine does not serve."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(f"{model}: {kind} is an encoder-decoder model; only decoder-only language models are served")
    architecture = causal_lm_class(config)
    if architecture is None:
        raise ModelRefused(f"{model}: {kind} has no causal language model in transformers {transformers.__version__}")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    recurrent = sorted(kinds & RECURRENT_LAYERS)
    if getattr(architecture, "_is_stateful", False) or recurrent:
        raise ModelRefused(f"{model}: {kind} keeps recurrent (state-space) state, and only attention is served")
    if "chunked_attention" in kinds or getattr(text, "attention_chunk_size", None):
        raise ModelRefused(f"{model}: {kind} attends within chunks, a rule that only a mask carries; not served yet")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise ModelRefused(
            f"{model}: {kind} does not go through transformers' attention interface, so it cannot be paged"
        )


def causal_lm_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM would make, None if there is none."""
    mapping = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def choose_device(wanted: str, index: int | None = None) -> torch.device:
    """``wanted`` of the --device option; one of several ranks has the visible GPU ``index`` to itself."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if index is not None and wanted.startswith("cuda"):
        if wanted != "cuda":
            raise StartError(f"--device {wanted}: with several ranks say cuda, each takes one of the visible GPUs")
        if index >= torch.cuda.device_count():
            raise StartError(f"a rank has no GPU: {torch.cuda.device_count()} are visible, and each takes one")
        wanted = f"cuda:{index}"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise StartError(f"--device {wanted}: not a device; try auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"--device {wanted}: only cpu and cuda are served")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"--device {wanted}: torch sees no CUDA device")
    return device


def choose_dtype(wanted: str, config: Any, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's own precision. On a CPU it is that of the weights alone: 16-bit products are slow
    there, so arithmetic is float32 (bfloat16 widens without loss, float16 is widened at load)."""
    if wanted != "auto":
        dtype = getattr(torch, wanted, None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise StartError(f"--dtype {wanted}: choose auto, float32, bfloat16 or float16")
        return dtype  # type: ignore[no-any-return]
    stored = stored_dtype(config)
    half = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return stored if stored in half else torch.float32


def stored_dtype(config: Any) -> torch.dtype:
    """The precision that the checkpoint states; float32 if it states none."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def choose_max_model_len(wanted: int | None, config: Any) -> int:
    """``wanted``, or the longest context that the model was made for."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return wanted or 4096
    if wanted is not None and wanted > longest:
        raise StartError(f"--max-model-len {wanted}: the model knows no more than {longest} positions")
    return wanted or longest


def load_model(
    config: EngineConfig, model_config: Any, device: torch.device, progress: Progress, group: Group = ALONE
) -> Any:
    """The model in eval mode on ``device``, its attention through the registered function. Of several ranks, the part
    of the model that is this one's."""
    loaded: Any
    with _LoadingBar(progress):
        try:
            load: Any = _load_whole if group is ALONE else _load_part
            if group is ALONE and stated_quantization(model_config) is not None:
                load = partial(_load_quantized, keeps(config, device))
            loaded = load(
                config.model,
                model_config,
                group,
                dtype=choose_dtype(config.dtype, model_config, device),
                attn_implementation=NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except (torch.OutOfMemoryError, HeadraceError):
            raise
        except Exception as error:  # of an architecture that cannot be built so, of files that do not fit it
            raise StartError(
                f"{config.model}: the model cannot be built or loaded ({_first_line(error)}); fetch it again"
            ) from error
    model, found = loaded
    if mismatched := sorted(found["mismatched_keys"]):
        raise StartError(
            f"{config.model}: config.json and the weights are of two models: {mismatched[0][0]} has the shape "
            f"{list(mismatched[0][1])}, not {list(mismatched[0][2])}; fetch the model again"
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would serve random numbers in their place
        raise StartError(
            f"{config.model}: {len(missing)} weights are missing from the checkpoint, {missing[0]} among them; "
            "fetch the model again"
        )
    model = rounded(model, config, device).to(device).eval().requires_grad_(False)
    _refuse_not_finite(config.model, model)
    return model


def stated_quantization(model_config: Any) -> dict[str, Any] | None:
    """The checkpoint's quantization_config; None: its weights are as wide as they say."""
    stated = getattr(model_config, "quantization_config", None)
    if stated is None:
        return None
    return dict(stated if isinstance(stated, dict) else stated.to_dict())


def keeps(config: EngineConfig, device: torch.device) -> frozenset[str]:
    """The kinds of weights of a quantized checkpoint that stay in few bits on ``device``; the others are widened."""
    if config.quantization is not None and not config.dequantize:
        raise StartError(
            f"--quantization {config.quantization}: the checkpoint is quantized already; leave that out, or say "
            "--dequantize, so that its weights are widened and rounded anew"
        )
    if config.dequantize:
        return frozenset()
    return frozenset({"int8", "int4"} if device.type == "cpu" else MAKERS)


def growth(config: EngineConfig, model_config: Any) -> float:
    """About how many times as many bytes weights take when they are loaded, as they do in the files."""
    stated = stated_quantization(model_config)
    kept = config.quantization and {"fp8": 0.5, "int8": 0.5, "int4": 0.27}[config.quantization]
    if stated is None or not config.dequantize:
        return kept or 1.0
    return methods.widening(stated) * (kept or 1.0)


def rounded(model: Any, config: EngineConfig, device: torch.device) -> Any:
    """``model`` with its weights in as few bits as --quantization says, before it is on ``device`` as a whole. int8 on
    a CPU is made by its kernels' own packing."""
    kind = config.quantization
    if kind is not None and (device.type != "cpu" or kind != "int8"):
        taken = quantize_linears(model, kind, device)
        log.info("linear layers are in %s and take %.2f GiB", kind, taken / (1 << 30))
    return model


def _load_whole(name: str, model_config: Any, group: Group, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, config=model_config, **options)


def _load_quantized(keep: frozenset[str], name: str, model_config: Any, group: Group, **options: Any) -> Any:
    return checkpoint.load(causal_lm_class(model_config), files_of(name), model_config, keep, **options)


def _load_part(name: str, model_config: Any, group: Group, **options: Any) -> Any:
    kind = causal_lm_class(model_config)
    shares = shares_of(model_config, group.part, group.parts)
    local = local_config(model_config, shares)
    stage = kind if group.stages == 1 else stage_of(kind, local, group)
    tensors = read_parts(files_of(name), Parts(kind, stage, model_config, local, shares).of)
    model, found = stage.from_pretrained(None, config=local, state_dict=tensors, **options)
    vocabulary = model_config.get_text_config().vocab_size
    model.config.get_text_config().vocab_size = vocabulary  # all ids may come; the modules know their own rows
    join(model, group, shares, vocabulary)
    # a stage between others has no weights of its own once its layers are fused: `model.dtype` is still to be known
    model.precision = torch.nn.Parameter(torch.empty(0, dtype=model.dtype), requires_grad=False)
    return model, found


def _refuse_not_finite(name: str, model: torch.nn.Module) -> None:
    """StartError for weights that hold NaN or infinities: one pass over memory, in which both survive max and min."""
    for parameter_name, parameter in model.named_parameters():
        looked_at = parameter.is_floating_point() and parameter.numel() and parameter.element_size() > 1
        if looked_at and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            raise StartError(
                f"{name}: its weights are damaged: {parameter_name} holds values that are no numbers; fetch the "
                "model again"
            )


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer, without any code of its own."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"{model}: cannot load the tokenizer: {_first_line(error)}") from error


def eos_token_ids(model: str, config: Any) -> list[int]:
    """Ids that end a sequence: generation_config.json's, else the config's. Sorted; may be empty."""
    try:
        stated = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        stated = None
    if stated is None:
        stated = getattr(config.get_text_config(), "eos_token_id", None)
    if stated is None:
        return []
    return sorted({int(token) for token in (stated if isinstance(stated, list) else [stated])})


@torch.no_grad()
def fix_rotary(model: torch.nn.Module, max_model_len: int) -> bool:
    """Make rotary tables that depend on the batch (longrope, dynamic) those of ``max_model_len``, for good.

    transformers picks them anew in each pass by the longest position in it, so that a long neighbour would
    change a short request. Each module is asked once at the longest position and told to stay so; asked again
    with another length, it changes. Returns whether there was any.
    """
    fixed = False
    for module in model.modules():
        rope = module.__dict__.setdefault("headrace_rope", getattr(module, "rope_type", None))  # what it came with
        if rope is not None:
            module.rope_type = rope
        kinds: dict[str | None, str] = rope if isinstance(rope, dict) else {None: rope} if isinstance(rope, str) else {}
        moving = [layer for layer, kind in kinds.items() if kind == "longrope" or "dynamic" in kind]
        fixed |= bool(moving)
        for layer in moving:
            position = torch.tensor([[max_model_len - 1]])
            buffer = next(module.buffers(), position)
            at = (torch.zeros(1, 1, 1, device=buffer.device), position.to(buffer.device))
            module(*at) if layer is None else module(*at, layer)
        if moving and isinstance(rope, dict):
            module.rope_type = {layer: "fixed" if layer in moving else kind for layer, kind in rope.items()}  # type: ignore[assignment]
        elif moving:
            module.rope_type = "fixed"  # type: ignore[assignment]
    return fixed


class _LoadingBar:
    """Turns transformers' own progress bars into calls of ``progress("load", fraction)`` while entered."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        self.progress("load", 0.0)
        self.before = transformers_logging.set_tqdm_hook(self._bar)

    def __exit__(self, *exc: object) -> None:
        transformers_logging.set_tqdm_hook(self.before)
        if exc[0] is None:
            self.progress("load", 1.0)

    def _bar(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        progress = self.progress

        class Bar(transformers_logging.EmptyTqdm):
            def __iter__(self) -> Any:
                items: Any = self._iterator
                total = max(1, len(items))
                for done, item in enumerate(items):
                    progress("load", done / total)
                    yield item

        return Bar(*args, **kwargs)  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    """Its first sentence; a KeyError's text alone would say nothing."""
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__} {first}".strip() if isinstance(error, KeyError) or not first else first
