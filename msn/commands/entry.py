"""Entry of every command: compose its configuration, run it, report a mistake in one line."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

import msn
from msn.commands.command_line import parse_flags, quote_paths, read_mapping, without_readers
from msn.errors import UserError
from msn.schema import refuse_unknown, take

Job = Callable[[DictConfig], Any]

# Errors that users can fix; the message says how.
MISTAKES = (UserError, OSError, HydraException, OmegaConfBaseException)
# Classes of Hydra's own errors.
_OF_COMPOSITION = (HydraException, OmegaConfBaseException, ValueError, TypeError)

# Groups of named parts to which users may add more.
_OPEN_GROUPS = ("callbacks", "logger")

# Files that are included by others and are not options.
_PARTS = {"data": ("base",), "protocol": ("base", "logistic")}

_FLAGS = """Flags:
  --help            this text
  --cfg job         what the command would use; with --resolve resolved, with --package KEY a part
  --multirun        one run for each choice: key=a,b

Paths and names (data.root, checkpoint, init, out, run.name, ...) are taken literally after the =,
so quote them only for the shell: "data.root=~/my photos (1)". null is none; ~ is your home."""


def config_directory() -> Path:
    """Directory of the YAML files: inside an installed package, or beside it in a checkout."""
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
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() == "utf-8":
            stream.reconfigure(errors="surrogateescape")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("msn").setLevel(logging.INFO)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # it logs what it also raises
    with without_readers():
        try:
            _run(config_name, explained(job), parse_flags(arguments))
            sys.stdout.flush()
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
        config = compose(config_name, flags.overrides)
        # Checked before the command, and torch with it, is imported.
        _refuse_missing([str(key) for key in config if OmegaConf.is_missing(config, key)])
        job(config)


def explained(job: Job) -> Job:
    """The job, with one line for errors of the machine: memory, shared memory, processes."""

    def run(config: DictConfig) -> Any:
        try:
            return job(config)
        except (RuntimeError, MemoryError) as error:
            from msn.data.workers import explain  # loads torch, which such a job has loaded

            line = explain(error, lambda: "smaller sizes or batches, or a smaller model, take less")
            if line is None or os.environ.get("MSN_DEBUG"):
                raise
            raise UserError(line) from None

    return run


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration from the shipped YAML files; no directory is made.

    Args:
        config_name: file in the config directory, without .yaml.
        overrides: `key=value` in Hydra's grammar, except paths and names, see `quote_paths`.

    Raises:
        UserError: if a key, group or value is wrong; says what is allowed.
    """
    groups, values = _parsed(quote_paths(overrides))
    known, choices = _composed(config_name, tuple(str(group.input_line) for group in groups))
    config = deepcopy(known)
    for override in values:
        _set(config, override)
    _compare(OmegaConf.to_container(config), OmegaConf.to_container(known))
    if "run" in config and "experiment" in config.run:
        config.run.experiment = choices.get("experiment") or config.run.experiment
    for name in ("init_key", "init_family"):
        if isinstance(value := config.get(name), str):
            config[name] = read_mapping(name, value)
    return config


def _parsed(overrides: list[str], *, sweep: bool = False) -> tuple[list[Override], list[Override]]:
    """Split overrides into those that choose groups or are Hydra's own, and those of values.

    Args:
        overrides: in Hydra's grammar.
        sweep: whether one may have several values.

    Raises:
        UserError: if one cannot be read, deletes a key, or names an option that does not exist.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        line = f"{error.override}: cannot be read as key=value ({one_line(error)})"
        raise UserError(line) from None
    groups: list[Override] = []
    values: list[Override] = []
    for override in parsed:
        key, given = override.key_or_group, override.input_line
        if override.is_delete():
            raise UserError(f"{given}: {key} would be missing; no key can be left out")
        if override.is_sweep_override() and not sweep:
            several = "key=[a,b] is a list, --multirun runs one after another"
            raise UserError(f"{given}: these are several values: {several}")
        if given == "hydra/launcher=slurm" and find_spec("submitit") is None:
            raise UserError(f'{given}: python -m pip install "msn-pretraining[slurm]"')
        hydras = key.startswith("hydra")
        if (config_directory() / key).is_dir() and not hydras and key != "suite":  # or any file
            _check_options(override)
            groups.append(override)
        else:
            (groups if hydras or override.package is not None else values).append(override)
    return groups, values


def _check_options(override: Override) -> None:
    """Raise a UserError if a group does not have an option, alone, in a list or in a sweep."""
    value: Any = override.value()
    names = value if isinstance(value, list) else [value]
    if override.is_sweep_override():
        names = list(override.sweep_string_iterator())
    allowed = options(override.key_or_group)
    if not names or not all(name in allowed for name in names):
        raise UserError(f"{override.input_line}: allowed are {', '.join(allowed)}")


@lru_cache  # sweeps and tests compose many times in a process
def _composed(config_name: str, groups: tuple[str, ...]) -> tuple[DictConfig, dict[Any, Any]]:
    """The configuration of the chosen groups, before any value is changed, and all choices."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = hydra.compose(config_name, list(groups), return_hydra_config=True)
    except _OF_COMPOSITION as error:
        if not groups:
            raise
        known, choices = _composed(config_name, ())
        for group in groups:
            key = group.partition("=")[0].lstrip("+")
            if key not in choices and not key.startswith("hydra"):  # not a group of this command
                keys = known.get(key)
                if isinstance(keys, DictConfig):
                    own = ", ".join(f"{key}.{name}" for name in map(str, keys))
                    raise UserError(f"{group}: no presets here, set {own}") from None
                raise UserError(_unknown(key, known)) from None
        raise UserError(one_line(error)) from None
    known = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(known, True)  # new keys need a +
    if _is_trunk(model := known.get("model")):
        OmegaConf.set_struct(model, False)  # except the trunk's options, see `_compare`
    return known, dict(config.hydra.runtime.choices)


def _set(config: DictConfig, override: Override) -> None:
    """Set a key, or add one; `_compare` refuses those that may not be added."""
    key, added = override.key_or_group, override.is_add() or override.is_force_add()
    try:
        OmegaConf.update(config, key, override.value(), merge=True, force_add=added)
    except (ConfigKeyError, ConfigAttributeError) as error:
        if not isinstance(error.parent_node, DictConfig):
            raise UserError(f"{override.input_line}: {one_line(error)}") from None
        raise UserError(_unknown(error.full_key or key, error.parent_node)) from None
    except _OF_COMPOSITION as error:
        raise UserError(f"{override.input_line}: {one_line(error)}") from None


def build(config: DictConfig, key: str, kind: type = object, **runtime: Any) -> Any:
    """Instantiate the `_target_` of a key.

    Args:
        config: a composed configuration.
        key: of the target and its settings.
        kind: class that the target must make.
        runtime: further keywords, objects that exist only at run time.

    Raises:
        UserError: if a setting is unknown, missing, of a wrong type or out of range.
    """
    settings, target = to_plain(config, key), find_target(config, key, kind)
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
        # An unknown key or a wrong type; loggers have many classes of errors.
        if not ours and (isinstance(cause, TypeError) or key.startswith("logger.")):
            raise UserError(f"{key}: {one_line(cause)}") from None
        raise cause from None
    if not isinstance(made, kind):
        raise UserError(f"{key}._target_={settings['_target_']}: does not make a {kind.__name__}")
    return made


def find_target(config: DictConfig, key: str, kind: type = object) -> Callable[..., Any]:
    """The class or function that the `_target_` of a key names.

    Raises:
        UserError: if there is none, or it is a class of another kind.
    """
    settings = OmegaConf.select(config, key)
    if not isinstance(settings, DictConfig) or "_target_" not in settings:
        raise UserError(f"{key} must be a group of keys with a _target_, got {settings}")
    name = settings["_target_"]
    try:
        target: Any = hydra.utils.get_object(name) if isinstance(name, str) else None
    except (ImportError, ValueError):
        raise UserError(f"{key}._target_={name}: cannot be imported") from None
    if not callable(target) or settings.get("_partial_"):
        raise UserError(f"{key}._target_={name}: must name a class or a function to call")
    if isinstance(target, type) and not issubclass(target, kind):
        raise UserError(f"{key}._target_={name}: does not make a {kind.__name__}")
    return target


def to_plain(config: DictConfig, key: str | None = None) -> dict[str, Any]:
    """A configuration, or the part at a key, as plain resolved data.

    Raises:
        UserError: if a required value (`???`) is missing.
    """
    # Resolved within the whole: a node alone does not see what its interpolations point to.
    missing = OmegaConf.missing_keys(config)
    _refuse_missing(sorted(name for name in missing if name.startswith(key or "")))
    node = config if key is None else OmegaConf.select(config, key)
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return plain  # a value, if the group was set to one


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise UserError(f"{names[0]} must be given: add {names[0]}=...")


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename!s}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError) and lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2]  # the worker's own line ends its traceback
    return lines[0] if lines else type(error).__name__


def options(group: str) -> list[str]:
    """The options of a group such as `data` or `data/views`, sorted."""
    names = (path.stem for path in (config_directory() / group).glob("*.yaml"))
    return sorted(name for name in names if name not in _PARTS.get(group, ()))


def _help(config_name: str, overrides: list[str]) -> str:
    """The help text: purpose, groups with their options, keys and flags."""
    lines = (config_directory() / f"{config_name}.yaml").read_text().splitlines()
    text = [line[2:] for line in takewhile(lambda line: line.startswith("# "), lines)]
    keys = OmegaConf.to_yaml(compose(config_name, overrides))
    groups, _ = _parsed(quote_paths(overrides))
    _, choices = _composed(config_name, tuple(str(group.input_line) for group in groups))
    own = [(group, option) for group, option in choices.items() if not group.startswith("hydra")]
    if own:
        text += ["", "Groups, group=option (an experiment changes several):"]
    for group, option in reversed(own):
        others = ", ".join(options(group))
        text.append(f"  {group}=...  default {option or 'none'}; of {others}")
    text += ["", "Keys, key=value (group.key=value for nested ones), with their values:"]
    text += [f"  {line}" for line in keys.splitlines()]
    return "\n".join([*text, "", _FLAGS])


def _shown(config: DictConfig, package: str | None, resolve: bool) -> str:
    """The text of `--cfg job [--package KEY] [--resolve]`."""
    node = config if package is None else OmegaConf.select(config, package)
    if node is None:
        raise UserError(f"--package {package}: there is no such key")
    text = OmegaConf.to_yaml(node, resolve=resolve) if OmegaConf.is_config(node) else str(node)
    return text.rstrip()


def _sweep(config_name: str, job: Job, overrides: list[str]) -> None:
    """Run a job for each choice, by Hydra's main function; a mistake in one does not end others."""
    overrides = quote_paths(overrides, sweep=True)
    parsed = [override for some in _parsed(overrides, sweep=True) for override in some]
    compose(config_name, [_first(override) for override in parsed])  # finds mistakes of all jobs
    GlobalHydra.instance().clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of five lines and exit code 1
    given, sys.argv = sys.argv, [sys.argv[0], "--multirun", *overrides]
    failed = []

    def task(config: DictConfig) -> None:
        sys.argv = given  # the trainer starts further processes with it
        own = list(HydraConfig.get().overrides.task)
        try:
            job(compose(config_name, own))
        except MISTAKES as error:
            # In a SLURM job only an exception reaches this process. Here, Hydra would print all
            # overrides before it.
            if os.environ.get("MSN_DEBUG") or "SUBMITIT_EXECUTOR" in os.environ:
                raise
            given_to_all = {override.lower() for override in overrides}  # report=false -> False
            failed.append(" ".join(one for one in own if one.lower() not in given_to_all))
            print(f"error: {failed[-1]}: {one_line(error)}", file=sys.stderr)

    main = hydra.main(
        version_base="1.3", config_path=str(config_directory()), config_name=config_name
    )
    main(task)()
    if failed:
        sys.exit(2)


def _first(override: Override) -> str:
    """The override in a sweep's first job."""
    given = str(override.input_line)
    if override.is_discrete_sweep():
        return f"{given.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"
    return given


def _compare(config: Any, known: Any, prefix: str = "") -> None:
    """Refuse keys that the files do not have, and values in place of groups."""
    if not isinstance(known, dict):
        return
    if not isinstance(config, dict):
        raise UserError(f"{prefix[:-1]} must be a group of keys, got {config!r}")
    if prefix == "model." and _is_trunk(known) and len(config) > len(known):
        from msn.method.vit import PLAIN  # loads torch; files leave a plain trunk's options out

        known = PLAIN | known
    for key, value in config.items():
        if key not in known and prefix.rstrip(".") not in _OPEN_GROUPS:
            raise UserError(_unknown(f"{prefix}{key}", known))
        # With a `_target_`, `build` checks against its signature: protocol.sgd=null.
        if isinstance(value, dict) or "_target_" not in known:
            _compare(value, known.get(key), f"{prefix}{key}.")


def _is_trunk(model: Any) -> bool:
    """Whether a group `model` describes a trunk to be built, not only how a file is read."""
    return isinstance(model, dict | DictConfig) and "embed_dim" in model


def _unknown(key: str, known: Iterable[Any]) -> str:
    allowed = ", ".join(sorted(str(name) for name in known if not str(name).startswith("_")))
    return f"unknown key {key}: allowed are {allowed or 'none here'}"
