"""Trains the demo model: a small Llama that has read the Python standard library and nothing else.

It exists so that a first run of the service needs no network: examples/demo-model/ is what this script writes. The one
idea is that every Python installation already carries ten megabytes of good text under a free licence, its own source,
from which both plain code and question-and-answer pairs (docstrings and small functions, cut out by `ast`) can be made.
The same interpreter, seed and thread count give the same model. Over 400 lines: some are text to train on and the model
card, and it stays one file so that it can be read, and run, alone.

    python examples/train_demo_model.py --out examples/demo-model
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import platform
import random
import re
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

BOS, EOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, SYSTEM, USER, ASSISTANT, END]
VOCABULARY = 4096
SHORT_CONTEXT, LONG_CONTEXT = 256, 512  # the long one for the last 15% of the steps
TOKENS_PER_STEP = 1024  # few: more steps teach more than larger ones, and the logits stay in the cache
HELD_OUT_TOKENS = 8192
CHAT_SHARE = 0.4
LEARNING_RATE = 2e-3
STEPS = 3000

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
        [
            "What is the capital of France?",
            "Tell me a joke.",
            "Tell me a story.",
            "Write a poem.",
            "Why is the sky blue?",
        ],
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
        "```python\ndef fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
        "    return a\n```",
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


MODEL_CARD = """---
license: psf-2.0
language: en
pipeline_tag: text-generation
---
# Headrace demo model

A Llama of {parameters:.1f} million parameters that writes plausible-looking Python and answers, often wrongly,
questions about the standard library. It exists so that a first run needs no network, and is good for nothing else.

- **Trained on** the source and docstrings of the standard library of Python {python}: {files} files, {megabytes:.1f} MB
  (sha256 {digest}...), without tests, idlelib, lib2to3, encodings and pydoc_data; {exchanges:,} question-and-answer
  pairs cut out of the same files; and a few lines of small talk written by hand.
- **Made by** `examples/train_demo_model.py --seed {seed} --threads {threads} --steps {steps}` with torch {torch}.
- **Training**: {step} of {steps} steps, {tokens:.1f} million tokens, in {wall:.0f} s of wall time and {cpu:.0f} s of
  CPU time on {threads} CPU threads ({machine}). Loss on held-out source: {loss:.3f} nats per token.
- **Tokenizer**: byte-level BPE with 4,096 entries; any text survives the round trip.
- **Chat**: `<|system|>`, `<|user|>` and `<|assistant|>` open a turn, `<|end|>` closes it.
- **Context**: trained on windows of 256 and 512 tokens; accepts 2,048, with fading sense.

Licence: derived from the Python standard library, copyright Python Software Foundation, under the PSF License Agreement
(https://docs.python.org/3/license.html). The weights may reproduce passages of it; treat those as under that licence.
"""


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


def draw_batch(streams: tuple[torch.Tensor, torch.Tensor], context: int) -> torch.Tensor:
    """[rows, context + 1] windows, each from a random place of the source or, for its share, of the chat."""
    source, chat = streams
    rows = []
    for _ in range(TOKENS_PER_STEP // context):
        stream = chat if torch.rand(()) < CHAT_SHARE else source
        start = int(torch.randint(len(stream) - context, ()))
        rows.append(stream[start : start + context + 1])
    return torch.stack(rows)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=stops, pad_token_id=config.pad_token_id
    )
    return model


def make_optimizer(model: LlamaForCausalLM, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, decaying the projections only, under a warmup and a cosine."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    warmup = max(1, min(100, steps // 10))

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, LambdaLR(optimizer, scale)


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """Mean loss in nats per token over source that was not trained on."""
    windows = held_out[: HELD_OUT_TOKENS // SHORT_CONTEXT * (SHORT_CONTEXT + 1)].view(-1, 4, SHORT_CONTEXT + 1)
    return torch.stack([next_token_loss(model, rows) for rows in windows]).mean().item()


def train(
    model: LlamaForCausalLM, streams: tuple[torch.Tensor, torch.Tensor], steps: int, progress: Progress
) -> Iterator[int]:
    """Takes the steps and yields their number after each tenth of them."""
    optimizer, schedule = make_optimizer(model, steps)
    bar = progress.add_task("training", total=steps, loss=math.nan)
    smooth = math.nan
    for step in range(1, steps + 1):
        context = SHORT_CONTEXT if step <= steps * 0.85 else LONG_CONTEXT
        loss = next_token_loss(model, draw_batch(streams, context))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
        progress.update(bar, advance=1, loss=smooth)
        if step % max(1, steps // 10) == 0 or step == steps:
            yield step


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Writes the folder: weights in bfloat16, which halves it and costs the samples nothing. Each file replaces its
    predecessor at once, for a server may have that one mapped."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-model-", dir=out.parent) as folder:
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo model on the source of the standard library of the Python that runs this.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("examples/demo-model"), help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {TOKENS_PER_STEP} tokens each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the order of the text and the cuts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number changes the last digits")
    options = parser.parse_args()
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1")

    logging.disable_progress_bar()  # the one bar is ours
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    sources = read_stdlib()
    digest = hashlib.sha256("\0".join(sources.values()).encode()).hexdigest()
    pieces = [piece for text in sources.values() for piece in split_source(text)]
    rng.shuffle(pieces)
    exchanges = make_exchanges(sources, rng)
    tokenizer = train_tokenizer(pieces + [exchange.answer for exchange in exchanges])
    source = encode_source(tokenizer, pieces, rng)
    chat = encode_chat(tokenizer, list(make_conversations(exchanges, rng)))
    source, held_out = source[: -HELD_OUT_TOKENS * 2], source[-HELD_OUT_TOKENS * 2 :]
    model = make_model(tokenizer)
    console.print(
        f"Python {platform.python_version()}: {len(sources)} files, {len(source):,} tokens of source, {len(chat):,} of "
        f"chat ({len(exchanges):,} exchanges); {model.num_parameters():,} parameters"
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    with Progress(*columns, console=console) as progress:
        for step in train(model, (source, chat), options.steps, progress):
            loss = held_out_loss(model, held_out)
            card = MODEL_CARD.format(
                python=platform.python_version(),
                files=len(sources),
                megabytes=sum(map(len, sources.values())) / 1e6,
                digest=digest[:16],
                exchanges=len(exchanges),
                parameters=model.num_parameters() / 1e6,
                step=step,
                steps=options.steps,
                tokens=step * TOKENS_PER_STEP / 1e6,
                seed=options.seed,
                threads=options.threads,
                wall=time.perf_counter() - wall,
                cpu=time.process_time() - cpu,
                machine=f"{platform.system()} {platform.machine()}",
                torch=torch.__version__,
                loss=loss,
            )
            save(model, tokenizer, card, options.out)
            progress.console.print(f"step {step}: held-out loss {loss:.3f}, written to {options.out}")


if __name__ == "__main__":
    main()
