"""What a rank loads: its part of every tensor and no more, together the whole; and what is refused before that."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from protocol.errors import StartError
from tests.models import CONFIGS, build, tiny_model
from tests.workers.torch_engine.parallel.test_parity import config_of
from workers.torch_engine import loader
from workers.torch_engine.parallel import split
from workers.torch_engine.parallel.group import Group
from workers.torch_engine.parallel.layers import cut


class Silent(Group):
    """A rank that loads without the others."""

    def __init__(self, part, parts, stage=0, stages=1):
        self.part, self.parts, self.stage, self.stages = part, parts, stage, stages


def part_of(path, *place):
    config = config_of(path)
    model_config = loader.load_config(str(path))
    return loader.load_model(config, model_config, torch.device("cpu"), lambda *_: None, Silent(*place))


def whole(path):
    config = config_of(path)
    return loader.load_model(config, loader.load_config(str(path)), torch.device("cpu"), lambda *_: None)


def named(model):
    return {name.replace("inner.", ""): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("qwen3_moe", 4), ("gpt_oss", 2), ("gemma3", 4)])
def test_the_parts_of_all_ranks_are_the_whole(tmp_path_factory, name, ranks):
    path = tiny_model(tmp_path_factory, name)
    parts = [named(part_of(path, rank, ranks)) for rank in range(ranks)]
    for key, tensor in named(whole(path)).items():
        shapes = [part[key].shape for part in parts if key in part]
        if key.endswith(("o_proj.bias", "down_proj_bias")):  # of a sum: rank 0's
            assert torch.equal(parts[0][key], tensor)
            assert all(key not in part or not part[key].any() for part in parts[1:])
        elif shapes[0] == tensor.shape:
            assert all(torch.equal(part[key], tensor) for part in parts), key
        elif "gate_up_proj" in key and name == "qwen3_moe":
            halves = [part[key].chunk(2, 1) for part in parts]
            assert torch.equal(torch.cat([torch.cat([h[i] for h in halves], 1) for i in (0, 1)], 1), tensor)
        elif ("k_proj" in key or "v_proj" in key) and ranks > 2:  # two key heads for four ranks: each twice
            assert torch.equal(torch.cat([part[key] for part in parts[::2]]), tensor)
            assert torch.equal(torch.cat([part[key] for part in parts[1::2]]), tensor)
        else:
            (axis,) = [at for at, (a, b) in enumerate(zip(shapes[0], tensor.shape, strict=True)) if a != b]
            assert torch.equal(torch.cat([part[key] for part in parts], axis), tensor), key


def test_a_rank_reads_its_part_of_the_files(tmp_path_factory, monkeypatch):
    path = tiny_model(tmp_path_factory, "qwen3_moe")
    read = 0

    class Counted:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def __getitem__(self, key):
            nonlocal read
            tensor = self.source[key]
            read += tensor.numel()
            return tensor

    monkeypatch.setattr(split, "slices_of", lambda path: ((k, Counted(s)) for k, s in original(path)))
    with safe_open(path / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    part_of(path, 1, 2)
    assert read < 0.52 * total  # norms and routers are everybody's


original = split.slices_of


@pytest.mark.parametrize(("ranks", "fitting"), [(3, "1, 2, 4 would do"), (8, "1, 2, 4 would do")])
def test_sizes_that_do_not_divide_name_those_that_do(tmp_path_factory, ranks, fitting):
    path = tiny_model(tmp_path_factory, "llama")
    with pytest.raises(StartError, match=fitting):
        part_of(path, 0, ranks)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "deepseek_v3"])
def test_what_has_no_known_division_is_refused_by_name(tmp_path_factory, name):
    path = tiny_model(tmp_path_factory, name)
    with pytest.raises(StartError, match="--tensor-parallel-size"):
        part_of(path, 0, 2)
    assert name in CONFIGS


@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_their_layers_and_no_more(tmp_path, tied):
    build({**CONFIGS["llama"], "num_hidden_layers": 5, "tie_word_embeddings": tied}).save_pretrained(tmp_path)
    everything = named(whole(tmp_path))
    seen = set()
    for stage in range(3):
        part = named(part_of(tmp_path, 0, 1, stage, 3))
        assert part.pop("precision").numel() == 0  # tells the dtype of a stage without weights of its own
        assert all(torch.equal(part[key], everything[key]) for key in part)
        layers = {key.split(".")[2] for key in part if ".layers." in key}
        assert len(layers) in (1, 2)
        assert layers.isdisjoint(seen)
        seen |= layers
        assert ("model.embed_tokens.weight" in part) == (stage == 0 or (tied and stage == 2))
        assert ("lm_head.weight" in part) == (stage == 2)
    assert seen == set("01234")
    with pytest.raises(StartError, match="at most 5 would do"):
        part_of(tmp_path, 0, 1, 0, 6)


def test_layers_are_cut_by_cost():
    assert cut([1] * 6, 3) == [(0, 2), (2, 4), (4, 6)]
    assert cut([1, 1, 1, 1, 1, 5], 2) == [(0, 5), (5, 6)]  # the head is in the last
    assert cut([4, 1, 1, 1, 1], 2) == [(0, 1), (1, 5)]


def test_what_a_rank_would_hold_whole_is_refused(tmp_path_factory, monkeypatch):
    """Its sum over the ranks would be a multiple: a width that another field of the config gives."""
    path = tiny_model(tmp_path_factory, "llama")
    monkeypatch.setattr(split, "_WIDTHS", ())
    with pytest.raises(StartError, match="gate_proj"):
        part_of(path, 0, 2)


def test_a_width_is_cut_into_whole_panels_where_it_can_be():
    def widths(width, ranks):
        return [split.Shares(rank, ranks, 8, 8).of_width(width) for rank in range(ranks)]

    assert widths(96, 4) == [(0, 32), (32, 64), (64, 80), (80, 96)]
    assert widths(32, 4) == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert widths(5, 2) == [(0, 3), (3, 5)]
