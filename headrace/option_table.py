"""The table of all command-line options. One row says everything: flag, commands, meaning, type, default.

``headrace COMMAND --help``, the environment variables, what ``serve`` hands on to its processes and the table in the
README are made from it.

Over 400 lines: it is a table.
"""

from __future__ import annotations

from headrace.options import Option, boolean, count, json_object, number, port, rate, seconds, share, size, span, whole

OPTIONS: tuple[Option, ...] = (
    Option(
        "--config",
        "serve config models ray",
        "a TOML file with any of these options and any number of models; options of the command line win over it "
        "(default: none; `config` and `models` take ./headrace.toml if it is there, `ray` always)",
        metavar="FILE",
    ),
    # what is served
    Option(
        "--model",
        "serve scheduler worker doctor",
        "the model: a local directory, a .gguf file, or a Hugging Face hub id (owner/name, owner/name:file.gguf) "
        "of a causal language model (default: SmolLM2-135M-Instruct, fetched once; without a network the demo model)",
        metavar="PATH|ID",
    ),
    Option(
        "--served-model-name",
        "serve scheduler worker",
        "the name that clients put in `model` (default: the last part of the path, or the hub id)",
        metavar="NAME",
    ),
    Option(
        "--cache-dir",
        "serve scheduler worker",
        "where fetched and converted models are kept (default: ~/.cache/headrace)",
        metavar="DIR",
    ),
    # where
    Option("--host", "serve gateway doctor", "address to listen on; 0.0.0.0 for every interface", default="127.0.0.1"),
    Option("--port", "serve gateway doctor", "port of the HTTP API; 0 picks a free one", port, 8000),
    Option(
        "--redis-url",
        "serve gateway scheduler worker submit top doctor requests dead shards config ray",
        "Redis or Valkey, as redis://[user:password@]host:port/db, rediss://..., unix:///path, or "
        "redis+cluster://host:port,host:port "
        "(default: serve starts an embedded one; the others find that, else redis://127.0.0.1:6379/0)",
        metavar="URL",
    ),
    Option(
        "--data-dir",
        "serve doctor",
        "where the embedded server keeps its append-only file; a restart finds its jobs again "
        "(default: ~/.local/state/headrace/data)",
        metavar="DIR",
    ),
    Option(
        "--run-dir",
        "serve config",
        "where logs/ and processes.json go; for `config check --diff` that of the serve to compare with "
        "(default: ~/.local/state/headrace/run-PORT)",
        metavar="DIR",
    ),
    # how many
    Option("--workers", "serve", "worker processes; they share out the GPUs", count, 1, metavar="N"),
    Option(
        "--tensor-parallel-size",
        "serve worker",
        "ranks of a worker: processes that compute one model together, each with a GPU or a share of the CPU threads",
        count,
        1,
        metavar="N",
    ),
    Option(
        "--pipeline-parallel-size",
        "serve worker",
        "stages of a worker: the model's layers are divided among so many, each of --tensor-parallel-size ranks",
        count,
        1,
        metavar="N",
    ),
    Option(
        "--rendezvous",
        "worker",
        "where ranks of other machines come in: the worker listens there, ranks connect; a network of its own "
        "(default: all ranks are here)",
        metavar="HOST:PORT",
    ),
    Option("--local-ranks", "worker", "with --rendezvous: ranks that this worker starts itself", count, 1, metavar="N"),
    Option("--rank", "worker", "be this rank of the worker at --rendezvous, and nothing else", count, metavar="K"),
    Option("--schedulers", "serve", "scheduler processes; one leads, the others stand by", count, 1, metavar="N"),
    Option(
        "--shards",
        "serve scheduler",
        "slots of Redis that the model's requests are spread over, each with a leader and workers of its own, "
        "as docs/scaling.md says (default: as many as there are, at first 1)",
        count,
        metavar="N",
    ),
    Option(
        "--shard",
        "scheduler worker",
        "of a model with several: which one this worker computes for (default: 0), or this scheduler leads first "
        "(default: whichever nobody leads)",
        whole,
        metavar="K",
    ),
    Option("--gateways", "serve", "gateway processes, on PORT, PORT+1, ...", count, 1, metavar="N"),
    Option(
        "--keep-alive",
        "serve",
        "a model that nobody has asked anything for so long gives its memory back; the next request waits in the queue "
        "until a worker has loaded it again (default: it stays)",
        seconds,
        metavar="SECONDS",
    ),
    Option(
        "--card",
        "serve",
        "models with the same name here share a card by turns: one is loaded when it is asked for, in the place of the "
        "one that is idle longest (default: none)",
        metavar="NAME",
    ),
    Option("--card-models", "serve", "how many models a card holds at once", count, 1, metavar="N"),
    Option(
        "--least-stay",
        "serve",
        "how long a model that shares a card is loaded before it gives way",
        seconds,
        30.0,
        metavar="SECONDS",
    ),
    # the engine
    Option(
        "--engine",
        "serve worker",
        "torch, or a simulated one that only keeps time",
        default="torch",
        choices=("torch", "simulated"),
    ),
    Option(
        "--dtype",
        "serve worker",
        "precision of the weights (default: the checkpoint's; on a CPU arithmetic is float32 all the same)",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    Option(
        "--quantization",
        "serve worker",
        "what weights of linear layers are rounded to as they are loaded, which is not lossless: int8, one scale per "
        "output; int4, a scale and a zero for 128 inputs, the head as it is; fp8 on a GPU, where the head stays too",
        choices=("fp8", "int8", "int4"),
    ),
    Option(
        "--dequantize",
        "serve worker",
        "weights of a quantized checkpoint are widened to --dtype as they are loaded; on a CPU those in FP8 are in any "
        "case",
        boolean,
        False,
    ),
    Option("--device", "serve worker", "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"),
    Option(
        "--max-model-len", "serve scheduler worker", "longest prompt + output, in tokens (default: the model's)", count
    ),
    Option(
        "--generation-config",
        "serve scheduler",
        "model: what its generation_config.json states (temperature, top_p, ...) is the default of its requests; "
        "off: OpenAI's defaults",
        default="model",
        choices=("model", "off"),
    ),
    Option(
        "--special-tokens-in-content",
        "serve scheduler",
        "guard: what reads as a special token in a chat's messages stays text, so that no message can forge a turn; "
        "allow: it becomes the token",
        default="guard",
        choices=("guard", "allow"),
    ),
    Option(
        "--tool-format",
        "serve scheduler",
        "how the model writes tool calls: a family such as hermes, llama3 or mistral; auto: found out from its chat "
        "template; none. hermes also serves models whose template knows no tools",
        default="auto",
    ),
    Option(
        "--reasoning-format",
        "serve scheduler",
        "what stands around the model's thoughts: a family such as think or mistral; auto: found out from its chat "
        "template; none: they are content",
        default="auto",
    ),
    Option("--max-num-seqs", "serve worker", "most sequences that run at once on a worker", count, shown="256"),
    Option(
        "--max-num-batched-tokens",
        "serve worker",
        "most tokens that one step computes on a worker",
        count,
        shown="2048",
    ),
    Option(
        "--kv-cache-memory",
        "serve worker",
        "memory of a worker's KV cache, as 2GiB (default: a share of what is free)",
        size,
        metavar="SIZE",
    ),
    Option(
        "--kv-cache-dtype",
        "serve worker",
        "auto: keys and values are stored as they are computed; fp8: in 8 bits (e4m3, no scale), which is not "
        "lossless and holds twice as many tokens; on a GPU. The start says how far it moves logits",
        default="auto",
        choices=("auto", "fp8"),
    ),
    Option(
        "--kv-offload",
        "serve worker",
        "host memory of a worker for blocks that its KV cache has no room for, as 32GiB: a conversation that returns "
        "is copied back rather than computed again (default: none)",
        size,
        metavar="SIZE",
    ),
    Option(
        "--gpu-memory-utilization",
        "serve worker",
        "share of a GPU's whole memory that a worker may take, for weights and KV cache together",
        share,
        shown="0.9",
    ),
    Option("--block-size", "serve worker", "tokens in one block of the KV cache", count, shown="16"),
    Option(
        "--engine-options",
        "serve worker",
        "further fields of the engine's configuration, such as '{\"step_us\": 10000}' for the simulated one",
        json_object,
        metavar="JSON",
    ),
    Option(
        "--kernel-cache",
        "serve worker",
        "folder where a GPU's compiled kernels are kept between starts; several workers may share it "
        "(default: $TRITON_CACHE_DIR, else ~/.cache/headrace/kernels)",
        metavar="DIR",
    ),
    Option("--threads", "serve worker", "CPU threads of a worker (default: its share of the cores)", count),
    # life of requests and processes
    Option("--api-keys-file", "serve gateway", "JSON file of hashed API keys (default: no key is asked for)"),
    Option(
        "--cors-origins",
        "serve gateway",
        "other origins whose pages may call the API from a browser, as https://a.example,http://localhost:3000; "
        "* for all (default: none)",
        metavar="ORIGINS",
    ),
    Option(
        "--allowed-hosts",
        "serve gateway",
        "without API keys, host names besides this machine's own by which browsers may reach the page, as gpu1.lan "
        "(default: none)",
        metavar="HOSTS",
    ),
    Option(
        "--contract",
        "serve gateway",
        "the endpoints of a hosting service besides, and its port, host and model folder as defaults (docs/hosting.md)",
        choices=("sagemaker", "vertex", "azureml"),
    ),
    Option("--ui", "serve gateway", "the page at /: a playground and a dashboard", boolean, True),
    Option(
        "--resume-grace",
        "serve gateway",
        "how long a stream whose client has gone away may be picked up again",
        seconds,
        0.0,
        metavar="SECONDS",
    ),
    Option(
        "--max-waiting-requests", "serve gateway", "beyond so many waiting requests new ones get a 429", count, 10000
    ),
    Option("--max-waiting-tokens", "serve gateway", "the same for waiting prompt tokens (default: no bound)", count),
    Option("--max-tenant-requests", "serve gateway", "the same for requests of one tenant (default: no bound)", count),
    Option(
        "--max-tenant-tokens", "serve gateway", "the same for prompt tokens of one tenant (default: no bound)", count
    ),
    Option(
        "--tenant-weights",
        "serve scheduler",
        'share of the tokens that a tenant gets beside others, as {"gold": 4} (default: 1 each)',
        json_object,
        metavar="JSON",
    ),
    Option(
        "--inter-token-target-ms",
        "serve scheduler",
        "longest time between the tokens of a stream that prefill of other prompts may cause, where it can be kept "
        "(default: what serves both best)",
        number,
        0.0,
    ),
    Option(
        "--response-cache",
        "serve scheduler",
        "keep the answers of deterministic requests (temperature 0; with a seed where they say cache: true), for "
        "requests of the same tenant that ask for the same",
        boolean,
        False,
    ),
    Option(
        "--response-cache-ttl",
        "serve scheduler",
        "how long a cached answer is kept",
        seconds,
        3600.0,
        metavar="SECONDS",
    ),
    Option(
        "--response-cache-memory",
        "serve scheduler",
        "most memory of the server for cached answers, as 512MiB (default: a tenth of its maxmemory, 256MiB where it "
        "has none)",
        size,
        metavar="SIZE",
    ),
    Option(
        "--response-cache-shared",
        "serve scheduler",
        "cached answers are for all tenants, who can tell by the time of an answer what others have asked",
        boolean,
        False,
    ),
    Option(
        "--trace-content",
        "serve scheduler",
        "traces hold prompts and answers (traces are made where OTEL_EXPORTER_OTLP_ENDPOINT is set, docs/traces.md)",
        boolean,
        False,
    ),
    Option(
        "--weights-grace",
        "serve scheduler",
        "how long a request that has begun waits for a worker with the weights that it began with, while only workers "
        "with others serve; then it ends with an error",
        seconds,
        60.0,
        metavar="SECONDS",
    ),
    Option(
        "--strict-durability",
        "serve gateway scheduler worker",
        "refuse a Redis that could lose what it acknowledged, instead of warning",
        boolean,
        False,
    ),
    Option(
        "--interruption-notice-url",
        "serve worker",
        "address (instance metadata of a cloud) or file that tells that this machine will go away; the worker then "
        "hands its requests over and ends (default: none)",
        metavar="URL|PATH",
    ),
    Option(
        "--retention",
        "serve scheduler worker",
        "how long a request's journal stays after its end, for readers that come late",
        seconds,
        600.0,
        "SECONDS",
    ),
    Option(
        "--drain-timeout",
        "serve gateway worker",
        "how long running requests may take to end when a process is asked to leave",
        seconds,
        60.0,
        metavar="SECONDS",
    ),
    # single services
    Option("--name", "gateway scheduler worker", "name of this process among its kind (default: made up)"),
    Option(
        "--metrics-port",
        "serve gateway scheduler worker",
        "port of /metrics (default: a gateway's own port, or none; serve: free ones, else N, N+1, ...)",
        port,
    ),
    Option("--metrics-host", "serve gateway scheduler worker", "address of that port", default="127.0.0.1"),
    Option(
        "--log-level",
        "serve gateway scheduler worker",
        "least level that is logged",
        default="info",
        choices=("debug", "info", "warning", "error"),
    ),
    Option(
        "--log-format",
        "serve gateway scheduler worker",
        "text for people, json for programs: an object a line (the line about each request is one in any case)",
        default="text",
        choices=("text", "json"),
    ),
    # tools of an operator
    Option("--interval", "top", "how long between two looks", seconds, 1.0, "SECONDS"),
    Option("--requests", "top", "show so many of each model's oldest requests", whole, 0, scope="TOP_"),
    Option("--once", "top", "one look", boolean, False),
    Option("--limit", "requests", "most requests that ls shows", count, 100),
    Option(
        "--address", "ray", "the Ray cluster, as HOST:PORT of its head; auto: the one of this machine", default="auto"
    ),
    Option("--json", "top doctor requests dead shards ray", "a JSON object a line", boolean, False),
    Option("--tenant", "requests", "only this tenant's (default: of all)", scope="REQUESTS_"),
    # submit: jobs from the command line
    Option(
        "--model",
        "submit top requests dead shards",
        "served name of the model (default: the only one that is served)",
        scope="SUBMIT_",
    ),
    Option("--prompt", "submit", "text to be continued; - reads it from standard input", metavar="TEXT"),
    Option("--chat", "submit", "take the prompt as a user's message of a chat", boolean, False),
    Option("--follow", "submit", "print the text as it is generated", boolean, False),
    Option("--max-tokens", "submit", "most tokens to generate", count, scope="SUBMIT_"),
    Option("--temperature", "submit", "0 always takes the likeliest token", number, scope="SUBMIT_"),
    Option("--seed", "submit", "repeats the same sampling", whole, scope="SUBMIT_"),
    Option("--file", "submit", "JSON lines, a job each: a prompt or messages, sampling, id, ...", metavar="JSONL"),
    Option("--out", "submit", "where the results of --file go, a JSON line each", metavar="JSONL"),
    Option("--wait", "submit", "send jobs to a model that nobody serves now, and wait for it", boolean, False),
    Option("--window", "submit", "most jobs of --file that are under way at once", count, 64),
    Option("--tenant", "submit", "whose share of the service this takes", default="default"),
    Option(
        "--priority",
        "submit",
        "class in the queue",
        default="standard",
        choices=("interactive", "standard", "batch"),
    ),
    # bench: load on a server
    Option("--url", "bench", "any OpenAI-compatible server", default="http://127.0.0.1:8000", scope="BENCH_"),
    Option("--api-key", "bench", "sent as a bearer token", metavar="KEY", scope="BENCH_"),
    Option("--model", "bench", "name of the model there (default: the first that it lists)", scope="BENCH_"),
    Option("--requests", "bench", "how many requests", count, 64, scope="BENCH_"),
    Option(
        "--concurrency", "bench", "closed loop: so many users, each with one request at a time", count, scope="BENCH_"
    ),
    Option("--rate", "bench", "open loop: Poisson arrivals, requests per second", rate, scope="BENCH_"),
    Option("--prompt-len", "bench", "tokens of a prompt", span, (32, 256), "N|LO:HI", shown="32:256", scope="BENCH_"),
    Option("--output-len", "bench", "tokens asked for", span, (16, 256), "N|LO:HI", shown="16:256", scope="BENCH_"),
    Option("--shared-prefix", "bench", "tokens that all prompts of a group begin with", whole, 0, scope="BENCH_"),
    Option("--prefix-groups", "bench", "groups of prompts with a prefix in common", count, 1, scope="BENCH_"),
    Option(
        "--ignore-eos",
        "bench",
        "generate all tokens asked for (not every server knows it)",
        boolean,
        False,
        scope="BENCH_",
    ),
    Option("--temperature", "bench", "sampling temperature", number, 0.0, scope="BENCH_"),
    Option("--api", "bench", "which endpoint", default="completions", choices=("completions", "chat"), scope="BENCH_"),
    Option(
        "--prompt",
        "bench",
        "send token ids or text (chat: always text)",
        default="ids",
        choices=("ids", "text"),
        scope="BENCH_",
    ),
    Option(
        "--tokenizer",
        "bench",
        "tokenizer.json, or its directory: text prompts of exact length",
        metavar="PATH",
        scope="BENCH_",
    ),
    Option(
        "--vocab-size",
        "bench",
        "draw ids below this (default: what the server tells, else 1000)",
        count,
        scope="BENCH_",
    ),
    Option(
        "--body", "bench", "JSON object merged into every request", json_object, {}, "JSON", shown="{}", scope="BENCH_"
    ),
    Option("--seed", "bench", "everything random comes from it", whole, 0, scope="BENCH_"),
    Option("--warmup", "bench", "requests that are sent before, and not measured", whole, 2, scope="BENCH_"),
    Option("--timeout", "bench", "for one request", seconds, 1800.0, "SECONDS", scope="BENCH_"),
    Option("--json", "bench", "write the report to this file too", metavar="FILE", scope="BENCH_"),
)


def options_of(command: str) -> list[Option]:
    return [o for o in OPTIONS if o.on(command)]


def markdown() -> str:
    """The table of the README: the options of ``serve``, then those that only other commands take."""
    lines = ["| option | commands | meaning |", "|---|---|---|"]
    for option in sorted(OPTIONS, key=lambda o: not o.on("serve")):
        if option.on("bench"):
            continue
        meaning = option.described.replace("|", "\\|")
        lines.append(f"| `{option.flag}` | {', '.join(option.commands.split())} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
