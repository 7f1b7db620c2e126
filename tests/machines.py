"""Made-up /proc and /sys trees, and conditions of machines that are not this one."""

from dataclasses import replace

from bert_evaluation.conditions import Conditions

V2 = {
    "proc/self/cgroup": "0::/docker/abc\n",
    "sys/fs/cgroup/docker/abc/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/docker/abc/cpu.stat": "usage_usec 9\nthrottled_usec 2500000\n",
    "sys/fs/cgroup/docker/abc/memory.max": "max\n",
    "sys/fs/cgroup/docker/memory.max": "2147483648\n",
}
V1 = {
    # The path is the host's: this container sees its own group at the root of each controller.
    "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n1:pids:/docker/abc\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.stat": "nr_throttled 4\nthrottled_time 1500000000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}
CPU = "sys/devices/system/cpu"
LAPTOP = {
    "proc/cpuinfo": "processor : 0\nflags\t\t: fpu avx2 fma aperfmperf\n\nprocessor : 1\nflags : fpu\n",
    f"{CPU}/intel_pstate/no_turbo": "0\n",
    **{f"{CPU}/cpu{i}/cpufreq/scaling_governor": "powersave\n" for i in range(4)},
    **{f"{CPU}/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}\n" for i in range(4)},
    **{f"{CPU}/cpu{i}/thermal_throttle/core_throttle_count": f"{i}\n" for i in range(4)},
    f"{CPU}/cpu0/cache/index0/size": "32K\n",
    f"{CPU}/cpu0/cache/index3/size": "8192K\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "5000000\n",
    "sys/class/powercap/intel-rapl:1/energy_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "3000000\n",  # a part of the first
    "proc/self/maps": "7f00 r-xp /usr/lib/libc.so.6\n7f01 r-xp /usr/lib/libtcmalloc.so.4\n",
}


def tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


QUIET = Conditions(
    seconds=100.0,
    cpus=4,
    threads=4,
    busy=1000.0,
    own=50.0,
    steal=3.0,
    held_back=2.0,
    load=0.1,
    clock_ghz=3.4,
    clock_max_ghz=3.5,
    temperature_c=50.0,
    throttles=7,
    governor="performance",
    energy_j=1000.0,
)
# Ten seconds later; all four CPUs worked for this process.
LATER = replace(QUIET, seconds=110.0, busy=1040.0, own=90.0, energy_j=1500.0)
