"""Which backends exist: names to lazily imported, validated classes.

Every backend, a built-in as well as a third party's, is an entry point of the group
``xtrain.backends``::

    [project.entry-points."xtrain.backends"]
    mychip = "my_package.mychip:MyChip"

A checkout reads its own ``backends/entry_points.ini`` (the table from which the installer makes the
entry points), so it works without an install and never sees a stale one.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any, TypeVar

from xtrain.contract import Backend, Capabilities, Rule
from xtrain.errors import (
    BackendContractError,
    ConfigurationError,
    MissingDependencyError,
    UnknownBackendError,
    XTrainError,
    explain,
)
from xtrain.precision import PRECISIONS
from xtrain.sources import (
    DISTRIBUTION,
    RESERVED,
    contested,
    entry_points,
    is_built_in,
    package_of,
    taken,
    warn_of_namesake,
)

B = TypeVar("B", bound=type[Backend])

_registered: dict[str, type[Backend]] = {}
_validated: set[type[Backend]] = set()


# -------------------------------------------------------------------- lookup


def registered_backends() -> Mapping[str, str]:
    """Return every registered name with the place of its class, ``"module:Class"``, sorted by name.

    Nothing is imported. Aliases have the same place. A name that two packages offer is not among them.
    """
    places = {name: entries[0].value for name, entries in entry_points().items() if not contested(entries)}
    places |= {name: f"{cls.__module__}:{cls.__qualname__}" for name, cls in _registered.items()}
    return dict(sorted(places.items()))


def rejected_entry_points() -> dict[str, str]:
    """Return what is wrong with entry points whose name another package has, by ``name (distribution)``."""
    rejected = {}
    for name, entries in entry_points().items():
        for entry in entries if contested(entries) else entries[1:]:
            rejected[f"{name} ({package_of(entry)})"] = taken(name, entries)
    return rejected


def get_backend_class(name: str) -> type[Backend]:
    """Import and validate the backend registered as `name`.

    Raises:
        UnknownBackendError: nothing is registered under `name`.
        MissingDependencyError: the backend's module needs a package that is not installed.
        BackendContractError: the entry point leads to something that is not a valid backend, or breaks when it
            is imported, or two packages offer the name.
    """
    if name in _registered:
        return _registered[name]
    entries = entry_points().get(name)
    if entries is None:
        raise _unknown(name)
    if contested(entries):
        raise BackendContractError(taken(name, entries))
    entry = entries[0]
    try:
        return validate_backend(entry.load())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a package does, sys.exit too, is about that package alone
        if isinstance(error, ModuleNotFoundError) and error.name != entry.module:
            raise MissingDependencyError(_hint(entry, error)) from error
        expected = f"the entry point {name} = {entry.value} of {package_of(entry)} to be a backend's class"
        fix = f"pip uninstall {package_of(entry).split()[0]}, or a version of it that fits this xtrain"
        raise BackendContractError(explain(expected, f"{type(error).__name__}: {error}", fix)) from error


def make_backend(backend: str | Backend, options: Mapping[str, Any] | None = None) -> Backend:
    """Return a backend instance for ``Trainer(backend=..., backend_options=...)``.

    Args:
        backend: a registered name or a ready instance.
        options: keyword arguments of the backend's class; only together with a name.

    Raises:
        ConfigurationError: options beside an instance, an option the backend does not take, or a
            `backend` that is neither name nor instance.
        UnknownBackendError: nothing is registered under that name.
        MissingDependencyError: the backend's module needs a package that is not installed.
        BackendContractError: the class does not fulfil the contract.
    """
    warn_of_namesake()
    options = dict(options or {})
    if isinstance(backend, Backend):
        if options:
            fix = f"Trainer(backend={type(backend).__name__}({_as_arguments(options)}))"
            raise ConfigurationError(explain("no backend_options beside a backend instance", options, fix))
        validate_backend(type(backend))
        return backend
    if not isinstance(backend, str):
        raise _no_backend(backend)
    cls = get_backend_class(backend)
    _check_options(backend, cls, options)
    return cls(**options)


def third_party_backends() -> list[type[Backend]]:
    """Return the backends of other packages, and those registered in code; one that cannot be used is left out."""
    names = [name for name, entries in entry_points().items() if not is_built_in(entries[0])]
    found = list(_registered.values())
    for name in names:
        with suppress(XTrainError):  # `xtrain backends` tells what is wrong with it
            found.append(get_backend_class(name))
    return list(dict.fromkeys(found))


def check_backend(backend: Any) -> Any:
    """Return `backend`, which is None, a name, or an instance.

    Raises:
        ConfigurationError: for anything else, a class included.
    """
    if backend is None or isinstance(backend, str | Backend):
        return backend
    raise _no_backend(backend)


def register_backend(cls: B) -> B:
    """Register a backend class in code, under its ``name``; usable as a decorator.

    Packages should prefer an entry point: it costs no import until the backend is asked for.

    Raises:
        BackendContractError: `cls` does not fulfil the contract, or another class has its name.

    Example:
        >>> from xtrain_backends.eager import EagerBackend
        >>> @register_backend
        ... class Here(EagerBackend):
        ...     name, capabilities = "here", Capabilities(precisions=frozenset({"32-true"}))
        ...     available = classmethod(lambda cls: None)
        ...     launch = lambda self: None
        >>> Trainer("here").backend.name
        'here'
    """
    validate_backend(cls)
    place = f"{cls.__module__}:{cls.__qualname__}"
    taken = registered_backends().get(cls.name, place)
    if taken != place:
        raise BackendContractError(
            explain("a backend name that is still free", f"{cls.name!r}, taken by {taken}", f'name = "my_{cls.name}"')
        )
    _registered[cls.name] = cls
    return cls


# -------------------------------------------------------------------- validation


def validate_backend(cls: Any) -> type[Backend]:
    """Return `cls` if it fulfils `xtrain.contract.Backend`.

    Raises:
        BackendContractError: with everything that is wrong, signatures quoted.
    """
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendContractError(
            explain("a subclass of xtrain.contract.Backend", repr(cls), "class MyBackend(xtrain.contract.Backend): ...")
        )
    if cls in _validated:
        return cls
    problems = [*_missing_methods(cls), *_wrong_signatures(cls), *_wrong_facts(cls)]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise BackendContractError(f"{cls.__module__}.{cls.__qualname__} is not a valid backend:\n{lines}")
    _validated.add(cls)
    return cls


def _missing_methods(cls: type[Backend]) -> Iterator[str]:
    for name in sorted(cls.__abstractmethods__):
        yield f"Expected a method {_quote(Backend, name)}. Received: none."


def _wrong_signatures(cls: type[Backend]) -> Iterator[str]:
    for name, contract in vars(Backend).items():
        override = inspect.getattr_static(cls, name)
        if name.startswith("_") or not inspect.isroutine(contract) or override is contract:
            continue
        if not _agrees(getattr(cls, name), getattr(Backend, name)):
            yield f"Expected {_quote(Backend, name)}. Received: {_quote(cls, name)}."


def _agrees(override: Any, contract: Any) -> bool:
    """Whether every call that the contract allows means the same to `override`."""
    return callable(override) and _shape(override) == _shape(contract)


def _shape(function: Callable[..., Any]) -> list[tuple[str, Any, bool]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default is p.empty) for p in parameters]


def _quote(cls: type, name: str) -> str:
    """Return ``name(parameters)`` as a caller on an instance would write it, without annotations."""
    attribute = inspect.getattr_static(cls, name)
    if not inspect.isroutine(attribute):
        return f"{name} = {attribute!r}"
    signature = inspect.signature(getattr(cls, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    prefix = "classmethod " if isinstance(attribute, classmethod) else ""
    return f"{prefix}{name}{signature.replace(parameters=bare, return_annotation=signature.empty)}"


def _wrong_facts(cls: type[Backend]) -> Iterator[str]:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name or name != name.lower() or name in RESERVED:
        yield f"Expected name to be a lower-case str other than 'auto'. Received: {name!r}."
    if not isinstance(cls.rules, tuple) or not all(isinstance(rule, Rule) for rule in cls.rules):
        yield f"Expected rules to be a tuple of xtrain.contract.Rule. Received: {cls.rules!r}."
    capabilities = getattr(cls, "capabilities", None)
    if not isinstance(capabilities, Capabilities):
        yield f"Expected capabilities to be an xtrain.contract.Capabilities. Received: {capabilities!r}."
        return
    unknown = sorted(set(capabilities.precisions) - set(PRECISIONS))
    if unknown or not capabilities.precisions:
        yield f"Expected capabilities.precisions out of {', '.join(PRECISIONS)}. Received: {unknown or 'none'}."


# -------------------------------------------------------------------- messages


def _no_backend(backend: Any) -> ConfigurationError:
    expected = "a backend's name or an instance of xtrain.contract.Backend"
    made = f"{backend.__name__}()" if isinstance(backend, type) else "'cpu'"
    return ConfigurationError(explain(expected, repr(backend), f"Trainer(backend={made})"))


def _unknown(name: str) -> UnknownBackendError:
    known = list(registered_backends())
    closest = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    fix = f"Trainer(backend={(closest or ['auto'])[0]!r})"
    return UnknownBackendError(explain(f"a backend out of {', '.join(map(repr, known))}", repr(name), fix))


def _hint(entry: metadata.EntryPoint, error: ModuleNotFoundError) -> str:
    """Return what to install: the extra with the backend's name where there is one, else the package."""
    package = entry.dist.name if entry.dist is not None else DISTRIBUTION
    extras = entry.dist.metadata.get_all("Provides-Extra") or [] if entry.dist is not None else [entry.name]
    wanted = f"'{package}[{entry.name}]'" if entry.name in extras else (error.name or package).split(".")[0]
    return explain(
        f"the packages that backend {entry.name!r} needs to be installed",
        f"{error} (imported by {entry.value})",
        f"pip install {wanted}",
    )


def _check_options(name: str, cls: type[Backend], options: Mapping[str, Any]) -> None:
    signature = inspect.signature(cls)
    try:
        signature.bind(**options)
    except TypeError as error:
        accepted = ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values()) or "none"
        unknown = [option for option in options if option not in signature.parameters]
        closest = difflib.get_close_matches(unknown[0], signature.parameters, n=1) if unknown else []
        fix = f"backend_options={{{closest[0]!r}: ...}}" if closest else None
        raise ConfigurationError(
            explain(f"backend_options of {name!r} out of: {accepted}", f"{dict(options)} ({error})", fix)
        ) from error


def _as_arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
