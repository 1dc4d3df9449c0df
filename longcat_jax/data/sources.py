"""From a config to prepared directories and the job's one tokenizer.

The default corpus is made on first use. The tokenizer is `data.tokenizer` if given, else that of
the prepared directories among the sources, else one trained on the default corpus. It is put at
DIR/tokenizer.json last, so that file says that all is ready.
"""

import os
import time
from pathlib import Path

from longcat_jax.config import Config, ConfigError
from longcat_jax.data.prepare import SpecialIds, prepare_installed_python
from longcat_jax.data.records import MANIFEST, TOKENIZER, DataError, Manifest, read_manifest
from longcat_jax.data.tokenizer import Tokenizer, load_tokenizer

INSTALLED_PYTHON = "installed-python"
WAIT_SECONDS = 1800
"""How long other processes wait for the first to prepare."""


def _own_tokenizer(config: Config) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the config names, itself or by a prepared directory, and its path."""
    prepared = [Path(s) for s in config.data.sources.values() if s != INSTALLED_PYTHON]
    for path in prepared:
        read_manifest(path)  # says so where it isn't one
    paths = [config.data.tokenizer] if config.data.tokenizer else []
    paths += [str(path / TOKENIZER) for path in prepared]
    return (load_tokenizer(paths[0]), paths[0]) if paths else (None, "")


def _check_manifest(manifest: Manifest, path: Path, tokenizer: Tokenizer, config: Config) -> None:
    model = config.model
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path / MANIFEST}: tokenized with another tokenizer than this job's; prepare it "
            "again with --tokenizer, or give that tokenizer as data.tokenizer"
        )
    if manifest.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: must be >= {manifest.vocab_size}, the "
            f"vocabulary of {path / TOKENIZER}"
        )
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(manifest, name) != getattr(model, name):
            raise ConfigError(
                f"model.{name}={getattr(model, name)}: must be {getattr(manifest, name)}, as "
                f"{path / MANIFEST} was made with"
            )


def _check_settings(made: dict, wanted: dict, path: Path) -> None:
    changed = [key for key in made | wanted if made.get(key) != wanted.get(key)]
    if changed:
        had, has = (
            ", ".join(f"{key}={settings.get(key)}" for key in changed)
            for settings in (made, wanted)
        )
        raise DataError(
            f"{path}: was made with {had}, the config says {has}; use another workdir, or delete it"
        )


def _settings(config: Config, tokenizer: Tokenizer | None) -> dict:
    settings = {"corpus_mb": config.data.corpus_mb, "validation_mb": config.data.validation_mb}
    if tokenizer is None:
        return settings | {"vocab_size": config.model.vocab_size}
    return settings | {"tokenizer": tokenizer.sha256[:16]}


def _put_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    partial = directory / f".{TOKENIZER}.partial"
    tokenizer.save(partial)
    os.replace(partial, directory / TOKENIZER)


def _make(config: Config, directory: Path) -> None:
    """Makes whatever is missing in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, origin = _own_tokenizer(config)
    ids = SpecialIds(config.model.bos_token_id, config.model.eos_token_id)
    if tokenizer is not None:
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}: must be >= {tokenizer.vocab_size}, "
                f"the vocabulary of {origin}"
            )
        ids.check(tokenizer, origin)
    if INSTALLED_PYTHON in config.data.sources.values():
        corpus, settings = directory / INSTALLED_PYTHON, _settings(config, tokenizer)
        if not (corpus / MANIFEST).exists():
            prepare_installed_python(
                corpus,
                settings=settings,
                vocab_size=config.model.vocab_size,
                tokenizer=tokenizer,
                ids=ids,
            )
        _check_settings(read_manifest(corpus).settings, settings, corpus)
        tokenizer = tokenizer or load_tokenizer(corpus / TOKENIZER)
    target = directory / TOKENIZER
    if not target.exists():
        _put_tokenizer(tokenizer, directory)
    elif load_tokenizer(target).sha256 != tokenizer.sha256:
        raise DataError(
            f"{target}: another tokenizer than the config's; use another workdir, or delete it"
        )


def _wait(directory: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (directory / TOKENIZER).exists():
        if time.monotonic() > deadline:
            raise DataError(
                f"{directory / TOKENIZER}: process 0 did not make it in {WAIT_SECONDS} s"
            )
        time.sleep(0.2)


def resolve_sources(config: Config, directory: Path, *, process_index: int) -> dict[str, Path]:
    """Name -> prepared directory of every source, all tokenized with DIR/tokenizer.json.

    Process 0 makes what is missing; others wait for it.

    Raises:
      DataError, ConfigError: sources, tokenizer and config that don't fit together.
    """
    if process_index == 0:
        _make(config, directory)
    else:
        _wait(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    sources = {
        name: directory / INSTALLED_PYTHON if source == INSTALLED_PYTHON else Path(source)
        for name, source in config.data.sources.items()
    }
    for path in sources.values():
        _check_manifest(read_manifest(path), path, tokenizer, config)
    return sources
