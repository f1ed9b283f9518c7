"""Command-line options made from the configuration's sections: one flag per field, with the field's own help."""

from __future__ import annotations

import base64
import dataclasses
import mimetypes
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from phloem.core.config import SECTIONS, Config, read_environment
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.spellings import MASTER, one_address, refuse_missing

T = TypeVar("T")
_ALIASES = {"model_path": ("--model",), "tokenizer_path": ("--tokenizer",)}


def settings_fields(skip: tuple[str, ...] = ()) -> list[tuple[str, Any, Any]]:
    """(name, annotated type, dataclass field) of every setting, in the order of the sections."""
    found: list[tuple[str, Any, Any]] = []
    for section, cls in SECTIONS.items():
        if section in skip:
            continue
        hints = get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            also = (*_ALIASES.get(spec.name, ()), *(f"--{name.replace('_', '-')}" for name in spec.metadata["also"]))
            kind = Annotated[hints[spec.name], tyro.conf.arg(help=spec.metadata["help"], aliases=also or None)]
            found.append((spec.name, kind, dataclasses.field(default=spec.default)))
    return found


def parse(
    command: str,
    argv: list[str],
    own: type[Any] | None = None,
    skip: tuple[str, ...] = (),
    description: str = "",
) -> tuple[Config, Any]:
    """Parse `argv` into a checked configuration and an instance of `own` (a command's own options, all with defaults).

    A first argument without a dash is the model. `--config FILE` reads settings from YAML; flags win over it.

    Raises:
        ConfigError: what `Config.from_flat` raises, or an unreadable file.
        SystemExit: on `--help`, and on an unknown flag after naming the nearest one.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--model-path", argv[0]]
    for arg in argv:
        refuse_missing(arg.removeprefix("--").split("=")[0] if arg.startswith("--") else "")
    file_values = _take_file(argv)
    address = one_address({name: take(argv, f"--{name.replace('_', '-')}") for name in MASTER})
    own_fields = [] if own is None else _own_fields(own)
    fields = [*own_fields, *settings_fields(skip)]
    flat_class: Any = dataclasses.make_dataclass("Options", fields)
    checked = Config.from_flat(file_values).flat() if file_values else {}
    names = {name for name, _, _ in fields}
    default = flat_class(**{name: value for name, value in checked.items() if name in names})
    values = tyro.cli(
        flat_class,
        prog=f"phloem {command}",
        description=description + "\n\nThe model may also be given as the first argument; --config FILE reads YAML.",
        args=argv,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    settings = {name: getattr(values, name) for name, _, _ in settings_fields(skip)}
    mine = None if own is None else own(**{name: getattr(values, name) for name, _, _ in own_fields})
    if address and settings["dist_init_addr"] not in (None, address["dist_init_addr"]):
        raise ConfigError("dist_init_addr: not beside another --master-addr and --master-port", param="dist_init_addr")
    return Config.from_flat(read_environment({**checked, **settings, **address})), mine


def _own_fields(own: type[Any]) -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(own)
    return [
        (
            spec.name,
            Annotated[hints[spec.name], tyro.conf.arg(help=spec.metadata["help"])],
            dataclasses.field(default=spec.default),
        )
        for spec in dataclasses.fields(own)
    ]


def parse_own(command: str, argv: list[str], own: type[T], description: str = "", default: T | None = None) -> T:
    """For a command that starts no engine: its own options alone. `default`: where no flag says otherwise."""
    flat_class: Any = dataclasses.make_dataclass("Options", _own_fields(own))
    fields: tuple[Any, ...] = dataclasses.fields(own)  # pyright: ignore[reportArgumentType]
    values = tyro.cli(
        flat_class,
        prog=f"phloem {command}",
        description=description,
        args=argv,
        default=flat_class(**{spec.name: vars(own() if default is None else default)[spec.name] for spec in fields}),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return own(**{spec.name: getattr(values, spec.name) for spec in fields})


def _take_file(argv: list[str]) -> dict[str, Any]:
    path = take_config(argv)
    return {} if path is None else read_yaml(Path(path))


def take_config(argv: list[str]) -> str | None:
    """Remove `--config FILE` or `--config=FILE` from the arguments, and give that file."""
    return take(argv, "--config")


def take(argv: list[str], flag: str) -> str | None:
    """Remove a flag and its value from the arguments, and give the value."""
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if arg.startswith(f"{flag}="):
            del argv[i]
            return arg.removeprefix(f"{flag}=")
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings by flat name; names may be written with dashes.

    Raises:
        ConfigError: if the file cannot be read or is not a mapping.
    """
    import yaml  # few commands read one, and every start would wait for it

    try:
        values: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {path} is not UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration file {path} must map names to values")
    return {str(name): value for name, value in values.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def media_parts(images: tuple[str, ...], videos: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parts of a message: addresses as they are, files as their bytes in data URIs.

    Raises:
        BadRequest: a file cannot be read.
    """
    found = [("image", name, "image/png") for name in images] + [("video", name, "video/mp4") for name in videos]
    return [{"type": f"{kind}_url", f"{kind}_url": {"url": _url(name, usual)}} for kind, name, usual in found]


def _url(name: str, usual: str) -> str:
    if name.startswith(("http://", "https://", "data:")):
        return name
    try:
        data = base64.b64encode(Path(name).expanduser().read_bytes()).decode()
    except OSError as error:
        raise BadRequest(f"cannot read {name}: {error.strerror}") from None
    return f"data:{mimetypes.guess_type(name)[0] or usual};base64,{data}"
