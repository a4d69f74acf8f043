"""Benchmarks: what is counted, how turns are taken, what is written, and what is refused. No time is asserted."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pcnb.bench as bench_module
from pcnb.bench import (Program, Work, bench, bench_figure, bench_images, bench_inference, bench_network, bench_rule, bench_table, check_step, compile_step,
                        count_flops, count_work, load_opponents, matmul_peak, paired, relative_difference, spread, take_turns)
from pcnb.cli import main
from pcnb.inference import ErrorDescent, GaussNewton, GradientDescent, Sweep
from pcnb.models import Conv, Dense, mlp, vgg
from pcnb.network import InputError
from pcnb.learning import Backprop


@pytest.fixture
def tiny(monkeypatch):
    "One small network instead of all, and a small matrix product as the peak."
    monkeypatch.setattr(bench_module, "BENCH_NETWORKS", {"tiny": ((4, 4, 1), lambda in_shape, classes, key: mlp(in_shape, classes, 8, 3, key=key))})
    monkeypatch.setattr(bench_module, "matmul_peak", lambda: matmul_peak(64, 1))
    monkeypatch.setattr(bench_module, "take_turns", lambda *args, least_seconds=0.01: take_turns(*args, least_seconds))


# Counting

def test_dense_layer_by_formula(getkey):
    batch, n, m = 32, 300, 200
    layer = Dense(n, m, key=getkey())
    count = count_flops(lambda layer, x: jax.vmap(layer)(x), layer, jnp.ones((batch, n)))
    assert count == 2 * batch * n * m + batch * m  # products and sums, and the bias


def test_convolution_by_formula(getkey):
    batch, side, n, m = 4, 12, 8, 16
    layer = Conv(n, m, 3, key=getkey())
    along = 3 * side - 2  # products along an axis: those with the zeros outside are not counted
    want = 2 * batch * along ** 2 * n * m
    assert count_flops(lambda layer, x: jax.vmap(layer)(x), layer, jnp.ones((batch, side, side, n))) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("length", [1, 3, 10])
def test_loop_counts_as_often_as_it_runs(length):
    W = jnp.ones((32, 32))
    scanned = lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ W), None), x, None, length=length)[0]
    def unrolled(x):
        for _ in range(length): x = jnp.sin(x @ W)
        return x
    assert count_flops(scanned, W) == count_flops(unrolled, W) >= length * 2 * 32 ** 3
    double = lambda f: jax.grad(lambda x: jnp.sum(f(x)))
    assert count_flops(double(scanned), W) == pytest.approx(count_flops(double(unrolled), W), rel=0.05)


@given(st.integers(0, 2**16), st.booleans())
def test_written_out_computes_the_same(seed, reverse):
    x = jax.random.normal(jax.random.key(seed), (4, 3))
    def f(x):
        c, y = jax.lax.scan(lambda c, v: (jax.nn.gelu(c) + v, (c * v, v)), x[0], x, reverse=reverse)
        return jax.jit(jnp.sort)(c), y, jax.lax.while_loop(lambda c: False, lambda c: 2 * c, x)
    got = bench_module._written_out(jax.make_jaxpr(f)(x), x)
    for u, v in zip(got, jax.tree.leaves(f(x)), strict=True): np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5)  # rounding of sums of values near 1


def test_work_of_a_perceptron(getkey):
    net, batch = mlp((100,), 10, 200, 4, jnp.tanh, key=getkey()), 64
    work = count_work(net, batch)
    first, inner = 2 * batch * 100 * 200, 2 * batch * (2 * 200 * 200 + 200 * 10)
    assert work.forward == pytest.approx(first + inner, rel=0.02) and work.inner == pytest.approx(inner, rel=0.02)
    backprop = compile_step(net, Backprop(), jnp.ones((batch, 100)), jnp.ones((batch, 10))).flops
    assert backprop == pytest.approx(work.least(1), rel=0.05)
    assert Work(5.0, 3.0, 7.0).least(4) == 24


@pytest.mark.parametrize("name", ["gn1x2", "gn2x1", "ed2"])
def test_steps_take_the_least_and_little_more(name, getkey):
    net, x, y = mlp((32,), 10, 256, 4, key=getkey()), jnp.ones((16, 32)), jnp.ones((16, 10))
    rule, passes = bench_rule(name, net)
    least = count_work(net, 16).least(passes)
    assert least <= compile_step(net, rule, x, y).flops <= 1.1 * least  # nothing but what is elementwise is computed beyond


@pytest.mark.parametrize("name, algorithm, passes", [
    ("gn1x1", GaussNewton(1, 1), 3), ("gn3x2", GaussNewton(3, 2), 15), ("sweep", Sweep(), 2), ("sweep3", Sweep(3), 6),
    ("gd2", GradientDescent(2), 2 * (1 + 2) / 3), ("gd5", GradientDescent(5), 2 * (1 + 2 + 3 + 3 + 3) / 3), ("ed4", ErrorDescent(4), 8),
])
def test_names_of_algorithms(name, algorithm, passes, getkey):
    got, least = bench_inference(name, mlp((6,), 10, 5, 4, key=getkey()))
    assert type(got) is type(algorithm) and least == pytest.approx(passes)
    for field in ("steps", "cg_steps", "sweeps"): assert getattr(got, field, None) == getattr(algorithm, field, None)


# Checks

def test_check_passes_the_right_and_refuses_the_wrong(getkey):
    net, x, y = mlp((6,), 10, 8, 3, key=getkey()), jax.random.normal(getkey(), (6, 6)), jax.nn.one_hot(jnp.arange(6), 10)
    rule, _ = bench_rule("gn2x2", net)
    program = compile_step(net, rule, x, y)
    assert check_step(program, net, rule, x, y) <= 1e-4
    for scale in (1.001, float("nan")):
        def wrong(params, x, y, rate):
            after, loss = program.run(params, x, y, rate)
            return jax.tree.map(lambda v: v * scale, after), loss
        with pytest.raises(RuntimeError, match="from the examples' mean; expected at most 1e-04. Nothing was timed"):
            check_step(Program(wrong, 0.0, 0.0, None), net, rule, x, y)


def test_check_where_float32_loses_the_lowest_errors():
    net, x, y = mlp((32,), 10, 256, 8, key=jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 32)), jax.nn.one_hot(jnp.arange(6), 10)
    rule, _ = bench_rule("gd8", net)
    program = compile_step(net, rule, x, y)
    off = check_step(program, net, rule, x, y)
    assert check_step(program, net, rule, x, y, off / 2) == off  # above the tolerance, and right
    def wrong(params, x, y, rate):  # in an array of the lowest layer, whose gradient is small
        after, loss = program.run(params, x, y, rate)
        return eqx.tree_at(lambda n: n.layers[0].bias, after, after.layers[0].bias + 1), loss
    with pytest.raises(RuntimeError, match="expected at most 1e-05"): check_step(Program(wrong, 0.0, 0.0, None), net, rule, x, y, 1e-5)


def test_relative_difference():
    one = [jnp.array([4.0, 1.0]), jnp.array([0.001])]
    assert relative_difference(one, one) == 0
    assert relative_difference([jnp.array([5.0, 1.0]), one[1]], one) == pytest.approx(1 / 4)
    assert relative_difference([one[0], jnp.array([0.002])], one) == pytest.approx(0.001 / 0.01)  # below the floor
    assert relative_difference([one[0], jnp.array([jnp.nan])], one) == float("inf")
    with pytest.raises(ValueError): relative_difference(one[:1], one)


# Turns and statistics

@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_paired_ratio_is_free_of_drift(drift, factor): assert paired([factor * d for d in drift], drift) == pytest.approx(factor)


@pytest.mark.parametrize("looped", [True, False])
def test_several_steps_are_single_steps_in_a_row(looped, getkey, monkeypatch):
    net, x, y = mlp((6,), 10, 8, 3, key=getkey()), jax.random.normal(getkey(), (4, 6)), jax.nn.one_hot(jnp.arange(4), 10)
    monkeypatch.setattr(bench_module, "loops_well", lambda *_: looped)
    program, weights = compile_step(net, bench_rule("gn1x2", net)[0], x, y), lambda: jax.tree.map(jnp.copy, eqx.filter(net, eqx.is_array))
    one, losses = weights(), []
    for _ in range(3):
        one, loss = program.run(one, x, y, jnp.float32(0.1))
        losses.append(float(loss))
    three, last = program.run(weights(), x, y, jnp.float32(0.1), 3)
    assert losses[0] > losses[1] > losses[2] == pytest.approx(float(last))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_short_work_is_done_more_often(monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: clock[0])
    def work(n):
        asked.append(n)
        clock[0] += 0.002 * n
    assert take_turns({"": work}, 2, least_seconds=0.05)[""] == pytest.approx([0.002] * 2)  # seconds of one piece of work
    assert asked == [1, 1, 25, 25]


def test_every_contestant_runs_once_a_repetition():
    calls = []
    times = take_turns({name: lambda n, name=name: calls.append(name) for name in "abc"}, 4, least_seconds=0)
    rounds = [calls[i:i + 3] for i in range(0, len(calls), 3)]  # the first is untimed
    assert len(rounds) == 5 and all(sorted(r) == list("abc") for r in rounds) and len({tuple(r) for r in rounds}) > 1
    assert {n: len(t) for n, t in times.items()} == dict(a=4, b=4, c=4)


def test_spread_is_of_the_values(): assert spread([4, 1, 3, 2, 5]) == dict(median=3, q1=2, q3=4)


# The whole

@pytest.mark.parametrize("backend, setting, expected", [("gpu", None, "float32"), ("cpu", None, None), ("gpu", "tensorfloat32", "tensorfloat32")])
def test_float32_is_not_tf32(monkeypatch, backend, setting, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(setting), bench_module.exact_products(): assert jax.config.jax_default_matmul_precision == expected


def test_rows_table_and_json(tiny, tmp_path, capsys):
    out = tmp_path / "speed" / "b.json"
    main(["bench", "--networks", "tiny", "--batch-sizes", "4", "8", "--inference", "gn1x1", "--repetitions", "3", "--epoch-examples", "24", "--epoch-repetitions", "1", "--out", str(out)])
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [(r["network"], r["batch_size"], r["framework"], r["rule"]) for r in result["rows"]] == [("tiny", b, "pcnb", n) for b in (4, 8) for n in ("backprop", "gn1x1")]
    assert result["versions"]["jax"] == jax.__version__ and {"matmul_precision", "device", "platform", "cores", "commit", "taken", "peak_flops_per_second", "epoch_examples"} <= result.keys()
    for r in result["rows"]:
        t = r["step_seconds"]
        assert 0 < t["q1"] <= t["median"] <= t["q3"] and r["against_pcnb"] == 1 and r["difference"] <= 1e-4
        assert r["examples_per_second"] == pytest.approx(r["batch_size"] / t["median"])
        assert r["peak_fraction"] * result["peak_flops_per_second"] == pytest.approx(r["flops"] / t["median"])
        assert (r["ratio"] == 1 and r["bound"] == 1) if r["rule"] == "backprop" else r["bound"] > 1
        assert r["epoch_seconds"]["median"] > 0
    heads, *rows = text.splitlines()[-5:]
    assert heads.split()[:4] == ["network", "batch", "rule", "compile"] and "framework" not in heads
    assert [row.split()[:3] for row in rows] == [["tiny", str(b), n] for b in (4, 8) for n in ("backprop", "gn1x1")]
    for head in ("compile s", "step ms", "examples/s", "bound", "epoch s"):  # right-aligned: each value ends where its heading does
        end = heads.index(head) + len(head)
        assert all(row[end - 1] not in " " and row[end:end + 1] in ("", " ") for row in rows)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_rows_by_the_clock(monkeypatch):
    "Steps and epochs by a clock that the contestants move: ratios to backpropagation of the same framework, to this library, and epochs without what they leave out."
    clock, left_out = [0.0], iter(range(1, 100))
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: clock[0])
    def contestant(framework, case):
        step, epoch = {("pcnb", "backprop"): (0.002, 4), ("pcnb", "gn1x1"): (0.005, 6), ("other", "backprop"): (0.004, 10), ("other", "gn1x1"): (0.016, 15)}[framework, case.name]
        def run_step(n): clock[0] += step * n
        def run_epoch():
            clock[0] += epoch + (compiling := next(left_out))
            return compiling
        return bench_module.Contestant(framework, run_step, run_epoch, dict(flops=1e6))
    monkeypatch.setattr(bench_module, "contestant", lambda case: contestant("pcnb", case))
    cases = [SimpleNamespace(network="net", name=name, x=np.zeros((8, 1)), arithmetic="float32") for name in ("backprop", "gn1x1")]
    rows = bench_module._rows(cases, {("float32", "backprop"): 2, ("float32", "gn1x1"): 3}, 1e9, lambda case: [contestant("other", case)], 3, 2, lambda _: None)
    got = {(r["framework"], r["rule"]): [r["step_seconds"]["median"], r["ratio"], r["against_pcnb"], r["epoch_seconds"]["median"], r["epoch_ratio"], r["epoch_against_pcnb"]] for r in rows}
    assert got == {("pcnb", "backprop"): pytest.approx([0.002, 1, 1, 4, 1, 1]), ("other", "backprop"): pytest.approx([0.004, 1, 2, 10, 1, 2.5]),
                   ("pcnb", "gn1x1"): pytest.approx([0.005, 2.5, 1, 6, 1.5, 1]), ("other", "gn1x1"): pytest.approx([0.016, 4, 3.2, 15, 1.5, 2.5])}
    for r in rows: assert (r["bound"], r["examples_per_second"], r["peak_fraction"]) == pytest.approx((1 if r["rule"] == "backprop" else 1.5, 8 / r["step_seconds"]["median"], 1e-3 / r["step_seconds"]["median"]))


def test_opponents_join(tiny, tmp_path):
    paths = []
    for name, epoch in (("other", "None"), ("third", "lambda: 0.0")):
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(f"from pcnb.bench import Contestant\ndef opponents(case): return [Contestant('{name}', lambda n: None, {epoch}, dict(compile_seconds=0.0))] if case.name == 'gn1x1' else []\n")
    result = bench(["tiny"], [4], ["gn1x1"], 3, epoch_examples=8, epoch_repetitions=1, opponents=load_opponents(*paths), progress=lambda _: None)
    rows = {(r["framework"], r["rule"]): r for r in result["rows"]}
    assert set(rows) == {("pcnb", "backprop"), ("pcnb", "gn1x1"), ("other", "gn1x1"), ("third", "gn1x1")}
    assert rows["other", "gn1x1"]["ratio"] is None and rows["other", "gn1x1"]["against_pcnb"] < 1
    assert "epoch_seconds" not in rows["other", "gn1x1"]
    assert rows["third", "gn1x1"]["epoch_ratio"] is None and rows["third", "gn1x1"]["epoch_against_pcnb"] < 1  # it has no backpropagation to compare with
    heads, *lines = bench_table(result).splitlines()[1:]
    assert "framework" in heads and "/pcnb" in heads and any(line.split()[2] == "other" for line in lines)
    assert [ax.get_ylabel() for ax in bench_figure(result).axes] == ["step / backpropagation's", "step / pcnb's"]


def test_arithmetics_take_turns_in_one_run(monkeypatch, capsys, tmp_path):
    build = lambda in_shape, classes, key, conv=Conv: vgg(in_shape, classes, [(32,), (32,)], conv=conv, key=key)
    monkeypatch.setattr(bench_module, "BENCH_NETWORKS", {"vggx": ((8, 8, 32), build)})
    monkeypatch.setattr(bench_module, "matmul_peak", lambda: matmul_peak(64, 1))
    monkeypatch.setattr(bench_module, "take_turns", lambda *args, least_seconds=0.01: take_turns(*args, least_seconds))
    other = lambda case: [bench_module.Contestant("other", lambda n: None, None, {"compile_seconds": 0.0})] if case.arithmetic == "float32" else []
    result = bench(["vggx"], [4], ["gn1x1"], 2, opponents=other, progress=lambda _: None, arithmetic=["float32", "bfloat16"])
    rows = {(r["framework"], r["arithmetic"], r["rule"]): r for r in result["rows"]}
    least = {a: {r: (lambda work, net: work.least(bench_rule(r, net)[1]) / work.least(1))(count_work(net, 4), net) for r in ("backprop", "gn1x1")} for a in ("float32", "bfloat16") for net in [bench_module.bench_network("vggx", arithmetic=a)]}
    if jax.default_backend() == "cpu": assert least["bfloat16"]["gn1x1"] < least["float32"]["gn1x1"]
    assert set(rows) == {("pcnb", a, r) for a in ("float32", "bfloat16") for r in ("backprop", "gn1x1")} | {("other", "float32", r) for r in ("backprop", "gn1x1")}
    for (framework, a, rule), r in rows.items():
        assert r["bound"] == pytest.approx(least[a][rule])  # a kernel's gradient costs more products in bfloat16
        assert r["ratio"] == pytest.approx(1) if rule == "backprop" else r["bound"] > 1
        assert r["against_float32"] == 1 if a == "float32" else 0 < r["against_float32"] != 1
    heads, *lines = bench_table(result).splitlines()[1:]
    assert "arithmetic" in heads and "/float32" in heads and [line.split()[3] for line in lines] == [a for _, a, _ in rows]
    ticks = [tick.get_text() for tick in bench_figure(result).axes[0].get_xticklabels()]
    assert ticks == ["vggx 4\ngn1x1", "vggx 4\ngn1x1 bfloat16"]


def test_bfloat16_rounds_what_convolutions_multiply():
    nets = [bench_network("vgg5", arithmetic=a) for a in ("float32", "bfloat16")]
    assert [net.layers[0].arithmetic for net in nets] == [None, "bfloat16"]  # None: that of the images
    for a, b in zip(*(jax.tree.leaves(eqx.filter(net, eqx.is_array)) for net in nets), strict=True): np.testing.assert_array_equal(a, b)


def test_images_are_of_the_form_asked_for():
    data = bench_images((4, 4, 3), 60)
    assert data.image_shape == (4, 4, 3) and len(data.train_images) == 60 and len(data.test_images) == 10 and data.n_classes == 10


# Bad input

@pytest.mark.parametrize("options, said", [
    ("--networks mpl3", "network 'mpl3' is unknown. There are tiny"),
    ("--networks mlp4x0", "width is 0; expected"),
    ("--arithmetic float16", "arithmetic 'float16' is unknown; did you mean 'bfloat16'"),
    ("--arithmetic bfloat16", "arithmetic is bfloat16, which tiny does not have; expected float32, or a vgg or resnet"),
    ("--inference newton", "inference 'newton' is unknown; expected a name like gn1x2"),
    ("--inference backprob", "inference 'backprob' is unknown"),
    ("--out old.json/b.json", "old.json is not a folder that you may write to"),
    ("--batch-sizes 0", "batch_sizes is 0; expected at least 1"),
    ("--repetitions 0", "repetitions is 0; expected at least 1"),
    ("--epoch-repetitions 0", "epoch_repetitions is 0"),
    ("--epoch-examples -1", "epoch_examples is -1"),
    ("--epoch-examples 3", "epoch_examples is 3; expected 0, or at least the batch size 4"),
    ("--inference gd-1", "inference 'gd-1' is unknown"),
    ("--against none.py", "none.py is no file"),
    ("--against empty.py", "empty.py has no function `opponents(case)`"),
    ("--out b.txt", "b.txt does not end in .json"),
    ("--out old.json", "old.json exists; use --overwrite"),
])
def test_refused(tiny, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "old.json").write_text("mine")
    with pytest.raises(SystemExit) as stop: main(["bench", "--networks", "tiny", "--batch-sizes", "4", "--inference", "gn1x1", *options.split()])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and said in err
    assert (tmp_path / "old.json").read_text() == "mine" and not (tmp_path / "runs").exists()


def test_an_opponent_that_does_not_know_the_case_is_left_out_and_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, answer in (("a", "raise InputError('only rings')"), ("b", "return [Contestant('b', lambda n: None, None, dict(compile_seconds=0.0))]")):
        (tmp_path / f"{name}.py").write_text(f"from pcnb.bench import Contestant\nfrom pcnb.network import InputError\ndef opponents(case): {answer}\n")
    main("bench --networks tiny --batch-sizes 4 --inference gn1x1 --repetitions 1 --epoch-examples 0 --against a.py b.py".split())
    out = capsys.readouterr().out
    assert "a.py leaves out tiny, gn1x1: only rings" in out
    assert [r["framework"] for r in json.loads(Path("runs/bench.json").read_text())["rows"]] == ["pcnb", "b"] * 2


def test_a_failed_check_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_module, "relative_difference", lambda *_: 0.5)
    with pytest.raises(SystemExit) as stop: main("bench --networks tiny --batch-sizes 4 --inference gn1x1".split())
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.startswith("pcnb: error: the compiled step's gradient is 5.0e-01 from") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_torch_side_says_how_to_get_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(InputError, match="torch is not installed; `pip install torch`"):
        load_opponents(Path(__file__).resolve().parent.parent / "benchmarks" / "torch_pc.py")
