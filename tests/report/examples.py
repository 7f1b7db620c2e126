"""Experiments made up for the tests of what is shown: one of 20 recipes with every part, and a hostile one."""

import random
from dataclasses import replace

from bert_evaluation.evaluation import Work
from bert_evaluation.memory import Memory
from bert_evaluation.outcome import Experiment, Outcome, dump
from bert_evaluation.rows import Cell, Change, Effect, Quality, Row, StepChange
from bert_evaluation.stats import Difference, Interval, Ratio
from bert_evaluation.store import Entry
from bert_evaluation.transformation import Refusal, Report
from bert_evaluation.verification import Verification

STEPS = (
    "LintAndRecompile",
    "MergeLinears",
    "FuseBiasInLinear",
    "ChangeTrueDivToMulByInverse",
    "RemoveDropout",
    "FuseAttention",
    "QuantizeDynamic",
    "ToBFloat16",
    "FuseGelu",
    "PruneHeads",
)
MACHINE = {
    "system": "Linux-6.18-x86_64-with-glibc2.36",
    "processor": "AMD EPYC",
    "cores": 2,
    "threads": 2,
    "device": "cpu",
    "torch": "2.13.0+cpu",
}
ATTACKS = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</style></script><svg onload=document.title='owned'>",
    "\"'><b onmouseover=document.title='owned'>",
    "javascript:document.title='owned'",
    "{{ 7 * 7 }}{% raw %}",
    "]]>--><!--",
    "right\u202eto left, \x00 nul, \x1b[31m, \ud800 half a pair",
    "https://example.com/" + "x" * 3000,
    "&lt;script&gt;",
)


def ratio(estimate, width=0.03):
    low, high = estimate - width, estimate + width
    return Ratio(estimate, low, high, "faster" if low > 1 else "slower" if high < 1 else "cannot tell")


def difference(estimate, width=0.2, allowed=0.63):
    low, high = estimate - width, estimate + width
    verdict = "not worse" if low >= -allowed else "worse" if high < -allowed else "cannot tell"
    return Difference(estimate, low, high, verdict)


def verified(promise="reassociates", error=7.4e-6, kept=True):
    if kept:
        return Verification(promise, "kept", error, 12.0, error, 8 * error, 9)
    return Verification(promise, "broken", error, 9e9, error, 1e-6, 9, "a fully masked row", "softmax_3")


def quality(f1=63.06, found=None, changes=(), samples=2794):
    return Quality(
        exact=f1 - 2.5,
        f1=f1,
        has_answer_exact=44.3,
        has_answer_f1=49.6,
        no_answer_exact=75.4,
        no_answer_f1=75.4,
        best_exact=61.5,
        best_exact_threshold=-0.7,
        best_f1=63.8,
        best_f1_threshold=-0.4,
        samples=samples,
        margin=0.99,
        f1_difference=found,
        exact_difference=found,
        mcnemar_p=0.42 if found else None,
        changed_answers=len(changes) if found else None,
        changes=tuple(changes),
    )


def base(**parts):
    return Row(
        name="Base",
        recipe="",
        quality=quality(),
        samples_per_second=22.5,
        tokens_per_second=4769.0,
        work=Work(),
        **parts,
    )


def row(name, speed=1.2, width=0.03, **parts):
    """A recipe that was evaluated and is faster unless told otherwise."""
    found = {
        "name": f"Base+{name}",
        "recipe": f"{name}()",
        "sites": (Report(f"{name}()", ("encoder.0 (linear)",)),),
        "verification": verified(),
        "quality": quality(found=difference(0.0, 0.0)),
        "samples_per_second": 22.5 * speed,
        "throughput_speedup": ratio(speed, width),
    }
    return Row(**(found | parts))


def outcome(*rows, **parts):
    experiment = Experiment(infer=True, evaluate=True, transform=True)
    found = {
        "number": 1,
        "experiment": experiment,
        "machine": MACHINE,
        "parameters": 22_600_000,
        "weights_hash": "9f86d081884c7d65",
        "dataset": "squad2-dev-a.json",
        "samples": 2794,
        "rows": rows,
    }
    return Outcome(**(found | parts))


def entry(found, state="finished", command="bert-evaluation --infer --evaluate --transform --html page.html"):
    text, rows = dump(found)
    times = ("2026-11-25T09:50:51+00:00", "2026-11-25T10:02:11+00:00")
    return Entry(found.number, times[0], times[1] if state == "finished" else None, state, command, text, tuple(rows))


def _diff(step, luck):
    lines = [f"--- before {step}", f"+++ after {step}"]
    for layer in range(6):
        at = 20 * layer + 3
        lines += [
            f"@@ -{at},9 +{at},7 @@",
            f"     # bert.encoder.layer.{layer}.attention.self",
            f"-    linear_{luck.randrange(99)} = aten.linear(layer_norm_{layer}, query_weight, query_bias)",
            f"-    linear_{luck.randrange(99)} = aten.linear(layer_norm_{layer}, key_weight, key_bias)",
            f"+    merged_{layer} = aten.linear(layer_norm_{layer}, merged_weight, merged_bias)  # (2, 7, 1152)",
            f"     view_{layer} = aten.view(linear, [batch, length, 12, 32])",
        ]
    return "\n".join(lines)


def rich():
    """Twenty recipes with every part there is; and raw times of an inference and of batches, in seconds."""
    luck = random.Random(7)  # noqa: S311
    names = [
        *STEPS,
        *("+".join(luck.sample(STEPS, 2)) for _ in range(5)),
        *("+".join(STEPS[:n]) for n in (3, 4, 5, 7, 10)),
    ]
    speeds = [1, 1.09, 0.953, 1, 1.003, 1.31, 1.62, 1.44, 1.05, 1.2]
    speeds += [1.12, 1.38, 0.97, 1.7, 1.01, 1.06, 1.08, 1.21, 1.85, 2.05]
    losses = [0, 0, 0, 0, 0, 0, -0.35, -0.05, 0, -2.4, 0, -0.1, 0, -0.55, 0, 0, 0, 0, -0.5, -2.9]
    rows = [base(latency=Interval(8.1, 8.0, 8.3), rounds=40, answer="Ocarina of time")]
    times = {"Base": [luck.gauss(0.0081, 0.0002) for _ in range(39)] + [0.031]}
    batches = {"Base": [luck.uniform(0.1, 0.5) for _ in range(180)]}
    for number, (name, speed, loss) in enumerate(zip(names, speeds, losses, strict=True)):
        idle = name in ("LintAndRecompile", "ChangeTrueDivToMulByInverse")
        approximates = any(word in name for word in ("Quantize", "BFloat", "Prune"))
        changes = [
            Change(f"56ddde6b9a695914005b{each:04x}", luck.choice(["", "the Normans", "10th and 11th centuries"]),
                   luck.choice(["Normandy", "in the 10th century", "Rollo"]), luck.expovariate(2), luck.expovariate(4))
            for each in range(int(-loss * 40))
        ]  # fmt: skip
        steps = name.split("+")
        reports = tuple(
            Report(
                f"{step}()",
                tuple(f"bert.encoder.layer.{layer}.attention (linear_{layer})" for layer in range(0 if idle else 6)),
                tuple(
                    Refusal(f"bert.pooler.dense (linear_{3 * layer})", "Its input is read by another node, add_3, too.")
                    for layer in range(number % 4)
                ),
            )
            for step in steps
        )
        alone = difference(loss, 0.02 + abs(loss) / 3)
        made = row(
            name,
            speed,
            luck.choice([0.012, 0.03, 0.05]),
            sites=reports,
            verification=verified(*(("approximates", 0.02) if approximates else ("reassociates", 7e-6)), number != 12),
            quality=quality(63.06 + loss, alone, changes),
            latency=Interval(8.1 / speed, 8.0 / speed, 8.3 / speed),
            rounds=40,
            memory=Memory(90_000_000, 150_000_000 - 1_000_000 * number),
            share_of_peak=0.4 * speed,
            speedup=ratio(speed * luck.uniform(0.96, 1.04)),
            answer="Ocarina of time" if number != 9 else "The Wind Waker",
            regime=tuple(
                Cell(batch, length, threads, 9.0, 9.0 / speed, ratio(speed * luck.uniform(0.85, 1.15), 0.04))
                for threads in (1, 2)
                for batch in (1, 8, 32)
                for length in (16, 64, 128, 384)
            ),
            effects=tuple(
                Effect(step, way, found := ratio(luck.uniform(0.95, 1.3)), None, difference(0.0, 0.05), found.verdict)
                for step in steps
                for way in ("left out", "alone")
            ),
            graph_changes=tuple(StepChange(f"{step}()", "" if idle else _diff(step, luck)) for step in steps),
        )  # fmt: skip
        if number == 8:
            changes = [Change("56ddde6b9a695914005b9628", "Normandy", "", 1.4, 0.2)]
            made = replace(made, alarm="1 answer changed though the promise is reassociates: the clearest, of question"
                           " 56ddde6b9a695914005b9628, was decided by 1.4e+00 logits",
                           quality=quality(63.02, difference(-0.04, 0.06), changes))  # fmt: skip
        if idle:
            made = replace(made, unchanged=True, speedup=None, throughput_speedup=None, latency=None, regime=(),
                           samples_per_second=None, effects=(), quality=quality(found=difference(0, 0)))  # fmt: skip
        else:
            times[made.name] = [luck.gauss(0.0081, 0.0002) / speed for _ in range(40)]
            batches[made.name] = [each / speed * luck.gauss(1, 0.01) for each in batches["Base"]]
        rows.append(made)
    return outcome(*rows, noise=Ratio(1.0, 0.994, 1.006, "cannot tell")), times, batches


def hostile():
    """Wherever text comes from a data set, a checkpoint or a command there is an attack."""
    rows = [base(latency=Interval(8.1, 8.0, 8.3), rounds=3, answer=ATTACKS[0])]
    times = {"Base": [0.008, 0.009, 0.01]}
    for number, attack in enumerate(ATTACKS):
        changes = [
            Change(each, attack, other, float("inf"), float("nan"))
            for each, other in zip(ATTACKS, ATTACKS[::-1], strict=True)
        ]
        made = row(
            f"Evil{number}+{attack}",
            quality=quality(found=difference(-0.1), changes=changes),
            alarm=attack,
            answer=attack,
            sites=(Report(attack, (attack,), (Refusal(attack, attack),)),),
            verification=replace(verified(kept=False), failing_probe=attack, first_difference=attack),
            effects=(Effect(attack, "alone", ratio(1.1), None, None, attack),),
            regime=(Cell(1, 16, 1, 1.0, 1.0, ratio(1.1)),),
            graph_changes=(StepChange(attack, f"--- {attack}\n+{attack}\n-{attack}"),),
        )
        times[made.name] = [0.008, 0.009, 0.01]
        rows.append(made)
    experiment = Experiment(
        infer=True, evaluate=True, transform=True, model=ATTACKS[0], question=ATTACKS[1], context=ATTACKS[2],
        recipes=ATTACKS,
    )  # fmt: skip
    machine = dict(zip(ATTACKS, ATTACKS, strict=True))
    return outcome(*rows, experiment=experiment, dataset=ATTACKS[3], machine=machine), times, times
