"""The one way into every command: compose, run, and end a mistake in one line and exit code 2."""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import msn
from msn.commands.command_line import parse_flags, quote_paths, read_mapping, without_readers
from msn.commands.help import help_text, options
from msn.errors import UserError
from msn.schema import refuse_unknown, take

Job = Callable[[DictConfig], Any]

# What a person can mend: the message says how, a traceback would not.
MISTAKES = (UserError, OSError, HydraException, OmegaConfBaseException)
# Hydra lets some of its own errors out as these.
_OF_COMPOSITION = (HydraException, OmegaConfBaseException, ValueError, TypeError)

# Groups of named parts to which a person may add more.
_OPEN_GROUPS = ("callbacks", "logger")


def config_directory() -> Path:
    """Where the YAML files lie: inside an installed package, else beside it in a checkout."""
    package = Path(msn.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def run_command(config_name: str, job: Job, arguments: list[str]) -> None:
    """Compose a command's configuration and run its job; a mistake ends the process with code 2.

    `MSN_DEBUG=1` shows the traceback instead.

    Args:
        config_name: file in the config directory, without .yaml.
        job: gets the composed configuration.
        arguments: overrides, key=value, and flags.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() == "utf-8":
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("msn").setLevel(logging.INFO)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # it tells what it also raises
    with without_readers():
        try:
            _run(config_name, explained(job), parse_flags(arguments))
        except MISTAKES as error:
            if os.environ.get("MSN_DEBUG"):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)


def _run(config_name: str, job: Job, flags: argparse.Namespace) -> None:
    if flags.help:
        print(_help(config_name, flags.overrides))
    elif flags.cfg == "job":
        print(_shown(compose(config_name, flags.overrides), flags.package, flags.resolve))
    elif flags.multirun:
        _sweep(config_name, job, flags.overrides)
    else:
        job(compose(config_name, flags.overrides))


def explained(job: Job) -> Job:
    """The job with one line for what is beyond the machine: memory, shared memory, processes."""

    def run(config: DictConfig) -> Any:
        try:
            return job(config)
        except (RuntimeError, MemoryError) as error:
            from msn.data.workers import explain  # loads torch, as such a job has done

            line = explain(error, lambda: "smaller sizes or batches, or a smaller model, take less")
            if line is None or os.environ.get("MSN_DEBUG"):
                raise
            raise UserError(line) from None

    return run


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration from the shipped YAML files, without making any directory.

    Args:
        config_name: file in the config directory, without .yaml.
        overrides: `key=value` in Hydra's grammar, but for paths and names, see `quote_paths`.

    Raises:
        UserError: if a key, group or value is wrong; says what is allowed.
    """
    overrides = quote_paths(overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        known = _known(config_name, overrides)
        try:
            config = hydra.compose(config_name, overrides, return_hydra_config=True)
        except _OF_COMPOSITION as error:
            raise UserError(_explain(error, known)) from None
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(choices, dict)
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return _finish(config, known, choices)


def _known(config_name: str, overrides: list[str]) -> DictConfig:
    """What the files offer under the chosen groups, nothing added to it and no value changed.

    Raises:
        UserError: if a group has no such option.
    """
    chosen = []
    for override in overrides:
        key, equals, option = override.partition("=")
        group = key.lstrip("+").partition("@")[0]
        if not equals or not (config_directory() / group).is_dir() or group.startswith("hydra"):
            continue
        allowed = options(config_directory(), group)
        several = re.fullmatch(r"\[?([\w\s,.-]*)\]?", option)  # a list, or choices of a sweep
        for one in several[1].split(",") if several else []:
            if one.strip() not in allowed:
                raise UserError(f"{key}={option}: allowed are {', '.join(allowed)}")
        if option in allowed:
            chosen.append(override)
    return _composed(config_name, tuple(chosen))


@lru_cache  # sweeps and tests compose many times in a process
def _composed(config_name: str, chosen: tuple[str, ...]) -> DictConfig:
    try:
        return hydra.compose(config_name, list(chosen))
    except _OF_COMPOSITION as error:
        raise UserError(_explain(error, OmegaConf.create())) from None


def build(config: DictConfig, key: str, kind: type = object, **runtime: Any) -> Any:
    """Instantiate the `_target_` that stands at a key.

    Args:
        config: a composed configuration.
        key: where the target and its settings stand.
        kind: what the target must make.
        runtime: further keywords, objects that only exist at run time.

    Raises:
        UserError: if a setting is unknown, missing, of a wrong type or out of its range.
    """
    settings = to_plain(config, key)
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError(f"{key} must be a group of keys with a _target_, got {settings}")
    name = settings["_target_"]
    try:
        target = hydra.utils.get_object(name) if isinstance(name, str) else None
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}._target_={name}: {one_line(error)}") from None
    if not callable(target) or settings.get("_partial_"):
        raise UserError(f"{key}._target_={name}: must name a class or a function to call")
    ours = str(getattr(target, "__module__", "")).startswith("msn.")
    if ours:
        plain = {name: value for name, value in settings.items() if not name.startswith("_")}
        refuse_unknown(key, plain, target, derived=list(runtime))
        take(key, plain, target, derived=list(runtime))
    try:
        made = hydra.utils.instantiate(OmegaConf.select(config, key), **runtime)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ImportError):  # one of the optional loggers
            extra = key.rpartition(".")[2]
            hint = f'python -m pip install "msn-pretraining[{extra}]"'
            raise UserError(f"{key}: {one_line(cause)}: {hint}") from None
        if isinstance(cause, TypeError) and not ours:  # an unknown key or a wrong type
            raise UserError(f"{key}: {one_line(cause)}") from None
        raise cause from None
    if not isinstance(made, kind):
        raise UserError(f"{key}._target_={name}: makes no {kind.__name__}")
    return made


def to_plain(config: DictConfig, key: str | None = None) -> dict[str, Any]:
    """A configuration, or what stands at a key of it, as plain resolved data.

    Raises:
        UserError: if a value that must be given (`???`) is missing.
    """
    # Resolved inside the whole: a node alone cannot see what its interpolations point to.
    missing = sorted(name for name in OmegaConf.missing_keys(config) if name.startswith(key or ""))
    if missing:
        raise UserError(f"{missing[0]} must be given: add {missing[0]}=...")
    node = config if key is None else OmegaConf.select(config, key)
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return plain  # of a group that was set to a value, that value


def one_line(error: BaseException) -> str:
    """The message of an error without its further lines."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename!s}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError) and lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2]  # the worker's own line ends its traceback
    return lines[0] if lines else type(error).__name__


def _help(config_name: str, overrides: list[str]) -> str:
    try:
        keys = OmegaConf.to_yaml(compose(config_name, overrides))
    except UserError:
        if overrides:
            raise
        keys = None  # a group must be chosen first, as in `bench --help`
    return help_text(config_directory(), config_name, keys)


def _shown(config: DictConfig, package: str | None, resolve: bool) -> str:
    """What `--cfg job [--package KEY] [--resolve]` shows."""
    node = config if package is None else OmegaConf.select(config, package)
    if node is None:
        raise UserError(f"--package {package}: there is no such key")
    text = OmegaConf.to_yaml(node, resolve=resolve) if OmegaConf.is_config(node) else str(node)
    return text.rstrip()


def _sweep(config_name: str, job: Job, overrides: list[str]) -> None:
    """A job for each choice, by Hydra's own main function; a mistake in one does not end others."""
    overrides = quote_paths(overrides, sweep=True)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        known = _known(config_name, overrides)
    GlobalHydra.instance().clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of five lines and exit code 1
    given, sys.argv = sys.argv, [sys.argv[0], "--multirun", *overrides]
    failed = []

    def task(config: DictConfig) -> None:
        sys.argv = given  # with it the trainer starts further processes
        chosen = HydraConfig.get()
        choices = OmegaConf.to_container(chosen.runtime.choices)
        assert isinstance(choices, dict)
        own = list(chosen.overrides.task)
        try:
            job(_finish(config, _known(config_name, own), choices))
        except MISTAKES as error:
            # Elsewhere (SLURM) only an exception tells this process. Here Hydra would print all
            # overrides before it.
            if os.environ.get("MSN_DEBUG") or "SUBMITIT_EXECUTOR" in os.environ:
                raise
            given_to_all = {override.lower() for override in overrides}  # report=false -> False
            failed.append(" ".join(one for one in own if one.lower() not in given_to_all))
            print(f"error: {failed[-1]}: {one_line(error)}", file=sys.stderr)

    main = hydra.main(
        version_base="1.3", config_path=str(config_directory()), config_name=config_name
    )
    try:
        main(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, known)) from None
    if failed:
        sys.exit(2)


def _finish(config: DictConfig, known: DictConfig, choices: dict[Any, Any]) -> DictConfig:
    """Refuse keys that nobody reads or that are gone; note what names the runs, read `init_key`."""
    _compare(OmegaConf.to_container(config), OmegaConf.to_container(known))
    if "run" in config and "experiment" in config.run:
        config.run.experiment = choices.get("experiment") or config.run.experiment
    if isinstance(key := config.get("init_key"), str):
        config.init_key = read_mapping("init_key", key)
    return config


def _compare(config: Any, known: Any, prefix: str = "") -> None:
    """Refuse keys that were added to what the files offer or taken away, and values for groups."""
    if not isinstance(known, dict):
        return
    if not isinstance(config, dict):
        raise UserError(f"{prefix[:-1]} must be a group of keys, got {config!r}")
    for key in config:
        if key not in known and prefix.rstrip(".") not in _OPEN_GROUPS:
            raise UserError(_unknown(f"{prefix}{key}", known))
    for key, value in known.items():
        if key not in config:
            raise UserError(f"{prefix}{key} is missing: it cannot be left out")
        # Where a signature says what may stand there, `build` looks: protocol.sgd=null.
        if isinstance(config[key], dict) or "_target_" not in known:
            _compare(config[key], value, f"{prefix}{key}.")


def _unknown(key: str, known: Iterable[Any]) -> str:
    allowed = ", ".join(sorted(str(name) for name in known if not str(name).startswith("_")))
    return f"unknown key {key}: allowed are {allowed or 'none here'}"


def _explain(error: Exception, known: DictConfig) -> str:
    """One line for Hydra's composition errors, with the keys or options that are allowed."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value ({one_line(error)})"
    if text.startswith("Ambiguous value"):
        return f"{one_line(error)}: key=[a,b] is a list, --multirun runs one after the other"
    if text.startswith("Could not override '"):
        key = text.split("'")[1]
        if "No match in the defaults list" in text:  # a group, but none of this command
            return _unknown(key, known)
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(known, parent) if parent else known
        if isinstance(node, DictConfig) and name not in list(node):
            return _unknown(key, node)
        if node is None or not isinstance(node, DictConfig):
            return f"unknown key {key}: there is no group {parent}"
    if "Available options" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options"))
        options = list(takewhile(lambda line: "onfig search" not in line, lines[start + 1 :]))
        what = lines[0].partition(", e.g")[0].rstrip(".")  # "You must specify 'what', e.g, ..."
        return f"{what}: allowed are {', '.join(options)}"
    if "hydra/launcher/submitit" in text:
        return 'hydra/launcher=slurm: python -m pip install "msn-pretraining[slurm]"'
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} must be given: add {error.full_key}=..."
    return one_line(error.__cause__ if error.__cause__ and not text else error)
