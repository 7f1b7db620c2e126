"""How fast and how large is an evaluation? Against a plain loop over questions, and the original stack's pipeline.

    python benchmarks/evaluation.py speed  [DATASET] [--original PYTHON]
    python benchmarks/evaluation.py memory DATASET [--times 10] [--model MODEL] [--gibibyte]

`PYTHON` is the interpreter of an environment with `transformers<5` and the same torch, where the pipeline still is.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bert_evaluation.evaluation import Work

app = typer.Typer(add_completion=False)
PIPELINE = Path(__file__).with_name("original_pipeline.py")
PLAIN, OURS = "plain loop", "bert-evaluation"
PROGRAM = Path(__file__).parents[1] / "bert-evaluation.py"


@app.command()
def speed(
    dataset: Annotated[str, typer.Argument(help="built-in, or a SQuAD file")] = "built-in",
    original: Annotated[Path | None, typer.Option(help="interpreter with transformers<5")] = None,
    parts: Annotated[int, typer.Option(help="rounds: each answers another part of the questions")] = 8,
    batch_tokens: Annotated[int | None, typer.Option(help="instead of measuring the cheapest")] = None,
) -> None:
    """Questions a second, in rounds in which all take turns in random order on the same questions."""
    import torch

    from bert_evaluation import capture, load, load_dataset
    from bert_evaluation.answering import Reader, answer
    from bert_evaluation.evaluation import evaluate, measured
    from bert_evaluation.squad import Dataset, score
    from bert_evaluation.squad.answers import AnswerRule
    from bert_evaluation.squad.batches import Batching
    from bert_evaluation.squad.windows import Windowing
    from bert_evaluation.stats import speedup

    model, tokenizer = load()
    graph, data = capture(model), load_dataset(dataset)
    examples = list(data.examples)
    random.shuffle(examples)
    batching = Batching(batch_tokens)
    if batching.is_open:
        batching = measured(Reader(graph, tokenizer, AnswerRule()), data, Windowing())
    print(f"{data.name}: {len(data)} questions, batches of {batching.tokens} tokens, torch {torch.__version__}")

    def plain(part: Dataset) -> dict[str, str]:
        return {each.id: answer(model, tokenizer, each.question, each.context).text for each in part.examples}

    def ours(part: Dataset) -> dict[str, str]:
        found = evaluate(graph, tokenizer, part, batching=batching)
        works.append(found.work)
        return found.answers

    ways: dict[str, Callable[[Dataset], dict[str, str]]] = {PLAIN: plain, OURS: ours}
    if original is not None:
        ways["pipeline of transformers 4"] = _Pipeline(original)
    works: list[Work] = []
    for way in ways.values():
        way(Dataset("warm-up", examples[:8]))
    works.clear()
    seconds, answers = {name: list[float]() for name in ways}, {name: dict[str, str]() for name in ways}
    for index in range(parts):
        part = Dataset("part", examples[index::parts])
        for name in random.sample(list(ways), len(ways)):
            start = time.perf_counter()
            answers[name] |= ways[name](part)
            seconds[name].append(time.perf_counter() - start)
        print(f"round {index + 1} of {parts}", file=sys.stderr)
    print("| | questions/s | times the plain loop | F1 | exact |\n|---|--:|---|--:|--:|")
    for name, times in seconds.items():
        ratio, scores = speedup(seconds[PLAIN], times), score(data, answers[name])
        cells = (
            name,
            f"{len(examples) / sum(times):.1f}",
            f"{ratio.estimate:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            f"{scores['f1']:.2f}",
            f"{scores['exact']:.2f}",
        )
        print("|", " | ".join(cells), "|")
    _print_work(works, sum(seconds[OURS]))


def _print_work(works: "list[Work]", wall: float) -> None:
    def total(name: str) -> float:
        return float(sum(getattr(work, name) for work in works))

    computed = total("tokens") + total("padding")
    print(f"{OURS}: {total('tokens') / wall:.0f} tokens/s; {total('padding') / computed:.2%} of those computed padding")
    parts = ", ".join(f"{name} {total(name):.2f}" for name in ("tokenise", "model", "extract", "score"))
    print(f"seconds: {parts}, in all {wall:.2f}; {1 - total('model') / wall:.1%} beyond the forward passes")


class _Pipeline:
    """The question-answering pipeline of transformers 4, in a process of its own environment."""

    def __init__(self, python: Path) -> None:
        from bert_evaluation import builtin

        command = [str(python), str(PIPELINE), str(builtin.CHECKPOINT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def __call__(self, part: Any) -> dict[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        questions = [{"id": each.id, "question": each.question, "context": each.context} for each in part.examples]
        print(json.dumps(questions), file=self.process.stdin, flush=True)
        found: dict[str, str] = json.loads(self.process.stdout.readline())
        return found


@app.command()
def memory(
    dataset: Annotated[Path, typer.Argument(help="a SQuAD file")],
    times: Annotated[int, typer.Option(help="how often it is repeated")] = 10,
    model: Annotated[str, typer.Option(help="checkpoint; a small one is as good and faster")] = "built-in",
    gibibyte: Annotated[bool, typer.Option("--gibibyte", help="also 20 questions out of a file of 1 GiB")] = False,
) -> None:
    """Peak memory of the command line on a file, and on that file repeated."""
    with tempfile.TemporaryDirectory() as folder:
        once = _peak("--evaluate", "--model", model, "--dataset", dataset, "--store", f"{folder}/once.sqlite")
        repeated = Path(folder) / "repeated.json"
        _repeat(dataset, repeated, times)
        many = _peak("--evaluate", "--model", model, "--dataset", repeated, "--store", f"{folder}/many.sqlite")
        print(f"once: {once:.0f} MB; {times} times: {many:.0f} MB, {many / once - 1:+.1%}")
        if gibibyte:
            copies = 2**30 // dataset.stat().st_size + 1
            _repeat(dataset, repeated, copies)
            size = repeated.stat().st_size / 2**30
            some = ("--samples", 20, "--store", ":memory:")
            drawn = _peak("--evaluate", "--model", model, "--dataset", repeated, *some)
            print(f"20 questions out of {size:.2f} GiB: {drawn:.0f} MB")


def _peak(*arguments: object) -> float:
    """The largest resident memory (MB) of a run of the command line."""
    command = [sys.executable, str(PROGRAM), "--quiet", *map(str, arguments)]
    process = subprocess.Popen(command)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _repeat(source: Path, target: Path, times: int) -> None:
    """Write the file's articles `times` times, with ids that differ."""
    articles = json.loads(source.read_text(encoding="utf-8"))["data"]
    ids = [question for article in articles for paragraph in article["paragraphs"] for question in paragraph["qas"]]
    names = [question["id"] for question in ids]
    with target.open("w", encoding="utf-8") as file:
        file.write('{"version": "v2.0", "data": [')
        for copy in range(times):
            for question, name in zip(ids, names, strict=True):
                question["id"] = f"{name}-{copy}"
            file.write((", " if copy else "") + json.dumps(articles)[1:-1])
        file.write("]}")


if __name__ == "__main__":
    app()
