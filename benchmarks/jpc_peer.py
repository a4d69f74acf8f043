"""jpc, by its discrete updates of states or of errors: as its examples call them, each compiled by itself, and all of a training step in one compiled function.

    pcnb bench --networks mlp4x512 mlp16 --inference gd8 --against benchmarks/jpc_peer.py

jpc divides the energy by the batch size before it differentiates, in the states too, so the rate is multiplied by it. The output's precision is its
`output_energy_scaling`. Not compared is its training step in one call: it integrates with an adaptive solver, and takes no output precision.

Its descent on the errors takes no output precision either, and differentiates the energy in the weights at fixed errors, not fixed states: that is another
gradient before inference has ended, so that it is compared by what it learns only (`time_to_accuracy.py`). Its example moves an error of the output too;
here that one is held at zero, as in the paper that it follows (Goemaere et al. 2025, arXiv:2505.20137).
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import peers

COMMIT = "7d6cc05742d28b543311e6c4d4ca140ba996f8b5"  # version 1.0.0; it is not in the package index
PEER = peers.Peer("jpc", __file__, (f"jpc @ git+https://github.com/thebuckleylab/jpc@{COMMIT}",), "0.5.2", ("jpc", "jpc.jit"))


def opponents(case): return peers.opponents(PEER, case)


def learner(task, learning_rate, way):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jpc
    import optax

    shapes = [w.shape for w, _ in task.weights]
    model = jpc.make_mlp(jax.random.PRNGKey(0), shapes[0][1], shapes[0][0], len(shapes), shapes[-1][0], "gelu", use_bias=True)
    for i, (w, b) in enumerate(task.weights): model[i] = eqx.tree_at(lambda f: (f[1].weight, f[1].bias), model[i], (jnp.asarray(w), jnp.asarray(b)))
    descent, weights, sizes = optax.sgd(task.rate * len(task.x)), peers.optimiser(task, learning_rate), [shapes[0][1], *(n for n, _ in shapes)]

    def train_states(model, optimiser, x, y):
        activities = jpc.init_activities_with_ffwd(model=model, input=x)
        moving, given = descent.init(activities), dict(output=y, input=x, output_energy_scaling=task.precision)
        for _ in range(task.steps):
            found = jpc.update_pc_activities(params=(model, None), activities=activities, optim=descent, opt_state=moving, **given)
            activities, moving = found["activities"], found["opt_state"]
        found = jpc.update_pc_params(params=(model, None), activities=activities, optim=weights, opt_state=optimiser, **given)
        return found["model"], found["opt_state"], activities

    def train_errors(model, optimiser, x, y):
        errors = jpc.init_epc_errors(layer_sizes=sizes, batch_size=len(x))
        free = optax.multi_transform(dict(free=descent, held=optax.set_to_zero()), ["free"] * (len(errors) - 1) + ["held"])
        moving, given = free.init(errors), dict(output=y, input=x)
        for _ in range(task.steps):
            found = jpc.update_epc_errors(params=(model, None), errors=errors, optim=free, opt_state=moving, **given)
            errors, moving = found["errors"], found["opt_state"]
        found = jpc.update_epc_params(params=(model, None), errors=errors, optim=weights, opt_state=optimiser, **given)
        return found["model"], found["opt_state"], errors

    train = train_errors if task.errors else train_states
    if way == "jpc.jit": train = eqx.filter_jit(train)
    now = dict(model=model, optimiser=weights.init((eqx.filter(model, eqx.is_array), None)))

    def step(x, y):
        now["model"], now["optimiser"], now["states"] = train(now["model"], now["optimiser"], x, y)
        jax.block_until_ready(eqx.filter((now["model"], now["states"]), eqx.is_array))

    return step, lambda: (now["states"][:-1], [(f[1].weight, f[1].bias) for f in now["model"]])


if __name__ == "__main__": peers.serve(learner)
