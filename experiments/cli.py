"""The command line: user mistakes end in one clear line, not in a traceback."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).absolute().parent.parent / "configs"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn mistakes of the user into one line on standard error and exit status 2."""
    try:
        yield
    except MissingMandatoryValue as error:
        print(f"error: {error.full_key} is not set and has no default; add {error.full_key}=...", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FileNotFoundError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a training goes on from its last checkpoint when it is started again", file=sys.stderr)
        sys.exit(130)


def guarded(main: Callable[[], None], config_name: str, configs: Path = CONFIGS) -> None:
    """Check the command line, then run a Hydra program whose configuration lies in the folder ``configs``."""
    with one_line_errors():
        # Hydra's own options may have values, which are no overrides.
        words = get_args_parser().parse_known_args(sys.argv[1:])[0].overrides
        empty = empty_choices(config_name, words, configs)
        check_overrides(config_name, [word for word in words if word not in empty], configs)
        sys.argv = [word for word in sys.argv if word not in empty]
        main()


def resolved(config: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Return a composed configuration as plain values, with the names of the chosen files under ``name``."""
    config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    names = {group: name for group, name in choices.items() if (CONFIGS / group).is_dir()}
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True) | {"name": names}


def compose_config(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """Return what a command line with these overrides would run with."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(config_name, overrides, return_hydra_config=True)
    return resolved(config, config.hydra.runtime.choices)


def empty_choices(config_name: str, words: list[str], configs: Path = CONFIGS) -> list[str]:
    """Return ``study=null`` and its like where that is the default and the words say nothing else of the group.

    Hydra itself refuses it: it has no word for an empty choice.
    """
    defaults = OmegaConf.to_container(OmegaConf.load(configs / f"{config_name}.yaml"))["defaults"]
    groups = [group for each in defaults if isinstance(each, dict) for group, name in each.items() if name is None]
    named = [word.partition("=")[0] for word in words]
    return [f"{group}=null" for group in groups if named.count(group) == 1]


def check_overrides(config_name: str, words: list[str], configs: Path = CONFIGS) -> None:
    """Raise ``ValueError`` for an override of what is not there, naming what comes nearest."""
    groups = {folder.name for folder in configs.iterdir() if folder.is_dir()}
    choices, fields = [], []
    for override in OverridesParser.create().parse_overrides(words):
        if override.key_or_group in groups:
            names = [file.stem for file in (configs / override.key_or_group).glob("*.yaml")]
            chosen = chosen_names(override)
            for name in chosen:
                if name not in names:
                    raise ValueError(f"{override.key_or_group}={name}: no such choice{nearest(name, names)}")
            choices += [f"{override.key_or_group}={name}" for name in chosen[:1]]
        elif not (override.is_add() or override.is_force_add() or override.is_hydra_override()):
            fields.append(override.key_or_group)
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose(config_name, choices)
    known = list(field_names(config))
    for field in fields:
        if field not in known:
            raise ValueError(f"{field}: no such field{nearest(field, [*known, *groups])}")


def chosen_names(override: Override) -> list[str]:
    """Return the choices that an override of a group names; none for a glob, which matches what there is."""
    chosen = override.value()
    if isinstance(chosen, ChoiceSweep):
        return [str(value) for value in chosen.list]
    return [] if override.is_sweep_override() else [str(chosen)]


def field_names(config: DictConfig, prefix: str = "") -> Iterable[str]:
    """Yield the dotted name of every field and of every group of fields."""
    for key in config:
        yield f"{prefix}{key}"
        child = None if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key) else config[key]
        if isinstance(child, DictConfig):
            yield from field_names(child, f"{prefix}{key}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest name, or the whole list where none is near."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(names)}"
