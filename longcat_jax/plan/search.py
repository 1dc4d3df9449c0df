"""The mesh, the number of micro-batches and the way to the experts with the shortest predicted step
that fits.
"""

import dataclasses
from collections.abc import Iterator

from longcat_jax.config import Config, ConfigError, MeshConfig
from longcat_jax.parallel.expert import EXCHANGES
from longcat_jax.plan.hardware import USABLE, Hardware
from longcat_jax.plan.job import Job
from longcat_jax.plan.memory import memory
from longcat_jax.plan.training import step


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [one for one in range(1, number + 1) if number % one == 0]


def with_mesh(config: Config, mesh: MeshConfig, accumulate: int) -> Config:
    """The job on another mesh.

    Raises:
      ConfigError: something doesn't divide.
    """
    train = dataclasses.replace(config.train, accumulate=accumulate)
    return dataclasses.replace(config, mesh=mesh, train=train)


def meshes(devices: int, context: int) -> Iterator[MeshConfig]:
    """All of this many devices over data, fsdp and expert, with a given context axis."""
    if devices % context:
        raise ConfigError(f"--devices={devices}: not divisible by mesh.context={context}")
    for expert in divisors(devices // context):
        for fsdp in divisors(devices // context // expert):
            data = devices // context // expert // fsdp
            yield MeshConfig(data=data, fsdp=fsdp, context=context, expert=expert)


def fits(job: Job, hardware: Hardware) -> bool:
    """Whether a device has room for it."""
    return memory(job).total <= USABLE * hardware.memory


def with_backends(job: Job) -> list[Job]:
    """The job with each way to the experts; only with its own where it names one, or needs none."""
    if job.mesh.expert == 1 or job.config.parallel.expert_backend != "auto":
        return [job]
    return [job.with_backend(backend) for backend in EXCHANGES]


def propose(config: Config, devices: int, hardware: Hardware) -> Job:
    """The fastest job of this many devices that fits.

    Raises:
      ConfigError: no mesh divides the job, or none fits.
    """
    refused, candidates = "", []
    for mesh in meshes(devices, config.mesh.context):
        rows = config.train.global_batch // mesh.batch_shards
        for accumulate in divisors(rows) if rows else [1]:
            try:
                candidates += with_backends(Job(with_mesh(config, mesh, accumulate)))
            except ConfigError as error:
                refused = refused or str(error)
    if not candidates:
        raise ConfigError(f"--devices={devices}: no mesh divides this job ({refused})")
    candidates.sort(key=lambda job: step(job, hardware).seconds)
    for job in candidates:
        if fits(job, hardware):
            return job
    most = max(job.micro_batches * job.mesh.batch_shards for job in candidates)
    smallest = [job for job in candidates if job.micro_batches * job.mesh.batch_shards == most]
    least = min(memory(job).total for job in smallest) / 1e9
    raise ConfigError(
        f"--devices={devices}: no mesh fits into {USABLE * hardware.memory / 1e9:.1f} GB of "
        f"{hardware.name}; the least is {least:.1f} GB a device"
    )


def largest_batch(job: Job, hardware: Hardware) -> int:
    """Most rows of a micro-batch that a device has room for on this mesh; 0: not even one."""

    def room(rows: int) -> bool:
        config = job.config
        batch = rows * config.mesh.batch_shards * config.train.accumulate
        train = dataclasses.replace(config.train, global_batch=batch)
        return fits(Job(dataclasses.replace(config, train=train)), hardware)

    below, above = 0, 1
    while room(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if room(middle) else (below, middle)
    return below
