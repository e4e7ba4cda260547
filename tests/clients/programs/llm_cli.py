"""llm, as a command line with a model of its own configuration, and as a library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import llm
from checks import BASE, CITY, CITY_SCHEMA, FRANCE, MODEL, SUM, TOKENS, add, is_city, run

home = Path.cwd()
os.environ["LLM_USER_PATH"] = str(home)
settings = {
    "model_id": "ours", "model_name": MODEL, "api_base": BASE, "api_key_name": "ours", "supports_schema": True,
    "supports_tools": True,
}  # fmt: skip
(home / "extra-openai-models.yaml").write_text(json.dumps([settings]))
(home / "keys.json").write_text('{"ours": "none"}')

model = llm.get_model("ours")


def command(*arguments: str) -> str:
    program = str(Path(sys.executable).parent / "llm")
    options = ("-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", str(TOKENS))
    ended = subprocess.run([program, *arguments, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def chat() -> None:
    assert "Paris" in command(FRANCE, "--no-stream")


def stream() -> None:
    assert "Paris" in command(FRANCE)
    assert len(list(model.prompt(FRANCE, temperature=0, max_tokens=TOKENS))) > 3


def tools() -> None:
    """It has no way to ask for a call: whether this model makes one is its own affair, what becomes of it is not."""
    chain = model.chain(SUM, tools=[add], options={"temperature": 0, "max_tokens": TOKENS})
    first = next(iter(chain.responses()))
    assert first.text() or first.tool_calls()
    assert len(first.execute_tool_calls()) == len(first.tool_calls())


def structured() -> None:
    is_city(json.loads(command(CITY, "--schema", json.dumps(CITY_SCHEMA))))


run(chat, stream, tools, structured)
