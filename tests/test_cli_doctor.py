import io
import json
import re
from dataclasses import replace

import pytest
import torch
from family_tokenizers import checkpoint
from machines import LATER, QUIET
from rich.console import Console
from test_cli import run, says
from test_roofline import MADE_UP, peak

from bert_evaluation import conditions, doctor, kernels, pace, roofline
from bert_evaluation.capabilities import Fact, facts, instructions, libraries, own_kernels
from bert_evaluation.doctor import Examination, Gpu, Reading, findings, read
from bert_evaluation.pace import Pace
from bert_evaluation.report.examination import conclusion, lines, published, tables
from bert_evaluation.report.writing import rate
from bert_evaluation.roofline import Reached
from bert_evaluation.stats import Interval
from bert_evaluation.store import Store

CPU = torch.device("cpu")
TOLD = Reading(
    QUIET,
    LATER,
    cores=4,
    quota=float("inf"),
    turbo=False,
    temperature_high_c=90.0,
    virtual=False,
    swap_used=0,
    paged=0,
    allocator="jemalloc",
    pace=Pace(1.04, 1.1),
)


def judged(reading):
    return {finding.what: finding for finding in findings(reading)}


def test_nothing_disturbs_a_quiet_machine():
    assert {finding.verdict for finding in findings(TOLD)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "what", "part"),
    [
        ({"before": replace(QUIET, load=1.5)}, "Load", "1.5 threads ran or waited in the last minute, for 4 CPUs"),
        ({"after": replace(LATER, busy=1050.0)}, "Other processes", "25% of the CPUs"),
        ({"busiest": (("chrome", 0.8),)}, "Other processes", "(chrome 80% of one)"),
        ({"after": replace(LATER, threads=8), "cores": 8}, "Threads", "8 for 4 usable CPUs"),
        ({"quota": 1.5, "cores": 4}, "Threads", "4 for 4 usable CPUs, a quota of 1.5"),
        ({"cores": 2}, "Shared cores (SMT)", "4 CPUs on 2 cores"),
        ({"after": replace(LATER, governor="powersave")}, "Clock governor", "powersave"),
        ({"turbo": True}, "Turbo", "on"),
        ({"after": replace(LATER, temperature_c=91.0)}, "Temperature", "91 °C, high from 90 on"),
        (
            {"after": replace(LATER, steal=5.0), "virtual": True},
            "Time taken by the host",
            "5.0% of the CPUs' time, virt",
        ),
        ({"after": replace(LATER, held_back=2.5), "quota": 4.0}, "CPU quota", "held this process back for 0.50 s"),
        ({"swap_used": 3 << 30, "paged": 5 << 20}, "Swap", "3.0 GiB used, 5 MiB moved while looking"),
        ({"pace": Pace(1.9)}, "Pace", "the same work took 1.90 times as long at times"),
        ({"pace": Pace(1.1, 1.8)}, "Pace", "at times, and 1.80 times as long on several CPUs at once"),
    ],
)
def test_each_disturbance_is_found_alone_with_advice(changes, what, part):
    found = judged(replace(TOLD, **changes))
    assert [each.what for each in found.values() if each.verdict == "disturbs"] == [what]
    assert part in found[what].found
    assert found[what].advice.endswith(".")


def test_the_advice_fits_the_quota():
    assert "OMP_NUM_THREADS=1:" in judged(replace(TOLD, quota=1.5))["Threads"].advice
    assert "OMP_NUM_THREADS=2:" in judged(replace(TOLD, cores=2))["Shared cores (SMT)"].advice


def test_what_the_system_does_not_tell_is_unknown():
    optional = ("steal", "held_back", "load", "clock_ghz", "temperature_c", "throttles", "governor", "energy_j")
    before, after = (replace(each, **dict.fromkeys(optional)) for each in (QUIET, LATER))
    found = judged(Reading(before, after))
    known = ("Other processes", "Threads")
    assert {what: each.verdict for what, each in found.items()} == {
        what: "ok" if what in known else "unknown" for what in found
    }
    assert {each.found for what, each in found.items() if what not in known} == {None}


def test_a_temperature_without_a_limit_is_not_judged():
    found = judged(replace(TOLD, temperature_high_c=None))["Temperature"]
    assert (found.verdict, "50 °C" in found.found) == ("unknown", True)


GPU = replace(
    TOLD,
    before=replace(QUIET, device_clock_mhz=1980, device_temperature_c=40, device_power_w=71),
    after=replace(LATER, device_clock_mhz=1980, device_temperature_c=41, device_power_w=120),
    gpu=Gpu(busy=0, taken=600 << 20),
)


def test_nothing_disturbs_a_quiet_gpu():
    found = judged(GPU)
    assert list(found) == [*judged(TOLD), "GPU", "Others on the GPU"]
    assert {finding.verdict for finding in found.values()} == {"ok"}
    assert found["GPU"].found == "1980 MHz, 41 °C, 120 W at work"
    assert found["Others on the GPU"].found == "busy 0 % of the time, 600 MiB taken beside this process's tensors"


@pytest.mark.parametrize(
    ("changes", "what", "part"),
    [
        ({"after": replace(GPU.after, device_temperature_c=85)}, "GPU", "85 °C"),
        ({"after": replace(GPU.after, device_clock_mhz=1700)}, "GPU", "1700 MHz"),
        ({"gpu": Gpu(30, 600 << 20)}, "Others on the GPU", "busy 30 % of the time"),
        ({"gpu": Gpu(0, 3 << 30)}, "Others on the GPU", "3.0 GiB taken"),
        ({"gpu": Gpu(None, 3 << 30)}, "Others on the GPU", "busy or not is not told, 3.0 GiB taken"),
    ],
)
def test_what_disturbs_a_gpu_is_found_alone_with_advice(changes, what, part):
    found = judged(replace(GPU, **changes))
    assert [each.what for each in found.values() if each.verdict == "disturbs"] == [what]
    assert part in found[what].found
    assert found[what].advice.endswith(".")


def test_without_the_drivers_library_a_gpu_is_unknown_and_the_advice_says_so():
    found = judged(replace(TOLD, gpu=Gpu(None, 600 << 20)))
    assert (found["GPU"].found, found["GPU"].verdict) == (None, "unknown")
    assert "nvidia-ml-py" in found["GPU"].advice
    assert found["Others on the GPU"].verdict == "unknown"


def test_looking_at_a_gpu(monkeypatch):
    """Its load is read while this process gives it none: before the second snapshot, which does."""
    told = []
    monkeypatch.setattr(conditions, "occupy", lambda device: told.append("occupied"))
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: told.append("utilization") or 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 << 30)
    for name in ("clock_rate", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 50)
    found = read(torch.device("cuda"), look=0.05)
    assert told == ["occupied", "utilization", "occupied"]
    assert found.gpu == Gpu(7, 4 << 30)
    assert found.after.device_clock_mhz == 50


def test_looking_at_this_machine(tmp_path):
    found = read(CPU, look=0.05)
    assert len({finding.what for finding in findings(found)}) == len(doctor.JUDGES)
    nothing = judged(read(CPU, root=tmp_path, look=0.05))
    assert nothing["Clock governor"].found is nothing["Turbo"].found is nothing["CPU quota"].found is None


def test_what_a_processor_can_do():
    assert instructions({"avx2": True, "fma3": True, "avx512_f": False, "avx512_vnni": False, "avx_vnni": True}) == (
        "AVX2, FMA, VNNI; not AVX-512"
    )
    assert instructions({"neon": True, "bf16": True, "i8mm": False}) == "BF16, NEON; not I8MM"
    assert instructions({}) is None


def test_kernels_of_our_own(monkeypatch):
    def told(**reasons):
        monkeypatch.setattr(kernels, "why_not", lambda kind, _: reasons.get(str(kind).removeprefix("torch.")))
        return own_kernels(CPU)

    assert told() == "fp32, bf16, int8"
    assert told(float32="No AMX.") == "bf16, int8; not fp32: No AMX"
    assert told(float32="No AMX.", int8="No VNNI.") == "bf16; not fp32: No AMX; not int8: No VNNI"
    assert told(float32="No g++.", bfloat16="No g++.", int8="No g++.") == "none: No g++"
    assert told(float32="No AMX.", bfloat16="No.", int8="No.") == "none; not fp32: No AMX; not bf16, int8: No"


def test_libraries_as_torch_was_built():
    built = "PyTorch built with:\n  - Build settings: BLAS_INFO=open, USE_MKLDNN=OFF, USE_OPENMP=ON, "
    assert libraries(built) == "BLAS open, no oneDNN, OpenMP"
    assert libraries("") == "BLAS not told by this system, no oneDNN, no OpenMP"


def test_facts_of_a_system_that_tells_little(tmp_path):
    found = {fact.what: fact.found for fact in facts(CPU, tmp_path)}
    assert found["CPU quota"] is found["Memory limit"] is found["Last cache"] is None
    assert found["torch"].startswith(torch.__version__)
    assert found["Kernels"] == own_kernels(CPU)


EXAMINATION = Examination(
    {"processor": "Made-up 9000"},
    (Fact("Processor", "Made-up 9000"), Fact("CPU quota", None)),
    findings(replace(TOLD, busiest=(("a[red]b", 0.8),), turbo=None, allocator="glibc")),
    replace(MADE_UP, measured="2026-01-02T03:04:05+00:00", remarks=("Other processes used 38% of the cores.",)),
    "built-in",
    (Reached(8, 384, Interval(700, 690, 720), 76_100_000_000, 0.87),),
)


def test_plain_lines():
    text = "\n".join(lines(EXAMINATION))
    assert "Processor: Made-up 9000" in text
    assert "CPU quota: not told by this system" in text
    assert "int8: 9.0 GFLOP/s (9.0 to 9.0), linear, 1×1 by 1×1; UNSAFE: 49% off at the largest values" in text
    assert "8 texts of 384 tokens: 700 ms (690 to 720), 76.1 GFLOP, 87%" in text
    assert "disturbs: Other processes: 0% of the CPUs (a[red]b 80% of one). End or pause them while timing." in text
    assert "ok: Threads: 4 for 4 usable CPUs\n" in text
    assert "unknown: Turbo: not told by this system. " in text
    assert "these are no peaks: measure them anew with --fresh" in text
    assert text.endswith("1 thing disturbs measurements: Other processes; of 2 things it is not known.")
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Interval(87.04, 86, 88), "87.0 GFLOP/s (86.0 to 88.0)"),
        (Interval(10_000, 9990, 10_010), "10000.0 GFLOP/s (9990.0 to 10010.0)"),
        (Interval(364_181.5, 363_000, 366_049), "364.2 TFLOP/s (363.0 to 366.0)"),
        (Interval(1_511_000, 1_500_000, 1_520_000), "1511.0 TFLOP/s (1500.0 to 1520.0)"),
    ],
)
def test_a_rate_is_told_in_a_unit_that_can_be_read(found, text):
    assert rate(found, "FLOP/s") == text


def test_threads_are_told_of_a_cpu_only():
    of_cpu, of_gpu = (
        "\n".join(lines(replace(EXAMINATION, roofline=replace(MADE_UP, device=device)))) for device in ("cpu", "cuda")
    )
    assert "What it reaches on cpu with 2 threads, measured" in of_cpu
    assert "What it reaches on cuda, measured" in of_gpu


def test_of_a_quiet_machine_nothing_is_said():
    quiet = replace(EXAMINATION, findings=findings(TOLD), roofline=MADE_UP, reached=())
    assert conclusion(quiet) == "Nothing was seen that disturbs measurements."
    text = "\n".join(lines(quiet))
    assert "--fresh" not in text
    assert "share" not in text


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("colour", ["standard", None])
def test_a_terminal_shows_all_of_it_within_80_columns(colour, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=colour, highlight=False)
    console.print(*tables(EXAMINATION), sep="\n")
    shown = console.file.getvalue()
    text = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert max(map(len, text.splitlines())) <= 80
    assert ("\x1b[" in shown) == (colour is not None)
    flat = " ".join(text.split())
    for line in lines(EXAMINATION):
        assert all(word.rstrip(".,:;") in flat for word in line.split() if word != "disturbs:")


def test_published():
    content = json.loads(json.dumps(published(EXAMINATION), allow_nan=False))
    assert content["schema"] == 1
    assert [each["safe"] for each in content["roofline"]["peaks"]] == [True, True, False]
    assert content["facts"][1] == {"what": "CPU quota", "found": None}
    assert {each["verdict"] for each in content["findings"]} == {"ok", "disturbs", "unknown"}


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device: MADE_UP)
    file, store = tmp_path / "doctor.json", tmp_path / "results.sqlite"
    result = run("doctor", "--json", file, "--store", store, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "fp32: 100.0 GFLOP/s" in result.stdout
    assert "\x1b" not in result.stdout
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert (content["model"], content["reached"]) == (None, [])
    monkeypatch.setattr(roofline, "measure", None)  # it is kept
    assert "fp32: 100.0 GFLOP/s" in run("doctor", "--store", store, "--device", "cpu").stdout


def test_each_row_is_held_against_the_peak_of_its_precision(tmp_path, monkeypatch):
    peaks = (peak("fp32", 100), peak("bf16", 10))
    monkeypatch.setattr(roofline, "measure", lambda device: replace(MADE_UP, peaks=peaks))
    file, store = tmp_path / "result.json", tmp_path / "results.sqlite"
    with Store(store) as results:
        roofline.known(results, CPU)
    recipes = ("CastToBFloat16(anyway=True)", "QuantizeLinears(anyway=True)")
    options = [option for recipe in recipes for option in ("--recipe", recipe)]
    options += [
        "--model",
        checkpoint("bert", tmp_path / "model"),
        "--rounds",
        "2",
        "--json",
        file,
        "--store",
        store,
        "--device",
        "cpu",
    ]
    result = run("--infer", "--transform", *options)
    assert result.returncode == 0, result.stderr
    base, bfloat16, int8 = json.loads(file.read_text())["rows"]
    assert (base["precision"], bfloat16["precision"], int8["precision"]) == ("fp32", "bf16", "int8")
    work = [row["share_of_peak"] * row["latency_ms"]["median"] for row in (base, bfloat16)]
    assert 10 * work[0] == pytest.approx(work[1])  # the same operations, of a tenth of the peak
    assert int8["share_of_peak"] is None
    assert re.search(r"^Base: \d+% of what the machine reaches in fp32$", result.stdout, re.MULTILINE)
    assert re.search(r"16\S*: \d+% of what the machine reaches in bf16$", result.stdout, re.MULTILINE)
    assert "reaches in int8" not in result.stdout


def test_bad_input(tmp_path):
    says(run("doctor", "--json", tmp_path / "absent" / "file.json"), 1, "There is no folder")
    says(run("doctor", "--device", "cda"), 2, "did you mean cuda")
    says(run("doctor", "--model", tmp_path / "absent"), 1, "There is no checkpoint folder")


def test_pace_on_several_threads_is_measured_where_there_are_several():
    alone, both = pace.measured(0, 1), pace.measured(0, 2)
    assert alone.at_once is None
    assert min(alone.at_times, both.at_times) >= 1
    assert both.at_once > 0
