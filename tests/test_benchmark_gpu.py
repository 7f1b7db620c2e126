"""The benchmark of a GPU, tried out on a CPU, little of everything."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_rows
import numpy as np
import pytest
import torch
from families import tiny
from family_tokenizers import tokenizer
from gpu_ahead import Ahead, Wanted
from gpu_parts import Settings, wanted
from gpu_profile import ATTENTION, ELEMENTWISE, MATRICES, QUANTISATION, REST, Profile, kind
from gpu_rows import LARGE, SMALL, Rows, Subject, bert, single
from gpu_work import DECILES, by_length, by_tokens, in_order, peaks, random_windows, useful_flops, work
from transformers import BertConfig

from bert_evaluation import capture
from bert_evaluation.errors import UsageError
from bert_evaluation.roofline import flops

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


def run(*arguments):
    command = [sys.executable, str(PROGRAM), "--quick", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def small():
    lines = []
    return Subject("small", bert(SMALL, CPU), lines.append), lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("checkpoint"), tokenizer("bert")
    tiny("bert", vocab_size=len(words), num_hidden_layers=1).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_all_parts_end_to_end(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)  # which would take minutes
    monkeypatch.setattr(gpu_rows, "LOOP", 4)
    monkeypatch.setattr(gpu_rows, "SORTED", (4,))
    monkeypatch.setitem(gpu.QUICK, "windows", 12)
    file = tmp_path / "gpu.json"
    gpu.main(device="cpu", quick=True, checkpoint=str(checkpoint), json_file=file)
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found["parts"]) == set("ABCDEG"), found["left_out"]
    throughput = {row["name"]: row for row in found["parts"]["A"]["rows"]}
    assert {"eager fp32", "eager bf16", "eager bf16, sorted", "ours bf16"} <= throughput.keys()
    assert throughput["eager bf16, sorted"]["padding"] <= throughput["eager bf16"]["padding"]
    assert throughput["eager bf16"]["to_base"]["estimate"] == 1
    for row in throughput.values():
        assert row["error"] < 0.1
        assert row["of_bf16"]["low"] <= row["of_bf16"]["estimate"] <= row["of_bf16"]["high"]
    against_compile = {row["name"] for row in found["parts"]["G"]["rows"]}
    assert {"eager bf16", "torch.compile", "torch.compile, sorted", "ours bf16"} <= against_compile
    assert "eager fp32" not in against_compile
    for latency in found["parts"]["B"].values():
        assert len(latency["seconds"]["torch.compile, reduce-overhead"]) == 3
    assert found["parts"]["C"]["eager fp32"]["changed"] == 0
    assert found["parts"]["D"]["ours bf16"]["verdict"] == "kept"
    assert sum(found["parts"]["E"]["ours bf16"]["shares"].values()) == pytest.approx(1)
    for title in ("Throughput", "Latency", "Quality", "Promises", "Kernels", "Clock"):
        assert f"### {title}" in printed


@pytest.mark.slow
def test_with_the_compiler(tmp_path, checkpoint):
    done = run("--parts", "B,E", "--checkpoint", checkpoint, "--json", tmp_path / "gpu.json", "--minutes", 15)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["parts"]) == set("BE"), found["left_out"]
    assert "ours bf16" in found["parts"]["E"]


def test_what_is_wanted_is_made_beside_the_run(checkpoint):
    model = str(checkpoint)
    ahead = Ahead(CPU, [Wanted(model, recipe, 8) for recipe in ("RemoveDropout", "Nonsense", "MergeLinears")])
    assert ahead.wait(model, "RemoveDropout")
    assert not ahead.wait(model, "Nonsense")
    assert not ahead.wait(model, "RemoveDropout")  # that is over
    ahead.end()
    ahead.wait_for_all()


def test_each_part_names_what_it_compiles():
    settings = Settings(CPU, "large", {}, "trained")
    found = list(wanted("ABCDEG", settings))
    assert len(set(found)) == len(found)
    assert {each.model for each in found} == {"large", "trained"}
    assert {each.recipe for each in found} == {each.recipe for each in wanted("AB", settings)}
    assert not list(wanted("F", settings))


def test_what_is_not_done_in_time_is_named(tmp_path):
    file = tmp_path / "gpu.json"
    done = run("--parts", "A,E", "--minutes", 0.02, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "- part A: not done within 1 s" in done.stdout
    assert "part A" in json.loads(file.read_text())["left_out"]


def test_a_part_that_there_is_not_is_refused():
    with pytest.raises(SystemExit, match="There is no part 'X'"):
        gpu.main(parts="A,X", device="cpu")


def test_useful_operations_are_those_that_torch_counts_without_padding(small):
    model, length = small[0].model, 48
    head = 2 * 2 * SMALL["hidden_size"] * length
    assert flops(capture(model), single(small[0], length)) == useful_flops(model.config, length) + head


def test_useful_operations_of_bert_large():
    assert useful_flops(BertConfig(**LARGE), 200) == 24 * 200 * (2 * 12 * 1024**2 + 4 * 200 * 1024)


def test_random_windows_are_as_long_as_squads_and_have_its_padding():
    cut = random_windows(4096, 99)
    lengths = np.array([len(window) for window in cut])
    assert np.allclose(np.quantile(lengths, np.linspace(0, 1, 11)), DECILES, atol=15)
    assert max(int(window.ids.max()) for window in cut) < 99
    assert 0.22 < work("", in_order(cut, 32), bert(SMALL, CPU).config, (), CPU).padding < 0.34  # 28 % in the file


def test_batches_hold_every_window_once():
    cut = random_windows(300, 99)
    for groups in (in_order(cut, 32), by_length(cut, 32), by_tokens(cut, 5000)):
        assert sorted(window.example for group in groups for window in group) == list(range(300))
    sizes = [sum(map(len, group)) for group in by_tokens(cut, 5000)]
    assert max(sizes) <= 5000
    assert min(sizes[:-1]) > 5000 - max(DECILES)
    assert [len(group) for group in by_tokens(cut, 1)] == [1] * 300  # a window that is longer is alone


def test_work_counts_tokens_and_positions():
    cut = [window for window in random_windows(400, 99) if len(window) in (62, 384)] or random_windows(20, 99)
    config = bert(SMALL, CPU).config
    found = work("two", [cut[:10], cut[10:]], config, ("input_ids", "attention_mask"), CPU)
    assert found.tokens == sum(int(inputs["attention_mask"].sum()) for inputs in found.inputs)
    assert found.positions == sum(inputs["input_ids"].numel() for inputs in found.inputs)
    assert found.flops == sum(useful_flops(config, len(window)) for window in cut)


def test_peaks_count_the_operations_of_their_products():
    found = {each.precision: each for each in peaks(CPU, 64)}
    assert {"fp32", "bf16"} <= found.keys()
    assert all(each.flops == 2 * 64**3 and each.run().shape == (64, 64) for each in found.values())


def test_outputs_that_are_wrong_are_refused(small):
    subject, inputs = small[0], single(small[0], 16)
    inputs["attention_mask"][:, 10:] = 0
    assert subject.error(subject.model, "fp32", inputs) == 0
    assert 0 < subject.error(subject.bf16, "bf16", inputs) < 0.1

    def nothing(**given):
        return {name: torch.full_like(each, torch.nan) for name, each in subject.model(**given).items()}

    def blind(**given):
        return subject.model(**given | {"attention_mask": torch.ones_like(given["attention_mask"])})

    for wrong in (nothing, blind, bert(SMALL | {"num_attention_heads": 4}, CPU)):
        with pytest.raises(ValueError, match="wrong"):
            subject.error(wrong, "bf16", inputs)


def test_a_row_that_fails_is_named_and_the_others_are_ready(small):
    subject, lines = small
    rows = Rows(subject, random_windows(4, 99), 512)

    def unreadable():
        raise UsageError("There is no transformation 'Nonsense'.")

    rows.add("ours broken", "bf16", unreadable, in_order(rows.cut, 2), "2")
    rows.add("eager fp32", "fp32", lambda: subject.model, in_order(rows.cut, 2), "2")
    assert rows.left_out == {"ours broken": "There is no transformation 'Nonsense'."}
    assert list(rows.ready) == ["eager fp32"]
    assert "ours broken is left out: There is no transformation 'Nonsense'." in lines


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", MATRICES),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256>", MATRICES),
        ("triton_tem_fused_addmm_gelu_12", MATRICES),
        ("triton_poi_fused_addmm_gelu_view_5", ELEMENTWISE),
        ("triton_per_fused__to_copy_abs_amax_clamp_native_layer_norm_3", QUANTISATION),
        ("triton_per_fused_add_native_layer_norm_3", ELEMENTWISE),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::...)", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", ATTENTION),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", ELEMENTWISE),
        ("Memcpy DtoH (Device -> Pinned)", REST),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, expected):
    assert kind(kernel) == expected


def test_a_profile_adds_up():
    found = Profile(wall=1.0, kernels={"nvjet_a": (0.5, 10), "flash_b": (0.2, 5), "Memset": (0.05, 1)})
    assert found.busy == pytest.approx(0.75)
    assert found.idle == pytest.approx(0.25)
    assert found.shares == pytest.approx({MATRICES: 2 / 3, ATTENTION: 0.8 / 3, REST: 0.2 / 3})
    assert [name for name, *_ in found.top(2)] == ["nvjet_a", "flash_b"]
