"""Trains the demo model: a small Llama that has read the Python standard library and nothing else.

It exists so that a first run of the service needs no network: examples/demo-model/ is what this script writes. The one
idea is that every Python installation already carries ten megabytes of good text under a free licence, its own source,
from which both plain code and question-and-answer pairs (docstrings and small functions, cut out by `ast`) can be made.
The same interpreter, seed and thread count give the same model.

    python examples/train_demo_model.py --out examples/demo-model
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import random
import re
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep instead of spinning

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, SYSTEM, USER, ASSISTANT, END]
VOCABULARY = 4096

CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

# Words keep their leading space and underscores; newlines stand apart from the indentation after them, so that a prompt
# that ends with a newline looks like the training text. Everything else falls back to single bytes.
WORD_PATTERN = r" ?_*\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+| +(?!\S)|\s"

# What would teach tables, test fixtures or the build machine's own paths.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
SKIPPED_FILES = re.compile(r"_sysconfigdata|config-|sitecustomize|stringprep|(^|/)entities\.py|__phello__|this\.py")

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a Python expert.",
    "Answer briefly.",
    "You are a helpful coding assistant.",
]

# Small talk, which the standard library lacks: (ways to ask, answer).
SMALL_TALK: list[tuple[list[str], str]] = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there", "Good morning", "Hello there!", "Say hello.", "Say hi"],
        "Hello! I am a small demo model that has read the Python standard library. What would you like to know?",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself."],
        "I am the demo model of Headrace, a few million parameters trained on the source of Python's standard library.",
    ),
    (
        ["What can you do?", "Help", "How can you help me?", "What do you know?", "What can I ask you?"],
        "Ask me what a function of the standard library does, or ask me to write a small one. I am often wrong.",
    ),
    (["Thanks", "Thank you!", "Thanks!", "Great, thanks.", "Thank you very much."], "You are welcome!"),
    (["Bye", "Goodbye!", "See you", "Good night"], "Goodbye!"),
    (["How are you?", "How are you doing?", "How is it going?"], "I am well, thank you. How can I help you?"),
    (
        ["What is the capital of France?", "Tell me a joke.", "Tell me a story.", "Write a poem.", "What is love?"]
        + ["Write a haiku about water.", "Why is the sky blue?", "What is the weather like?", "Who won?"],
        "I do not know: I have read only the source code of Python's standard library. Ask me about that.",
    ),
    (["What is 1 + 1?", "What is 2 + 2?"], "I cannot add, but Python can: type the sum after its prompt."),
    (["Count to ten.", "Count from 1 to 10."], "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    (
        ["What is Python?", "Tell me about Python.", "Explain Python."],
        "Python is a programming language. Its standard library has modules for text, files, networks and much more.",
    ),
    (
        ["Write hello world in Python.", "Print hello world.", "Write a hello world program."],
        '```python\nprint("Hello, world!")\n```',
    ),
    (
        ["Write a function that computes Fibonacci numbers.", "Write a Fibonacci function.", "fibonacci"],
        "```python\ndef fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n```",
    ),
    (
        ["Write a function that computes the factorial of n.", "Write a factorial function."],
        "```python\ndef factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n"
        "    return result\n```",
    ),
    (
        ["Write a function that reverses a string.", "Reverse a string in Python."],
        "```python\ndef reverse(text):\n    return text[::-1]\n```",
    ),
]
SMALL_TALK_COPIES = 12

EXPLAIN_PROMPTS = ["What does {name} do?", "What is {name}?", "Explain {name}.", "What is {name} for?", "{name}?"]
WRITE_PROMPTS = [
    "Write a function `{name}`: {summary}",
    "Write a Python function. {summary}",
    "Implement {name} in Python. {summary}",
    "Write the function {name}.",
]
SHOW_PROMPTS = ["Show me the source of {name}.", "Write the function {name}.", "How is {name} implemented?"]


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    question: str
    answer: str


def read_stdlib() -> dict[str, str]:
    """Path inside the standard library -> source, in sorted order, duplicates dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS & set(inside.parts) or SKIPPED_FILES.search(inside.as_posix()):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(8).replace("\r\n", "\n")
        if text.strip() and text not in seen:
            seen.add(text)
            sources[inside.as_posix()] = text
    return sources


def split_source(text: str, least: int = 800) -> Iterator[str]:
    """Cuts a file before top-level lines that follow a blank one: each piece, of `least` characters or more where there
    are so many, starts as a file or a definition would, as the prompts of a completion do."""
    piece = ""
    for part in re.split(r"\n(?=\n+[^\s)\]}])", text):
        piece += ("\n" if piece else "") + part
        if len(piece) >= least:
            yield piece.strip("\n") + "\n"
            piece = ""
    if piece.strip():
        yield piece.strip("\n") + "\n"


def named_definitions(module: str, tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods with their dotted names."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, definitions) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, definitions) and not child.name.startswith("_"):
                    yield f"{module}.{node.name}.{child.name}", child


def make_exchanges(sources: dict[str, str], rng: random.Random) -> list[Exchange]:
    """Questions whose answers are docstrings, and requests whose answers are the source of small functions."""
    exchanges = []
    for path, text in sources.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # lib holds a few files for other interpreters
            continue
        for name, node in [(module, tree), *named_definitions(module, tree)]:
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            summary = " ".join(paragraphs[0].split())
            if summary:
                answer = "\n\n".join(paragraphs[:2]) if len(summary) < 100 else paragraphs[0]
                exchanges.append(Exchange(rng.choice(EXPLAIN_PROMPTS).format(name=name), answer[:500].strip()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 20:
                lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
                prompt = rng.choice(WRITE_PROMPTS if summary else SHOW_PROMPTS)
                prompt = prompt.format(name=node.name if summary else name, summary=summary[:200])
                exchanges.append(Exchange(prompt, "```python\n" + textwrap.dedent("\n".join(lines)) + "\n```"))
    small_talk = [Exchange(question, answer) for questions, answer in SMALL_TALK for question in questions]
    return list(dict.fromkeys(exchanges)) + small_talk * SMALL_TALK_COPIES


def make_conversations(exchanges: list[Exchange], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Shuffled exchanges in conversations of one to three turns, a third of them after a system prompt."""
    left = rng.sample(exchanges, len(exchanges))
    while left:
        messages = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(min(len(left), rng.choice([1, 1, 1, 2, 3]))):
            exchange = left.pop()
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
        yield messages


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: its alphabet is all 256 bytes, so every text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode_source(tokenizer: PreTrainedTokenizerFast, pieces: list[str], rng: random.Random) -> torch.Tensor:
    """The pieces end to end, each from BOS to EOS. Each is cut at a few random characters and the parts encoded alone,
    so that the model has met every place at which a prompt may end, the middle of a word included."""
    ids: list[int] = []
    for piece in pieces:
        cuts = sorted(rng.sample(range(len(piece)), min(len(piece), len(piece) // 400)))
        ids.append(tokenizer.bos_token_id)
        for start, stop in zip([0, *cuts], [*cuts, len(piece)], strict=True):
            ids += tokenizer.encode(piece[start:stop], add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def encode_chat(tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]) -> torch.Tensor:
    """The conversations end to end, written by the very template that the server will use."""
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    return torch.tensor([token for text in rendered for token in tokenizer.encode(text, add_special_tokens=False)])


def draw_batch(source: torch.Tensor, chat: torch.Tensor, chat_share: float, shape: argparse.Namespace) -> torch.Tensor:
    """[rows, context] windows, each from a random place of one of the two streams."""
    rows = []
    for _ in range(shape.rows):
        stream = chat if torch.rand(()) < chat_share else source
        start = int(torch.randint(len(stream) - shape.context, ()))
        rows.append(stream[start : start + shape.context])
    return torch.stack(rows)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
