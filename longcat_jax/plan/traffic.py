"""What a step sends: every kind of collective by formula, in `parallel.hlo.Collective`'s terms.

Gradients of norms and biases and sums of a few numbers (metrics, router counts) are left out.
"""

import dataclasses

from longcat_jax.config import MESH_AXES, MeshConfig
from longcat_jax.plan.hardware import Load, load
from longcat_jax.plan.job import Axes, Job, Part, ways

ID = 4
"""Bytes of an expert's number."""
DENSE_PATH, BLOCK, LOSS, NOTHING = "dense path", "rest of the block", "loss", "nothing"
"""What runs meanwhile: FFN_0, MLA_1, FFN_1 and other chunks' experts; MLA_0, router and one chunk's
experts; products with the unembedding; nothing that could be relied on.
"""
SUMMED = tuple(axis for axis in MESH_AXES if axis != "pipeline")
"""Axes over which tokens, and so gradients' terms, are spread."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """Equal collectives of one step."""

    name: str
    kind: str
    axes: Axes
    payload: int
    """Bytes of the whole array on one device."""
    times: int
    behind: str
    """What hides it."""
    backward: bool = False

    def load(self, mesh: MeshConfig, node: int) -> Load:
        """Bytes that one of them brings over a device's links."""
        return load(self.kind, self.payload, mesh, self.axes, node)


@dataclasses.dataclass(frozen=True)
class Use:
    """How often a weight is read in a step, and in what width it travels."""

    times: int
    behind: str
    itemsize: int
    """Bytes of a value when gathered."""
    gradient_itemsize: int
    backward: int = 1
    """How often the backward pass gathers it once more."""


def _present(mesh: MeshConfig, axes: Axes) -> Axes:
    return tuple(axis for axis in axes if getattr(mesh, axis) > 1)


def _weights(mesh: MeshConfig, part: Part, values: int, use: Use) -> list[Flow]:
    """A weight is gathered for either pass, its gradient scattered over the axes that cut it, and
    summed over the others; `values` are those of the gathered weight.
    """
    cut = _present(mesh, part.cut)
    if part.name == "experts":  # devices of the expert axis have experts of their own
        cut = tuple(axis for axis in cut if axis != "expert")
    summed = _present(mesh, tuple(axis for axis in SUMMED if axis not in part.cut))
    whole, gradient = values * use.itemsize, values * use.gradient_itemsize
    wanted = [
        ("weights", "all-gather", cut, whole, False),
        *([("weights", "all-gather", cut, whole, True)] * use.backward),
        ("gradients", "reduce-scatter", cut, gradient, True),
        ("gradients", "all-reduce", summed, gradient // ways(mesh, cut), True),
    ]
    return [
        Flow(f"{part.name}: {what}", kind, axes, payload, use.times, use.behind, backward)
        for what, kind, axes, payload, backward in wanted
        if axes
    ]


def exchanges(job: Job) -> list[Flow]:
    """Tokens on their way to experts and back, in all blocks and micro-batches.

    Ids and gates travel with the tokens. What is made again for the backward pass includes their
    way there, and not the way back, whose result no gradient reads.
    """
    m = job.model
    if job.mesh.expert == 1 or job.backend not in ("allgather", "all_to_all"):
        return []
    there, back = ("all-to-all",) * 2
    if job.backend == "allgather":
        there, back = "all-gather", "reduce-scatter"
    hidden = job.received * m.hidden_size * job.itemsize
    gates, ids = job.received * m.moe_topk * job.wide, job.received * m.moe_topk * ID
    wanted = [
        ("dispatch", there, hidden + gates + ids, False),
        ("combine", back, hidden, False),
        ("gradient of combine", there, hidden, True),
        ("gradient of dispatch", back, hidden + gates, True),
    ]
    if job.config.train.remat != "none":
        wanted.append(("dispatch", there, hidden + gates + ids, True))
    times = m.num_layers * job.micro_batches
    return [
        Flow(name, kind, ("expert",), payload, times, DENSE_PATH, backward)
        for name, kind, payload, backward in wanted
    ]


def _latents(job: Job, attentions: int, behind: str) -> list[Flow]:
    """Keys of whole rows, gathered as latents over the context axis."""
    axes = _present(job.mesh, ("context",))
    payload = job.tokens * job.mesh.context * job.model.latent_dim * job.itemsize
    wanted = [("all-gather", False), ("reduce-scatter", True)]
    if job.config.train.remat != "none" and behind == BLOCK:
        wanted.append(("all-gather", True))
    return [
        Flow("latents", kind, axes, payload, attentions * job.micro_batches, behind, backward)
        for kind, backward in wanted
        if axes
    ]


def flows(job: Job) -> list[Flow]:
    """All of a step's traffic."""
    mesh, layers, micro, size = job.mesh, job.model.num_layers, job.micro_batches, job.itemsize
    block = Use(layers * micro, BLOCK, size, size)
    by_hand = dataclasses.replace(block, backward=int(job.gathers_again))
    found = exchanges(job) + _latents(job, 2 * layers, BLOCK)
    for name, use in (
        ("dense", block),
        ("keys and values", by_hand),
        ("router", _router(job, block)),
    ):
        part = job.part(name)
        found += _weights(mesh, part, (part.values - part.small) // layers, use)
    experts = job.part("experts")
    found += _weights(mesh, experts, experts.values // layers // mesh.expert, by_hand)
    losses = 1
    if mtp := job.part("MTP layer").values:
        losses = 2
        found += _latents(job, 1, NOTHING)
        mtp -= job.part("MTP layer").small
        # Its two passes follow one another: the gathered weights stay.
        use = Use(micro, NOTHING, size, size, backward=0)
        found += _weights(mesh, job.part("MTP layer"), mtp, use)
    for name in ("embedding", "MTP embedding"):
        if table := job.part(name).values:
            use = Use(micro, NOTHING, size, job.wide, backward=0)
            found += _weights(mesh, job.part(name), table, use)
    head = Use(losses * micro, LOSS, size, job.wide)
    return found + _weights(mesh, job.part("head"), _columns(job) * job.model.hidden_size, head)


def _router(job: Job, block: Use) -> Use:
    """In bfloat16 its weights travel as three parts, and so does their gradient (model/router.py);
    its logits are made again only where everything is.
    """
    if job.model.dtype != "bfloat16":
        return dataclasses.replace(block, itemsize=job.wide, gradient_itemsize=job.wide)
    times = 2 if job.config.train.remat == "full" else 1
    return dataclasses.replace(
        block, itemsize=3 * job.itemsize, gradient_itemsize=3 * job.wide, backward=times
    )


def _columns(job: Job) -> int:
    """Of the unembedding that one loss reads: the last piece overlaps the one before."""
    width = min(job.config.train.vocab_chunk, job.model.vocab_size)
    return -(-job.model.vocab_size // width) * width
