# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Reading of configuration files, for the filter and for the commands.

What is wrong with a file is told without its content, which may be a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oslo_config import cfg, iniparser

from cellmw import options, redaction
from cellmw.exceptions import ConfigurationError

# The paste options that take several names.
_LISTS = {
    "oslo_config_file": "--config-file",
    "oslo_config_dir": "--config-dir",
}


class UnknownOption(NamedTuple):
    """An option in ``[cellmw]`` of a file that has no meaning there."""

    file: str
    name: str
    nearest: str


def read(
    arguments: Sequence[str] = (),
    *,
    project: str | None = None,
    program: str | None = None,
    where: str = "",
) -> cfg.ConfigOpts:
    """Read a configuration as oslo.config does.  Blocks as files do.

    :param arguments: ``--config-file=FILE`` and ``--config-dir=DIRECTORY``;
        a later one wins
    :param project: also its own files and directories are read: each kind
        of which no argument is given
    :param program: the same, for this name of a program
    :param where: what to begin an error with
    :raises ConfigurationError: a file cannot be read; names it and the line
    """
    conf = cfg.ConfigOpts()
    named = bool(project or program)
    problem = ""
    try:
        conf(
            list(arguments),
            project=project,
            prog=program,
            # oslo.config would look for some by the program's name.
            default_config_files=None if named else [],
            default_config_dirs=None if named else [],
            validate_default_values=True,
        )
    except cfg.ConfigFilesNotFoundError as error:
        problem = f"no such file: {shown(*error.config_files)}"
    except cfg.ConfigDirNotFoundError as error:
        problem = f"no such directory: {shown(error.config_dir)}"
    except cfg.ConfigFilesPermissionDeniedError as error:
        problem = f"no permission to read {shown(*error.config_files)}"
    except cfg.ConfigFileParseError as error:
        problem = _parse_problem(error)
    except UnicodeDecodeError:
        problem = _undecodable(arguments, project, program)
    except (cfg.Error, ValueError, OSError) as error:
        # Their messages may quote a line.
        name = getattr(error, "filename", None)
        what = f"{shown(str(name))} " if name else "it "
        problem = f"{what}cannot be read ({type(error).__name__})"
    if problem:
        raise ConfigurationError(f"{where}{problem}")
    return conf


def arguments_of(source: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments for :func:`read` that paste options stand for.

    :param source: of ``oslo_config_file`` and ``oslo_config_dir`` each takes
        several names, separated by commas or on lines of their own
    :raises ConfigurationError: a value is of another type
    """
    found: list[str] = []
    for name, argument in _LISTS.items():
        value = source.get(name) or ()
        names = re.split("[,\n]", value) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(one, str) for one in names
        ):
            raise ConfigurationError(
                f"cellmw: {name} has a bad value; accepted: names, separated "
                "by commas or on lines of their own"
            )
        found += [f"{argument}={one.strip()}" for one in names if one.strip()]
    return tuple(found)


def files_of(conf: cfg.ConfigOpts) -> list[str]:
    """The files that a configuration was read from, in their order."""
    try:
        files = list(conf.config_file or ())
    except cfg.Error:
        return []  # nothing was read so far
    return files + _files_in(conf.config_dirs or conf.default_config_dirs)


def _files_in(folders: Iterable[str]) -> list[str]:
    """What oslo.config reads in these directories, in its order."""
    return [
        str(file)
        for folder in folders
        for file in sorted(Path(folder).expanduser().glob("*.conf"))
        if not file.name.startswith(".")
    ]


def tell_files_of(conf: cfg.ConfigOpts) -> str:
    """The files that were read, as an error tells of them."""
    files = files_of(conf)
    return f"read: {shown(*files)}" if files else "no file was read"


def unknown_options(files: Iterable[str]) -> list[UnknownOption]:
    """What stands in ``[cellmw]`` of these files without a meaning."""
    known = [opt.name for opt in options.OPTS]
    found = []
    for file in files:
        sections: dict[str, dict[str, Any]] = {}
        try:
            path = str(Path(file).expanduser())
            cfg.ConfigParser(path, sections).parse()
        except (iniparser.ParseError, OSError, ValueError):
            continue  # changed since it was read
        for section, lines in sections.items():
            if section.lower() != options.GROUP:
                continue
            for name in lines.keys() - set(known):
                near = difflib.get_close_matches(name.lower(), known, 1, 0)
                found.append(UnknownOption(shown(file), shown(name), near[0]))
    return found


def shown(*values: str) -> str:
    """Names on one line, or a connection string in place of one."""
    # In a path that was made absolute, "://" has become ":/".
    hidden = [
        redaction.redact_url(value)
        if ":" in value and "@" in value
        else redaction.scrub(value)
        for value in values
    ]
    return redaction.one_line(", ".join(hidden))


def _parse_problem(error: cfg.ConfigFileParseError) -> str:
    file = shown(error.config_file)
    cause = error.__context__
    if isinstance(cause, iniparser.ParseError):
        return f"{file}, line {cause.lineno}: {cause.msg}"
    return f"{file} cannot be parsed"


def _undecodable(
    arguments: Sequence[str], project: str | None, program: str | None
) -> str:
    """Which file is not text, and from which line on."""
    files, folders = (
        [one.partition("=")[2] for one in arguments if one.startswith(option)]
        for option in _LISTS.values()
    )
    files = files or cfg.find_config_files(project, program)
    folders = folders or cfg.find_config_dirs(project, program)
    for file in files + _files_in(folders):
        data = Path(file).expanduser().read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            return f"{shown(file)}, line {line}: it is not UTF-8 text"
    return "a file is not text in the encoding of the locale"
