"""Studies: what is run, what is not run again, and what becomes of runs that fail."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments import compare, study
from experiments.cli import CONFIGS, guarded, resolved
from experiments.reading import read
from experiments.train import train

SMALL = ("batch.size=4", "batch.length=10", "budget.epochs=null", "budget.tokens=400", "model.backbone.hidden_size=16",
         "evaluate.every_tokens=200", "wandb.mode=disabled", "progress=false", "log_every=2", "device=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    for split, lines in {"train": 100, "valid": 20, "test": 20}.items():
        words = [" ".join(f"w{min(int(chance.expovariate(0.1)), 40)}" for _ in range(9)) for _ in range(lines)]
        (folder / f"{split}.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def words(text, tmp_path):
    files = [f"data.{split}={text}/{split}.txt" for split in ("train", "valid", "test")]
    return ["data=text", *files, f"data.cache={text}/cache", f"run.root={tmp_path}/outputs", *SMALL]


@pytest.fixture
def trained(monkeypatch):
    """Train in this process instead of a new one; the list says what was trained. A layer in ``broken`` crashes."""
    log = SimpleNamespace(jobs=[], configs=[], threads=[], broken=set())

    def run(command, env, **_):
        assert command[:3] == [sys.executable, "-m", "experiments.train"]
        composed = compose("train", command[3:], return_hydra_config=True)
        config = resolved(composed, composed.hydra.runtime.choices)
        layer = config["name"]["output"]
        log.jobs.append((layer, config["seed"]))
        log.configs.append(config)
        log.threads.append(env.get("OMP_NUM_THREADS"))
        if layer in log.broken:
            return subprocess.CompletedProcess(command, -9)
        return subprocess.CompletedProcess(command, 0 if train(config) else 1)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return log


def program(monkeypatch, capsys, *words):
    """Run the program with a command line; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    status = 0
    try:
        guarded(compare.main, "compare")
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_study_trains_every_layer_and_seed_once_and_reports(words, trained, monkeypatch, capsys, tmp_path):
    line = ["study=smoke", "study.layers=[full_softmax,sampled_softmax]", "study.seeds=[1,2]", *words]
    status, out, err = program(monkeypatch, capsys, *line)
    expected = [("full_softmax", 1), ("sampled_softmax", 1), ("full_softmax", 2), ("sampled_softmax", 2)]
    assert status == 0, err
    assert trained.jobs == expected
    page = tmp_path / "outputs" / "compare" / "smoke-text-400-tokens" / "report.html"
    assert out.rstrip().endswith(str(page)) and page.exists()
    assert (page.parent / "results.csv").exists() and (page.parent / "figures" / "curves-seconds.svg").exists()
    assert "[4/4] sampled_softmax, seed 2: test perplexity" in out, out
    assert "Unigram frequencies" in out, out
    config = yaml.safe_load(next((tmp_path / "outputs" / "text").glob("full*seed2*/config.yaml")).read_text())
    assert config["budget"]["tokens"] == 400 and config["wandb"]["group"] == "smoke"

    before = page.read_bytes()
    status, out, _ = program(monkeypatch, capsys, *line)
    assert status == 0 and trained.jobs == expected and out.count("done before") == 4
    assert page.read_bytes() == before


def test_a_failed_run_ends_nothing_else_and_is_tried_again(words, trained, monkeypatch, capsys):
    trained.broken.add("full_softmax")
    line = ["study=smoke", "study.layers=[full_softmax,sampled_softmax]", *words]
    status, out, _ = program(monkeypatch, capsys, *line)
    assert status == 1
    assert "[1/2] full_softmax, seed 1: failed with exit status -9" in out
    assert "failed: full_softmax, seed 1; alone: python -m experiments.train study=smoke" in out
    assert "[2/2] sampled_softmax, seed 1: test perplexity" in out
    trained.broken.clear()
    status, *_ = program(monkeypatch, capsys, *line)
    assert status == 0
    assert trained.jobs == [("full_softmax", 1), ("sampled_softmax", 1), ("full_softmax", 1)]


def test_a_diverged_run_is_no_failure_and_not_repeated(words, trained, monkeypatch, capsys):
    line = ["study=smoke", "study.layers=[full_softmax]", "optim.learning_rate=1e30", "optim.clip=null", *words]
    for expected in ("diverged at step", "done before: diverged at step"):
        status, out, _ = program(monkeypatch, capsys, *line)
        assert status == 0 and expected in out and "nothing to compare" in out
    assert len(trained.jobs) == 1


def test_a_larger_budget_continues_what_is_finished(words, trained, monkeypatch, capsys, tmp_path):
    line = ["study=smoke", "study.layers=[full_softmax]", *words]
    program(monkeypatch, capsys, *line)
    program(monkeypatch, capsys, *line, "budget.tokens=800")
    (folder,) = (tmp_path / "outputs" / "text").iterdir()
    assert len(trained.jobs) == 2
    assert json.loads((folder / "result.json").read_text())["train"]["tokens"] == 800


def test_each_budget_said_on_the_command_line_has_its_record(words, trained, monkeypatch, capsys, tmp_path):
    line = ["study=smoke", "study.layers=[full_softmax]", *words]
    for tokens in (400, 200):
        program(monkeypatch, capsys, *line, "schedule=cosine", f"budget.tokens={tokens}")
    for tokens in (400, 200):
        found = record(tmp_path, f"smoke-text-{tokens}-tokens")
        assert found["budget"]["tokens"] == tokens and len(found["runs"]) == 1


@pytest.mark.parametrize(
    "word, message",
    [
        ("study=quik", "study=quik: no such choice; did you mean quick?"),
        (
            "study.layers=[sampled_sofmax]",
            "study.layers=sampled_sofmax: no such output layer; did you mean sampled_softmax",
        ),
        ("study.layer=[full_softmax]", "study.layer: no such field; did you mean study.layers?"),
        ("study.layers=[nothing*]", "study smoke is empty; fill study.layers and study.seeds"),
        ("study.seeds=[]", "study smoke is empty"),
        ("study.layers=full_softmax", "study.layers=full_softmax: must be a list"),
        ("study.seeds=1", "study.seeds=1: must be a list"),
        ("output=full_softmax", "output=full_softmax: the runs of a study differ in it; use study.layers=[...]"),
        ("seed=3", "use study.seeds=[...]"),
        ("run.dir=there", "set run.root instead"),
        ("budget.tokens=-1", "budget.tokens=-1: must be a positive number"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_runs(word, message, words, trained, monkeypatch, capsys, tmp_path):
    line = [each for each in words if each.split("=")[0] != word.split("=")[0]]
    study = [] if word.startswith("study=") else ["study=smoke"]
    status, out, err = program(monkeypatch, capsys, *study, *line, word)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not trained.jobs and not (tmp_path / "outputs").exists()


def test_layers_by_pattern_are_taken_once_in_order():
    there = sorted(file.stem for file in (CONFIGS / "output").glob("*.yaml"))
    assert study.expand(["*"]) == there
    assert study.expand(["sampled_softmax", "*", "no_such_layer*"])[0] == "sampled_softmax"
    assert sorted(study.expand(["sampled_softmax", "*"])) == there


def test_settings_of_a_layer_follow_its_name_and_are_crossed():
    assert study.expand(["sampled_softmax output.samples=4,8 output.power=0.5,1.0", "sampled_softmax"]) == [
        "sampled_softmax output.samples=4 output.power=0.5",
        "sampled_softmax output.samples=4 output.power=1.0",
        "sampled_softmax output.samples=8 output.power=0.5",
        "sampled_softmax output.samples=8 output.power=1.0",
        "sampled_softmax",
    ]
    for setting in ("batch.size=3", "output.samples", "seed=2"):
        with pytest.raises(ValueError, match=f"{setting} is no setting of an output layer"):
            study.expand([f"sampled_softmax {setting}"])


def test_variants_of_a_layer_are_runs_of_their_own(words, trained, monkeypatch, capsys):
    layers = "study.layers=[full_softmax,'sampled_softmax output.samples=4,8']"
    status, out, err = program(monkeypatch, capsys, "study=smoke", layers, *words)
    assert status == 0, err
    assert [layer for layer, _ in trained.jobs] == ["full_softmax", "sampled_softmax", "sampled_softmax"]
    assert "(samples=4)" in out and "(samples=8)" in out, out


@pytest.mark.parametrize("file", sorted((CONFIGS / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_preset_composes_for_every_layer(file):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        preset = compose("compare", [f"study={file.stem}"]).study
        assert preset.name == file.stem
        for layer in study.expand(preset.layers):
            name, *settings = layer.split()
            config = compose("train", [f"study={file.stem}", f"output={name}", *settings])
            assert sum(value is not None for value in config.budget.values()) == 1


def test_the_runs_of_a_study_train_in_processes_of_their_own(words, tmp_path):
    command = [sys.executable, "-m", "experiments.compare", "study=smoke", "study.layers=[full_softmax]", *words]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "text").iterdir()
    assert read(folder).result["train"]["tokens"] == 400


SEARCH = ["study.search={rates:[0.3,1,1e33],budget:0.5,seed:1}", "study.seeds=[1,2]"]


def record(tmp_path, name="smoke-text-400-tokens"):
    return json.loads((tmp_path / "outputs" / "studies" / name / "study.json").read_text())


def test_each_layer_gets_the_rate_that_validates_best_after_the_same_trials(
    words, trained, monkeypatch, capsys, tmp_path
):
    """The rates are tried at half the budget; an absurd one loses, whatever its losses were before."""
    layers = ["full_softmax", "sampled_softmax"]
    line = ["study=smoke", f"study.layers=[{','.join(layers)}]", *SEARCH, *words, "optim.clip=null"]
    status, _, err = program(monkeypatch, capsys, *line)
    assert status == 0, err
    # Seed by seed, and the trials of a layer right before its first run.
    assert trained.jobs == [(layer, 1) for layer in layers for _ in range(4)] + [(layer, 2) for layer in layers]
    trials = [config for config in trained.configs if config["budget"]["tokens"] == 200]
    runs = [config for config in trained.configs if config["budget"]["tokens"] == 400]
    assert [config["optim"]["learning_rate"] for config in trials] == 2 * [0.03, 0.1, 1e32]
    assert all(config["evaluate"]["final_tokens"] == config["evaluate"]["tokens"] for config in trials)
    assert all(config["evaluate"]["final_tokens"] is None for config in runs)

    found = record(tmp_path)
    assert [entry["layer"] for entry in found["layers"]] == layers
    assert found["budget"] == {"epochs": None, "tokens": 400, "seconds": None}
    for entry in found["layers"]:
        losses = [trial["valid_nll"] for trial in entry["search"]]
        assert losses[2] is None and None not in losses[:2]
        for trial, loss in zip(entry["search"][:2], losses, strict=False):
            result = json.loads((tmp_path / "outputs" / trial["run"] / "result.json").read_text())
            assert loss == result["valid"]["nll"] and trial["seconds"] == result["train"]["seconds"]
        best = losses.index(min(losses[:2]))
        assert entry["learning_rate"] == [0.03, 0.1][best] and entry["edge"] == (best == 0)
        rates = [config["optim"]["learning_rate"] for config in runs if config["name"]["output"] == entry["layer"]]
        assert rates == 2 * [entry["learning_rate"]]
    assert len(found["runs"]) == 4 and not found["smoke"]
    assert all((tmp_path / "outputs" / name / "result.json").exists() for name in found["runs"])

    count = len(trained.jobs)
    status, out, _ = program(monkeypatch, capsys, *line)
    assert status == 0 and len(trained.jobs) == count and out.count("done before") == count
    assert record(tmp_path) == found


def test_a_study_cut_short_goes_on_in_the_middle_of_a_search(words, trained, monkeypatch, capsys, tmp_path):
    """A crash in every run but one's own stands for a kill: what is missing afterwards is what is run."""
    line = ["study=smoke", "study.layers=[full_softmax,sampled_softmax]", *SEARCH, *words, "optim.clip=null"]
    trained.broken.add("sampled_softmax")
    status, out, _ = program(monkeypatch, capsys, *line)
    # Without its trials a layer has no rate, and is not run at another.
    assert (
        status == 1 and trained.jobs.count(("sampled_softmax", 1)) == 3 and ("sampled_softmax", 2) not in trained.jobs
    )
    entry = record(tmp_path)["layers"][1]
    assert entry == {"layer": "sampled_softmax", "search": [], "learning_rate": None, "edge": False}
    trained.broken.clear()
    trained.jobs.clear()
    status, *_ = program(monkeypatch, capsys, *line)
    assert status == 0 and trained.jobs == [("sampled_softmax", 1)] * 4 + [("sampled_softmax", 2)]
    assert record(tmp_path)["layers"][1]["learning_rate"] in (0.03, 0.1)


def test_a_layer_that_diverges_at_every_rate_is_not_run_and_named(words, trained, monkeypatch, capsys, tmp_path):
    search = "study.search={rates:[1e32,1e33],budget:0.5,seed:1}"
    line = ["study=smoke", "study.layers=[full_softmax]", search, *words, "optim.clip=null"]
    status, out, _ = program(monkeypatch, capsys, *line)
    assert status == 0 and "no learning rate: full_softmax diverged in every trial" in out
    assert len(trained.jobs) == 2
    (entry,) = record(tmp_path)["layers"]
    assert [trial["valid_nll"] for trial in entry["search"]] == [None, None]
    assert entry["learning_rate"] is None and not entry["edge"]


def test_layers_that_are_not_compared_run_a_few_steps_and_are_labelled(words, trained, monkeypatch, capsys, tmp_path):
    smoke = "study.smoke={layers:[full*,spherical*,sig*],tokens:80}"
    line = ["study=smoke", "study.layers=['full_softmax output.bias=false']", smoke, *words]
    status, out, _ = program(monkeypatch, capsys, *line)
    assert status == 0 and trained.jobs == [("full_softmax", 1), ("spherical_softmax", 1), ("sig_softmax", 1)]
    found = record(tmp_path)
    smoked = [name.split("/")[1].split("-")[0] for name in found["smoke"]]
    assert len(found["runs"]) == 1 and smoked == ["spherical_softmax", "sig_softmax"]
    assert read(tmp_path / "outputs" / found["smoke"][0]).result["train"]["tokens"] == 80
    assert "Sig softmax" not in out


def test_runs_that_are_finished_elsewhere_are_taken_from_there(words, trained, monkeypatch, capsys, tmp_path):
    line = ["study=smoke", "study.layers=[full_softmax,sampled_softmax]", *words]
    program(monkeypatch, capsys, *line)
    (tmp_path / "outputs").rename(tmp_path / "shipped")
    other = next((tmp_path / "shipped" / "text").glob("sampled*"))
    (other / "result.json").unlink()
    line.append(f"study.finished=[{tmp_path}/nowhere,{tmp_path}/shipped]")
    status, out, _ = program(monkeypatch, capsys, *line)
    source = next((tmp_path / "shipped" / "text").glob("full*"))
    machine = read(source).machine
    assert machine and status == 0 and f"full_softmax, seed 1: taken from {source} ({machine}): test perplexity" in out
    assert trained.jobs == [("full_softmax", 1), ("sampled_softmax", 1), ("sampled_softmax", 1)]
    copied = tmp_path / "outputs" / "text" / source.name
    assert sorted(file.name for file in copied.iterdir()) == sorted(study.KEPT)
    # A part of the budget is not enough, and neither are the same digits.
    line[1] = "study.layers=[full_softmax]"
    status, out, _ = program(monkeypatch, capsys, *line, f"run.root={tmp_path}/more", "budget.tokens=800")
    assert status == 0 and "taken from" not in out and len(trained.jobs) == 4
    environment = json.loads((source / "environment.json").read_text())
    other = environment["identity"][:8] + "0" * 56
    (source / "environment.json").write_text(json.dumps(environment | {"identity": other}))
    status, out, _ = program(monkeypatch, capsys, *line, f"run.root={tmp_path}/again")
    assert status == 0 and "taken from" not in out and len(trained.jobs) == 5


def test_a_trial_that_would_be_the_beginning_of_a_run_is_refused(words, trained, monkeypatch, capsys):
    line = ["study=smoke", "study.layers=[full_softmax]", *words, "schedule=constant", "evaluate.final_tokens=null"]
    line += ["evaluate.tokens=null", "study.search={rates:[0.5,1],budget:0.5,seed:1}"]
    status, _, err = program(monkeypatch, capsys, *line)
    assert status == 2 and "a trial and a run would share a folder" in err and not trained.jobs
    assert program(monkeypatch, capsys, *line, "evaluate.tokens=50")[0] == 0


def test_the_number_of_threads_is_that_of_the_study(words, trained, monkeypatch, capsys):
    line = ["study=smoke", "study.layers=[full_softmax]", *words]
    program(monkeypatch, capsys, *line, "study.threads=3")
    program(monkeypatch, capsys, *line, "study.seeds=[2]")
    assert trained.threads == ["3", None]


@pytest.mark.parametrize(
    "word, message",
    [
        ("study.search={rates:[],budget:0.2,seed:1}", "study.search.rates=[]: must be factors above 0"),
        ("study.search={rates:[1,-1],budget:0.2,seed:1}", "study.search.rates=[1, -1]: must be factors above 0"),
        ("study.search={rates:3,budget:0.2,seed:1}", "study.search.rates=3: must be a list"),
        ("study.search={rates:[1],budget:2,seed:1}", "study.search.budget=2: must be a share of the budget, in (0, 1]"),
        ("study.smoke={layers:[sig_sofmax],tokens:9}", "no such output layer; did you mean sig_softmax"),
        ("study.finished=here", "study.finished=here: must be a list"),
    ],
)
def test_mistakes_in_a_search_end_in_one_line(word, message, words, trained, monkeypatch, capsys, tmp_path):
    status, out, err = program(monkeypatch, capsys, "study=smoke", *words, word)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert not trained.jobs and not (tmp_path / "outputs").exists()


def test_the_best_of_some_infinite_losses_is_the_best_when_smoothed():
    def trial(nll, coverage, smoothed):
        valid = {"nll": nll, "coverage": coverage, "epsilon_perplexity": smoothed}
        return SimpleNamespace(run=SimpleNamespace(result={"valid": valid}))

    lost = SimpleNamespace(run=SimpleNamespace(result=None))
    assert study.choice([trial(3.0, 1.0, 9.0), trial(2.0, 1.0, 10.0), lost]) == 1
    assert study.choice([trial(float("inf"), 0.9, 9.0), trial(2.0, 1.0, 10.0), lost]) == 0
    assert study.choice([lost, lost]) is None
    assert study.choice([trial(3.0, 1.0, 9.0), SimpleNamespace(run=None)]) is None


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_runs_side_by_side_through_a_launcher_of_hydra(launcher, words, tmp_path):
    """Trials first, as the runs wait for them; one that crashes ends nothing else; what is finished is not launched."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    search = "study.search={rates:[1,1e33],budget:0.5,seed:1}"
    own = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    line = [sys.executable, "-m", "experiments.compare", "study=smoke", "study.threads=1", search, *own, *words]
    line += ["study.layers=[full_softmax,'sampled_softmax output.noise=bigram']", "optim.clip=null"]
    done = subprocess.run(line, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    # The bigram noise lacks its bigrams, which only the layer itself can say.
    assert done.returncode == 1 and "failed: sampled_softmax output.noise=bigram, seed 1, trial" in done.stdout
    assert "[1/6] full_softmax, seed 1, trial at rate x 1: test perplexity" in done.stdout, done.stderr
    assert "[2/6] full_softmax, seed 1, trial at rate x 1e+33: diverged" in done.stdout
    assert "[5/6] full_softmax, seed 1: test perplexity" in done.stdout
    found = record(tmp_path)
    assert len(found["runs"]) == 1 and found["layers"][0]["learning_rate"] == 0.1
    folder = tmp_path / "outputs" / found["runs"][0]
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1
    again = subprocess.run(line, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert again.stdout.count("done before") == 3 and again.stdout.count("launched") == 2
    assert not (CONFIGS.parent / ".submitit").exists() and not (CONFIGS.parent / "multirun").exists()
