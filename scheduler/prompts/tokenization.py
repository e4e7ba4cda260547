"""From a job to token ids: chat template, tokenizer, limits. The only part of the scheduler that knows transformers.

Every error of a request that can be found without running it is found here, before admission, since the gateway sends
its 200 at admission. Any error ends only the job that caused it.

Over 400 lines: one class, which loads what a model brings once and makes prompts of it, and why it may be refused.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from array import array
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from protocol.chat import REASONING, normal_messages
from protocol.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelRefused,
    StartError,
    StructureNotSupported,
)
from protocol.formats.rules import sampling_of
from protocol.formats.tool_use import with_tools
from protocol.jobs import check_job
from protocol.messages import Job, ModelCard
from protocol.prompt_logprobs import check_size
from protocol.structures.grammar import Grammars
from scheduler.prompts.chat_format import AUTO, ChatFormat, Tokens, find_format
from scheduler.prompts.fill_in_middle import FillInMiddle
from scheduler.prompts.generation_config import read as read_generation_config
from scheduler.prompts.prompt_guard import NO_BACKEND, PromptGuard
from scheduler.prompts.template_source import TemplateSource
from scheduler.prompts.twin_tokenizer import TwinFailed

log = logging.getLogger("headrace.scheduler")

SpecialTokensInContent = Literal["guard", "allow"]

TEMPLATES = ("chat_template.jinja", "chat_template.json")  # where they stand, if not in tokenizer_config.json
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def hide_torch() -> None:
    """Keep transformers from importing torch into this process, which has no use for it: a third of the start's CPU
    time and a fifth of the memory are left. For a process that is a scheduler and nothing else."""
    if "transformers" not in sys.modules:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # Python's own way to say "not there"
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class Prompts:
    """Turns the prompts of a job into ids. ``ids`` is called from several threads at once: it only reads.

    Fast tokenizers are used through their Rust object: transformers' own __call__ sets padding and truncation on
    it at every call, which is not safe across threads.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: list[int],
        special_tokens_in_content: SpecialTokensInContent = "guard",
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len  # the service lowers it to what the workers really offer
        self.eos_token_ids = eos_token_ids
        self.longest_token: int | None = None  # bytes of text that one token can stand for; None: no bound
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.format: ChatFormat | None = None  # found at load
        self.fill_in_middle = FillInMiddle.of(tokenizer, vocab_size)
        self.defaults: dict[str, float] = {}  # of sampling, by the model's generation_config.json
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "encode_batch") else None
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.no_truncation()
        known = TemplateSource.of(getattr(tokenizer, "chat_template", None)).words
        self._reasoning_field = next((name for name in REASONING if name in known), REASONING[0])
        self._guard: PromptGuard | None = None
        if special_tokens_in_content == "guard" and self.chat and self._backend is not None:
            self._guard = PromptGuard.of(tokenizer, self._render, eos_token_ids)
        self._grammars: Grammars | StructureNotSupported | None = None  # made for the first request for structure
        self._making_grammars = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        max_model_len: int | None = None,
        special_tokens_in_content: SpecialTokensInContent = "guard",
        tool_format: str = AUTO,
        reasoning_format: str = AUTO,
        generation_config: str = "model",
    ) -> Prompts:
        """``model``: a local directory or a hub id. Raises StartError or ModelRefused, whose text says what to do.
        What a message can do to its prompt all the same is told in the log, and how the model writes tool calls."""
        from transformers import AutoConfig, AutoTokenizer

        _refuse_remote_code(model)
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as e:  # configs check their fields each in a way of its own
            if "trust_remote_code" in str(e):
                raise ModelRefused(REMOTE_CODE.format(model=model)) from None
            raise StartError(_load_failure(model, "configuration", e)) from e
        if getattr(config, "auto_map", None):
            raise ModelRefused(REMOTE_CODE.format(model=model))
        _refuse_other_kinds(model, config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except Exception as e:  # tokenizer classes raise whatever they like on broken files
            raise StartError(_load_failure(model, "tokenizer", e)) from e
        text = config.get_text_config()
        natural = next((n for f in CONTEXT_FIELDS if isinstance(n := getattr(text, f, None), int) and n > 0), None)
        if max_model_len is None and natural is None:
            raise StartError(f"{model}: its configuration names no context length; give --max-model-len")
        eos_ids = _eos_ids(model, text, tokenizer)
        prompts = cls(
            tokenizer, int(text.vocab_size), max_model_len or natural or 0, eos_ids, special_tokens_in_content
        )
        if special_tokens_in_content == "guard" and (reason := prompts.unprotected()):
            log.warning("%s: messages can forge turns of its chats: %s", model, reason)
        if beyond := prompts.ids_beyond_model():
            log.warning(
                "%s: its tokenizer is larger than the model: %d of its tokens have ids from %d on, for which there are "
                "no embeddings. Text that holds one of them is refused (400).",
                model, beyond, prompts.vocab_size,
            )  # fmt: skip
        prompts.check_template(model)
        prompts.find_format(tool_format, reasoning_format)
        if generation_config == "model" and (defaults := read_generation_config(model)):
            prompts.defaults = defaults
            told = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
            log.info("%s: sampling defaults by its generation_config.json: %s", model, told)
        return prompts

    def with_defaults(self, job: Job, given: Container[str], ids: Sequence[array[int]]) -> Job:
        """``job`` with this model's defaults for the fields of its sampling that it has not ``given``. A default length
        gives way to the context."""
        defaults: dict[str, Any] = {name: value for name, value in self.defaults.items() if name not in given}
        if "max_tokens" in defaults:
            room = self.max_model_len - max(map(len, ids))
            most = max(int(defaults["max_tokens"]), job.sampling.min_tokens)
            defaults["max_tokens"] = max(1, min(most, room))
        if not defaults:
            return job
        return msgspec.structs.replace(job, sampling=msgspec.structs.replace(job.sampling, **defaults))

    def as_accepted(self, job: Job) -> Job:
        """A pushed ``job`` as a gateway would have accepted it: ruled by its tools, the format of its answer pinned."""
        return with_tools(job, self.format.spec if self.format is not None else None)

    def check_template(self, model: str) -> None:
        """StartError if the chat template can write no chat at all."""
        if not self.chat:
            return
        first: Exception | None = None
        for content in ("Hi", [{"type": "text", "text": "Hi"}]):
            turn = {"role": "user", "content": content}
            for messages in ([turn], [{**turn, "role": "system"}, turn]):
                try:
                    self._apply(messages, add_generation_prompt=True)
                except Exception as error:  # a template raises whatever it likes
                    first = first or error
                else:
                    return
        assert first is not None
        file = next((f for f in TEMPLATES if (Path(model) / f).is_file()), "tokenizer_config.json")
        raise StartError(
            f"{Path(model) / file}: its chat template cannot write a chat ({_first_line(first)[:200]}); mend it, or "
            "remove it to serve completions alone"
        )

    def find_format(self, tool_format: str = AUTO, reasoning_format: str = AUTO) -> None:
        """Find out how the model writes tool calls and thoughts, by its chat template or as it is told. StartError."""
        if not self.chat:
            return
        self.format, told = find_format(self._apply, _text_of(self.tokenizer.chat_template), self._tokens(),
                                        tool_format, reasoning_format)  # fmt: skip
        log.info("%s", told)

    def _tokens(self) -> Tokens:
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        specials = set(self.tokenizer.all_special_tokens)
        return Tokens(
            added={text: id for text, id in added.items() if id < self.vocab_size},
            special=frozenset(id for text, id in added.items() if text in specials),
            end_ids=frozenset(self.eos_token_ids),
            encode=lambda text: list(self.tokenizer.encode(text, add_special_tokens=False)),
            decode=lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=False)),
            ruled=self._backend is not None and bool(self.eos_token_ids),
        )

    def unprotected(self) -> str | None:
        """Why text in a message can be read as the end of its turn, if it can."""
        if not self.chat:
            return None
        return NO_BACKEND if self._guard is None else self._guard.unprotected

    def prepare(self) -> None:
        """Build what the first chat with special tokens in its messages would wait for: up to some seconds and
        100 MiB. Such chats are refused where it cannot be built, which the log says."""
        try:
            if self._guard is not None:
                self._guard.prepare()
        except TwinFailed as reason:
            log.warning("chats that hold special tokens will be refused: %s", reason)

    def ids_beyond_model(self) -> int:
        """How many tokens of the tokenizer have an id that the model has no embedding for: common where tokens were
        added without the model's being resized."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return sum(token_id >= self.vocab_size for token_id in vocabulary.values())

    def card(self, name: str, created: int) -> ModelCard:
        """What the registry will say of this model under the served ``name``."""
        return ModelCard(
            model=name, created=created, max_model_len=self.max_model_len, vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids, chat=self.chat,
            format=self.format.spec if self.format is not None else None, sampling=self.defaults,
        )  # fmt: skip

    def tokenizer_json(self) -> bytes | None:
        """tokenizer.json for the gateways' /tokenize; None for a tokenizer that has no such form."""
        return None if self._backend is None else self._backend.to_str().encode()

    def ids(self, job: Job) -> list[array[int]]:
        """The prompts of ``job`` as token ids, all limits checked. InvalidRequest or ContextLengthExceeded."""
        check_job(job, vocab_size=self.vocab_size)
        if job.messages is not None:
            prompts = [self._chat(job)]
        else:
            prompts = [self._prompt(p, job) for p in job.prompts()]
        field = "prompt" if job.messages is None else "messages"
        if not prompts or not all(prompts):
            raise InvalidRequest(f"{field} must hold at least one token", param=field)
        kept = self._kept(job)
        prompts = [prompt[-kept:] for prompt in prompts]
        for prompt in prompts:
            self._check_fit(len(prompt), job)
            if max(prompt) >= self.vocab_size:
                raise InvalidRequest(
                    f"{field} holds the text of an added token that the model has no embedding for: its ids end at "
                    f"{self.vocab_size - 1}",
                    param=field,
                )
        if job.sampling.prompt_logprobs is not None:
            check_size(map(len, prompts), job.sampling.n, job.sampling.prompt_logprobs)
        structure = sampling_of(job, prompts[0]).structure
        if structure is not None and structure.constrains:
            self.grammars().check(structure)
        return prompts

    def _kept(self, job: Job) -> int:
        """How many of a prompt's last tokens are kept; 0: all of them."""
        if job.truncate_prompt_tokens != -1:
            return job.truncate_prompt_tokens or 0
        return max(1, self.max_model_len - _least_output(job))

    def grammars(self) -> Grammars:
        """Compiled grammars over this tokenizer. StructureNotSupported if there can be none: no end token, or a
        tokenizer that the library cannot take."""
        with self._making_grammars:
            if self._grammars is None:
                try:
                    self._grammars = self._make_grammars()
                except StructureNotSupported as reason:
                    self._grammars = reason
        if isinstance(self._grammars, StructureNotSupported):
            raise StructureNotSupported(self._grammars.message, param="structure")
        return self._grammars

    def _make_grammars(self) -> Grammars:
        text = self.tokenizer_json()
        if text is None:
            raise StructureNotSupported("this model's tokenizer has no tokenizer.json", param="structure")
        return Grammars(text.decode(), self.vocab_size, self.eos_token_ids)

    def _prompt(self, prompt: str | list[int], job: Job) -> array[int]:
        """Ids are used as they are; a text gets what the tokenizer adds by default, unless that is not wanted."""
        if job.suffix and isinstance(prompt, str):
            return self._filled(prompt, job.suffix, job)
        if isinstance(prompt, str):
            return self._encode(prompt, job, special=job.add_special_tokens)
        return array("i", prompt)

    def _filled(self, prompt: str, suffix: str, job: Job) -> array[int]:
        """A prompt with what follows the text that is asked for."""
        if self.fill_in_middle is None:
            raise InvalidRequest(
                "suffix is not supported: this model's tokenizer has no tokens to fill in the middle",
                param="suffix", code="unsupported_parameter",
            )  # fmt: skip
        return self.fill_in_middle.ids(prompt, suffix, lambda text: self._encode(text, job, special=False))

    def _encode(self, text: str, job: Job, special: bool) -> array[int]:
        """A text that by its length alone cannot fit is refused unread. Unlike ``encode``, ``encode_batch`` releases
        the interpreter's lock; the fast one keeps no offsets."""
        self._check_length(text, job)
        if self._backend is not None:
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
            return array("i", encoded.ids)
        return array("i", self.tokenizer.encode(text, add_special_tokens=special))

    def _chat(self, job: Job) -> array[int]:
        """The ids of a chat, special tokens written by the template. Those in messages are text, if guarded."""
        if not self.chat:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        arguments = {"add_generation_prompt": not job.continue_final_message, **(job.chat_template_kwargs or {})}
        if job.continue_final_message:
            arguments["continue_final_message"] = True  # transformers cuts the chat after the message's own text
        messages = normal_messages(job.messages)
        if self.format is not None:
            messages, tools = self.format.prepare(messages, job.tools)
            if tools:
                arguments["tools"] = tools
        messages = [self._as_the_template_reads(message) for message in messages]
        if self._guard is not None:
            return array("i", self._guard.ids(messages, arguments, lambda text: self._check_length(text, job)))
        return self._encode(self._render(messages, arguments), job, special=False)

    def _as_the_template_reads(self, message: dict[str, Any]) -> dict[str, Any]:
        """Reasoning under the name that the template looks for."""
        if self._reasoning_field == "reasoning_content" or "reasoning_content" not in message:
            return message
        return {self._reasoning_field if k == "reasoning_content" else k: v for k, v in message.items()}

    def _render(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        """The chat as one text."""
        import jinja2

        try:
            return self._apply(messages, **arguments)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as e:
            raise InvalidRequest(f"the chat template refuses the messages{self._reason(e)}", param="messages") from None

    def _apply(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))

    def _reason(self, error: Exception) -> str:
        """A template's own complaint, if it is one of the template's fixed texts: others might quote the prompt."""
        complaint = str(error)
        return f": {complaint}" if complaint and complaint in str(self.tokenizer.chat_template) else ""

    def _check_length(self, text: str, job: Job) -> None:
        """Refuse a text that by its length alone has more tokens than a context, if it is not to be cut."""
        if job.truncate_prompt_tokens is None and self.longest_token is not None and len(text) > self.max_model_len:
            least = -(-len(text.encode()) // self.longest_token)
            if least >= self.max_model_len:
                self._check_fit(least, job, "at least ")

    def _check_fit(self, tokens: int, job: Job, counted: str = "") -> None:
        wanted, limit = job.sampling.max_tokens, self.max_model_len
        field = "prompt" if job.messages is None else "messages"
        if tokens + _least_output(job) > limit:
            asked = "" if wanted is None else f" and max_tokens is {wanted}"
            raise ContextLengthExceeded(
                f"the model's context holds {limit} tokens: the prompt has {counted}{tokens}{asked}",
                param=field if not wanted or tokens >= limit else "max_tokens",
            )


def _least_output(job: Job) -> int:
    """Tokens that must fit beside the prompt."""
    wanted = job.sampling.max_tokens
    return max(1 if wanted is None else wanted, job.sampling.min_tokens)


REMOTE_CODE = (
    "{model}: this model asks for code of its own (auto_map in its configuration), which Headrace never runs. "
    "Use a version of it that transformers supports by itself."
)


def _refuse_remote_code(model: str) -> None:
    """Look before transformers does: a local config.json with auto_map is refused by name."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return
    try:
        asks = "auto_map" in json.loads(path.read_bytes())
    except ValueError as e:
        raise StartError(f"{model}: config.json is not valid JSON ({e})") from None
    if asks:
        raise ModelRefused(REMOTE_CODE.format(model=model))


def _refuse_other_kinds(model: str, config: Any) -> None:
    """ModelRefused for a config of no language model, such as one that sees."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelRefused(
            f"{Path(model) / 'config.json'}: {config.model_type} is no causal language model that transformers knows; "
            "choose another model"
        )


def _first_line(error: Exception) -> str:
    """Its first sentence; a KeyError's text alone would say nothing."""
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__} {first}".strip() if isinstance(error, KeyError) or not first else first


def _load_failure(model: str, part: str, error: Exception) -> str:
    file = {"configuration": "config.json", "tokenizer": "tokenizer.json"}[part]
    where = Path(model) / file if (Path(model) / file).is_file() else model
    return f"{where}: the {part} cannot be loaded ({_first_line(error)[:200]}); fetch it again"


def _eos_ids(model: str, config: Any, tokenizer: Any) -> list[int]:
    """generation_config, else config, else tokenizer: the order in which transformers' generate looks."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no such file
        eos = None
    for candidate in (eos, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        if candidate is not None:
            return list(candidate) if isinstance(candidate, list) else [int(candidate)]
    return []


def _text_of(template: Any) -> str:
    """All of a chat template's text: some tokenizers have several by name."""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)
