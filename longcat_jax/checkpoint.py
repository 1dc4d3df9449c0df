"""Checkpoints with Orbax: what a run saves at a step, and how anything opens it again.

A directory of checkpoints, `WORKDIR/checkpoints/STEP/`, holds as separate items `params`,
`optimizer` (training only), `data` (the iterator's state) and `config` (the job, as
config.to_mapping). The step's folder appears by one rename when everything in it is written, so a
kill or a full disk leaves the earlier ones as they were. `WORKDIR/tokenizer.json` stands beside.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from longcat_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, from_mapping
from longcat_jax.dataclass_mapping import build
from longcat_jax.model.longcat import Model
from longcat_jax.model.longcat import abstract as abstract_model
from longcat_jax.parameters import unbox
from longcat_jax.sharding import Mesh, make_mesh, parameter_shardings

FOLDER = "checkpoints"
TOKENIZER = "tokenizer.json"
ITEMS = ("params", "optimizer", "data", "config")
METRIC = "eval/loss"
CHUNK_BYTES = 64 << 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line meant for the user."""


def _first_line(error: BaseException) -> str:
    """What went wrong, without the tracebacks that storage layers put into their messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    # The cause stands last, behind a chain of paths.
    return text if len(text) <= 240 else f"{text[:100]} ... {text[-130:]}"


def _chunks(array: jax.Array) -> ocp.SaveArgs:
    """How a parameter is cut in storage: stacked matrices one by one, as `longcat convert to_hf`
    reads them.
    """
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(array.ndim - 2)))


def finished_steps(workdir: Path) -> list[int]:
    """Steps whose checkpoint is whole, ascending; what a kill left half-made doesn't count."""
    folders = (Path(workdir) / FOLDER).glob("*/config")
    return sorted(int(path.parent.name) for path in folders if path.parent.name.isdigit())


class Checkpoints:
    """The checkpoints of one workdir: asynchronous saves, the last n and the best m kept."""

    def __init__(self, workdir: Path, keep: TrainConfig | None = None) -> None:
        """`keep` says how many are kept; None opens the directory for reading."""
        self.directory = Path(workdir).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(read_only=True)
        if keep is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            policies = [checkpoint_managers.LatestN(keep.keep_last)]
            if keep.keep_best:
                best = checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: -metrics[METRIC],
                    n=keep.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
                policies.append(best)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, ascending."""
        return finished_steps(self.directory.parent)

    def save(
        self,
        step: int,
        *,
        params: Any,
        optimizer: Any,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts writing a checkpoint and returns once the arrays may be overwritten.

        `metrics` holds METRIC where the step was evaluated. Raises CheckpointError if the save
        before this one, or the start of this one, failed.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree.map(_chunks, params)),
            optimizer=ocp.args.StandardSave(optimizer),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(config)),
        )
        try:
            self._manager.wait_until_finished()
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Returns when the last save stands on disk; raises CheckpointError if it doesn't."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits and lets go of threads."""
        self.wait()
        self._manager.close()

    def restore(self, step: int, **items: Any) -> dict[str, Any]:
        """Reads the named items of a step.

        Args:
          step: one of `steps()`.
          **items: item name -> abstract tree of arrays with shardings, or None for JSON items.

        Raises:
          CheckpointError: damaged or of another shape.
        """
        wanted = {
            name: ocp.args.JsonRestore() if tree is None else ocp.args.StandardRestore(tree)
            for name, tree in items.items()
        }
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except Exception as error:
            raise self.read_error(step, error) from error
        for name, tree in items.items():
            if found.get(name) is None:
                raise self.read_error(step, ValueError(f"{name}: missing"))
            if tree is None and not isinstance(found[name], dict):
                raise self.read_error(step, ValueError(f"{name}: not a JSON object"))
        return dict(found.items())

    def stored_dtypes(self, step: int) -> Any:
        """Dtype of every parameter of a step, as a tree."""
        try:
            with ocp.StandardCheckpointer() as reader:
                found = reader.metadata(self.directory / str(step) / "params").item_metadata
            if found is None:
                raise ValueError("params: missing")
            return jax.tree.map(lambda leaf: leaf.dtype, found.tree)
        except Exception as error:
            raise self.read_error(step, error) from error

    def _write_error(self, error: BaseException) -> CheckpointError:
        intact = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(
            f"{self.directory}: a checkpoint could not be written ({_first_line(error)}); "
            f"intact: {intact}"
        )

    def read_error(self, step: int, error: BaseException) -> CheckpointError:
        """What to tell of a checkpoint that `error` makes unusable."""
        others = [other for other in self.steps() if other != step]
        hint = f"; remove it to go on from step {others[-1]}" if others else ""
        return CheckpointError(
            f"{self.directory / str(step)}: cannot be read ({_first_line(error)}){hint}"
        )


def locate(path: str | Path) -> tuple[Path, int]:
    """(workdir, step) of a workdir (its last checkpoint) or of `WORKDIR/checkpoints/STEP`.

    Raises:
      CheckpointError: nothing there.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == FOLDER:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint")
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == FOLDER else path
    if not (workdir / FOLDER).is_dir():
        raise CheckpointError(f"{path}: no checkpoints here (looked for {workdir / FOLDER})")
    steps = finished_steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir / FOLDER}: holds no finished checkpoint")
    return workdir, steps[-1]


def _saved(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """The `config` item: a whole job, or of a converted checkpoint the section `model` only."""
    return checkpoints.restore(step, config=None)["config"]


def _saved_model(checkpoints: Checkpoints, step: int) -> ModelConfig:
    return build(ModelConfig, _saved(checkpoints, step).get("model"), "model")


def saved_model_config(path: str | Path) -> ModelConfig:
    """The model of a checkpoint."""
    workdir, step = locate(path)
    return _saved_model(Checkpoints(workdir), step)


def saved_config(path: str | Path) -> Config | None:
    """The job that a checkpoint belongs to; None for a converted one, which no training made."""
    workdir, step = locate(path)
    mapping = _saved(Checkpoints(workdir), step)
    return from_mapping(mapping) if "train" in mapping else None


def load(path: str | Path, *, mesh: Mesh | None = None) -> Model:
    """Opens a checkpoint, a training's or a converted one, parameters in their stored dtype.

    Args:
      path: a workdir (last checkpoint) or `WORKDIR/checkpoints/STEP`.
      mesh: where the parameters go; None: the first device.

    Raises:
      CheckpointError: nothing there, or damaged.
    """
    workdir, step = locate(path)
    checkpoints = Checkpoints(workdir)
    config = _saved_model(checkpoints, step)
    boxed = abstract_model(config)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = jax.tree.map(
        lambda a, dtype, sharding: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding),
        unbox(boxed),
        checkpoints.stored_dtypes(step),
        parameter_shardings(boxed, mesh),
    )
    params = checkpoints.restore(step, params=abstract)["params"]
    tokenizer = workdir / TOKENIZER
    return Model(config, params, tokenizer if tokenizer.is_file() else None)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` as a whole: a kill leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
