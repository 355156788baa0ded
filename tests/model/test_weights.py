"""Loading Qwen2.5-VL from local folders: every layout, nothing but what fits, and no page more than needed."""

import json
import multiprocessing
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from tools.make_random_checkpoint import model_config, write_checkpoint
from vidcls.model.tiny import tiny_backbone
from vidcls.model.weights import (
    fingerprint,
    load_backbone,
    load_config,
    load_language_head,
    load_token_embeddings,
    own_trained_weights,
)

MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "sharded", "tiny", shard_bytes=200_000)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "single", "tiny", shard_bytes=None)


@pytest.fixture
def copy(single, tmp_path) -> Path:
    """A folder to damage."""
    return shutil.copytree(single, tmp_path / "copy")


def assert_same_model(mine, theirs) -> None:
    assert type(mine) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)())
        found = dict(getattr(mine, kind)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def reference(request, tmp_path_factory) -> tuple[str, Qwen2_5_VLModel]:
    """A shape, and its published layout as transformers loads it, which reads no file of the newer layout itself."""
    folder = write_checkpoint(tmp_path_factory.mktemp("reference") / "model", request.param)
    return request.param, Qwen2_5_VLModel.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["old", "new", "base"])
@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_every_layout_loads_as_transformers_loads_it(tmp_path, reference, layout, shard_bytes):
    shape, expected = reference
    folder = write_checkpoint(tmp_path / "model", shape, layout=layout, shard_bytes=shard_bytes)
    loaded = load_backbone(str(folder), dtype=torch.bfloat16)
    assert_same_model(loaded, expected)
    for part in ("text_config", "vision_config"):
        mine, theirs = getattr(loaded.config, part), getattr(expected.config, part)
        assert mine._attn_implementation == theirs._attn_implementation == "sdpa"
        assert mine.dtype == theirs.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    for name, parameter in load_backbone(str(folder), dtype=torch.float32).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name).float())


def test_an_old_config_is_read_as_the_new_one(tmp_path):
    """The text keys of the old file stand at the top level, and its rope has another name."""
    folder = write_checkpoint(tmp_path / "model", "tiny", layout="old")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["hidden_size"] == 128
    assert "text_config" not in stored
    found, expected = load_config(str(folder)), model_config("tiny")
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "layer_types"):
        assert getattr(found.text_config, name) == getattr(expected.text_config, name)
    assert found.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    assert found.text_config.rope_parameters["rope_theta"] == 1e6
    assert found.tie_word_embeddings is True
    assert found.video_token_id == expected.video_token_id


@pytest.mark.real
@pytest.mark.parametrize(("size", "rows", "tied"), [("3b", 151936, True), ("7b", 152064, False)])
def test_the_published_configs(real_data, size, rows, tied):
    found, expected = load_config(str(real_data / f"qwen2_5_vl_{size}")), model_config(size)
    assert found.tie_word_embeddings is tied
    assert found.text_config.vocab_size == rows
    for part, names in {
        "text_config": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"),
        "vision_config": ("hidden_size", "intermediate_size", "depth", "out_hidden_size", "fullatt_block_indexes"),
    }.items():
        for name in names:
            assert getattr(getattr(found, part), name) == getattr(getattr(expected, part), name), name
    rope = found.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"]) == (1e6, [16, 24, 24])


def test_an_attention_kernel_reaches_both_parts(single):
    for name in (str(single), "tiny"):
        model = load_backbone(name, dtype=torch.float32, attn_implementation="eager")
        assert model.language_model.config._attn_implementation == "eager"
        assert model.visual.config._attn_implementation == "eager"


def test_tiny_is_tiny():
    torch.manual_seed(1)
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert_same_model(load_backbone("tiny", dtype=torch.float32), tiny_backbone())
    assert torch.equal(torch.rand(2), drawn)


def test_weights_stay_mapped_and_writing_never_reaches_the_file(single):
    before = (single / "model.safetensors").read_bytes()
    model = load_backbone(str(single), dtype=torch.bfloat16)
    (region,) = [r for r in psutil.Process().memory_maps(grouped=False) if r.path.startswith(str(single))]
    assert region.anonymous == 0  # pages of the process's own
    first, last = (int(end, 16) for end in region.addr.split("-"))
    assert all(first <= parameter.data_ptr() < last for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.data.fill_(7)
    (region,) = [r for r in psutil.Process().memory_maps(grouped=False) if r.path.startswith(str(single))]
    assert region.anonymous > len(before) // 2
    assert (single / "model.safetensors").read_bytes() == before
    again = load_backbone(str(single), dtype=torch.bfloat16)
    assert not any(torch.all(parameter == 7) for parameter in again.parameters())


def test_what_trains_is_taken_out_of_the_mapping(single):
    model = load_backbone(str(single), dtype=torch.bfloat16)
    trained = model.language_model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    values, frozen = trained.detach().clone(), model.visual.merger.ln_q.weight.data_ptr()
    own_trained_weights(model)
    (region,) = [r for r in psutil.Process().memory_maps(grouped=False) if r.path.startswith(str(single))]
    first, last = (int(end, 16) for end in region.addr.split("-"))
    assert not first <= trained.data_ptr() < last
    assert first <= frozen < last
    assert torch.equal(trained, values)
    assert model.visual.merger.ln_q.weight.data_ptr() == frozen


def read_and_wait(folder: str, connection) -> None:
    """Load, touch every page, say so, and stay until told to go."""
    model = load_backbone(folder, dtype=torch.bfloat16)
    connection.send(sum(int(p.data.view(torch.uint8).numpy()[..., ::64].sum()) for p in model.parameters()))
    connection.recv()


def test_two_processes_share_the_pages(tmp_path):
    """Each maps all 27 MB, and between them they hold them once."""
    folder = write_checkpoint(tmp_path / "model", "tiny", shard_bytes=None)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    rows = 100_000
    weights["model.embed_tokens.weight"] = torch.ones(rows, 128, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=read_and_wait, args=(str(folder), theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            assert ours.poll(30)
            ours.recv()
        for process in processes:
            regions = [
                r for r in psutil.Process(process.pid).memory_maps(grouped=False) if r.path.startswith(str(folder))
            ]
            resident, share = sum(r.rss for r in regions), sum(r.pss for r in regions)
            assert resident > rows * 128 * 2
            assert sum(r.anonymous for r in regions) == 0
            assert share == pytest.approx(resident / 2, rel=0.02)
    finally:
        for process, (ours, _) in zip(processes, pipes, strict=True):
            ours.send("go")
            process.join(20)


def test_the_language_head(tmp_path, single):
    folder = write_checkpoint(tmp_path / "untied", "tiny-untied")
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(load_language_head(str(folder), dtype=torch.float32), whole.lm_head.weight)
    assert load_language_head(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not torch.equal(whole.lm_head.weight, whole.get_input_embeddings().weight)
    assert load_language_head("tiny", dtype=torch.float32) is None
    assert load_language_head(str(single), dtype=torch.float32) is None
    base = write_checkpoint(tmp_path / "base", "tiny-untied", layout="base")
    with pytest.raises(ValueError, match=r"tie_word_embeddings is false and lm_head.weight is not stored; lm_loss"):
        load_language_head(str(base), dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 511}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(512, 128\); it must be \(511, 128\)"):
        load_language_head(str(folder), dtype=torch.float32)


def test_rows_of_the_embedding_table(single, sharded):
    for name in ("tiny", str(single), str(sharded)):
        table = load_backbone(name, dtype=torch.float32).language_model.embed_tokens.weight
        rows = load_token_embeddings(name, [5, 0, 511, 5], dtype=torch.float32)
        assert torch.equal(rows, table[[5, 0, 511, 5]])


def test_fingerprints_tell_folders_apart(single, sharded, copy):
    assert fingerprint("tiny") == fingerprint("tiny")
    assert fingerprint(str(single)) == fingerprint(str(copy)) != fingerprint(str(sharded))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert fingerprint(str(single)) != fingerprint(str(copy))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def drop(weights):
    del weights[MLP]


def cut(weights):
    weights[MLP] = weights[MLP][:100].clone()


def double(weights):
    weights[MLP.replace("model.", "model.language_model.")] = weights[MLP].clone()


def add(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = weights[MLP].clone()


def alien(weights):
    weights["score.weight"] = weights[MLP].clone()


def quantize(weights):
    weights[MLP] = weights[MLP].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, r"1 missing \['language_model.layers.1.mlp.up_proj.weight'\], 0 unexpected"),
        (cut, r"model.safetensors: model.layers.1.mlp.up_proj.weight has shape \(100, 128\); it must be \(256, 128\)"),
        (double, r"model.safetensors: model\.\S+ and model\.\S+ are the same parameter; it must be stored once"),
        (add, r"0 missing \[\], 1 unexpected \['model.layers.2.mlp.up_proj.weight'\]"),
        (alien, r"0 missing \[\], 1 unexpected \['score.weight'\]"),
        (quantize, r"up_proj.weight is stored as I8; it must be BF16, F16, F32"),
    ],
)
def test_tensors_that_do_not_fit(copy, change, reason):
    rewrite(copy, change)
    with pytest.raises(ValueError, match=reason):
        load_backbone(str(copy), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "qwen2_vl"}, r"config.json: model_type is 'qwen2_vl'; it must be 'qwen2_5_vl'"),
        ({"model_type": None}, r"config.json: model_type is None"),
        ({"quantization_config": {"bits": 4}}, r"config.json: quantization_config is set; the weights must be plain"),
        ({"hidden_size": "wide"}, r"config.json is no Qwen2.5-VL config: .*hidden_size"),
        ({"num_hidden_layers": 3}, r"12 missing \['language_model.layers.2.input_layernorm.weight'"),
        ({"intermediate_size": 200}, r"proj.weight has shape .*; it must be"),
    ],
)
def test_configs_that_do_not_fit(copy, values, reason):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ValueError, match=reason):
        load_backbone(str(copy), dtype=torch.bfloat16)


def test_folders_that_are_no_model(tmp_path, copy):
    with pytest.raises(ValueError, match=r"model is 'Qwen/Qwen2.5-VL-3B'; it must be 'tiny' or a local folder"):
        load_backbone("Qwen/Qwen2.5-VL-3B", dtype=torch.bfloat16)
    for text in ("{", "[]", "\ufeff{}"):
        (copy / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json"):
            load_config(str(copy))


def test_a_model_that_transformers_has_just_saved(tmp_path):
    """Its configuration must survive too: written by today's transformers, read by us."""
    config: Qwen2_5_VLConfig = model_config("tiny")
    torch.manual_seed(0)
    whole = Qwen2_5_VLForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    for name in ("whole", "base"):
        assert_same_model(load_backbone(str(tmp_path / name), dtype=torch.float32), whole.model.eval())
