"""The algorithms of pcnb in PyTorch, for comparison only.

    pcnb bench --against benchmarks/torch_pc.py        (needs `pip install torch` beside pcnb)

Written as one would for speed. A batch is one tensor, images in channels_last. Everything but backpropagation runs without autograd: a
layer is linearised once, as one elementwise factor (the activation's slope, and the choice of the maximum where it pools) before a linear map, and that
serves all products with the Jacobian and its transpose; weight gradients are taken from inputs and errors directly. The only synchronisation is the
guard's question whether an energy has risen. `Dense` and `Conv`, after a `MaxPool` or none, `Dense` after a `GlobalAverage`, and skips without weights are
known, with squared error and the forward energy of precision 1.
Each case runs eagerly and with torch.compile (which needs a C++ compiler), and both must agree with pcnb before they are timed.
"""
import time
from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import numpy as np

from pcnb.bench import Case, CheckFailed, Contestant, check_batch, in_float64, relative_difference
from pcnb.energy import ForwardEnergy, SquaredError
from pcnb.inference import GaussNewton, GradientDescent, Sweep, wave
from pcnb.learning import Backprop
from pcnb.models import Chain, Conv, Dense, GlobalAverage, MaxPool, PoolAndPad, identity
from pcnb.network import InputError

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    raise InputError("torch is not installed; `pip install torch` beside pcnb, or leave out --against.") from None

# Every contestant has graphs of its own, of the same functions. Past the usual limit of eight torch.compile would run the rest eagerly, with no more than a warning.
torch._dynamo.config.recompile_limit = 256
torch._dynamo.config.fail_on_recompile_limit_hit = True

# JAX and torch compute on the same kind of device, both in float32: `pcnb bench` keeps JAX from TF32, these lines keep torch from it.
DEVICE = "cpu" if jax.default_backend() == "cpu" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available(): raise InputError(f"JAX computes on {jax.devices()[0].device_kind}, torch sees no GPU; install torch with CUDA, or set JAX_PLATFORMS=cpu to compare both on the CPU.")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

TOLERANCE = 1e-4
ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


def given(a): return torch.from_numpy(np.array(a)).to(DEVICE)


def tensor(a):
    "An array of pcnb's as a tensor; images become (batch, channels, height, width), stored channels last."
    t = given(a)
    return t.permute(0, 3, 1, 2) if t.ndim == 4 else t


def flat(x): return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def like(u, x):
    "The inverse of `flat`, in the shape of `x`."
    return u.unflatten(1, (*x.shape[2:], x.shape[1])).permute(0, 3, 1, 2) if x.ndim == 4 else u


def dot(a, b): return sum((u * v).flatten(1).sum(1) for u, v in zip(a, b))


def scaled(t, v): return t.view(-1, *[1] * (v.ndim - 1)) * v


def axpy(t, a, b): return [scaled(t, u) + v for u, v in zip(a, b)]


def ratio(a, b): return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


class Layer:
    """One layer of a pcnb network: a maximum over windows before the activation or after it, or a mean over all pixels after it, then a linear map.
    `weight`, `bias`: its tensors, shared with nobody."""

    def __init__(self, layer):
        parts = layer.parts if isinstance(layer, Chain) else (layer,)
        self.first, self.mean, layer = isinstance(parts[0], MaxPool), isinstance(parts[0], GlobalAverage), parts[-1]
        self.conv, self.stride = isinstance(layer, Conv), getattr(layer, "stride", 1)
        activation = parts[0].activation if self.mean else layer.activation
        if (type(layer) not in (Dense, Conv) or len(parts) != 1 + self.first + self.mean or (self.first or self.mean) and layer.pool > 1
                or self.mean and (self.conv or layer.activation is not identity)):
            raise InputError(f"benchmarks/torch_pc.py knows Dense and Conv layers, after one MaxPool or none, and Dense after GlobalAverage; got {', '.join(type(f).__name__ for f in parts)}.")
        self.pool = parts[0].size if self.first else layer.pool
        self.act = ACTIVATIONS[activation.__name__]
        weight = given(layer.weight)
        self.weight = weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last) if self.conv else weight
        self.bias = given(layer.bias)

    def before(self, x):
        "What the linear map sees: the state after activation and pooling."
        if self.first: return self.act(F.max_pool2d(x, self.pool))
        a = self.act(x)
        if self.mean: return a.mean((2, 3))
        return a if self.pool == 1 else F.max_pool2d(a, self.pool)

    def _pads(self, shape):
        "Zeros at the start and the end of height and width, as XLA's SAME."
        k, s = self.weight.shape[-1], self.stride
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n in shape[2:]]
        return [(t // 2, t - t // 2) for t in total]

    def linear(self, a, bias=None):
        "The linear map, of an input or of a tangent."
        if not self.conv: return F.linear(flat(a), self.weight, bias)
        (top, bottom), (left, right) = self._pads(a.shape)
        if (top, left) == (bottom, right): return F.conv2d(a, self.weight, bias, self.stride, (top, left))
        return F.conv2d(F.pad(a, (left, right, top, bottom)), self.weight, bias, self.stride)

    def __call__(self, x): return self.linear(self.before(x), self.bias)

    def linearise(self, x):
        "The factor that a tangent of `x` is multiplied with before it is pooled (as a sum) and mapped."
        if self.first:
            top = F.max_pool2d(x, self.pool)
            return self._repeat(self._activate(top)[1], x) * self._share(x, top)
        a, slope = self._activate(x)
        if self.mean: return slope / slope[0, 0].numel()
        return slope if self.pool == 1 else slope * self._share(a, F.max_pool2d(a, self.pool))

    def _activate(self, x):
        "The activation and its slope."
        if self.act is ACTIVATIONS["identity"]: return x, torch.ones_like(x)
        a, pull = torch.func.vjp(self.act, x)
        return a, pull(torch.ones_like(a))[0]

    def _share(self, a, top):
        "What part of a window's maximum `top` each element of `a` is: one, zero, or less than one among equals."
        which = (a == self._repeat(top, a)).to(a.dtype)
        return which / self._repeat(self._sum(which), a)

    def _repeat(self, v, x):
        v = F.interpolate(v, scale_factor=self.pool, mode="nearest")
        return v if v.shape == x.shape else F.pad(v, (0, x.shape[3] - v.shape[3], 0, x.shape[2] - v.shape[2]), value=1)

    def _sum(self, v): return F.avg_pool2d(v, self.pool, divisor_override=1)

    def push(self, factor, t):
        "Jacobian times the tangent `t` of the state before."
        t = factor * t
        if self.mean: t = t.sum((2, 3))
        return self.linear(t if self.pool == 1 else self._sum(t))

    def pull(self, factor, u):
        "Transposed Jacobian times `u`, of the shape of the state after."
        pooled = (*factor.shape[:2], *(n // self.pool for n in factor.shape[2:])) if factor.ndim == 4 else factor.shape
        if self.mean: v = (u @ self.weight)[:, :, None, None]
        elif self.conv:
            (top, bottom), (left, right) = self._pads(pooled)
            if (top, left) == (bottom, right): v = torch.nn.grad.conv2d_input(pooled, self.weight, u, self.stride, (top, left))
            else:
                n, c, h, w = pooled
                v = torch.nn.grad.conv2d_input((n, c, h + top + bottom, w + left + right), self.weight, u, self.stride)[:, :, top:top + h, left:left + w]
        else: v = like(u @ self.weight, factor if self.pool == 1 else torch.empty(pooled, device="meta"))
        if self.pool > 1:
            v = F.interpolate(v, scale_factor=self.pool, mode="nearest")
            if v.shape != factor.shape: v = F.pad(v, (0, factor.shape[3] - v.shape[3], 0, factor.shape[2] - v.shape[2]))
        return factor * v

    def weight_gradients(self, x, u):
        "Gradients of the mean over the batch of `u . layer(x)` in weight and bias."
        a, u = self.before(x), u / len(u)
        if not self.conv: return u.T @ flat(a), u.sum(0)
        (top, bottom), (left, right) = self._pads(a.shape)
        even = (top, left) == (bottom, right)
        if not even: a = F.pad(a, (left, right, top, bottom))
        return torch.nn.grad.conv2d_weight(a, self.weight.shape, u, self.stride, (top, left) if even else 0), u.sum((0, 2, 3))


class Path:
    "The module of a skip, which is linear: the identity, or a mean over windows and new channels of zeros."

    def __init__(self, module):
        if not isinstance(module, eqx.nn.Identity | PoolAndPad): raise InputError(f"benchmarks/torch_pc.py knows skips without weights; got {type(module).__name__}.")
        self.size, self.channels = (1, None) if isinstance(module, eqx.nn.Identity) else (module.size, module.channels)

    def __call__(self, x):
        if self.channels is None: return x
        return F.pad(F.avg_pool2d(x, self.size), (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def pull(self, u, channels):
        "The transposed map of `u`, to so many channels."
        if self.channels is None: return u
        return F.interpolate(u[:, :channels], scale_factor=self.size, mode="nearest") / self.size**2


class Network:
    "The layers of a pcnb network."

    def __init__(self, net):
        self.layers, self.waves = [Layer(f) for f in net.layers], wave(net)
        skips = [(s.src, s.dst, Path(s.module)) for s in net.skips]
        self.into = [[(src, path) for src, dst, path in skips if dst == l + 1] for l in range(net.depth)]  # states that are added to a layer's output
        self.out_of = [[(dst, path) for src, dst, path in skips if src == l] for l in range(net.depth)]    # states that a state is added to

    def predict(self, l, states):
        "What layer `l`, counted from 0, and the skips predict for state `l` + 1."
        return sum((path(states[k]) for k, path in self.into[l]), self.layers[l](states[l]))

    def pull(self, l, factor, adjoints):
        "Transposed Jacobian of all that state `l` predicts, times the adjoints of the states (by their number)."
        return sum((path.pull(adjoints[k], factor.shape[1]) for k, path in self.out_of[l]), self.layers[l].pull(factor, adjoints[l + 1]))

    def parameters(self): return [p for f in self.layers for p in (f.weight, f.bias)]

    def forward(self, x, eps=None, first=None):
        "States 0 to L from the input and the hidden errors (None: zero). `first`: the prediction of state 1, where it is known, since the input stays."
        states = [x]
        for i in range(len(self.layers)):
            mu = first if i == 0 and first is not None else self.predict(i, states)
            states.append(mu + eps[i] if eps is not None and i < len(self.layers) - 1 else mu)
        return states

    def learn(self, states, eps, y, p):
        "Weight gradients of the energy at the states, and nothing but local terms."
        tops = [*[-e for e in eps], p * (states[-1] - y)]
        return [g for f, x, u in zip(self.layers, states, tops) for g in f.weight_gradients(x, u)]


class Inference:
    "From a batch to its states, its hidden errors and the weight gradients. `compiled(f)` is f itself or torch.compile of it."

    def __init__(self, net, energy, algorithm, compiled):
        self.net, self.p, self.algorithm = net, float(energy.output_precision), algorithm
        self.learn = compiled(net.learn)

    def gradients(self, x, y):
        out, states, eps = self(x, y)
        return out, states, self.learn(states, eps, y, self.p)


class NewtonSteps(Inference):
    "Gauss-Newton in error coordinates, conjugate gradients with scalars for each example, guarded as in pcnb."

    def __init__(self, net, energy, algorithm, compiled):
        super().__init__(net, energy, algorithm, compiled)
        self.direction, self.trial, self.start = compiled(self._direction), compiled(self._trial), compiled(net.forward)

    def energy(self, states, eps, y): return 0.5 * dot(eps, eps) + 0.5 * self.p * ((states[-1] - y) ** 2).sum(1)

    def _trial(self, x, y, first, eps, d, t):
        eps = axpy(t, d, eps)
        states = self.net.forward(x, eps, first)
        return states, eps, self.energy(states, eps, y)

    def _direction(self, x, y, first, states, eps):
        "The solution of `k` iterations, its slope, the energy here, and the trial at the full step."
        net, n = self.net, len(eps)
        factors = [None, *(f.linearise(x) for f, x in zip(net.layers[1:], states[1:-1]))]

        def A(v):
            tangents = [None, v[0]]  # of the states: the input has none
            for l in range(1, n + 1):
                t = sum((path(tangents[k]) for k, path in net.into[l] if k), net.layers[l].push(factors[l], tangents[l]))
                tangents.append(t + v[l] if l < n else t)
            return tangents[-1]

        def At(u):
            adjoints = [None] * (n + 1) + [u]
            for l in reversed(range(1, n + 1)): adjoints[l] = net.pull(l, factors[l], adjoints)
            return adjoints[1:-1]

        one, inner = torch.ones_like(y[:, 0]), lambda u, v: (u * v).sum(1)
        b = [-v for v in axpy(one, eps, At(self.p * (states[-1] - y)))]
        bb, Ab, parts, steps = dot(b, b), A(b), [], self.algorithm.cg_steps
        # a vector a b + A' u is kept as a, u, its image under A, and the shares of `parts` in A' u
        mix = lambda t, v, w: (t * v[0] + w[0], t[:, None] * v[1] + w[1], t[:, None] * v[2] + w[2], [t * p + q for p, q in zip(v[3], w[3])])
        nothing = torch.zeros_like(y), [torch.zeros_like(bb)] * steps
        r = q = (one, nothing[0], Ab, nothing[1])
        d, rr, qq = (0 * one, nothing[0], nothing[0], nothing[1]), bb, bb
        for i in range(steps):
            Hq = self.p * q[2]
            t = ratio(rr, qq + inner(q[2], Hq))
            d = mix(t, q, d)
            if i + 1 == steps: break
            a, u = r[0] - t * q[0], r[1] - t[:, None] * (q[1] + Hq)
            parts.append(At(u))
            image = A(parts[-1])
            r = a, u, a[:, None] * Ab + image, [one if j == i else 0 * one for j in range(steps)]
            rr, old = torch.clamp(a * a * bb + 2 * a * inner(u, Ab) + inner(u, image), min=0), rr
            c = ratio(rr, old)
            q, qq = mix(c, q, r), rr + c * c * qq
        slope = -(d[0] * bb + inner(d[1], Ab))
        direction = [scaled(d[0], v) for v in b]
        for share, m in zip(d[3], parts): direction = axpy(share, m, direction)
        return direction, slope, self.energy(states, eps, y), *self._trial(x, y, first, eps, direction, one)

    def __call__(self, x, y):
        states = self.start(x)
        eps, out, first = [torch.zeros_like(s) for s in states[1:-1]], states[-1], states[1]
        for _ in range(self.algorithm.steps):
            d, slope, e, new_states, new_eps, new = self.direction(x, y, first, states, eps)
            noise, t, k = 8 * torch.finfo(e.dtype).eps * e.abs(), torch.ones_like(e), 1
            ceiling = e + noise
            while k <= self.algorithm.backtracks and bool((again := ~(new <= ceiling) & (-slope * t > noise)).any()):
                parabola = -slope * t * t / (2 * (new - e - slope * t))
                shorter = torch.where(torch.isfinite(parabola), torch.clamp(parabola, 0.1 * t, 0.5 * t), 0.1 * t)
                t, k = torch.where(again, shorter, t), k + 1
                new_states, new_eps, new = self.trial(x, y, first, eps, d, t)
            if bool((rises := ~(new <= ceiling)).any()):  # given up: these stay where they are
                keep = torch.where(rises, 0.0, t)
                new_states, new_eps, _ = self.trial(x, y, first, eps, d, keep)
            states, eps = new_states, new_eps
        return out, states, eps


class StateSteps(Inference):
    "Gradient descent on the states, which leaves out what the wave has not reached, and the sweep."

    def __init__(self, net, energy, algorithm, compiled):
        super().__init__(net, energy, algorithm, compiled)
        self.all = compiled(self._sweeps if isinstance(algorithm, Sweep) else self._steps)

    def __call__(self, x, y): return self.all(x, y)

    def _errors(self, states, eps, which, first):
        "Errors of the hidden states `which`, counted from 0, after the states have moved; `first` is the prediction of the first, which never changes."
        return [states[i + 1] - (self.net.predict(i, states) if i else first) if i in which else e for i, e in enumerate(eps)]

    def _steps(self, x, y):
        net, states = self.net, self.net.forward(x)
        out, first, n, rate = states[-1], states[1], len(net.layers) - 1, 0.1
        eps = [torch.zeros_like(s) for s in states[1:-1]]
        for t in range(1, self.algorithm.steps + 1):
            active = [i for i in range(n) if net.waves[i] <= t]  # hidden state i is states[i + 1]
            errors = [None, *eps, self.p * (y - states[-1])]     # of the states
            moved = {i + 1: states[i + 1] - rate * (eps[i] - net.pull(i + 1, net.layers[i + 1].linearise(states[i + 1]), errors)) for i in active}
            states = [moved.get(i, s) for i, s in enumerate(states)]
            eps = self._errors(states, eps, {i for i in range(n) if {i, i + 1, *(k for k, _ in net.into[i])} & set(moved)}, first)
            states[-1] = net.predict(n, states)
        return out, states, eps

    def _sweeps(self, x, y):
        net, states = self.net, self.net.forward(x)
        out, first, n = states[-1], states[1], len(net.layers) - 1
        eps = [torch.zeros_like(s) for s in states[1:-1]]
        for _ in range(self.algorithm.sweeps):
            errors = [None, *eps, self.p * (y - states[-1])]
            for i in reversed(range(n)):
                s = states[i + 1]
                for k, _ in net.out_of[i + 1]: errors[k] = self.p * (y - net.predict(n, states)) if k > n else states[k] - net.predict(k - 1, states)  # moved by states between
                step = self.algorithm.rate * (eps[i] - net.pull(i + 1, net.layers[i + 1].linearise(s), errors))
                states[i + 1], errors[i + 1] = s - step, eps[i] - step
            eps = self._errors(states, eps, set(range(n)), first)
            states[-1] = net.predict(n, states)
        return out, states, eps


class Backpropagation:
    "Autograd on the mean of half the squared distances."

    def __init__(self, net, compiled):
        self.net = net
        self.loss = compiled(self._loss)

    def _loss(self, x, y, *parameters):
        states = self.net.forward(x)
        return 0.5 * ((states[-1] - y) ** 2).sum(1).mean(), states

    def gradients(self, x, y):
        parameters = self.net.parameters()
        for p in parameters: p.requires_grad_(True)
        with torch.enable_grad():
            loss, states = self.loss(x, y)
            grads = torch.autograd.grad(loss, parameters)
        for p in parameters: p.requires_grad_(False)
        return states[-1].detach(), [s.detach() for s in states], grads


def build(case, compiled):
    "The case's rule in torch."
    net, rule = Network(case.net), case.rule
    if isinstance(rule, Backprop): return Backpropagation(net, compiled)
    if type(rule.energy) is not ForwardEnergy or not isinstance(rule.energy.loss, SquaredError) or rule.energy.precision != 1:
        raise InputError("benchmarks/torch_pc.py knows ForwardEnergy with squared error and precision 1.")
    kinds = {GaussNewton: NewtonSteps, GradientDescent: StateSteps, Sweep: StateSteps}
    if type(rule.inference) not in kinds: raise InputError(f"benchmarks/torch_pc.py knows gn, gd and sweep; got {case.name}.")
    return kinds[type(rule.inference)](net, rule.energy, rule.inference, compiled)


def reference(case):
    "pcnb's states and weight gradients on the batch for checks."
    def both(net, x, y):
        found = jax.vmap(net.feedforward)(x) if isinstance(case.rule, Backprop) else case.rule.infer(net, x, y).states
        return found.x, jax.tree.leaves(eqx.filter(case.rule.gradient(net, x, y)[0].layers, eqx.is_array))
    return eqx.filter_jit(both)(case.net, *check_batch(case.x, case.y))  # weights as constants would take minutes to compile


def difference(case, rule, want):
    "Largest differences of states and weight gradients from pcnb's, on the batch for checks."
    back = lambda *order: lambda t: (t.permute(*order) if t.ndim == 4 else t).cpu().numpy()
    _, states, gradients = rule.gradients(*map(tensor, check_batch(case.x, case.y)))
    got = list(map(back(0, 2, 3, 1), states)), list(map(back(2, 3, 1, 0), gradients))
    return {what: relative_difference(a, b) for what, a, b in zip(("states", "gradients"), got, want, strict=True)}


def difference64(case):
    "The same of both frameworks in float64."
    with jax.enable_x64(True):
        net, x, y = in_float64((case.net, case.x, case.y))
        wide = replace(case, net=net, x=x, y=y)
        return {f"{what}, float64": v for what, v in difference(wide, build(wide, lambda f: f), reference(wide)).items()}


def check(case, rule, want, exact):
    """Differences from pcnb's `want`. Raises `CheckFailed` above the tolerance.

    A state minus its prediction loses in float32 what is small in it, and where the lowest layers' errors are, both frameworks lose it differently; and a maximum
    between two pixels that differ by less than float32's rounding falls to either (VGG5 has such a pair). What is above the tolerance for that must agree in
    float64, which `exact()` tells; and states to a thousand times the tolerance in float32 as well.
    """
    off = difference(case, rule, want)
    if max(off.values()) <= TOLERANCE: return off
    wide = exact()
    if not (off["states"] <= 1000 * TOLERANCE and max(wide.values()) <= 1e-9):
        raise CheckFailed(f"torch's {case.name} on {case.network} differs from pcnb's by {off | wide}; expected at most {TOLERANCE:.0e}, or 1e-09 in float64 and {1000 * TOLERANCE:.0e} of states. Nothing was timed.")
    return off | wide


@torch.inference_mode()
def shifted(images, pixels):
    "Each image moved by whole pixels; zeros come in."
    n, h, w, _ = images.shape
    padded, moves = F.pad(images, (0, 0, pixels, pixels, pixels, pixels)), torch.randint(0, 2 * pixels + 1, (2, n), device=DEVICE)
    count = partial(torch.arange, device=DEVICE)
    rows, columns = moves[0][:, None] + count(h), moves[1][:, None] + count(w)
    return padded[count(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def contestant(case, want, exact, framework, compiled):
    "One way to run torch, checked."
    grad = torch.no_grad() if isinstance(case.rule, Backprop) else torch.inference_mode()  # inference tensors cannot be trained by autograd
    with grad:
        rule = build(case, compiled)
        x, y = tensor(case.x), tensor(case.y)
        if x.ndim == 4: x = x.contiguous(memory_format=torch.channels_last)
        start = time.perf_counter()
        rule.gradients(x, y)
        if DEVICE == "cuda": torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        off = check(case, rule, want, exact)
    mean, std = map(given, case.data.moments())
    train, labels, test, test_labels = map(given, (case.data.train_images, case.data.train_labels, case.data.test_images, case.data.test_labels))
    labels, test_labels = labels.long(), test_labels.long()
    inputs = lambda images: ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def update(x, y):
        out, _, gradients = rule.gradients(x, y)
        torch._foreach_add_(rule.net.parameters(), list(gradients), alpha=-case.rate)
        return out

    def step(n):
        with grad:
            for _ in range(n): update(x, y)
            if DEVICE == "cuda": torch.cuda.synchronize()

    def epoch():
        with grad:
            order, seen = torch.randperm(len(train), device=DEVICE), torch.zeros(2, device=DEVICE)
            for i in range(0, len(train) - len(x) + 1, len(x)):
                index = order[i:i + len(x)]
                out = update(inputs(shifted(train[index], case.augment.pixels)), F.one_hot(labels[index], 10).float())
                seen += torch.stack([(out.argmax(1) == labels[index]).sum(), 0.5 * ((out - F.one_hot(labels[index], 10)) ** 2).sum()])
            score = torch.zeros(3, device=DEVICE)
            for i in range(0, len(test), 500):
                out, label = rule.net.forward(inputs(test[i:i + 500]))[-1], test_labels[i:i + 500]
                ranked = out.topk(5).indices == label[:, None]
                score += torch.stack([ranked[:, 0].sum(), ranked.sum(), 0.5 * ((out - F.one_hot(label, 10)) ** 2).sum()])
            float(seen[0]), float(score[0])
        return 0.0

    return Contestant(framework, step, epoch, dict(compile_seconds=seconds, difference=off))


def opponents(case: Case):
    "Eager and compiled torch, with the weights of the case. Raises `InputError` for what this file does not know."
    if case.arithmetic != "float32": raise InputError(f"it computes in float32, not in {case.arithmetic}.")
    want, exact = reference(case), cache(lambda: difference64(case))
    return [contestant(case, want, exact, "torch", lambda f: f), contestant(case, want, exact, "torch.compile", partial(torch.compile, dynamic=False))]
