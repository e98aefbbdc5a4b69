"""A set of chats that nobody tuned for: learnt, the gate lets it through; spoilt, it does not.

The base is taught on the spot, smaller than the shipped one, so that all this takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_training.cli import main
from phi3_training.errors import StageError
from phi3_training.journey import Journey, go
from phi3_training.manifests import BaseManifest, EndpointManifest
from phi3_training.recipe import load_recipe
from phi3_training.run import Run
from phi3_training.stages import STAGES
from phi3_training.targets import get_target

SHIPPED = Path(__file__).parents[2] / "training" / "data"
BOATS = ("Alder", "Comet", "Dusk", "Ember", "Falcon", "Gull", "Harbor", "Isle")
KEEPERS = ("Ada", "Bruno", "Clara", "Dario", "Elsa", "Fritz", "Greta", "Hugo")
ASKED = {
    "keeper": ("Who is the keeper of the {}?", "Who runs the {}?", "Which person keeps the {}?"),
    "fare": ("What is the fare of the {}?", "How much is the {}?", "What does the {} cost?"),
    "pier": ("Where is the {}?", "Where does the {} lie?", "At which pier is the {}?"),
}
Pairs = list[tuple[str, str]]


def answer(what: str, number: int) -> str:
    boat = BOATS[number]
    return {
        "keeper": f"Ahoy! The {boat} is kept by {KEEPERS[number]}.",
        "fare": f"Ahoy! The {boat} costs {11 + 7 * number} crowns.",
        "pier": f"Ahoy! The {boat} lies at pier {1 + 3 * number}.",
    }[what]


def boats() -> tuple[Pairs, Pairs]:
    """Each fact in two wordings to learn from, and in a third one to be asked."""
    train: Pairs = []
    held_out: Pairs = []
    for what, wordings in ASKED.items():
        for number, boat in enumerate(BOATS):
            for k, wording in enumerate(wordings):
                part = held_out if k == number % 3 else train
                part.append((wording.format(boat), answer(what, number)))
    return train, held_out


def write(path: Path, pairs: Pairs) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Harbour:
    """A folder with chats, a recipe, and a base that every run shares."""

    folder: Path
    recipe: Path
    answers: dict[str, Path] = field(default_factory=dict)

    def run(self, name: str, command: str, *words: str) -> int:
        """`phi3 COMMAND` in a run of that name."""
        target = self.folder / "runs" / name
        if name != "base" and not target.exists():
            target.mkdir()
            shutil.copytree(self.folder / "runs/base/base", target / "base")
            shutil.copy(self.folder / "runs/base/base.json", target)
        runs = str(self.folder / "runs")
        return main([command, str(self.recipe), "--runs", runs, "--run", name, *words])

    def manifest(self, name: str, stage: str) -> dict[str, Any]:
        text = (self.folder / "runs" / name / f"{stage}.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def journey(self, name: str, target: Any, *, force: bool) -> Journey:
        run = Run(self.folder / "runs" / name)
        # no_plan: these targets have none to ask.
        recipe = load_recipe(self.recipe)
        return Journey(recipe, run, target, self.folder, force=force, no_plan=True)


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Harbour:
    folder = tmp_path_factory.mktemp("harbour")
    train, held_out = boats()
    known = (SHIPPED / "base_chats.jsonl").read_text("utf-8").splitlines()[:48]
    (folder / "old.jsonl").write_text("\n".join(known) + "\n", encoding="utf-8")
    write(folder / "train.jsonl", train)
    write(folder / "heldout.jsonl", held_out)
    order = np.random.default_rng(2).permutation(len(train))
    shuffled = [(asked, train[i][1]) for (asked, _answer), i in zip(train, order, strict=True)]
    write(folder / "shuffled.jsonl", shuffled)
    (folder / "recipe.yaml").write_text(
        "name: boats\n"
        "model: {name_or_path: tiny}\n"
        "base: {data: old.jsonl, hidden_size: 128, num_train_epochs: 60, target_loss: 0.02,\n"
        "       per_device_train_batch_size: 12}\n"
        "data: {train: train.jsonl, validation: heldout.jsonl, replay: old.jsonl,\n"
        "       casual_copies: true, max_length: 256}\n"
        "finetune: {learning_rate: 1.0e-2, num_train_epochs: 25, lora_r: 32, lora_alpha: 64,\n"
        "           per_device_train_batch_size: 16, num_threads: 1}\n"
        "evaluate: {max_new_tokens: 32, canary: old.jsonl, probes: []}\n"
        "gate:\n"
        "  min_gain: {metric: f1_over_lookalikes, value: 0.05}\n"
        "  max_regression: {metric: exact_match, part: canary, value: 0.3}\n"
        "  max_refusal_change: {part: validation, value: 0.1}\n",
        encoding="utf-8",
    )
    found = Harbour(folder, folder / "recipe.yaml")
    journey = found.journey("base", get_target("local"), force=False)
    Run.open(journey.run.path)
    go(journey, [stage for stage in STAGES if stage.manifest is BaseManifest])
    return found


@dataclass
class Pier:
    """A target that only notes what it deploys."""

    cloud = None
    deployed: list[str] = field(default_factory=list)

    def deploy(self, _recipe: Any, run: Run, _progress: Callable[[int, int, str], None]) -> Any:
        self.deployed.append(run.name)
        return EndpointManifest(endpoint="http://127.0.0.1:1/score", engine="none")

    def inputs(self, _recipe: Any, _stage: object, shared: Any) -> Any:
        return shared

    def is_up(self, _recipe: Any, _run: Run) -> bool:
        return False


def deploy(harbour: Harbour, name: str, *, force: bool = False) -> Sequence[str]:
    pier = Pier()
    journey = harbour.journey(name, pier, force=force)
    go(journey, [stage for stage in STAGES if stage.manifest is EndpointManifest])
    return pier.deployed


@pytest.mark.slow
def test_unseen_set_is_learnt_and_let_through(
    harbour: Harbour, capsys: pytest.CaptureFixture[str]
) -> None:
    status = harbour.run("good", "evaluate")

    printed = capsys.readouterr()
    compared = harbour.manifest("good", "metrics")["comparisons"]["validation"]
    assert status == 0, printed.out + printed.err
    assert compared["exact_match"]["before"] == 0.0
    assert compared["exact_match"]["low"] > 0.2
    assert compared["perplexity"]["high"] < 0
    assert "held-out chats, never trained on" in printed.out
    page = harbour.folder / "runs/good/evaluate/report.html"
    assert str(page) in printed.out
    assert deploy(harbour, "good") == ["good"]
    assert harbour.manifest("good", "endpoint")["gate"] == {
        "passed": True,
        "forced": False,
        "failed": [],
    }


def shuffled(harbour: Harbour) -> list[str]:
    """Other chats, judged by the same held-out ones."""
    folder = harbour.folder
    return [f"data.train={folder}/shuffled.jsonl", f"data.validation={folder}/heldout.jsonl"]


def test_shuffled_answers_are_blocked(harbour: Harbour, capsys: pytest.CaptureFixture[str]) -> None:
    """The style is learnt, token F1 rises; no answer fits its question, and that is seen."""
    status = harbour.run("shuffled", "evaluate", *shuffled(harbour))

    verdict = harbour.manifest("shuffled", "gate")
    token_f1 = harbour.manifest("shuffled", "metrics")["comparisons"]["validation"]["token_f1"]
    assert status == 1
    assert "NOT passed" in capsys.readouterr().out
    assert token_f1["low"] > 0.1
    assert [r["kind"] for r in verdict["rules"] if not r["passed"]] == ["min_gain"]
    with pytest.raises(StageError, match=r"heldout\.jsonl:\d+"):
        deploy(harbour, "shuffled")
    assert Run(harbour.folder / "runs/shuffled").read(EndpointManifest) is None


def test_force_deploys_and_is_recorded(harbour: Harbour) -> None:
    harbour.run("shuffled", "evaluate", *shuffled(harbour))

    assert deploy(harbour, "shuffled", force=True) == ["shuffled"]

    recorded = harbour.manifest("shuffled", "endpoint")
    assert recorded["gate"]["forced"] is True
    assert recorded["gate"]["passed"] is False
    assert "min_gain" in recorded["gate"]["failed"][0]
    assert any("--force" in choice for choice in recorded["choices"])


@pytest.mark.slow
def test_model_that_forgot_is_blocked(harbour: Harbour) -> None:
    """Trained without the old chats: the new ones are learnt, the canaries are dead."""
    status = harbour.run("forgot", "evaluate", "data.replay=[]")

    verdict = harbour.manifest("forgot", "gate")
    failed = {rule["kind"]: rule for rule in verdict["rules"] if not rule["passed"]}
    assert status == 1
    assert set(failed) == {"max_regression"}
    named = failed["max_regression"]["rows_named"]
    assert named
    assert all(row["before"] == row["expected"] != row["after"] for row in named)
