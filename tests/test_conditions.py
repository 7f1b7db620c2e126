import math
import time
from dataclasses import asdict, replace

import pytest
import torch
from machines import LAPTOP, LATER, QUIET, V1, V2, tree

from bert_evaluation import conditions, linux
from bert_evaluation.conditions import published, remarks, snapshot
from bert_evaluation.device import occupy
from bert_evaluation.outcome import Experiment, Outcome, as_json, dump, load
from bert_evaluation.store import Entry

CPU = torch.device("cpu")


def test_control_groups_of_version_2(tmp_path):
    root = tree(tmp_path, V2)
    assert linux.cpu_quota(root) == 1.5
    assert linux.memory_limit(root) == 2 << 30  # the limit of the group around it
    assert linux.held_back(root) == 2.5


def test_control_groups_of_version_1_in_a_container(tmp_path):
    root = tree(tmp_path, V1)
    assert linux.cpu_quota(root) == 0.5
    assert linux.memory_limit(root) == math.inf
    assert linux.held_back(root) == 1.5


def test_a_group_without_a_quota_has_none(tmp_path):
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cgroup.procs": "1\n"})
    assert linux.cpu_quota(root) == linux.memory_limit(root) == math.inf
    assert linux.held_back(root) is None
    v2 = tree(tmp_path / "v2", V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "max 100000\n"})
    v1 = tree(tmp_path / "v1", V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert linux.cpu_quota(v2) == linux.cpu_quota(v1) == math.inf


def test_a_group_cannot_lead_out_of_its_hierarchy(tmp_path):
    root = tree(tmp_path, {"proc/self/cgroup": "0::/../../..\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert linux.cpu_quota(root) == 2


def test_what_a_laptop_tells(tmp_path):
    root, cpus = tree(tmp_path, LAPTOP), range(4)
    assert linux.cpu_flags(root) == {"fpu", "avx2", "fma", "aperfmperf"}
    assert linux.governor(cpus, root) == "powersave"
    assert linux.turbo(root) is True
    assert (linux.cores(cpus, root), linux.cores((0, 1), root)) == (2, 2)
    assert linux.throttles(cpus, root) == 6
    assert linux.energy(root) == 6.0
    assert linux.last_level_cache(root) == 8 << 20
    assert linux.allocator(root) == "tcmalloc"


def test_turbo_by_either_name(tmp_path):
    assert linux.turbo(tree(tmp_path / "a", {"sys/devices/system/cpu/cpufreq/boost": "1\n"})) is True
    assert linux.turbo(tree(tmp_path / "b", {"sys/devices/system/cpu/cpufreq/boost": "0\n"})) is False
    assert linux.turbo(tree(tmp_path / "c", {"sys/devices/system/cpu/intel_pstate/no_turbo": "1\n"})) is False


def test_several_governors_are_all_named(tmp_path):
    files = LAPTOP | {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n"}
    assert linux.governor(range(4), tree(tmp_path, files)) == "performance, powersave"


def test_a_system_that_tells_nothing(tmp_path):
    told = [
        linux.cpu_flags(tmp_path),
        linux.cpu_quota(tmp_path),
        linux.memory_limit(tmp_path),
        linux.held_back(tmp_path),
        linux.governor((0,), tmp_path),
        linux.turbo(tmp_path),
        linux.cores((0,), tmp_path),
        linux.throttles((0,), tmp_path),
        linux.energy(tmp_path),
        linux.last_level_cache(tmp_path),
        linux.allocator(tmp_path),
    ]
    assert told == [None] * len(told)


def test_files_that_hold_something_else_tell_nothing(tmp_path):
    nonsense = {name: "\udcff nonsense\n".encode("utf-8", "surrogateescape") for name in LAPTOP}
    for name, content in nonsense.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert linux.turbo(tmp_path) is linux.energy(tmp_path) is linux.throttles(range(4), tmp_path) is None
    assert linux.cpu_flags(tmp_path) is linux.last_level_cache(tmp_path) is None


def test_a_snapshot_of_this_machine():
    before = snapshot(CPU)
    sum(i * i for i in range(300_000))
    after = snapshot(CPU)
    assert after.seconds > before.seconds
    assert after.busy >= before.busy
    assert after.own >= before.own > 0
    assert after.cpus >= 1
    assert after.threads == torch.get_num_threads()
    assert after.device_clock_mhz is None


def test_a_snapshot_where_the_system_tells_nothing(tmp_path, monkeypatch):
    """macOS and others: psutil lacks the functions, there is no /proc and no /sys."""
    for name in ("sensors_temperatures", "cpu_freq", "getloadavg"):
        monkeypatch.delattr(conditions.psutil, name, raising=False)
    found = snapshot(CPU, tmp_path)
    untold = ("held_back", "load", "clock_ghz", "clock_max_ghz", "temperature_c", "throttles", "governor", "energy_j")
    assert {name: getattr(found, name) for name in untold} == dict.fromkeys(untold)


@pytest.mark.parametrize(("flags", "most", "clock"), [("hypervisor", 0, None), ("aperfmperf", 0, 2.4), ("", 3500, 2.4)])
def test_a_nominal_clock_is_not_taken_for_a_measured_one(tmp_path, monkeypatch, flags, most, clock):
    frequency = type("Frequency", (), {"current": 2400.0, "max": float(most)})
    monkeypatch.setattr(conditions.psutil, "cpu_freq", lambda percpu: [frequency])
    found = snapshot(CPU, tree(tmp_path, {"proc/cpuinfo": f"flags : fpu {flags}\n"}))
    assert (found.clock_ghz, found.clock_max_ghz) == (clock, most / 1000 or None)


def missing(*_):
    raise ModuleNotFoundError("pynvml")


def of_device(monkeypatch, **answers):
    """What a snapshot of a GPU tells whose driver answers so."""
    monkeypatch.setattr(conditions, "occupy", lambda device: None)
    for name in ("clock_rate", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, answers.get(name, missing))
    found = snapshot(torch.device("cuda"))
    return found.device_clock_mhz, found.device_temperature_c, found.device_power_w


def test_what_the_driver_of_a_gpu_tells(monkeypatch):
    answers = {"clock_rate": lambda _: 1980, "temperature": lambda _: 40, "power_draw": lambda _: 71_000}
    assert of_device(monkeypatch, **answers) == (1980, 40, 71)


def test_the_driver_of_a_gpu_may_tell_less_or_nothing(monkeypatch):
    def not_supported(_):
        raise type("NVMLError_NotSupported", (Exception,), {})

    assert of_device(monkeypatch) == (None, None, None)
    assert of_device(monkeypatch, clock_rate=lambda _: 1980, temperature=not_supported) == (1980, None, None)


def test_a_gpu_is_at_work_when_it_is_asked(monkeypatch):
    told = []
    monkeypatch.setattr(conditions, "occupy", lambda device: told.append("at work"))
    for name in ("clock_rate", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: told.append(name))
    snapshot(torch.device("cuda"))
    assert told[0] == "at work"
    assert sorted(told[1:]) == ["clock_rate", "power_draw", "temperature"]
    told.clear()
    snapshot(CPU)
    assert told == []


def test_a_gpu_without_memory_left_is_asked_as_it_is(monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(conditions, "occupy", full)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda _: 345)
    assert snapshot(torch.device("cuda")).device_clock_mhz == 345


def test_occupying_a_device_lasts_as_long_as_it_is_asked_for():
    start = time.perf_counter()
    occupy(CPU, 0.05)
    assert time.perf_counter() - start >= 0.05


def test_of_a_quiet_session_there_is_nothing_to_say():
    assert remarks(QUIET, LATER) == []


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"clock_ghz": 2.9}, "The processor's clock fell from 3.4 to 2.9 GHz while timing."),
        ({"throttles": 9}, "The processor was too hot and throttled itself while timing (2 times)."),
        ({"busy": 1055.2}, "Other processes used 38% of the cores while timing."),
        ({"steal": 5.0}, "The host gave 5% of the cores' time to other virtual machines while timing."),
        ({"held_back": 3.2}, "The container's CPU quota held it back for 1.2 s while timing."),
    ],
)
def test_what_disturbed_is_told(changes, remark):
    assert remarks(QUIET, replace(LATER, **changes)) == [remark]


def test_a_device_that_slowed_down_is_told():
    before, after = replace(QUIET, device_clock_mhz=1980), replace(LATER, device_clock_mhz=1500)
    assert remarks(before, after) == ["The device's clock fell from 1980 to 1500 MHz while timing."]
    assert remarks(after, before) == remarks(before, replace(before, seconds=110.0, device_clock_mhz=1950)) == []


def test_a_hot_device_is_told():
    before, after = (replace(each, device_temperature_c=hot) for each, hot in ((QUIET, 40), (LATER, 87)))
    assert remarks(before, after) == ["The device is 87 °C hot after timing: it may lower its clock."]
    assert remarks(after, replace(LATER, seconds=120.0, device_temperature_c=84)) == []


@pytest.mark.parametrize("changes", [{"clock_ghz": 3.5}, {"clock_ghz": 3.38}, {"busy": 1041.0}, {"steal": 3.1}])
def test_what_is_small_or_better_is_not_told(changes):
    assert remarks(QUIET, replace(LATER, **changes)) == []


def test_what_is_not_told_is_none_and_no_remark():
    optional = [
        name for name, value in asdict(QUIET).items() if name not in ("seconds", "cpus", "threads", "busy", "own")
    ]
    before, after = (replace(each, **dict.fromkeys(optional)) for each in (QUIET, LATER))
    assert remarks(before, after) == []
    content = published(before, after)
    assert content["steal_share"] is content["power_w"] is content["clock_ghz_after"] is content["throttles"] is None
    assert (content["seconds"], content["own_share"], content["others_share"]) == (10, 1, 0)


def test_published_values():
    content = published(QUIET, LATER)
    assert content["power_w"] == 50
    assert (content["clock_ghz_before"], content["clock_ghz_after"], content["governor"]) == (3.4, 3.4, "performance")
    assert published(QUIET, replace(LATER, energy_j=10.0))["power_w"] is None  # the counter started again
    assert all(value is None or isinstance(value, (int, float, str)) for value in content.values())


def test_the_device_is_published_before_and_after():
    told = {"device_clock_mhz": 1980, "device_temperature_c": 40, "device_power_w": 71.5}
    content = published(replace(QUIET, **told), replace(LATER, **told | {"device_temperature_c": 61}))
    assert (content["device_temperature_c_before"], content["device_temperature_c_after"]) == (40, 61)
    assert (content["device_clock_mhz_after"], content["device_power_w_before"]) == (1980, 71.5)


def test_conditions_are_stored_with_the_outcome_and_old_outcomes_have_none():
    outcome = Outcome(3, Experiment(), {}, 1, "", None, None, (), conditions=published(QUIET, LATER))
    entry = Entry(3, "", None, "finished", "", dump(outcome)[0], ())
    assert load(entry) == outcome
    assert as_json(load(entry))["conditions"]["power_w"] == 50
    older = entry.outcome.replace(', "conditions": ' + dump(outcome)[0].partition('"conditions": ')[2], "}")
    assert "conditions" not in older
    assert load(replace(entry, outcome=older)).conditions == {}
