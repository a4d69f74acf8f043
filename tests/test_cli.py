"""The command line: what it does, and that bad input is answered in a line and leaves runs as they were."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

import pcnb.training
from pcnb.cli import COMMANDS, _training, main
from pcnb.data import load
from pcnb.diagnostics import read_records
from pcnb.recipes import RECIPES, AdamSetting, CNNSetting, GradientDescentSetting, from_json, to_json
from pcnb.training import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TINY = ["train", "digits", "--epochs", "2", "--network.width", "8", "--network.depth", "2", "--train-examples", "256", "--quiet", "--no-twin"]
TIMES = {"seconds", "elapsed", "examples_per_second", "seconds_per_epoch", "compile_seconds"}
WHAT = ["checkpoint.eqx", "config.json", "figures", "metrics.jsonl", "scale.eqx", "summary.json", "weights.eqx"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise socket.gaierror("the network is blocked in this test")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "A finished run, which no test changes."
    out = tmp_path_factory.mktemp("cli") / "run"
    main([*TINY, "--out", str(out)])
    return out


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def summary(out): return json.loads((out / "summary.json").read_text())


def timeless(values): return {k: v for k, v in values.items() if k not in TIMES}


def copy(run, to, **changed):
    "A copy of a run whose files of these names (a dot is __) have other content."
    for p, content in files(run).items():
        new = to / p.relative_to(run)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(changed.get(p.name.replace(".", "__"), content))
    return to


@pytest.fixture
def refuse(capsys):
    "Runs a command that must be refused; gives its message."
    def refuse(*argv, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop: main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert stop.value.code == code
        assert out == "" and err.startswith("pcnb: ") and err.count("\n") <= 2 and "Traceback" not in err, err
        return err
    return refuse


@pytest.fixture
def printed(capsys):
    "Runs a command that must succeed; gives what it prints."
    def printed(*argv):
        main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert err == ""
        return out
    return printed


# Bad input. `RUN` stands for a finished run, which must not change.

@pytest.mark.parametrize("argv, said", [
    (["--no-such"], "command '--no-such' is unknown"),
    (["evalute", "RUN"], "did you mean 'evaluate'?"),
    (["train"], "the recipe comes first"),
    (["train", "--epochs", "3", "digits"], "the recipe comes first"),
    (["train", "mnist-mpl", "--out", "RUN", "--overwrite"], "did you mean 'mnist-mlp'?"),
    (["recipes", "mnist-mpl"], "did you mean 'mnist-mlp'?"),
    (["recipes", "digits", "mnist-mlp"], "Unrecognized options: mnist-mlp"),
    (["data", "--data-dri", "x"], "did you mean --data-dir?"),
    (["evaluate"], "Missing from pcnb evaluate: RUN"),
    (["evaluate", "RUN/none"], "does not exist"),
    (["evaluate", "RUN/figures"], "a run's folder?"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_command(run, refuse, argv, said):
    before = files(run)
    message = refuse(*(a.replace("RUN", str(run)) for a in argv))
    assert said in message
    assert files(run) == before


@pytest.mark.parametrize("options, said", [
    ("--epoch 3", "did you mean --epochs?"),
    ("--network.wdth 3", "did you mean --network.width"),
    ("--network.channels 3 4", "Unrecognized options: --network.channels, 3, 4"),
    ("inference:newton", "Available subcommands: inference:gauss-newton"),
    ("--name other", "Unrecognized options: --name, other"),
    ("--epochs many", "Error parsing --epochs"),
    ("--epochs 1.5", "Error parsing --epochs"),
    ("--optimiser.rate fast", "Error parsing --optimiser.rate"),
    ("--network.width", "Missing value for argument '--network.width'"),
    ("--rule bp", "invalid choice 'bp' for argument '--rule'"),
    ("--dataset digit", "invalid choice 'digit' for argument '--dataset'"),
    ("--resume", "--resume and --overwrite exclude each other"),
    ("--epochs -1", "epochs is -1"),
    ("--epochs 0", "epochs is 0"),
    ("--batch-size 0", "batch_size is 0; expected 1 to 256"),
    ("--batch-size 257", "batch_size is 257; expected 1 to 256"),
    ("--train-examples 1438", "train_examples is 1438; expected at least 1 and at most 1437, of 1437 training examples"),
    ("--validation 1437", "validation is 1437; expected at least 0 and at most 1436, of 1437 training examples"),
    ("--network.width 0", "width is 0"),
    ("--network.depth 0", "depth is 0"),
    ("--energy.precision -1", "precision is -1.0"),
    ("--optimiser.rate -0.1", "rate is -0.1"),
    ("--augment.degrees 400", "400"),
    ("--rule ipc", "rule ipc needs gradient descent"),
    ("inference:gauss-newton --inference.steps -1", "steps is -1"),
    ("inference:gauss-newton --inference.cg-steps -1", "cg_steps is -1"),
    ("inference:gradient-descent --inference.steps -1", "steps is -1"),
    ("inference:gradient-descent --inference.rate -0.3", "rate is -0.3"),
    ("inference:error-descent --inference.steps -1", "steps is -1"),
    ("inference:sweep --inference.sweeps -1", "sweeps is -1"),
])
def test_bad_option_replaces_nothing(run, refuse, options, said):
    before = files(run)
    assert said in refuse(*TINY, "--out", run, "--overwrite", *options.split())
    assert files(run) == before


def test_run_is_neither_replaced_nor_continued_with_other_settings(run, refuse):
    before = files(run)
    assert "is not empty" in refuse(*TINY, "--out", run)
    assert "another seed" in refuse(*TINY, "--out", run, "--resume", "--seed", 1)
    assert "another epochs (2, now 3)" in refuse(*TINY, "--out", run, "--resume", "--epochs", 3)
    assert "another rule" in refuse(*TINY, "--out", run, "--resume", "--rule", "backprop")
    assert files(run) == before


def test_folders_that_will_not_do(tmp_path, refuse):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refuse(*TINY, "--out", file)
    assert "is a file" in refuse(*TINY, "--out", file, "--overwrite")
    assert "cannot write to" in refuse(*TINY, "--out", file / "run")
    assert "no checkpoint.eqx to resume from" in refuse(*TINY, "--out", tmp_path / "new", "--resume")
    assert "not a run's folder" in refuse(*TINY, "--out", tmp_path, "--overwrite")
    assert files(tmp_path) == {file: b"mine"}


def test_error_of_the_system_is_a_line(tmp_path, refuse, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device", "checkpoint.eqx")
    monkeypatch.setattr(pcnb.training, "save_checkpoint", full)
    assert "No space left on device: 'checkpoint.eqx'" in refuse(*TINY, "--out", tmp_path / "run")


def test_missing_data_set(run, tmp_path, refuse):
    (tmp_path / "data").mkdir()
    before = files(run)
    message = refuse("train", "mnist-mlp", "--data-dir", tmp_path / "data", "--out", run, "--overwrite")
    assert "mnist is not complete" in message and "Put there" in message
    assert files(run) == before


@pytest.mark.parametrize("name, content, said", [
    ("config__json", b"{", "config.json is damaged"),
    ("config__json", b"[]", "config.json is damaged"),
    ("config__json", b"\xff\xfe", "config.json is damaged"),
    ("config__json", b"{}", "not a recipe"),
    ("config__json", b'{"settings": {"dataset": "digits", "size": 3}}', "not a recipe"),
    ("config__json", b'{"settings": {"dataset": "digits", "network": {"kind": "RNN"}}}', "not a recipe"),
    ("weights__eqx", b"", "weights.eqx cannot be read"),
    ("weights__eqx", b'{"epoch": 2}\n\x93NUMPY', "weights.eqx cannot be read"),
])
def test_evaluate_says_what_is_damaged(run, tmp_path, refuse, name, content, said):
    assert said in refuse("evaluate", copy(run, tmp_path / "run", **{name: content}))


@pytest.mark.parametrize("name", ["config__json", "checkpoint__eqx", "metrics__jsonl"])
def test_resume_says_what_is_damaged(run, tmp_path, refuse, name):
    out = copy(run, tmp_path / "run", **{name: b"{"})
    before = files(out)
    assert name.replace("__", ".") in refuse(*TINY, "--out", out, "--resume")
    assert files(out) == before


@pytest.mark.parametrize("options, said", [
    ("--energy.precision 1 2 3", "precision has 3 values"), ("--augment.crop 8", "crop is 8; the images have a side of 8 pixels"), ("--energy.precision 0", "need precisions > 0; got 0"), ("--accumulate 3", "accumulate is 3; expected 1 to"),
    ("--batch-size 200 --accumulate 2", "accumulate is 2; expected 1 to 1"), ("--network.mupc --network.skips --network.gain 0.5", "gain is 0.5, but Depth-muP sets the size"),
])
def test_settings_that_do_not_fit_each_other_replace_no_run(run, tmp_path, refuse, options, said):
    out = copy(run, tmp_path / "run")
    before = files(out)
    batch = [] if "batch" in options else ["--batch-size", 128]
    assert said in refuse(*TINY, *batch, "--out", out, "--overwrite", *options.split())
    assert files(out) == before


def test_a_finished_run_that_is_resumed_says_what_it_said(run, tmp_path, printed, monkeypatch):
    out = copy(run, tmp_path / "run")
    before = files(out)
    monkeypatch.setattr(pcnb.recipes, "_commit", lambda: "another")
    printed(*TINY, "--out", out, "--resume")
    assert files(out) == before


def test_records_of_an_epoch_whose_checkpoint_was_lost_are_made_again(tmp_path, refuse, printed):
    "A crash after an epoch's metrics and before its checkpoint."
    out, argv = tmp_path / "run", [*TINY, "--batch-size", 64, "--record-every", 1]
    printed(*argv, "--out", out)
    straight = [json.loads(line)["step"] for line in (out / "layers.jsonl").read_text().splitlines()]
    assert straight == list(range(1, 9))
    short = tmp_path / "short"
    epoch, saved = pcnb.training.save_checkpoint, []
    with pytest.MonkeyPatch.context() as patch:
        def lost(path, *what):
            if saved: raise KeyboardInterrupt
            saved.append(epoch(path, *what))
        patch.setattr(pcnb.training, "save_checkpoint", lost)
        refuse(*argv, "--out", short, code=130)
    assert len(read_metrics(short / "metrics.jsonl")) == 2
    printed(*argv, "--out", short, "--resume")
    assert [json.loads(line)["step"] for line in (short / "layers.jsonl").read_text().splitlines()] == straight


@pytest.mark.parametrize("rule", ["pc", "ipc"])
def test_the_plain_bidirectional_form_by_gradient_descent(rule, tmp_path, printed):
    printed(*TINY, "--out", tmp_path / "run", "--epochs", 1, "--rule", rule, "--energy.alpha", 0.1, "--energy.no-difference", "inference:gradient-descent", "--inference.steps", 2)
    assert 0 < summary(tmp_path / "run")["energy_ratio"] < 1  # inference has begun, and lowers the energy


def test_divergence_is_a_failure_of_its_own(tmp_path, refuse):
    assert "smaller learning rate" in refuse(*TINY, "--out", tmp_path / "run", "--optimiser.rate", "1e30", code=1)


# Commands that do what they say

@pytest.mark.filterwarnings("ignore:inference moved no state")
@pytest.mark.parametrize("steps", [0, 1])
def test_the_table_says_where_inference_moved_nothing(steps, tmp_path, printed):
    text = printed(*TINY, "--network.depth", "3", "--inference.steps", steps, "--out", tmp_path / "run")
    assert ("moved no state" in text) == (steps == 0)


def test_train_writes_a_run_that_evaluate_agrees_with(run, printed):
    assert sorted(p.name for p in run.iterdir()) == WHAT
    first, second = printed("evaluate", run).splitlines()
    assert first == f"{run}: 360 test examples of digits"
    s, last = summary(run), read_metrics(run / "metrics.jsonl")[-1]
    assert second == f"top-1 {100 * s['test_top1']:.2f} %, top-5 {100 * s['test_top5']:.2f} %, squared-error loss {last['test_loss']:.4f}"
    for key in ("test_top1", "test_top5", "train_top1", "relative_residual", "energy_ratio", "sensitivity", "passes"): assert s[key] == last[key]
    assert s["cosine_to_backprop"]["layers"] == pytest.approx(last["cosine"], abs=1e-6) and s["cosine_to_backprop"]["mean"] == pytest.approx(sum(last["cosine"]) / 2, abs=1e-6)


def test_table_shows_the_summary(tmp_path, printed):
    out = tmp_path / "run"
    rows = {line[:25].strip(): line[25:].strip() for line in printed(*TINY, "--out", out, "--validation", 100).splitlines()}
    s = summary(out)
    assert rows["validation top-1 (%)"] == f"{100 * s['test_top1']:.2f}" and rows["validation top-5 (%)"] == f"{100 * s['test_top5']:.2f}"
    assert float(rows["relative residual"]) == pytest.approx(s["relative_residual"], rel=1e-3)
    assert float(rows["energy ratio"]) == pytest.approx(s["energy_ratio"], rel=1e-3)
    assert float(rows["sensitivity"]) == pytest.approx(s["sensitivity"], rel=1e-3)
    assert rows["run"] == str(out)
    assert "100 validation examples, held out of the training set of digits" in printed("evaluate", out)


def test_config_gives_back_the_recipe(run):
    config = json.loads((run / "config.json").read_text())
    recipe = from_json(config["settings"])
    assert recipe == replace(RECIPES["digits"], epochs=2, network=replace(RECIPES["digits"].network, width=8, depth=2), train_examples=256)
    assert json.loads(json.dumps(to_json(recipe))) == config["settings"]
    assert (config["recipe"], config["rule"], config["seed"], config["data"]) == ("digits", "pc", 0, load("digits").take(256).source)


def test_stopped_run_goes_on_to_the_same_end(run, tmp_path, refuse, printed, monkeypatch):
    epoch = pcnb.training._epoch
    def stopped(*args):
        if any(isinstance(a, str) and a == "epoch 2/2" for a in args): raise KeyboardInterrupt
        return epoch(*args)
    out = tmp_path / "run"
    monkeypatch.setattr(pcnb.training, "_epoch", stopped)
    assert refuse(*TINY, "--out", out, code=130) == "pcnb: stopped; go on with --resume\n"
    assert len(read_metrics(out / "metrics.jsonl")) == 1
    assert "weights.eqx" in refuse("evaluate", out)
    monkeypatch.setattr(pcnb.training, "_epoch", epoch)
    printed(*TINY, "--out", out, "--resume")
    assert list(map(timeless, read_metrics(out / "metrics.jsonl"))) == list(map(timeless, read_metrics(run / "metrics.jsonl")))
    assert timeless(summary(out)) == timeless(summary(run))
    assert (out / "weights.eqx").read_bytes() == (run / "weights.eqx").read_bytes()
    once, (again,) = json.loads((run / "config.json").read_text()), json.loads((out / "config.json").read_text())["resumed"]
    assert "resumed" not in once and again == {k: once[k] for k in again.keys() - {"epoch"}} | {"epoch": 1, "started": again["started"]} and {"device", "commit", "versions", "matmul_precision"} < again.keys()


def test_a_run_that_went_on_elsewhere_says_so(run, tmp_path, printed, refuse, monkeypatch):
    "In its record and its summary, for each place in which it trained an epoch; a finished run is not marked by being asked for again."
    argv, epoch, here = [*TINY, "--epochs", 3, "--out", tmp_path / "run"], pcnb.training._epoch, pcnb.recipes.environment
    def go_on(at, stop, *how, **where):
        def stopped(*args):
            if f"epoch {stop}/3" in [a for a in args if isinstance(a, str)]: raise KeyboardInterrupt
            return epoch(*args)
        with monkeypatch.context() as m:
            m.setattr(pcnb.recipes, "environment", lambda: here() | where)
            m.setattr(pcnb.training, "_epoch", stopped)
            printed(*argv, *how) if stop == 4 else refuse(*argv, *how, code=130)
    go_on(1, 2, commit=None)
    go_on(2, 2, "--resume", device="abacus")  # where it trains nothing
    go_on(2, 3, "--resume", device="TPU", commit="abc")
    for _ in range(2): go_on(3, 4, "--resume", commit="abc")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [(r["epoch"], r["device"]) for r in config["resumed"]] == [(1, "TPU"), (2, "cpu")]
    assert summary(tmp_path / "run")["device"] == "cpu, TPU" and summary(tmp_path / "run")["commit"] == "abc"


@pytest.mark.parametrize("left", [["metrics.jsonl", "scale.eqx", ".checkpoint.eqx.part"], ["metrics.jsonl", "scale.eqx"], [".metrics.jsonl.part", "scale.eqx"]])
def test_a_run_stopped_as_it_wrote_its_first_epoch_begins_anew(left, run, tmp_path, printed, refuse):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((run / "config.json").read_bytes())
    for name in left: (out / name).write_bytes((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0] if name == "metrics.jsonl" else b"half")
    (out / "notes.part").write_text("mine")
    assert "--overwrite" in refuse(*TINY, "--out", out)  # with something of the user's in it
    (out / "notes.part").unlink()
    printed(*TINY, "--out", out, "--resume")
    assert sorted(p.name for p in out.iterdir()) == WHAT


def test_two_processes_do_not_go_on_with_one_run(run, tmp_path, refuse):
    "Also after the first has written where it goes on."
    out = copy(run, tmp_path / "run")
    (out / "summary.json").unlink()
    with pcnb.recipes._lock(out):
        pcnb.recipes._write_json(out / "config.json", json.loads((out / "config.json").read_text()) | {"resumed": []})
        assert "is being trained by another process" in refuse(*TINY, "--out", out, "--resume")


def test_lost_weights_come_back_from_the_checkpoint(run, tmp_path, printed, refuse):
    out = copy(run, tmp_path / "run")
    (out / "weights.eqx").unlink()
    assert "Go on with it by --resume" in refuse("evaluate", out)
    printed(*TINY, "--out", out, "--resume")
    assert files(out).values() and {p.name: b for p, b in files(out).items()} == {p.name: b for p, b in files(run).items()}


def test_records_go_on_behind_a_line_that_was_cut_off(tmp_path, printed, refuse, monkeypatch):
    out, argv, epoch = tmp_path / "run", [*TINY, "--record-every", 2], pcnb.training._epoch
    def stopped(*args):
        if "epoch 2/2" in [a for a in args if isinstance(a, str)]: raise KeyboardInterrupt
        return epoch(*args)
    monkeypatch.setattr(pcnb.training, "_epoch", stopped)
    refuse(*argv, "--out", out, code=130)
    monkeypatch.setattr(pcnb.training, "_epoch", epoch)
    first = read_records(out / "layers.jsonl")
    with open(out / "layers.jsonl", "a") as f: f.write('{"step": 6, "ener')
    assert "another record_every" in refuse(*argv[:-1], 3, "--out", out, "--resume")
    printed(*argv, "--out", out, "--resume")
    assert [r["step"] for r in read_records(out / "layers.jsonl")] == [1, 2, 4, 6, 8] and read_records(out / "layers.jsonl")[:3] == first


def test_other_files_than_those_of_the_run_are_told(tmp_path, printed, refuse, monkeypatch):
    of = lambda name: replace(load("digits"), source={"set": "digits", "verified": False, "files": {"digits-files/": name * 64}})
    monkeypatch.setattr(pcnb.recipes, "load", lambda *_: of("1"))
    printed(*TINY, "--out", tmp_path / "run")
    printed("evaluate", tmp_path / "run")
    monkeypatch.setattr(pcnb.recipes, "load", lambda *_: of("2"))
    assert "was trained on other files of digits: digits-files/ 111111111111, now digits-files/ 222222222222" in refuse(*TINY, "--out", tmp_path / "run", "--resume")
    with pytest.warns(UserWarning, match="was trained on other files of digits"): printed("evaluate", tmp_path / "run")
    verified = replace(of("3"), source=of("3").source | {"verified": True})  # as an archive beside unpacked files
    monkeypatch.setattr(pcnb.recipes, "load", lambda *_: verified)
    assert "now digits-files/ 333333333333" in refuse(*TINY, "--out", tmp_path / "run", "--resume")


def test_a_run_without_weights_asks_for_no_data(run, tmp_path, refuse, monkeypatch):
    out = copy(run, tmp_path / "run")
    (out / "weights.eqx").unlink()
    monkeypatch.setattr(pcnb.recipes, "load", lambda *_: pytest.fail("it was loaded"))
    assert "has no weights.eqx" in refuse("evaluate", out)


def test_damaged_records_are_named(run, tmp_path, refuse):
    for i, (name, content, command, said) in enumerate((
            ("summary.json", {}, "report", "summary.json is damaged: it has no cosine_to_backprop and no device"), ("config.json", {"recipe": "digits", "rule": "pc"}, "evaluate", "config.json cannot be read: not a recipe"),
            ("metrics.jsonl", {}, "report", "metrics.jsonl is damaged: a line is not the metrics of an epoch"))):
        out = copy(run, tmp_path / str(i), **{name.replace(".", "__"): json.dumps(content).encode()})
        assert said in refuse(command, out)


def test_the_table_tells_a_rise_of_the_energy_from_rounding(run):
    s = summary(run)
    table = lambda **changed: pcnb.cli._table({run: s | changed})
    for ratio, residual, told in ((1.01, 0.1, True), (1.0004, 3.7, True), (1.0004, 0.07, False), (0.9, 1.3, False)): assert ("raised the energy" in table(energy_ratio=ratio, relative_residual=residual)) == told
    assert table(test_top1_flip=0.4321).splitlines()[3].split() == ["with", "the", "mirror", "image", "(%)", "43.21"] and "mirror" not in table()


def test_a_run_can_be_scored_without_its_training_images_in_memory(run, printed, monkeypatch):
    asked = []
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream: asked.append(stream) or load(name))
    assert printed("evaluate", run) == printed("evaluate", run, "--stream") and asked == [False, True]


def test_overwrite_replaces(run, tmp_path, printed):
    out = copy(run, tmp_path / "run")
    (out / "note.txt").write_text("old")
    printed(*TINY, "--out", out, "--overwrite", "--seed", 1, "--epochs", 1)
    assert sorted(p.name for p in out.iterdir()) == WHAT
    assert summary(out)["seed"] == 1 and len(read_metrics(out / "metrics.jsonl")) == 1


def test_twin_is_trained_beside_and_resumed(tmp_path, refuse, printed, monkeypatch):
    argv = [*TINY[:-1], "--out", tmp_path / "run", "--epochs", 1]  # of digits: with a twin
    run_epoch, stop = pcnb.training._epoch, [False, True]
    def stop_second(*args):
        if stop.pop(0): raise KeyboardInterrupt
        return run_epoch(*args)
    monkeypatch.setattr(pcnb.training, "_epoch", stop_second)
    refuse(*argv, code=130)
    monkeypatch.setattr(pcnb.training, "_epoch", run_epoch)
    twin = tmp_path / "run" / "twin"
    assert sorted(p.name for p in twin.iterdir()) == ["config.json", "scale.eqx"]
    figure = (tmp_path / "run" / "figures" / "accuracy.png").read_bytes()
    table = printed(*argv, "--resume")
    assert (tmp_path / "run" / "figures" / "accuracy.png").read_bytes() != figure
    s, t = summary(tmp_path / "run"), summary(twin)
    assert (s["rule"], t["rule"]) == ("pc", "backprop") and t["cosine_to_backprop"]["mean"] == pytest.approx(1, abs=1e-5)
    assert table.splitlines()[1].split()[-2:] == [f"{100 * s['test_top1']:.2f}", f"{100 * t['test_top1']:.2f}"]
    assert timeless_table(printed(*argv, "--resume")) == timeless_table(table)  # nothing is left to do


def timeless_table(text): return [line.split() for line in text.splitlines() if not line.startswith("seconds")]


def test_backpropagation_has_cosine_1_and_no_twin(tmp_path, printed):
    table = printed(*TINY[:-1], "--out", tmp_path / "run", "--epochs", 1, "--rule", "backprop")
    assert summary(tmp_path / "run")["cosine_to_backprop"]["layers"] == pytest.approx([1, 1], abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == WHAT
    assert [line for line in table.splitlines() if line.startswith("cosine")][0].split()[-1] == "1.0000"


def test_the_rate_of_an_incremental_run_ends_with_it(tmp_path, monkeypatch):
    "Four batches of 64, two epochs, three steps each."
    asked, build = [], AdamSetting.build
    monkeypatch.setattr(AdamSetting, "build", lambda self, steps: asked.append(steps) or build(self, steps))
    main([str(a) for a in (*TINY, "--out", tmp_path / "run", "--rule", "ipc", "inference:gradient-descent", "--inference.steps", 3)])
    assert set(asked) == {2 * 4 * 3}


@pytest.mark.parametrize("options, said", [(("--seed", 2**32), "seed is 4294967296; expected a number from 0 to 2**32 - 1"), (("--seed", -1), "seed is -1"), (("--record-every", -1), "record_every is -1"),
                                           (("--train-examples", 0), "train_examples is 0; expected at least 1"), (("--validation", -1), "validation is -1; expected at least 0")])
def test_numbers_out_of_range(options, said, refuse, tmp_path):
    assert said in refuse(*TINY, "--out", tmp_path / "run", *options)


def test_incremental_rule_with_chosen_inference(tmp_path, printed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(*TINY, "--rule", "ipc", "--epochs", 1, "inference:gradient-descent", "--inference.steps", 3, "--inference.rate", 0.2, "--optimiser.rate", 1e-3)
    config = json.loads(Path("runs/digits-ipc-0/config.json").read_text())  # the default of --out
    recipe = from_json(config["settings"])
    assert recipe.inference == GradientDescentSetting(3, 0.2) and recipe.optimiser == AdamSetting(1e-3)
    assert summary(Path("runs/digits-ipc-0"))["rule"] == "ipc"


def test_peers_remedies_from_the_command_line(tmp_path, printed):
    out = tmp_path / "run"
    table = printed(*TINY, "--out", out, "--epochs", 1, "--rule", "cpc", "--held", "--energy.alpha", 0.1, "--energy.backward", "learned",
                    "inference:gradient-descent", "--inference.steps", 2, "--inference.rate", 0.7, "--inference.schedule", "spike")
    assert "centred pc" in table.splitlines()[0]
    recipe, s = from_json(json.loads((out / "config.json").read_text())["settings"]), summary(out)
    assert (recipe.held, recipe.energy.backward, recipe.inference) == (True, "learned", GradientDescentSetting(2, 0.7, schedule="spike"))
    # a layer of 64 x 8, the output of 8 x 10, and back
    assert (s["rule"], s["parameters"], s["decoder_parameters"]) == ("cpc", 64 * 8 + 8 + 8 * 10 + 10, 8 * 64 + 64 + 10 * 8 + 8)


def test_recipes_lists_every_setting(printed):
    for name, recipe in RECIPES.items():
        text = printed("recipes", name)
        parts = [recipe, *(v for f in fields(recipe) if is_dataclass(v := getattr(recipe, f.name)))]
        for part in parts:
            for f in fields(part):
                if is_dataclass(v := getattr(part, f.name)): continue
                v = " ".join(map(str, v)) or "none" if isinstance(v, tuple) else v
                assert f"{f.name.replace('_', '-')} {v}" in text.replace("\n", ","), (name, f.name)
        assert text in printed("recipes")


@pytest.mark.parametrize("name", ["mnist-mlp16-sgd", "cifar10-equilibrium", "digits"])
def test_every_switch_has_two_positions(name):
    "Whatever the recipe's own value, of the inference and optimiser that need not be named too."
    recipe = RECIPES[name]
    parts = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    switches = [(group, f.name) for group, part in {"": recipe, **parts}.items() if is_dataclass(part) for f in fields(part) if isinstance(getattr(part, f.name), bool)]
    assert ("optimiser", "decay_all") in switches
    for group, switch in switches:
        for value in (True, False):
            option = f"--{group}{'.' * bool(group)}{'' if value else 'no-'}{switch.replace('_', '-')}"
            run = _training([name, option])
            assert getattr(getattr(run, group) if group else run, switch) is value, option


def test_help(printed, capsys):
    text = printed("--help")
    assert printed() == text and all(f"pcnb {name}" in text for name in COMMANDS)
    assert all(name in printed("train", "--help") for name in RECIPES)
    for name in RECIPES:
        with pytest.raises(SystemExit) as stop: main(["train", name, "--help"])
        text, err = capsys.readouterr()
        assert stop.value.code == 0 and err == ""
        for option in ("--epochs", "--energy.output-precision", "--optimiser.rate", "--augment.pixels", "--inference.cg-steps", "inference:sweep", "--twin"):
            assert option in text
        assert ("--network.channels" in text) == isinstance(RECIPES[name].network, CNNSetting)
        assert "--name" not in text


def test_data_lists_the_sets(tmp_path, printed):
    text = printed("data", "--data-dir", tmp_path)
    assert "embedded" in text and f"put into {tmp_path / 'mnist'}" in text


def test_process(run, tmp_path):
    "Exit code, streams and imports of a process of its own."
    def process(code, *argv):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", code, *map(str, argv)], env=env, cwd=tmp_path, capture_output=True, text=True)
    script = "from pcnb.cli import main; main()"
    done = process(script, "evaluate", run)
    assert done.returncode == 0 and done.stdout.startswith(f"{run}: 360 test examples"), done.stderr
    done = process(script, "train", "digits", "--epoch", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pcnb: error: Unrecognized options: --epoch, 3; did you mean --epochs? See pcnb train digits --help.\n"
    heavy = {"tensorflow", "tensorflow_datasets", "sklearn", "matplotlib"}
    done = process("import sys, pcnb.cli as c; c.main(); print(*sys.modules)", "--version")
    version, modules = done.stdout.splitlines()
    assert version == f"pcnb {pcnb.__version__}" and not heavy & set(modules.split())
    assert list(tmp_path.iterdir()) == []


def test_readme_commands_are_understood(monkeypatch):
    called = []
    for kind in COMMANDS.values(): monkeypatch.setattr(kind, "__call__", lambda self: called.append(self))
    readme = (ROOT / "README.md").read_text()
    lines = [line.split("#")[0].split()[1:] for line in readme.splitlines() if line.startswith("pcnb ")]
    for argv in lines: main(argv)
    assert {type(c) for c in called} == set(COMMANDS.values()) and len(called) == len(lines)


def test_models_counts_weights_and_suggests(printed, refuse):
    # vgg5 on 32x32x3: four 3x3 convolutions, four poolings by 2, a dense layer on 2x2x512
    channels = (3, 128, 256, 512, 512)
    weights = sum(9 * n * m + m for n, m in zip(channels, channels[1:])) + 4 * 512 * 10 + 10
    assert f"{weights:,} weights" in next(line for line in printed("models").splitlines() if line.startswith("vgg5 "))
    assert f"{weights:,}  5 layers, 0 skips" in printed("models", "vgg5")
    assert "did you mean 'resnet9'?" in refuse("models", "resnet-9")


def test_a_reader_that_leaves_early_is_no_error():
    "As `pcnb recipes | head -1`, but certain to leave before the text is written."
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "from pcnb.cli import main; main(['recipes'])"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_whitening_wants_colour(refuse, tmp_path):
    assert "whiten is on, and digits has 1 channel; expected colour images" in refuse("train", "cifar10-cpu", "--dataset", "digits", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
