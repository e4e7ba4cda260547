"""Tests of more than 20 s, all their parameters together: `make long` runs them, and CI does before `make test`.

One list, so that what `make test` leaves out is seen at a glance. A hook of tests/conftest.py marks them.
"""

from __future__ import annotations

import pytest

CUDA = "tests/workers/torch_engine/cuda"
LONG = (
    "tests/chaos/test_chaos.py::test_nothing_is_lost_and_nothing_comes_twice",
    "tests/clients/test_clients.py::test_a_client_of_ci",
    "tests/deploy/test_packages.py::test_the_sdist_holds_all_that_the_tree_gives_to_a_wheel",
    "tests/deploy/test_packages.py::test_the_wheel_serves_from_a_clean_environment",
    "tests/e2e/test_bad_rows.py::test_whatever_is_sent_to_an_odd_model_no_process_restarts_and_no_stream_pauses",
    "tests/e2e/test_small_model.py::test_twenty_chats_equal_generate",
    "tests/e2e/test_reasoning.py::test_a_thought_goes_on_where_a_process_died_in_its_middle",
    "tests/e2e/test_tools.py::test_a_call_goes_on_where_a_process_died_in_its_middle",
    "tests/headrace/serve/test_fleet.py::test_models_that_share_a_card_take_turns_and_who_waits_is_told_why",
    "tests/headrace/test_out_of_disk.py::test_out_of_disk",
    "tests/headrace/test_rolling.py::test_a_rolling_restart_fails_no_request",
    "tests/headrace/test_update.py::test_clients_stream_through_an_update",
    "tests/protocol/test_model.py::test_without_one_of_the_checks_it_fails",
    "tests/protocol/test_model.py::test_one_key_is_one_request_and_a_limit_holds_in_whatever_slot",
    "tests/scheduler/prompts/test_real_templates.py::test_messages_forge_nothing_and_ordinary_chats_keep_their_ids",
    "tests/test_gpu_benchmark.py::test_all_parts_run_with_tiny_shapes",
    "tests/test_structure.py::test_a_tokens_way_is_short_and_documented",
    "tests/workers/engines/test_process.py::test_what_the_child_raises_keeps_its_class_and_text",
    "tests/workers/torch_engine/cpu/test_layers.py::test_threads_that_lose_their_cores_change_nothing",
    f"{CUDA}/test_graphs.py::test_every_rule_of_attention_launch_by_launch",
    f"{CUDA}/test_graphs.py::test_experts_are_recorded",
    f"{CUDA}/test_graphs.py::test_launches_of_a_layer_in_a_step_of_decodes",
    f"{CUDA}/test_graphs.py::test_keys_and_values_in_fp8_give_what_the_model_gives_with_them_rounded",
    f"{CUDA}/test_quantized.py::test_an_engine_that_rounds_at_load_gives_the_tokens_of_the_rounded_model",
    f"{CUDA}/test_quantized.py::test_quantized_layers_are_replaced_by_products",
    f"{CUDA}/test_triton_compile.py::test_the_kernels_compile_for_gpus_that_are_not_here",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.partition("[")[0] in LONG:
            item.add_marker("long")


if __name__ == "__main__":  # the files to collect
    print(*sorted({name.partition("::")[0] for name in LONG}))
