"""Plans of many runs: what is trained, what is left, what is refused before anything is trained."""
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import pcnb.cli
from pcnb.cli import main
from pcnb.data import SETS, Dataset, load
from pcnb.recipes import RECIPES, MLPSetting
from pcnb.training import Diverged, read_metrics

RUN = "digits --epochs 1 --network.width 8 --network.depth 2 --no-twin"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def plan(text, *options):
    Path("p.txt").write_text(text)
    main(["plan", "p.txt", "--quiet", *options])


def refused(text, capsys, *options):
    "What is said of a plan that will not do."
    with pytest.raises(SystemExit) as stop: plan(text, *options)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


def trained(monkeypatch):
    "The runs that are trained, as (folder, epochs, resumed), instead of training them."
    calls = []
    def call(self):
        calls.append((str(self.out), self.epochs, self.resume))
        if self.epochs == 7: raise Diverged("the loss is nan")
    monkeypatch.setattr(pcnb.cli.Train, "__call__", call)
    return calls


def test_runs_are_trained_in_order_and_once(capsys):
    plan(f"b {RUN}\n\n# not this one\na {RUN} --seed 1  # nor this\n")
    out = capsys.readouterr().out
    assert [json.loads(Path("runs/p", n, "config.json").read_text())["seed"] for n in "ba"] == [0, 1]
    assert out.splitlines()[-1].split("|")[5].strip() == "2"  # two seeds in one row of the report
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
    plan(f"b {RUN}\na {RUN} --seed 1\n")
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before


def test_a_seed_for_all_runs_has_folders_of_its_own(capsys):
    plan(f"b {RUN}\nx/a {RUN} --seed 1 --optimiser.rate 0.01\n", "--seed", "2")
    assert [json.loads(Path("runs/p", n, "config.json").read_text())["seed"] for n in ("b-2", "x/a-2")] == [2, 2]
    assert sorted(str(f.parent) for f in Path("runs").rglob("config.json")) == ["runs/p/b-2", "runs/p/x/a-2"]


def test_a_seed_for_all_makes_no_run_twice(capsys):
    assert "differ in nothing but their seeds" in refused(f"a {RUN}\nb {RUN} --seed 1\n", capsys, "--seed", "2")
    assert not Path("runs").exists()


def test_a_stopped_run_goes_on(monkeypatch):
    save, text = pcnb.training.save_checkpoint, f"a {RUN.replace('--epochs 1', '--epochs 2')}\n"
    def stop(path, epoch, tree):
        save(path, epoch, tree)
        raise KeyboardInterrupt
    monkeypatch.setattr(pcnb.training, "save_checkpoint", stop)
    with pytest.raises(SystemExit) as stopped: plan(text)
    assert stopped.value.code == 130 and not Path("runs/p/a/summary.json").exists()
    monkeypatch.setattr(pcnb.training, "save_checkpoint", save)
    first = read_metrics(Path("runs/p/a/metrics.jsonl"))
    plan(text)
    assert read_metrics(Path("runs/p/a/metrics.jsonl"))[0] == first[0] and Path("runs/p/a/summary.json").exists()


def test_a_run_without_its_twin_is_not_finished():
    text = f"a {RUN.replace('--no-twin', '--twin')}\n"
    plan(text)
    (Path("runs/p/a/twin/summary.json")).unlink()
    plan(text)
    assert json.loads(Path("runs/p/a/twin/summary.json").read_text())["rule"] == "backprop"


def test_folders_beginnings_and_divergence(monkeypatch, capsys):
    calls = trained(monkeypatch)
    with pytest.raises(SystemExit) as stopped: plan("mlp/a digits --epochs 7\nmlp/b digits --epochs 2\ncnn/a digits --epochs 3\n", "--out", "there", "--only", "mlp")
    assert stopped.value.code == 1 and calls == [("there/mlp/a", 7, False), ("there/mlp/b", 2, False)]
    assert "there/mlp/a: the loss is nan" in capsys.readouterr().err


def test_perceptrons_come_before_convolutions(monkeypatch):
    calls = trained(monkeypatch)
    plan("a mnist-cnn\nb digits --epochs 2\nc cifar10-cpu\nd mnist-mlp\n")
    assert [folder[-1] for folder, *_ in calls] == ["b", "d", "a", "c"]


def test_runs_that_share_a_twin_are_reported(capsys):
    "Each has a twin inside; these are the same run, and one of them is shown beside both."
    plan("".join(f"{name} {RUN.replace('--no-twin', '--twin')} --energy.output-precision {p}\n" for name, p in (("a", 0.1), ("b", 0.2))))
    twin, other = (json.loads(Path("runs/p", n, "twin/summary.json").read_text())["test_top1"] for n in "ab")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| digits")]
    assert twin == other and len(rows) == 2 and all(row[8].strip() == f"{100 * twin:.2f}" for row in rows)


def test_a_finished_run_whose_checkpoint_is_gone_is_kept():
    text = f"a {RUN.replace('--no-twin', '--twin')}\n"
    plan(text)
    for name in ("checkpoint.eqx", "twin/summary.json"): Path("runs/p/a", name).unlink()
    kept = {name: Path("runs/p/a", name).read_bytes() for name in ("summary.json", "weights.eqx", "config.json", "metrics.jsonl")}
    plan(text)
    assert Path("runs/p/a/twin/summary.json").exists() and kept == {name: Path("runs/p/a", name).read_bytes() for name in kept}


def test_a_refused_line_can_be_corrected(capsys):
    assert "precision has 3 values" in refused(f"a {RUN} --energy.precision 1 2 3\n", capsys)
    assert not list(Path("runs/p/a").iterdir())
    plan(f"a {RUN}\n")
    assert Path("runs/p/a/summary.json").exists()


def test_a_run_in_training_is_not_taken_over(capsys):
    "Its first epoch looks like that of a run that was stopped."
    main(["train", *RUN.split(), "--quiet", "--out", "r"])
    for path in Path("r").iterdir():
        if path.name != "config.json": shutil.rmtree(path) if path.is_dir() else path.unlink()
    for how in ([], ["--resume"], ["--overwrite"]):
        with pcnb.recipes._lock(Path("r")), pytest.raises(SystemExit): main(["train", *RUN.split(), "--quiet", "--out", "r", *how])
        assert "r is being trained by another process" in capsys.readouterr().err and [p.name for p in Path("r").iterdir()] == ["config.json"]
    main(["train", *RUN.split(), "--quiet", "--out", "r"])


@pytest.mark.parametrize("text, said", [
    ("", "p.txt has no runs"), ("# nothing\n", "p.txt has no runs"),
    ("a digits\nb digit\n", "p.txt, line 2: recipe 'digit' is unknown; did you mean 'digits'?"),
    ("a digits --epoch 3\n", "p.txt, line 1: Unrecognized options: --epoch"),
    ("a\n", "p.txt, line 1: the recipe comes first"), ("a digits 'x\n", "p.txt, line 1: No closing quotation"),
    ("a digits\na mnist-mlp\n", "p.txt, line 2: the name a comes twice"),
    ("../a digits\n", "p.txt, line 1: ../a leads out of the plan's folder"), ("/a digits\n", "/a leads out of"),
    ("a digits --out x\n", "p.txt, line 1: --out, --data-dir, --overwrite, --resume and --quiet are the plan's"),
])
def test_bad_plans(text, said, capsys, monkeypatch):
    calls = trained(monkeypatch)
    assert said in refused(text, capsys)
    assert calls == [] and not Path("runs").exists()


def test_other_refusals(capsys, monkeypatch):
    plan(f"a {RUN}\n")
    calls = trained(monkeypatch)
    assert "runs/p/a holds a run of other settings than the plan's" in refused(f"z {RUN}\na {RUN} --seed 2\n", capsys)
    assert "no run whose name begins with 'q'" in refused(f"a {RUN}\n", capsys, "--only", "q")
    with pytest.raises(SystemExit): main(["plan", "none.txt"])
    assert "none.txt cannot be read as a text file: No such file" in capsys.readouterr().err
    assert calls == []


PLANS = Path(__file__).resolve().parent.parent / "plans"

@pytest.mark.parametrize("path", sorted(PLANS.glob("*.txt")), ids=lambda p: p.stem)
def test_the_plans_of_this_repository_mean_runs_that_can_be_built(path):
    runs = pcnb.cli._planned(path)
    assert len({(r.name, r.rule, r.seed, repr(r)) for r in runs.values()}) == len(runs)  # no run twice
    for run in runs.values(): built(run, run.rule, shapes=not isinstance(run.network, MLPSetting))  # hundreds of layers take long


@functools.cache
def images(name):
    "Two pictures in the form of a set."
    entry = SETS.get(name)
    if entry is None: return load(name).take(2)
    rng, n = np.random.default_rng(0), len(entry.classes) if isinstance(entry.classes, tuple) else entry.classes or 200
    pictures = rng.integers(0, 256, (2, *entry.shape), np.uint8)
    return Dataset(name, pictures, np.arange(2), pictures, np.arange(2), tuple(map(str, range(n))))


def built(recipe, rule, shapes=True):
    "All that a recipe builds before it trains; of the weights only the shapes."
    pcnb.recipes.build_rule(recipe, rule)
    data = images(recipe.dataset)
    recipe.augment.build(data)
    recipe.optimiser.build(10)
    return shapes and shapes_of(recipe.network, recipe.energy if rule != "backprop" else RECIPES["digits"].energy, recipe.joint, recipe.statistics_examples, recipe.dataset)


@functools.cache
def shapes_of(network, energy, joint, measured, dataset):
    "Shapes of the states of a network on a set's images."
    recipe, data = replace(RECIPES["digits"], dataset=dataset, network=network, energy=energy, joint=joint, statistics_examples=measured), images(dataset)
    scale = pcnb.recipes._scale(recipe, data)
    net = eqx.filter_eval_shape(lambda: pcnb.recipes._network(recipe, "pc", data, scale, jax.random.key(0)))
    assert net.shapes[-1] == (data.n_classes,)
    return net.shapes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_network(name):
    "On 16 directions of whitened patches and their negatives, or the colours there are."
    recipe = RECIPES[name]
    *size, colours = images(recipe.dataset).image_shape
    assert built(recipe, "pc")[0] == (*size, 32 if getattr(recipe.network, "whiten", False) else colours)


def test_a_refused_run_does_not_stop_the_others(capsys):
    said = refused(f"a {RUN} --augment.crop 20\nb {RUN}\n", capsys)
    assert "runs/p/a was not trained" in said and "20" in said
    assert Path("runs/p/b/summary.json").exists()


def test_a_run_stopped_in_its_first_epoch_begins_anew(monkeypatch):
    def stop(*args, **how): raise KeyboardInterrupt
    for again in range(2):  # with --resume, as the message says, and without
        with monkeypatch.context() as m:
            m.setattr(pcnb.training, "_epoch", stop)
            with pytest.raises(SystemExit): main(["train", *RUN.split(), "--quiet", "--out", "r"])
        assert Path("r/config.json").exists()
        main(["train", *RUN.split(), "--quiet", "--out", "r", *["--resume"] * again])
        assert Path("r/summary.json").exists()
        shutil.rmtree("r")


def test_a_folder_with_more_than_a_stopped_run_is_left_alone(capsys):
    for name, text in (("mine", '{"recipe": "cake"}'), ("other", '{"name": "not a run"}')):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    Path("mine/thesis.txt").write_text("years of work")
    for name in ("mine", "other"):
        with pytest.raises(SystemExit): main(["train", *RUN.split(), "--quiet", "--out", name])
        assert "is not empty" in capsys.readouterr().err
        with pytest.raises(SystemExit): main(["train", *RUN.split(), "--quiet", "--out", name, "--overwrite"])
        assert f"{name} is not a run's folder" in capsys.readouterr().err
    assert Path("mine/thesis.txt").read_text() == "years of work" and "not a run" in Path("other/config.json").read_text()


def test_a_setting_without_effect_is_the_same_run():
    "A backward term of weight 0 is written down as none."
    text = f"a {RUN} --energy.backward tied\n"
    plan(text)
    plan(text)
