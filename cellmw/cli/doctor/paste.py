# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A service's paste file: its pipelines, and our filters in them.

PasteDeploy reads the file.  No other filter and no application is imported:
they need not be installed where the command runs, and may do anything.
"""

from __future__ import annotations

import configparser
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from paste.deploy import loadwsgi

from cellmw import configuration

# The names under which this package's filter can be loaded.
_OURS = re.compile(
    r"egg:cellmw(#(main|cellmw))?|(call:)?cellmw(\.deploy)?:filter_factory"
)
_FACTORIES = re.compile(r"paste\.\w+_factory|paste\.filter_app_factory")
_APPLICATIONS = ("app", "application", "composite", "composit", "pipeline")
_FILTERS = ("filter",)
# Sections that refer to each other in a circle end somewhere.
_DEEPEST = 20


class Unreadable(Exception):
    """The file, or a part of it, cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One element of a pipeline.

    :ivar name: as the pipeline names it
    :ivar factory: what makes it; None: the file has no such section
    :ivar ours: whether it is this package's filter
    """

    name: str
    factory: str | None
    ours: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Pipeline:
    """Filters in the order in which a request passes them, and what follows.

    :ivar name: its section, and the option in a composite
    """

    name: str
    steps: tuple[Step, ...]

    @property
    def ours(self) -> list[int]:
        """The places at which our filter stands."""
        return [n for n, step in enumerate(self.steps) if step.ours]


class PasteFile:
    """A paste file that can be read.

    :raises Unreadable: it cannot
    """

    def __init__(self, path: str) -> None:
        problem = ""
        try:
            self._loader = loadwsgi.ConfigLoader(path)
        except OSError as error:
            problem = f"it cannot be read ({type(error).__name__})"
        except UnicodeDecodeError:
            problem = "it is not text"
        except (configparser.Error, ValueError) as error:
            # The message quotes the line.
            lines = [number for number, _ in getattr(error, "errors", ())]
            number = getattr(error, "lineno", None) or next(iter(lines), None)
            where = f" at line {number}" if number else ""
            problem = f"it cannot be parsed{where} ({type(error).__name__})"
        if problem:
            raise Unreadable(problem)
        self._inner: set[str] = set()
        self._parser = self._loader.parser
        self._sections = {
            tuple(part.strip() for part in section.split(":", 1)): section
            for section in self._parser.sections()
            if ":" in section
        }

    def pipelines(self) -> Iterator[Pipeline]:
        """Each pipeline, and each list of filters in a composite.

        A pipeline at the end of another one is part of that one.

        :raises Unreadable: a value cannot be read
        """
        self._inner.clear()
        found: dict[str, list[Pipeline]] = {}
        for (kind, name), section in self._sections.items():
            found[section] = []
            if kind == "pipeline":
                found[section].append(Pipeline(name, self._chain(section)))
            elif kind == "filter-app" or (
                kind in _APPLICATIONS and self._option(section, "filter-with")
            ):
                found[section].append(Pipeline(section, self._chain(section)))
            if kind in ("composite", "composit"):
                found[section] += self._lists(name, section)
        for section, made in found.items():
            if section not in self._inner:
                yield from made

    def _lists(self, name: str, section: str) -> Iterator[Pipeline]:
        """The lists of filters that Nova and others keep in a composite."""
        for option in self._parser.options(section):
            words = self._option(section, option).split()
            if len(words) > 1 and self._find(_APPLICATIONS, words[-1]):
                yield Pipeline(f"{name}, {option}", self._steps(words, 0))

    def _chain(self, section: str, depth: int = 0) -> tuple[Step, ...]:
        kind = section.partition(":")[0].strip()
        words: list[str] = []
        if kind == "pipeline":
            words = self._option(section, "pipeline").split()
        elif kind == "filter-app":
            words = [self._option(section, "next")]
        chain = self._steps(words, depth)
        if kind != "pipeline":
            own = section.partition(":")[2].strip()
            chain = (self._made(own, section), *chain)
        around = self._option(section, "filter-with")
        return (*self._steps([around], depth), *chain) if around else chain

    def _steps(self, words: list[str], depth: int) -> tuple[Step, ...]:
        steps: list[Step] = []
        for number, word in enumerate(words, 1):
            is_last = number == len(words)
            kinds = (*_APPLICATIONS, "filter-app") if is_last else ()
            section = self._find((*kinds, *_FILTERS), word)
            if section is not None and depth < _DEEPEST:
                self._inner.add(section)
                steps += self._chain(section, depth + 1)
            else:
                is_uri = loadwsgi.ConfigLoader._absolute_re.search(word)
                factory = word if is_uri else None
                steps.append(_step(word, factory))
        return tuple(steps)

    def _made(self, name: str, section: str) -> Step:
        return _step(name, self._factory(section))

    def _factory(self, section: str) -> str:
        """What a section is made with, over other sections that it uses."""
        kind = section.partition(":")[0].strip()
        kinds = _APPLICATIONS if kind in _APPLICATIONS else _FILTERS
        for _ in range(_DEEPEST):
            use = self._option(section, "use")
            if not use:
                break
            other = self._find(kinds, use)
            if other is None:
                return use
            section = other
        for option in self._parser.options(section):
            if _FACTORIES.fullmatch(option):
                return self._option(section, option)
        return ""

    def _find(self, kinds: tuple[str, ...], name: str) -> str | None:
        found = (self._sections.get((kind, name)) for kind in kinds)
        return next(filter(None, found), None)

    def _option(self, section: str, name: str) -> str:
        if not self._parser.has_option(section, name):
            return ""
        try:
            return str(self._parser.get(section, name)).strip()
        except (configparser.Error, ValueError):
            pass  # the message quotes the value
        raise Unreadable(
            f"[{configuration.shown(section)}] "
            f"{configuration.shown(name)} has a % that stands for nothing; "
            "a % is written %%"
        )

    def given(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What Paste would give to one of our filters.

        :param name: as a pipeline names it
        :returns: ``[DEFAULT]``, and the filter's own options
        :raises Unreadable: Paste could not load the section
        """
        section = self._find(_FILTERS, name)
        around = self._find(("filter-app",), name) if not section else None
        own = {} if around is None else self._own(around)
        problem = ""
        try:
            use = own.pop("use", name)
            if around is not None and use == name:
                return self._parser.defaults(), own
            context = self._loader.get_context(loadwsgi.FILTER, use)
            # With a filter around it, ours is the inner one.
            context = getattr(context, "next_context", context)
            return context.global_conf, {**context.local_conf, **own}
        except (configparser.Error, ValueError):
            problem = "a value has a % that stands for nothing; write %%"
        except KeyError as error:
            problem = f"a line 'get' names {error}, which is set nowhere"
        except Exception as error:
            problem = f"Paste cannot load it ({type(error).__name__})"
        raise Unreadable(problem)

    def _own(self, section: str) -> dict[str, str]:
        """Options of a filter-app, which Paste loads with its application."""
        left_out = {"next", "filter-with", *self._parser.defaults()}
        return {
            option: self._option(section, option)
            for option in self._parser.options(section)
            if option not in left_out and not _FACTORIES.fullmatch(option)
        }


def _step(name: str, factory: str | None) -> Step:
    ours = factory is not None and _OURS.fullmatch(factory) is not None
    return Step(configuration.shown(name), factory, ours)
