# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Checks of the filter's place, and of the context that it finds there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cellmw.cli.doctor.findings import Finding, fail, ok, warn
from cellmw.cli.doctor.paste import Pipeline, Step
from cellmw.options import Settings

_DEFAULT_KEY = "cellmw.context"
_AUTHTOKEN = re.compile(r"\bauth_?token\b")
# nova.api.auth:NovaKeystoneContext.factory stores under nova.context, and so
# do those of cinder, manila and others that began as copies of it.
_KEYSTONE_CONTEXT = re.compile(r"(\w+)\..*KeystoneContext\b.*")


def _is_authtoken(step: Step) -> bool:
    return _AUTHTOKEN.search(f"{step.name} {step.factory}") is not None


def _makes_context(step: Step) -> bool:
    """Whether a filter looks as if it made the request's context."""
    return not step.ours and "context" in f"{step.name} {step.factory}".lower()


def _key_of(step: Step) -> str | None:
    """The environ key that a known filter keeps its context under."""
    found = _KEYSTONE_CONTEXT.fullmatch(step.factory or "")
    return f"{found[1]}.context" if found else None


def places(pipelines: Sequence[Pipeline]) -> Iterator[Finding]:
    """Where the filter stands in each pipeline."""
    with_ours = [pipeline for pipeline in pipelines if pipeline.ours]
    if not with_ours:
        yield fail(
            "pipelines",
            "no pipeline of the paste file has the filter",
            "add a section [filter:cellmw] with 'use = egg:cellmw', and put "
            "cellmw behind authtoken into the pipeline of the API",
        )
        return
    for pipeline in pipelines:
        check = f"pipeline {pipeline.name}"
        problems = list(_missing(check, pipeline))
        if pipeline.ours:
            problems += _place(check, pipeline)
            yield from problems or [_good(check, pipeline)]
            continue
        yield from problems
        if any(map(_is_authtoken, pipeline.steps)):
            yield warn(
                check,
                "it has authtoken and not the filter, so its requests are "
                "not given a cell's message queue",
                "add cellmw behind authtoken, unless its handlers send "
                "nothing to cells",
            )


def _good(check: str, pipeline: Pipeline) -> Finding:
    here = pipeline.ours[0]
    before = [
        step.name
        for step in pipeline.steps[:here]
        if _is_authtoken(step) or _makes_context(step)
    ]
    return ok(
        check,
        f"the filter stands once, after {' and '.join(before)} and before "
        f"{pipeline.steps[-1].name}",
    )


def _missing(check: str, pipeline: Pipeline) -> Iterator[Finding]:
    for step in pipeline.steps:
        if step.factory is None:
            yield fail(
                check,
                f"it names {step.name}, and the file has no such section",
                f"add the section [filter:{step.name}] or [app:{step.name}], "
                "or correct the name; the service does not start",
            )


def _place(check: str, pipeline: Pipeline) -> Iterator[Finding]:
    steps, first = pipeline.steps, pipeline.ours[0]
    if len(pipeline.ours) > 1:
        yield fail(
            check,
            f"the filter stands in it {len(pipeline.ours)} times",
            "leave the one behind authtoken and the filter that makes the "
            "request's context, and take out the others",
        )
    if pipeline.ours[-1] == len(steps) - 1:
        yield fail(
            check,
            "the filter stands at the end, where the application belongs",
            "put the application behind it",
        )
    later = steps[first + 1 :]
    for step in filter(_is_authtoken, later):
        yield fail(
            check,
            f"the filter stands before {step.name}: it looks up instances "
            "for clients that nobody has checked",
            f"put the filter behind {step.name}",
        )
    for step in filter(_makes_context, later):
        yield fail(
            check,
            f"the filter stands before {step.name}, which makes the "
            "request's context: handlers get a context without a cell, and "
            "their messages go to the default queue",
            f"put the filter behind {step.name}",
        )
    if not any(map(_is_authtoken, steps)):
        yield warn(
            check,
            "there is no authtoken in it, so no client's identity is checked",
            "put authtoken before the filter, unless the service checks its "
            "clients itself, as Nova's metadata API does",
        )


def context_key(
    pipeline: Pipeline, settings: Settings, others: Sequence[Pipeline]
) -> Iterator[Finding]:
    """Whether the filter looks for the context under the right key.

    :param settings: of the filter in this pipeline
    :param others: all pipelines of the file
    """
    check = f"context_key, pipeline {pipeline.name}"
    key = settings.context_key
    makers = [
        step
        for step in pipeline.steps[: pipeline.ours[0]]
        if _makes_context(step)
    ]
    known = {_key_of(step): step.name for step in makers if _key_of(step)}
    if known and key not in known:
        (right, name), *_ = known.items()
        yield fail(
            check,
            f"{name} keeps its context under {right}, and context_key is "
            f"{key}: the handlers' context gets no cell, and their messages "
            "go to the default queue",
            f"set context_key = {right} in the filter's section",
        )
    elif known:
        yield ok(check, f"it is {key}, where {known[key]} keeps its context")
    elif makers and key == _DEFAULT_KEY:
        yield warn(
            check,
            f"{makers[-1].name} seems to make a context of the service's own, "
            f"and context_key is {key}",
            "set context_key to the key of the environ under which that "
            "filter keeps its context",
        )
    elif makers or key == _DEFAULT_KEY or _is_made_elsewhere(key, others):
        maker = makers[-1].name if makers else "the filter itself"
        yield ok(check, f"it is {key}; {maker} makes the context")
    else:
        yield warn(
            check,
            f"it is {key}, but no filter before ours seems to make a "
            "context, so ours makes one and keeps it there",
            "put the filter behind the one that makes the context; if no "
            "filter makes one, remove the line context_key",
        )


def _is_made_elsewhere(key: str, others: Sequence[Pipeline]) -> bool:
    """Whether another pipeline has a filter that keeps its context there."""
    return any(_key_of(step) == key for one in others for step in one.steps)


def nova(pipeline: Pipeline, settings: Settings) -> Iterator[Finding]:
    """Whether Nova's handlers send through the filter."""
    if not (pipeline.steps[-1].factory or "").startswith("nova."):
        return
    if settings.mode == "observe" or settings.nova_cell_cache:
        return
    yield warn(
        f"nova_cell_cache, pipeline {pipeline.name}",
        "Nova's handlers target cells themselves, so the filter does nothing "
        "for their messages",
        "set nova_cell_cache = true in the filter's section, or mode = "
        "observe to try the filter first",
    )
