"""The client of `vllm bench serve`, as its command calls it: every stream is read, by both of its ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from checks import BASE, MODEL, run

REQUESTS = 6


def bench(backend: str, path: str, tokenizer: str) -> None:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(
        parser.parse_args([
            "--backend", backend, "--base-url", BASE.removesuffix("/v1"), "--endpoint", path, "--model", MODEL,
            "--tokenizer", tokenizer, "--dataset-name", "random", "--random-input-len", "24",
            "--random-output-len", "8",
            "--num-prompts", str(REQUESTS), "--max-concurrency", "2", "--ignore-eos", "--save-result",
            "--result-filename", "result.json",
        ])
    )  # fmt: skip
    result = json.loads(Path("result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0), result
    assert result["total_output_tokens"] == REQUESTS * 8, result


def completions() -> None:
    bench("openai", "/v1/completions", sys.argv[3])


def chats() -> None:
    bench("openai-chat", "/v1/chat/completions", sys.argv[3])


run(completions, chats)
