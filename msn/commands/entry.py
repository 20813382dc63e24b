"""The one way into every command: compose, run, and end a mistake in one line and exit code 2."""

import logging
import os
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import msn
from msn.errors import UserError
from msn.schema import refuse_unknown, take

Job = Callable[[DictConfig], None]

# What a person can mend: the message says how, a traceback would not.
MISTAKES = (UserError, OSError, HydraException, OmegaConfBaseException)


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
        arguments: Hydra overrides and flags.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("msn").setLevel(logging.INFO)
    try:
        if any(argument.startswith("-") for argument in arguments):
            _through_hydra_main(config_name, job, arguments)
        else:
            job(compose(config_name, arguments))
    except MISTAKES as error:
        if os.environ.get("MSN_DEBUG"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration from the shipped YAML files, without making any directory.

    Args:
        config_name: file in the config directory, without .yaml.
        overrides: `key=value` in Hydra's grammar.

    Raises:
        UserError: if a key, group or value is wrong; says what is allowed.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        known = _known(config_name, overrides)
        try:
            config = hydra.compose(config_name, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain(error, known)) from None
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(choices, dict)
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return _finish(config, known, choices)


def _known(config_name: str, overrides: list[str]) -> DictConfig:
    """What the files offer under the chosen groups, nothing added to it and no value changed."""
    defaults = OmegaConf.select(
        OmegaConf.load(config_directory() / f"{config_name}.yaml"), "defaults", default=[]
    )
    groups = {str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    chosen = [override for override in overrides if override.partition("=")[0] in groups]
    try:
        return hydra.compose(config_name, chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, OmegaConf.create())) from None


def build(config: DictConfig, key: str, **runtime: Any) -> Any:
    """Instantiate the `_target_` that stands at a key.

    Args:
        config: a composed configuration.
        key: where the target and its settings stand.
        runtime: further keywords, objects that only exist at run time.

    Raises:
        UserError: if a setting is unknown, missing, of a wrong type or out of its range.
    """
    node = OmegaConf.select(config, key)
    settings = to_plain(config, key)
    target = hydra.utils.get_object(settings["_target_"])
    if target.__module__.startswith("msn."):
        plain = {name: value for name, value in settings.items() if not name.startswith("_")}
        refuse_unknown(key, plain, target, derived=list(runtime))
        take(key, plain, target)
    try:
        return hydra.utils.instantiate(node, **runtime)
    except InstantiationException as error:
        raise (error.__cause__ or error) from None


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
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def one_line(error: BaseException) -> str:
    """The message of an error without its further lines."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename!s}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _through_hydra_main(config_name: str, job: Job, arguments: list[str]) -> None:
    """Flags such as --help, --cfg job and --multirun belong to Hydra's own main function."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        plain = [argument for argument in arguments if not argument.startswith("-")]
        try:
            known = _known(config_name, [text for text in plain if "," not in text])
        except UserError:  # a group that must be chosen is not, as in `bench --help`
            known = OmegaConf.create()
    GlobalHydra.instance().clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of five lines and exit code 1
    given, sys.argv = sys.argv, [sys.argv[0], *arguments]

    def task(config: DictConfig) -> None:
        sys.argv = given  # with it the trainer starts further processes
        choices = OmegaConf.to_container(HydraConfig.get().runtime.choices)
        assert isinstance(choices, dict)
        job(_finish(config, known, choices))

    main = hydra.main(
        version_base="1.3", config_path=str(config_directory()), config_name=config_name
    )
    try:
        main(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, known)) from None


def _finish(config: DictConfig, known: DictConfig, choices: dict[Any, Any]) -> DictConfig:
    """Refuse keys that nobody reads; note the chosen experiment where runs are named by it."""
    for key in config if len(known) else []:
        if key not in list(known):  # `in` is False for ???
            allowed = ", ".join(sorted(str(name) for name in known))
            raise UserError(f"unknown key {key!s}: allowed are {allowed}")
    if "run" in config and "experiment" in config.run:
        config.run.experiment = choices.get("experiment") or config.run.experiment
    return config


def _explain(error: Exception, known: DictConfig) -> str:
    """One line for Hydra's composition errors, with the keys or options that are allowed."""
    text = str(error)
    if text.startswith("Could not override '"):
        key = text.split("'")[1]
        if "No match in the defaults list" in text:  # a group, but none of this command
            return f"unknown key {key}: allowed are {', '.join(sorted(map(str, known)))}"
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(known, parent) if parent else known
        if isinstance(node, DictConfig) and name not in list(node):
            allowed = ", ".join(sorted(str(n) for n in node if not str(n).startswith("_")))
            return f"unknown key {key}: allowed are {allowed}"
        if node is None or not isinstance(node, DictConfig):
            return f"unknown key {key}: there is no group {parent}"
    if "Available options" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options"))
        options = list(takewhile(lambda line: "onfig search" not in line, lines[start + 1 :]))
        what = lines[0].partition(", e.g")[0].rstrip(".")  # "You must specify 'what', e.g, ..."
        return f"{what}: allowed are {', '.join(options)}"
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} must be given: add {error.full_key}=..."
    return one_line(error.__cause__ if error.__cause__ and not text else error)
