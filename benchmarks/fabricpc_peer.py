"""FabricPC, by the compiled training step that it offers for loops of one's own.

    pcnb bench --networks mlp4x512 mlp16 --inference gd8 --against benchmarks/fabricpc_peer.py

Its `Linear` applies the activation after the linear map, so a node of one's own, which it provides for, applies GELU to what comes in. The output's
precision is that of its Gaussian energy; gradients in the states are those of sums over the batch, in the weights of means.
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import peers

PEER = peers.Peer("fabricpc", __file__, ("fabricpc==0.6.0",), "0.10.2", ("fabricpc",))


def opponents(case): return peers.opponents(PEER, case)


def learner(task, learning_rate, way):
    import jax
    import jax.numpy as jnp
    from fabricpc.core.energy import GaussianEnergy
    from fabricpc.core.inference import InferenceSGD
    from fabricpc.core.topology import Edge
    from fabricpc.core.types import GraphParams, NodeParams
    from fabricpc.graph_assembly import TaskMap, graph
    from fabricpc.graph_initialization import initialize_params
    from fabricpc.nodes import IdentityNode, Linear
    from fabricpc.training import make_train_step

    class Activated(Linear):
        "A linear map of the activated input."
        @staticmethod
        def predict(params, inputs, state, node_info): return Linear.predict(params, {k: jax.nn.gelu(v) for k, v in inputs.items()}, state, node_info)

    source = IdentityNode(shape=task.x.shape[1:], name="input")
    nodes = [source]
    for i, (_, b) in enumerate(task.weights, 1):
        last = i == len(task.weights)
        nodes.append((Activated if i > 1 else Linear)(shape=b.shape, name=f"state{i}", energy=GaussianEnergy(precision=task.precision if last else 1.0)))
    structure = graph(nodes=nodes, edges=[Edge(source=a, target=b.slot("in")) for a, b in zip(nodes, nodes[1:])], task_map=TaskMap(x=source, y=nodes[-1]),
                      inference=InferenceSGD(eta_infer=task.rate, infer_steps=task.steps))
    key, names = jax.random.key(0), [f"state{i}" for i in range(1, len(nodes))]
    params = initialize_params(structure, key).nodes
    for name, (w, b) in zip(names, task.weights):
        edge, = params[name].weights
        params = params | {name: NodeParams(weights={edge: jnp.asarray(w.T)}, biases={"b": jnp.asarray(b)[None]})}
    optimizer = peers.optimiser(task, learning_rate)
    train, now = make_train_step(structure, optimizer), dict(params=GraphParams(nodes=params))
    now["optimizer"] = optimizer.init(now["params"])

    def step(x, y):
        now["params"], now["optimizer"], _, now["states"] = train(now["params"], now["optimizer"], dict(x=x, y=y), key)
        jax.block_until_ready((now["params"], now["states"]))

    def read():
        found = [now["params"].nodes[n] for n in names]
        return [now["states"].nodes[n].z_latent for n in names[:-1]], [(next(iter(p.weights.values())).T, p.biases["b"][0]) for p in found]

    return step, read


if __name__ == "__main__": peers.serve(learner)
