"""pcx, as its examples train: forward pass, unrolled inference and weight update in one compiled function, written for one example and mapped over the batch.

    pcnb bench --networks mlp4x512 mlp16 --inference gd8 --against benchmarks/pcx_peer.py

The output's energy is pcx's squared error times the precision. Its gradients are sums over the batch, for the states as they are, for the weights
scaled by the batch size, as in its examples. Version 0.6.3 needs a JAX before 0.5.
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import peers

PEER = peers.Peer("pcx", __file__, ("pcx==0.6.3",), "0.4.38", ("pcx",))


def opponents(case): return peers.opponents(PEER, case)


def learner(task, learning_rate, way):
    import jax
    import jax.numpy as jnp
    import optax
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    class Model(pxc.EnergyModule):
        def __init__(self):
            super().__init__()
            self.layers = [pxnn.Linear(w.shape[1], w.shape[0]) for w, _ in task.weights]
            for layer, (w, b) in zip(self.layers, task.weights):
                layer.nn.weight.set(jnp.asarray(w))
                layer.nn.bias.set(jnp.asarray(b))
            self.vodes = [pxc.Vode() for _ in self.layers[1:]] + [pxc.Vode(lambda vode, rkg: task.precision * pxc.se_energy(vode, rkg))]
            self.vodes[-1].h.frozen = True

        def __call__(self, x, y):
            x = self.vodes[0](self.layers[0](x))
            for layer, vode in zip(self.layers[1:], self.vodes[1:]): x = vode(layer(jax.nn.gelu(x)))
            if y is not None: self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    batched = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
    hidden = lambda: pxu.M_hasnot(pxc.VodeParam, frozen=True)  # a new one each time: `to` changes it

    @pxf.vmap(batched, in_axes=(0, 0), out_axes=0)
    def forward(x, y, *, model): return model(x, y)

    @pxf.vmap(batched, in_axes=(0,), out_axes=(None, 0), axis_name="batch")
    def energy(x, *, model):
        out = model(x, None)
        return jax.lax.psum(model.energy(), "batch"), out

    gradient = lambda mask: pxf.value_and_grad(mask.to([False, True]), has_aux=True)(energy)

    @pxf.jit(static_argnums=0)
    def train(steps, x, y, *, model, states, weights):
        model.train()
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache): forward(x, y, model=model)
        states.init(hidden()(model))
        for _ in range(steps):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache): _, g = gradient(hidden())(x, model=model)
            states.step(model, g["model"])
        states.clear()
        with pxu.step(model, clear_params=pxc.VodeParam.Cache): _, g = gradient(pxu.M(pxnn.LayerParam))(x, model=model)
        weights.step(model, g["model"], scale_by=1.0 / x.shape[0])

    model = Model()
    states, weights = pxu.Optim(lambda: optax.sgd(task.rate)), pxu.Optim(lambda: peers.optimiser(task, learning_rate), pxu.M(pxnn.LayerParam)(model))
    now = lambda: [(f.nn.weight.get(), f.nn.bias.get()) for f in model.layers]

    def step(x, y):
        train(task.steps, x, y, model=model, states=states, weights=weights)
        jax.block_until_ready(now())

    return step, lambda: ([v.h.get() for v in model.vodes[:-1]], now())


if __name__ == "__main__": peers.serve(learner)
