"""What the parts of benchmarks.gpu share: where findings go, models drawn on the spot, an engine without files."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_rows import seconds_of
from benchmarks.models import BOS, EOS, PAD, SHAPES
from benchmarks.stack import Unavailable
from headrace.clients.workload import Workload
from protocol.messages import Capacity
from workers.torch_engine import loader
from workers.torch_engine.attention import NAME
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.make import make_engine

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048,
}  # fmt: skip
MOE = "moe-7b"
TINY_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}


class OutOfTime(KeyboardInterrupt):
    """A row's time is over. Of this kind so that nothing within it takes it for the failure of one request."""


class Part:
    """What is found goes to the file at once, so that a part that is cut off leaves what it has.

    The file holds a map for each part that ran in this process: ``begin`` names the one that ``note`` writes to.
    """

    def __init__(self, path: Path, tiny: bool) -> None:
        self.path, self.tiny = path, tiny
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.results: dict[str, dict[str, Any]] = {}
        self.name = ""
        self.served: Any = None  # tiny: the one stack
        self.open = ExitStack()  # what stays for the parts that follow; the process closes it at its end

    def begin(self, name: str) -> None:
        self.name = name
        self.results[name] = {}

    @property
    def found(self) -> dict[str, Any]:
        return self.results[self.name]

    def note(self, **found: Any) -> None:
        self.results[self.name] |= found
        self.path.write_text(json.dumps(self.results))
        print(self.name, found, flush=True)

    @contextmanager
    def row(self, key: str) -> Iterator[dict[str, Any]]:
        """Fill what is given: it is noted as ``key``. It has the row's own time; when that is over, or something
        fails, the reason is noted beside what there is, and the part goes on with its next row."""
        seconds = seconds_of(self.name, key) * (50 if self.tiny else 1)  # a rehearsal is not about time
        found: dict[str, Any] = {}

        def over(number: int, frame: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield found
        except OutOfTime:
            found["why"] = f"stopped after {seconds:g} s"
        except Unavailable as error:
            found["why"] = str(error)
        except Exception as error:
            logging.exception("%s of %s", key, self.name)
            found["why"] = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.note(**{key: found})

    def fields(self, shape: str) -> dict[str, Any]:
        return {**SHAPES[shape], **(TINY if self.tiny else {}), **(TINY_MOE if self.tiny and shape == MOE else {})}

    def policy(self, **given: Any) -> dict[str, Any]:
        """Limits of an engine and of a stack alike, so that what is compared was asked the same: fields of
        EngineConfig."""
        usual = {"max_model_len": 2048, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
        if self.tiny:
            usual = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory": 64 << 20}
        return {**usual, "threads": 1, **given}

    def workload(self, **given: Any) -> Workload:
        """Everyone at once, the same number of tokens for each: what transformers' batching can be asked for too."""
        if self.tiny:
            small = {"requests": 6, "prompt_len": (8, 8), "output_len": (8, 8), "shared_prefix": 32}
            given = {n: min(v, small[n]) if n in small else v for n, v in given.items()}
            return Workload(**{"requests": 6, "prompt_len": (8, 40), "output_len": (8, 8), "seed": 5, **given})
        return Workload(**{"requests": 256, "prompt_len": (64, 512), "output_len": (128, 128), "seed": 5, **given})

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def draw_model(
    fields: dict[str, Any], device: torch.device, dtype: torch.dtype, attention: str, lively: bool = False
) -> Any:
    """A model of random weights, drawn on ``device``. ``lively``: large enough that it does not repeat one token."""
    fields = dict(fields)
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, **ids)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)
    for weight in model.parameters() if lively else ():
        if weight.dim() > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def without_files(fields: dict[str, Any], dtype: torch.dtype, on: torch.device | None = None) -> Iterator[None]:
    """While entered, the loader draws the model, ``on`` the engine's device or another, and loads no tokenizer."""
    replaced = ("load_config", "load_model", "load_tokenizer", "eos_token_ids", "directory_of")
    known = {name: getattr(loader, name) for name in replaced}

    def load_model(config: Any, model_config: Any, device: torch.device, progress: Any, group: Any) -> Any:
        model = draw_model(fields, on or device, dtype, NAME, lively=on is not None)
        return loader.rounded(model, config, device).to(device)

    plain = dict(fields)
    model_config = AutoConfig.for_model(plain.pop("model_type"), **plain)
    loader.load_config = lambda model: model_config
    loader.load_model = load_model
    loader.load_tokenizer = lambda model: None
    loader.directory_of = lambda model: None
    loader.eos_token_ids = lambda model, config: [EOS]
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(loader, name, function)


def load_engine(part: Part, shape: str, dtype: torch.dtype = torch.bfloat16, **given: Any) -> tuple[Any, Capacity]:
    config = EngineConfig(model=shape, device=part.device.type, **part.policy(**given))
    began, stages = time.perf_counter(), [""]

    def progress(stage: str, fraction: float) -> None:
        if stage != stages[-1]:
            stages.append(stage)
            print(f"{time.perf_counter() - began:5.1f} s {stage}", flush=True)

    with without_files(part.fields(shape), dtype):
        engine = make_engine(config)
        capacity = engine.load(progress)
    steps = getattr(engine.backend, "steps", None)
    part.note(
        engine=engine.backend.name,
        load_s=round(time.perf_counter() - began, 1),
        graphs=len(steps.buckets) if steps is not None else 0,
        capture_s=round(getattr(steps, "capture_s", 0.0), 1),
        capture_mib=round(getattr(steps, "capture_bytes", 0) / 2**20),
        kv_blocks=capacity.pools[0].units,
    )
    return engine, capacity


def timed(part: Part, run: Callable[[], Any], times: int) -> float:
    """Seconds that one of ``times`` runs took, after three to warm up."""
    for _ in range(3):
        run()
    part.wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    part.wait()
    return (time.perf_counter() - began) / times
