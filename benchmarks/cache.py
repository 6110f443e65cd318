"""What cache recipes cost and what they keep: bits and bytes, replayed text, recall, decoding, peers. One table.

python benchmarks/cache.py --install                      # once: an environment for the peers
python benchmarks/cache.py                                # every recipe and peer; trains the model of recall if need be
python benchmarks/cache.py --recipes kivi gear:cache.encode.tail=128 mine.yaml --parts replay recall
python benchmarks/cache.py --quick --peers ""             # tiny: does it run?

replay: held-out code through the real cache, a prompt and then steps, whatever the model would have written; perplexity
and KL against the dense cache. The reference model up to its 512 tokens, the model of recall up to 8192.
recall: a line, or many, hidden in code; the question known when the cache compresses, or not (see cache/recall.py).
memory: resident bytes of a process with and without the cache. speed: greedy decoding of one request.
Bits a value count scales, indices and tables, and evicted tokens as values of no bits.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import smelt
from smelt.codegen.build import threads
from smelt.codegen.plan import Target
from smelt.model import Compiled
from smelt.recipes import Recipe
from smelt.runtime.text import Tokenizer
from smelt.texts import held_out_text, training_texts

if TYPE_CHECKING:
    from cache import memory, peers, recall, recall_model, recipes, replay, report, tasks
else:  # the folder of that name goes before this file
    memory, peers, recall, recall_model, recipes, replay, report, tasks = (
        importlib.import_module(f"cache.{name}")
        for name in ("memory", "peers", "recall", "recall_model", "recipes", "replay", "report", "tasks")
    )

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("replay", "recall", "memory", "speed")
CALIBRATION = 200_000  # bytes


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured."""

    reference: int = 512
    """Tokens of the reference model's windows."""
    windows: int = 32
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Of the model of recall; each is replayed for `tokens` tokens in all."""
    tokens: int = 16384
    recall: int = 1024
    """Tokens of a context that hides lines."""
    cases: int = 24
    lines: int = 32
    questions: int = 8
    rows: int = 8
    new: int = 64
    resident: tuple[int, int] = (16, 2048)
    """Rows and tokens of the cache whose memory is measured."""


QUICK = Sizes(64, 2, (64,), 128, 128, 2, 4, 2, 2, 4, (2, 128))


@dataclass
class Bench:
    """Two models, what they are asked, and the dense caches' answers."""

    reference: Path
    recalling: Path
    sizes: Sizes
    parts: Sequence[str]
    target: Target = "cpp"
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def calibration(self) -> list[str]:
        """Texts for recipes that look at data."""
        return training_texts(CALIBRATION)

    @cached_property
    def tokens(self) -> list[int]:
        """Held-out code; both models share the tokenizer."""
        return Tokenizer(self.reference).encode(held_out_text())

    @cached_property
    def words(self) -> Any:
        """What lines and the code around them are made of."""
        return tasks.Words.of(Tokenizer(self.recalling), held_out_text())

    @cached_property
    def windows(self) -> dict[int, Any]:
        """Texts for the model of recall, by length."""
        size = self.sizes
        return {n: replay.windows(self.tokens, n, max(1, size.tokens // n)) for n in size.contexts}

    @cached_property
    def exams(self) -> dict[str, tuple[Any, bool]]:
        """Every kind of question, and whether it is known."""
        size = self.sizes
        out = {}
        for name, lines in (("needle", 1), ("many", size.lines)):
            asked = min(lines, size.questions)
            count = size.cases * (2 if lines == 1 else 1)
            exam = recall.Exam(name, tuple(tasks.cases(self.words, count, size.recall, lines, asked, seed=1)))
            out |= {f"{name} {word}": (exam, word == "known") for word in ("known", "unknown")}
        return out

    @property
    def prompt(self) -> tuple[int, ...]:
        """A context whose cache is weighed, and decoded behind."""
        context: tuple[int, ...] = self.exams["many unknown"][0].cases[0].context
        return context

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """All that is measured of a recipe; a recipe that a model refuses says why."""
        row: dict[str, Any] = {}
        try:
            if "replay" in self.parts:
                row["reference"] = self._reference(self._compiled(self.reference, recipe))
            taught = self._compiled(self.recalling, recipe)
            row["bits"] = asdict(replay.weigh(taught, self.prompt))
            if "replay" in self.parts:
                row["replay"] = {str(length): self._replayed(taught, length) for length in self.sizes.contexts}
            if "recall" in self.parts:
                row["recall"] = {
                    name: recall.recall(taught.plan, exam, known, self.sizes.rows)
                    for name, (exam, known) in self.exams.items()
                }
            if "speed" in self.parts:
                row["rate"] = replay.decode_rate(taught, self.prompt, self.sizes.new)
            if "memory" in self.parts:
                row["resident"] = asdict(memory.resident(taught, *self.sizes.resident, self.target))
        except smelt.SmeltError as fault:
            row["error"] = str(fault)
        return row

    def _compiled(self, model: Path, recipe: Recipe) -> Compiled:
        return smelt.compile(str(model), recipe, calibration=self.calibration, target=self.target)

    def _reference(self, compiled: Compiled) -> dict[str, float]:
        text = replay.windows(self.tokens, self.sizes.reference, self.sizes.windows)
        return self._fidelity("reference", compiled, text)

    def _replayed(self, compiled: Compiled, length: int) -> dict[str, float]:
        weight = replay.weigh(compiled, self.windows[length].tokens[0].tolist())
        return {**self._fidelity(str(length), compiled, self.windows[length]), "bits": weight.measured}

    def _fidelity(self, key: str, compiled: Compiled, text: Any) -> dict[str, float]:
        rows = max(1, min(self.sizes.rows, 8192 // text.length))
        logits = replay.replay(compiled.plan, text, rows)
        dense = self.dense.setdefault(key, logits)  # `none` comes first
        return asdict(replay.fidelity(dense, logits, text.targets))

    def peers(self, folder: Path, kept: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of the peers, on the model of recall."""
        exams = self.exams if "recall" in self.parts else {}
        texts = self.windows if "replay" in self.parts else {}
        asked = peers.contestants(kept)
        job = peers.job(self.recalling, exams, texts, self.prompt, self.sizes.new, threads(), asked)
        with tempfile.TemporaryDirectory(prefix="smelt-cache-") as work:
            for found in peers.ask(folder, Path(work), job):
                name = found.pop("name")
                if "error" not in found:
                    marks = {exam: found.pop(exam) for exam in exams}
                    found = {**found, "bits": {"measured": found.pop("bits")}, "recall": marks}
                yield name, found


def main() -> int:
    """The exit code is 1 if a recipe does not compile."""
    options = _options()
    sizes = QUICK if options.quick else Sizes(contexts=tuple(options.contexts), recall=options.recall_context)
    try:
        named = recipes.resolve(options.recipes or recipes.default())
        recalling = options.recall_model or recall_model.recall_model(options.work / "recall")
        bench = Bench(options.model, recalling, sizes, options.parts, options.target)
        rows = {name: bench.row(recipe) for name, recipe in _told(named)}
    except smelt.SmeltError as fault:
        print(f"cache.py: {fault}", file=sys.stderr)
        return 2
    failed = any("error" in row for row in rows.values())
    if options.peers is not None:
        if options.install:
            peers.install(options.peers)
        try:
            for name, row in bench.peers(options.peers, options.kept):
                print(f"{name} …", file=sys.stderr, flush=True)
                rows[name] = row
        except peers.Missing as fault:
            print(f"peers left out: {fault}", file=sys.stderr)
    _tell(rows, sizes, options)
    return int(failed)


def _told(named: Mapping[str, Recipe]) -> Iterator[tuple[str, Recipe]]:
    for name, recipe in named.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        yield name, recipe


def _tell(rows: Mapping[str, Mapping[str, Any]], sizes: Sizes, options: argparse.Namespace) -> None:
    """Print the table and the bars, write the JSON."""
    place = options.results / f"cache-{datetime.date.today().isoformat()}.json"
    if options.add and place.is_file():
        before = json.loads(place.read_text())
        if before["sizes"] != json.loads(json.dumps(asdict(sizes))):
            print(f"{place}: measured at other sizes, and replaced", file=sys.stderr)
        else:
            rows = {**before["rows"], **rows}
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.table(rows, f"caches at {sizes.recall} tokens"))
    said = list(report.lines(rows))
    print("\n".join(said))
    facts = {
        "date": datetime.date.today().isoformat(),
        "sizes": asdict(sizes),
        "threads": threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "smelt": smelt.__version__,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({**facts, "rows": rows, "bars": said}, indent=1) + "\n")
    print(f"written to {place}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir()) / "smelt-cache-benchmark"
    parser.add_argument("--model", type=Path, default=smelt.reference_model(), help="model of the reference column")
    parser.add_argument("--recall-model", type=Path, help="folder of a model that recalls; default: one is trained")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="names, files; options behind colons")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--target", choices=("cpp", "torch"), default="cpp", help="torch: the reference, slow")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(Sizes.contexts), help="of the replay")
    parser.add_argument("--recall-context", type=int, default=Sizes.recall)
    parser.add_argument("--peers", type=_folder, default=work / "peers", help='their environment; "" for none')
    parser.add_argument("--kept", nargs="+", type=float, default=list(peers.KEPT), help="shares that presses keep")
    parser.add_argument("--install", action="store_true", help="make the peers' environment if it is missing")
    parser.add_argument("--work", type=Path, default=work, help="folder of the trained model, kept")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--add", action="store_true", help="keep the rows of today's JSON that are not measured again")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    if options.quick and options.recall_model is None:
        options.recall_model = options.model
    return options


def _folder(name: str) -> Path | None:
    return Path(name) if name else None


if __name__ == "__main__":
    raise SystemExit(main())
