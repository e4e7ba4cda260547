"""OpenVINO GenAI's continuous batching, in process: reads requests as JSON lines, answers with the times of tokens.

    python openvino_loop.py EXPORTED_DIRECTORY

Runs in the environment of OpenVINO and imports nothing of ours. A line in: [[token ids, max tokens, arrival], ...];
a line out: [[seconds since the start for every token], ...], in the same order.
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai as genai


def main() -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # lossless, as everyone here
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", precise)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipeline, json.loads(line))), flush=True)


def run(pipeline: "genai.ContinuousBatchingPipeline", requests: list) -> list:
    times: list[list[float]] = [[] for _ in requests]
    todo = sorted(enumerate(requests), key=lambda item: item[1][2])
    open_: dict[int, object] = {}
    began = time.perf_counter()
    while todo or open_:
        now = time.perf_counter() - began
        while todo and todo[0][1][2] <= now:
            k, (ids, count, _) = todo.pop(0)
            config = genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            open_[k] = pipeline.add_request(k, openvino.Tensor(np.array([ids], np.int64)), config)
        if not open_:
            time.sleep(max(0.0, todo[0][1][2] - now))
            continue
        pipeline.step()
        now = time.perf_counter() - began
        for k, handle in list(open_.items()):
            while handle.can_read():
                for output in handle.read().values():
                    times[k] += [now] * len(output.generated_ids)
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del open_[k]
    return times


if __name__ == "__main__":
    main()
