"""Python files that return a configuration: --config=FILE or --config=FILE:ARGUMENT."""

import inspect
import pathlib
import runpy
import traceback

import ml_collections

_RIGHT = "it should return a training.config.default_config(), edited"


def load(file: str) -> ml_collections.ConfigDict:
    """Returns what get_config(), or get_config(ARGUMENT), of a Python file returns: for a training.

    Args:
      file: "PATH" or "PATH:ARGUMENT".

    Raises:
      ValueError: as `load_any`; or it is not a training configuration.
    """
    config = load_any(file)
    if not {"model", "data", "mesh"} <= set(config):
        raise ValueError(
            f"--config={file} is not a training configuration: its get_config() returned one of "
            f"{', '.join(config)}; {_RIGHT}"
        )
    return config


def load_any(file: str) -> ml_collections.ConfigDict:
    """Returns what get_config() returns, be it a training's or a paper's.

    Raises:
      ValueError: there is no such file, it is not Python, it or its get_config() raises, or that
        returns something else; names the file and, where there is one, the line.
    """
    # The file, run as a script.
    path, colon, argument = file.partition(":")
    if not pathlib.Path(path).is_file():
        assigned = f"; to set a key write --config.{file}" if "=" in file else ""
        there_is = f"{path!r} is a folder, and not a file with get_config()"
        if not pathlib.Path(path).is_dir():
            there_is = f"there is no file {path!r}"
        raise ValueError(f"--config={file}: {there_is}{assigned}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config={file}: {_told(error, path)}") from error

    # Its function, and whether it takes the argument.
    if "get_config" not in names:
        raise ValueError(f"--config={file}: {path} has no get_config(); {_RIGHT}")
    get_config = names["get_config"]
    place = f"{path}{_line_of(get_config)}"
    if not callable(get_config):
        raise ValueError(
            f"--config={file}: get_config in {path} is {get_config!r:.60}, not a function; {_RIGHT}"
        )
    arguments = [argument] if colon else []
    _check_arguments(file, place, get_config, arguments)

    # What it returns.
    try:
        config = get_config(*arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config={file}: {_told(error, path)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"--config={file}: get_config() at {place} returned {config!r:.60}, of type "
            f"{type(config).__name__}; {_RIGHT}"
        )
    return config


def _check_arguments(file: str, place: str, get_config, arguments: list[str]) -> None:
    """Raises ValueError if a function does not take what the command line gives it."""
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # a callable that does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = f"was given {arguments[0]!r}" if arguments else "was given nothing"
        raise ValueError(
            f"--config={file}: get_config{signature} at {place} {given}: {error}; write "
            f"--config=FILE, or --config=FILE:ARGUMENT if it takes one"
        ) from error


def _line_of(function) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else f", line {code.co_firstlineno}"


def _told(error: BaseException, path: str) -> str:
    """Says 'PATH, line 3: KeyError: ...', with the file's own last line in the traceback."""
    kind = type(error).__name__
    here = pathlib.Path(path).resolve()
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {kind}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == here]
    place = f"{path}, line {lines[-1]}" if lines else path
    return f"{place}: {kind}: {error}"
